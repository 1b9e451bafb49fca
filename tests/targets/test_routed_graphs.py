"""Experts, and light and heavy branches, in exported programs and graph modules: as in the rewritten module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import rewriter
from codegen.ops.mixture_of_experts.torch_body import mixture_of_experts
from codegen.spec import MixtureOfExperts, Routing
from passes.targets import Colt5, ConditionalBlocks, ConditionalHeads, Experts, LinearMixer, SparseMixer
from rewriter.errors import UnsupportedModel
from rewriter.install import fx_routed
from rewriter.install.fx_spec_body import spec_body
from tests.targets.watched_mixes import relative
from tests.zoo.models import ZOO

CLOSE = 2e-5


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, relative_attention_num_buckets=8,
        relative_attention_max_distance=16, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    return model


def given(batch: int, tokens: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 19, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def program_of(model: Any, inputs: Mapping[str, Tensor], axes: Any = Dim.AUTO) -> Any:
    free = {name: {0: axes, 1: axes} for name in inputs}
    return torch.export.export(model, (), dict(inputs), dynamic_shapes=free, strict=False)


def states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    found: Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    return found[inputs["attention_mask"].bool()]


EXPERTS = SparseMixer(mixing=LinearMixer(keep=1), blocks=Experts(4, 0.5))
ASKED = SparseMixer(mixing=LinearMixer(keep=1), blocks=Experts(4, 0.5, routing=Routing.TOKENS_CHOOSE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "target", "after", "program"),
    [
        pytest.param(ZOO["bert-sdpa"].build, "colt5:4", {"colt5:4"}, False, id="bert-colt5"),
        pytest.param(t5, "colt5:4", {"colt5:4"}, True, id="t5-colt5"),
        pytest.param(ZOO["bert-sdpa"].build, EXPERTS, {"linear-mixer", "mha4", "moe4"}, True, id="bert-experts"),
        pytest.param(ZOO["bert-sdpa"].build, ASKED, {"linear-mixer", "mha4", "moe4"}, False, id="bert-experts-asked"),
    ],
)
def test_graphs_are_the_module(build: Any, target: Any, after: set[str], program: bool) -> None:
    """At any batch and length, in both kinds of graphs."""
    first = given(2, 30, 0)
    exported = program_of(build(), first)
    graph: Any = exported if program else exported.module()
    done = rewriter.optimize(graph, target, example_inputs=first)
    assert isinstance(done, torch.export.ExportedProgram if program else torch.fx.GraphModule)
    module, original = rewriter.optimize(build(), target, example_inputs=first, kernels="off"), build()
    for batch, tokens in ((2, 30), (1, 7), (3, 61)):
        more = given(batch, tokens, 5)
        wanted = states(module, more)
        assert relative(states(done.module() if program else done, more), wanted) < CLOSE, (batch, tokens)
        assert relative(states(original, more), wanted) > 1e-2  # the control
    ours, theirs = done.rewrite_report, module.rewrite_report
    assert {row.after for row in ours.sites} == after and ours.refused == ()
    assert [(r.name, r.after, r.exact) for r in ours.sites] == [(r.name, r.after, r.exact) for r in theirs.sites]
    assert ours.parameters == theirs.parameters and ours.flops == theirs.flops
    assert all((fx_routed.ONE_GROUP in r.notes) is (r.after == "moe4") for r in ours.sites)


class SequenceFirst(torch.nn.Module):
    """Blocks that no module computes, tokens before batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        found: Tensor = self.layer(x, src_key_padding_mask=hidden)
        return found


@pytest.mark.slow
def test_tokens_may_come_first() -> None:
    """Where the module door finds no module. With every token routed it is the original."""
    model, x = SequenceFirst().train(), torch.randn(30, 2, 16)
    hidden = torch.zeros(2, 30, dtype=torch.bool)
    hidden[1, 20:] = True
    with torch.no_grad():
        program = torch.export.export(model, (x, hidden), strict=False)
    shown = ~hidden.T
    wanted = program.module()(x, hidden)[shown].detach()
    for fraction, same in ((1.0, True), (0.25, False)):
        target = Colt5(ConditionalHeads(fraction=fraction, radius=30), ConditionalBlocks(fraction=fraction))
        done = rewriter.optimize(program, target)
        assert [row.after for row in done.rewrite_report.sites] == ["colt5", "colt5"]
        found = done.module()(x, hidden)[shown].detach()
        assert (relative(found, wanted) < CLOSE) is same


def test_the_check_sees_what_is_written_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the proof at installing."""
    real = fx_routed.copied

    def scaled(emitter: Any, like: Any, body: Any, operands: Any) -> Any:
        return emitter.call(like, torch.ops.aten.mul.Tensor, real(emitter, like, body, operands), 1.01)

    monkeypatch.setattr(fx_routed, "copied", scaled)
    program = torch.export.export(ZOO["bert-sdpa"].build(), (), given(2, 9, 0), strict=False)
    with pytest.raises(UnsupportedModel, match=r"what takes the place of encoder\.layer\.0"):
        rewriter.optimize(program, "colt5:4")


def test_graphs_of_fixed_sizes_have_as_many_groups_as_modules() -> None:
    """Rows of open ones say that all tokens are one group (above)."""
    first, target = given(2, 9, 0), SparseMixer(mixing=LinearMixer(keep=1), blocks=Experts(4, 0.5))
    done = rewriter.optimize(program_of(ZOO["bert-sdpa"].build(), first, Dim.STATIC), target)
    assert not any(fx_routed.ONE_GROUP in row.notes for row in done.rewrite_report.sites)
    spec = replace(MixtureOfExperts(4, 6, 3), group_limit=8)
    x, held = torch.randn(2, 9, 4), tuple(torch.randn(shape) for shape in spec.shapes.values())
    body = spec_body(spec, torch.float32, (2, 9), False)
    found = torch.fx.Interpreter(body).run(x, *held, None, None, enable_io_processing=False)[0]
    parameters = dict(zip(spec.shapes, held, strict=True))
    assert torch.allclose(found, mixture_of_experts(spec, x, **parameters), atol=1e-6)
    assert not torch.allclose(found, mixture_of_experts(replace(spec, group_limit=99), x, **parameters), atol=1e-3)


@pytest.mark.slow
def test_torch_compile_takes_them() -> None:
    case = ZOO["bert-sdpa"]
    model, inputs = case.build(), given(2, 9, 0)
    compiled = torch.compile(model, backend="rewriter", options={"target": "colt5:4", "backend": "eager"})
    with torch.no_grad():
        found = compiled(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    module = rewriter.optimize(case.build(), "colt5:4", example_inputs=inputs, kernels="off")
    assert relative(found, states(module, inputs)) < CLOSE
    assert relative(found, states(model, inputs)) > 1e-2  # the control
