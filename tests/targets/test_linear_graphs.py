"""Linear attention in exported programs and graph modules: as in the rewritten module, at any batch and length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim

import rewriter
from passes.targets import LinearHeads
from passes.targets.linear_attention import FeatureMap
from rewriter.errors import UnsupportedModel
from tests.targets.watched_mixes import relative
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

CLOSE = 2e-5
PROGRAMS = [
    pytest.param(ZOO["bert-sdpa"], LinearHeads(4), id="bert-learned"),
    pytest.param(ZOO["llama-sdpa"], LinearHeads(4, FeatureMap.FAVOR), id="llama-favor"),
]


def program_of(case: ZooCase) -> Any:
    """With hidden keys, and both dimensions open."""
    inputs: dict[str, Any] = {**case.inputs(2, 30, 0)}
    free: dict[str, Any] = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs}
    if "llama" in case.name:
        inputs["use_cache"], free["use_cache"] = False, None
    return torch.export.export(case.build(), (), inputs, dynamic_shapes=free, strict=False), inputs


@pytest.mark.parametrize(("case", "target"), PROGRAMS)
def test_a_program_is_the_module(case: ZooCase, target: LinearHeads) -> None:
    program, inputs = program_of(case)
    done = rewriter.optimize(program, target)
    model, original = rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 30, 0)), case.build()
    for batch, length, same in ((2, 8, True), (3, 61, False)):
        more = case.inputs(batch, length, 5)
        real = more["attention_mask"].bool()
        out = done.module()(**{**inputs, **more})
        found = (out.logits if hasattr(out, "logits") else out[0])[real]
        assert relative(found, case.run(model, more)[real]) < CLOSE, length
        apart = relative(found, case.run(original, more)[real])
        assert apart < CLOSE if same else apart > 1e-3  # the control
    report = done.rewrite_report
    assert [(row.after, row.exact) for row in report.sites] == [(target.name, False)] * 2
    assert report.kv_bytes_per_token.before == report.kv_bytes_per_token.after
    added = {name: t for name, t in done.state_dict.items() if ".linear_" in name}
    assert len(added) == 2 * len(target.spec(rewriter.inspect(program).sites[0]).shapes)
    assert report.parameters.after - report.parameters.before == sum(t.numel() for t in added.values())
    assert all(isinstance(t, torch.nn.Parameter) and t.requires_grad for t in added.values())


def test_a_graph_module_trains_its_features() -> None:
    case = ZOO["bert-sdpa"]
    program, inputs = program_of(case)
    graph = rewriter.optimize(program.module(), "linear:4", example_inputs=inputs)
    assert isinstance(graph, torch.fx.GraphModule)
    model = rewriter.optimize(case.build(), "linear:4", example_inputs=inputs)
    more = case.inputs(3, 41, 5)
    real = more["attention_mask"].bool()
    out = graph(**more)
    found = (out[0] if not hasattr(out, "last_hidden_state") else out.last_hidden_state)[real]
    assert relative(found, case.run(model, more)[real]) < CLOSE
    assert relative(found, case.run(case.build(), more)[real]) > 1e-3  # the control
    found.square().sum().backward()
    learned = {n: p for n, p in graph.named_parameters() if "linear_" in n}
    assert len(learned) == 6 and all(p.grad is not None and bool(p.grad.any()) for p in learned.values())


class Biased(torch.nn.Module):
    """Attention whose mask is an argument, with a row for each query."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: torch.Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


def test_other_masks_are_refused() -> None:
    x, ones = torch.randn(2, 20, 16), torch.ones(2, 1, 20, 20, dtype=torch.bool)
    for mask, reason in ((ones, "row for each query"), (torch.randn(2, 1, 20, 20), "bias")):
        program = torch.export.export(Biased().eval(), (x, mask))
        with pytest.raises(UnsupportedModel, match=reason):
            rewriter.optimize(program, "linear:4")
