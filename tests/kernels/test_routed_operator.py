"""Routed feed-forward blocks without a kernel at hand: the torch body, the operator's gradients, and who calls it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from codegen.activation import Activation
from codegen.conditional import ConditionalFeedForward, Router
from codegen.device import Device, DType, Language
from codegen.errors import NotLegal
from codegen.launch import feed_forward_op, routed_operator
from codegen.launch.feed_forward_op import conditional, mixture
from codegen.ops.conditional_feed_forward import reference as conditional_reference
from codegen.ops.mixture_of_experts import reference as mixture_reference
from codegen.ops.routed_feed_forward import reference, torch_body
from codegen.routed import RoutedFeedForward, of_heavy_branch, of_mixture
from codegen.spec import MixtureOfExperts, Routing
from codegen.tuning import routed as tuning
from rewriter.errors import UsageError
from rewriter.install import checkpoint_loading
from rewriter.install.conditional_block import ConditionalBlock
from rewriter.install.expert_mixer import ExpertMixer
from rewriter.install.kernel_choice import choose_kernels
from rewriter.kernels.emit import emit
from rewriter.kernels.needed import needs
from tests.kernels.routed_problems import SPECS, K, distance, draw

MIXTURES = {
    "experts choose": MixtureOfExperts(12, 20, 4, capacity_factor=2.0, min_capacity=1, group_limit=9, bias=True),
    "tokens choose, two each": MixtureOfExperts(
        12, 20, 4, Routing.TOKENS_CHOOSE, Activation.SILU, 0.7, 1, 9, selected=2, gated=True
    ),
    "tokens choose, one each": MixtureOfExperts(12, 20, 4, Routing.TOKENS_CHOOSE, capacity_factor=0.5, min_capacity=1),
}
BRANCHES = ConditionalFeedForward(12, 8, 20, Router(fraction=0.25), up_bias=True, down_bias=True)


@pytest.fixture
def by_torch() -> Iterator[list[RoutedFeedForward]]:
    """The operator with torch in the kernel's place, and the specs that it was called with."""
    seen: list[RoutedFeedForward] = []

    def called(spec: RoutedFeedForward, x: Tensor, rows: Tensor, *rest: Any, language: Language) -> Tensor:
        assert language is Language.TRITON
        seen.append(spec)
        reference.require_places(spec, x.shape[0], rows.numpy())
        return torch_body.routed_feed_forward(spec, x, rows, *rest)

    with mock.patch.object(feed_forward_op, "routed_feed_forward", called):
        yield seen


def parameters_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random).to(dtype) / shape[0] ** 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize("name", SPECS)
def test_the_torch_body_is_within_rounding_of_the_oracle(name: str) -> None:
    spec = SPECS[name]
    for tokens, places in ((70, 17), (1, 1), (0, 3), (3, 0)):
        x = draw(spec, torch.float32, tokens, places, based=name == "heavy branch")
        found = torch_body.routed_feed_forward(spec, x.x, x.rows, x.weights, x.parameters, x.base)
        assert distance(spec, x, found) < K
    x = draw(spec, torch.float32, 70, 17)
    found = torch_body.routed_feed_forward(spec, x.x, x.rows, x.weights, x.parameters)
    assert distance(spec, replace(x, weights=x.weights * 1.001), found) > K, "the control"


def test_the_oracle_says_what_contradicts_a_spec() -> None:
    spec = SPECS["one place"]
    x = draw(spec, torch.float64, 9, 2)
    given = {name: p.numpy() for name, p in x.parameters.items()}
    for rows, told in ((x.rows * 0, "two places"), (x.rows + 50, "tokens below 9"), (x.rows[:2], "shape")):
        with pytest.raises(ValueError, match=told):
            reference.routed_feed_forward(spec, x.x.numpy(), rows.numpy(), x.weights[: len(rows)].numpy(), **given)
    with pytest.raises(ValueError, match="up_weight"):
        reference.routed_feed_forward(replace(spec, inner=9), x.x.numpy(), x.rows.numpy(), x.weights.numpy(), **given)
    with pytest.raises(ValueError, match="at least 1"):
        RoutedFeedForward(4, 0)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_through_routed_blocks_is_the_oracles(by_torch: list[RoutedFeedForward], name: str) -> None:
    spec = MIXTURES[name]
    x, parameters = torch.randn(2, 9, 12, dtype=torch.float64), parameters_of(spec.shapes)
    found = mixture(spec, x, parameters, kernels="triton")
    right = mixture_reference.mixture_of_experts(spec, x.numpy(), **{n: p.numpy() for n, p in parameters.items()})
    assert by_torch == [of_mixture(spec)]
    assert np.abs(found.output.numpy() - right.output).max() < 1e-6  # weights are in single precision
    assert abs(float(found.balance) - right.balance) < 1e-9 and abs(float(found.z) - right.z) < 1e-9
    plain = mixture(spec, x, parameters, kernels="off")
    assert len(by_torch) == 1 and torch.equal(plain.left_behind, found.left_behind)
    assert float((plain.output - found.output).abs().max()) < 1e-6
    less = mixture(replace(spec, capacity_factor=0.25), x, parameters, kernels="triton")
    assert float((less.output - found.output).abs().max()) > 1e-3, "the control: other capacities"


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_heavy_branch_through_a_routed_block_is_the_oracles(by_torch: list[RoutedFeedForward], soft: bool) -> None:
    x, parameters = torch.randn(2, 11, 12, dtype=torch.float64), parameters_of(BRANCHES.shapes)
    shown = torch.ones(2, 11, dtype=torch.bool)
    shown[1, 2:] = False
    found = conditional(BRANCHES, x, parameters, shown, soft=soft, kernels="triton")
    given = {n: p.numpy() for n, p in parameters.items()}
    right = conditional_reference.conditional_feed_forward(BRANCHES, x.numpy(), shown.numpy(), soft=soft, **given)
    assert by_torch == [of_heavy_branch(BRANCHES)]
    assert np.abs(found.numpy() - right).max() < 1e-6
    other = conditional_reference.conditional_feed_forward(BRANCHES, x.numpy(), None, soft=soft, **given)
    assert np.abs(found.numpy() - other).max() > 1e-3, "the control: padding counts"


@pytest.mark.parametrize("name", ["gated, odd widths", "heavy branch"])
def test_gradients_are_those_of_the_torch_body(name: str) -> None:
    """Of what stands in for the kernel backward, beside numbers."""
    spec = replace(SPECS[name], hidden=4, inner=3)
    x = draw(spec, torch.float64, 5, 3, based=spec.once)
    given = [x.x, x.rows, x.weights.double(), x.base, *(x.parameters.get(n) for n in routed_operator.PARAMETERS)]
    place = list(Activation).index(spec.activation)

    def body(*leaves: Tensor) -> Tensor:
        rest = iter(leaves)
        operands = [t if t is None or not t.is_floating_point() else next(rest) for t in given]
        return routed_operator.by_torch(operands, place, spec.once)

    leaves = [t.clone().requires_grad_() for t in given if t is not None and t.is_floating_point()]
    assert torch.autograd.gradcheck(body, leaves, fast_mode=True)


def test_an_exported_program_holds_the_operator_only_where_it_is_asked_for() -> None:
    spec = MIXTURES["tokens choose, two each"]
    parameters = parameters_of(spec.shapes, torch.float32)

    class Blocks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = mixture(spec, x, parameters, kernels="triton").output
            return mixture(spec, found, parameters).output

    program = torch.export.export(Blocks(), (torch.randn(1, 9, 12),), strict=False)
    (call,) = [n for n in program.graph.nodes if "rewriter.routed_feed_forward" in str(n.target)]
    assert call.args[-3:] == (list(Activation).index(spec.activation), False, "triton")


def test_modules_are_told_which_kernels_to_call() -> None:
    spec = MIXTURES["experts choose"]
    experts = ExpertMixer(spec, {n: nn.Parameter(p) for n, p in parameters_of(spec.shapes, torch.float32).items()})
    held = {n: nn.Parameter(p) for n, p in parameters_of(BRANCHES.shapes, torch.float32).items()}
    model = nn.Sequential(experts, ConditionalBlock(BRANCHES, held, batch_first=True)).eval()
    x = torch.randn(1, 9, 12)
    with torch.no_grad():
        right = model(x)
        choose_kernels(model, "triton", (x,), {}, everywhere=False)
        with pytest.raises(NotLegal, match="no kernel for cpu"):
            model(x)
        with pytest.raises(UsageError, match="cannot reach"):
            choose_kernels(model, "cuda", (x,), {}, everywhere=False)
        assert torch.equal(model(x), right)
    with pytest.raises(NotLegal, match="no cuda kernel"):
        mixture(spec, x, dict(experts.named_parameters()), kernels="cuda")


def test_auto_takes_a_kernel_by_the_table_alone(by_torch: list[RoutedFeedForward], monkeypatch: Any) -> None:
    spec, x = MIXTURES["experts choose"], torch.randn(1, 9, 12)
    parameters = parameters_of(spec.shapes, torch.float32)
    own = of_mixture(spec)
    measured = tuning.Measured("float32", "sm_90", False, 4, 12, 20, 5, 1.5)

    def tables(*rows: tuning.Measured) -> None:
        monkeypatch.setattr(tuning, "measurements", lambda: rows)
        tuning.faster.cache_clear()

    tables()
    assert not tuning.faster(own, DType.FLOAT32, "sm_90", 5), "nothing was measured"
    tables(measured, replace(measured, places=4096, speedup=0.5))
    assert tuning.faster(own, DType.FLOAT32, "sm_90", 5)
    for dtype, arch, places in ((DType.FLOAT16, "sm_90", 5), (DType.FLOAT32, "sm_80", 5), (DType.FLOAT32, "sm_90", 1)):
        assert not tuning.faster(own, dtype, arch, places)
    assert not tuning.faster(own, DType.FLOAT32, "sm_90", 3000), "the nearest one was slower"
    assert not tuning.faster(replace(own, gated=True), DType.FLOAT32, "sm_90", 5)
    monkeypatch.setattr(feed_forward_op, "_device", lambda x: Device("cuda", "sm_90"))
    with torch.no_grad():
        mixture(spec, x, parameters)
        assert by_torch == [own]
    leaf = {**parameters, "up_weight": parameters["up_weight"].clone().requires_grad_()}
    mixture(spec, x, leaf)
    assert by_torch == [own], "training is torch's"
    monkeypatch.undo()
    tuning.faster.cache_clear()


def test_rewriter_kernels_writes_them(tmp_path: Path, monkeypatch: Any) -> None:
    """For a card and for a processor."""
    pytest.importorskip("triton")
    spec = MIXTURES["tokens choose, one each"]
    held = {n: nn.Parameter(p) for n, p in parameters_of(spec.shapes, torch.float32).items()}
    monkeypatch.setattr(checkpoint_loading, "load", lambda path: nn.Sequential(ExpertMixer(spec, held)))
    assert [need.spec for need in needs(tmp_path)] == [of_mixture(spec)]
    found = emit(tmp_path, tmp_path / "out", ["sm_90"])["kernels"]
    assert [kernel["name"].rpartition("_")[2] for kernel in found] == ["up", "down"]
    for kernel in found:
        assert kernel["spec"]["op"] == "RoutedFeedForward" and kernel["spec"]["activation"] == "gelu_tanh"
        assert kernel["name"].encode() in (tmp_path / "out" / kernel["binary"]).read_bytes()
        assert (kernel["resources"]["stack"], kernel["resources"]["spills"]) == (0, 0)
    (kernel,) = emit(tmp_path, tmp_path / "other", ["cpu:avx2"])["kernels"]
    assert kernel["isa"] == "avx2" and (tmp_path / "other" / kernel["binary"]).exists()
    assert "RoutedLaunch" in (tmp_path / "other" / kernel["source"]).read_text()
    assert kernel["resources"]["scratch_bytes"] < 1 << 20
