"""Gated units, in attentions' and in feed-forward blocks' places, in graphs: as in the rewritten module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import rewriter
from rewriter.errors import NothingToRewrite, UnsupportedModel
from rewriter.install import fx_routed
from tests.targets.watched_mixes import relative
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

CLOSE = 2e-5


def program_of(case: ZooCase, axes: Any = Dim.AUTO) -> tuple[Any, dict[str, Any]]:
    inputs: dict[str, Any] = {**case.inputs(2, 30, 0)}
    free: dict[str, Any] = {name: {0: axes, 1: axes} for name in inputs}
    if case.causal:
        inputs["use_cache"], free["use_cache"] = False, None
    return torch.export.export(case.build(), (), inputs, dynamic_shapes=free, strict=False), inputs


def answer(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    found: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "program"),
    [
        ("bert-sdpa", "gau:pair", True),
        ("bert-sdpa", "flash:4,pair", False),
        ("gpt2-sdpa", "flash:4,pair", True),
        ("llama-gqa-sdpa", "flash-quad:pair", False),
    ],
)
def test_graphs_are_the_module(name: str, target: str, program: bool) -> None:
    """At any batch and length, in both kinds of graphs, causal or not."""
    case = ZOO[name]
    exported, inputs = program_of(case)
    graph: Any = exported if program else exported.module()
    done = rewriter.optimize(graph, target, example_inputs=inputs)
    assert isinstance(done, torch.export.ExportedProgram if program else torch.fx.GraphModule)
    first = case.inputs(2, 30, 0)
    module, original = rewriter.optimize(case.build(), target, example_inputs=first, kernels="off"), case.build()
    for batch, tokens in ((2, 30), (1, 7), (3, 61)):
        more = {**inputs, **case.inputs(batch, tokens, 5)}
        wanted = answer(module, more)
        assert relative(answer(done.module() if program else done, more), wanted) < CLOSE, (batch, tokens)
        assert relative(answer(original, more), wanted) > 1e-2  # the control
    ours, theirs = done.rewrite_report, module.rewrite_report
    assert ours.refused == () and len(ours.sites) == (4 if "pair" in target else 2)
    assert {(r.name, r.after, r.exact) for r in ours.sites} == {(r.name, r.after, r.exact) for r in theirs.sites}
    assert ours.parameters == theirs.parameters and ours.flops == theirs.flops


class Layer(torch.nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def test_tokens_may_come_first_and_numbers_be_short() -> None:
    x = torch.randn(2, 30, 16)
    found = {}
    for kind, limit in ((torch.float32, CLOSE), (torch.bfloat16, 3e-2)):
        for first in (True, False):
            model, given = Layer(first).train().to(kind), (x if first else x.transpose(0, 1)).to(kind)
            with torch.no_grad():
                done = rewriter.optimize(torch.export.export(model, (given,), strict=False), "flash:4,pair")
                answer = done.module()(given)
            assert [row.after for row in done.rewrite_report.sites] == ["flash:4", "flash:4"]
            assert answer.dtype is kind and answer.shape == given.shape
            found[first] = answer if first else answer.transpose(0, 1)
            assert relative(model(given), answer) > 1e-2  # the control
        assert relative(found[True], found[False]) < limit, kind


@pytest.mark.parametrize(
    ("target", "what"),
    [("gau", "the attention of"), ("gau:pair", r"what takes the place of encoder\.layer\.0\.feed_forward")],
)
def test_the_check_sees_what_is_written_otherwise(target: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the proof at installing: by the oracle at attentions, by the torch body at blocks."""
    real = fx_routed.copied

    def scaled(emitter: Any, like: Any, body: Any, operands: Any) -> Any:
        return emitter.call(like, torch.ops.aten.mul.Tensor, real(emitter, like, body, operands), 1.01)

    monkeypatch.setattr(fx_routed, "copied", scaled)
    program = torch.export.export(ZOO["bert-sdpa"].build(), (), ZOO["bert-sdpa"].inputs(2, 9, 0), strict=False)
    with pytest.raises(UnsupportedModel, match=what):
        rewriter.optimize(program, target)


class HandingOut(torch.nn.Module):
    """Keys and values beside the answer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def test_a_cache_of_the_graphs_own_is_refused_with_what_to_do() -> None:
    case = ZOO["gpt2-sdpa"]
    program = torch.export.export(HandingOut(case.build()).eval(), (), case.inputs(2, 9, 0), strict=False)
    with pytest.raises(NothingToRewrite, match="rewrite the module, or export without"):
        rewriter.optimize(program, "flash")
    plain, _ = program_of(case)
    for graph, offered in ((program, False), (plain, True)):
        names = {n for site in rewriter.inspect(graph).to_dict()["sites"] for n in site["targets"]}
        assert ({"gau", "flash-quad", "flash", "gau:pair"} <= names) is offered, names


@pytest.mark.slow
def test_a_graph_module_trains_its_units() -> None:
    program, inputs = program_of(ZOO["bert-sdpa"])
    graph = rewriter.optimize(program.module(), "flash:4,pair", example_inputs=inputs)
    out = graph(**{**inputs, **ZOO["bert-sdpa"].inputs(3, 41, 5)})
    out[0].square().sum().backward()
    learned = {n: p for n, p in graph.named_parameters() if n.endswith(("expand_weight", "distances", "scale"))}
    assert len(learned) == 12 and all(p.grad is not None and bool(p.grad.any()) for p in learned.values())


@pytest.mark.slow
def test_torch_compile_takes_them() -> None:
    case = ZOO["bert-sdpa"]
    model, inputs = case.build(), case.inputs(2, 9, 0)
    compiled = torch.compile(model, backend="rewriter", options={"target": "flash:4,pair", "backend": "eager"})
    module = rewriter.optimize(case.build(), "flash:4,pair", example_inputs=inputs, kernels="off")
    for size in ((2, 9, 0), (3, 14, 1)):
        more = case.inputs(*size)
        found = answer(compiled, more)
        assert relative(found, answer(module, more)) < CLOSE
        assert relative(found, answer(model, more)) > 1e-2  # the control
