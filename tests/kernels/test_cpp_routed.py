"""The C++ kernel of routed feed-forward blocks against the float64 oracle, on each instruction set that is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.activation import Activation
from codegen.device import DType, Isa, host
from codegen.errors import NoCompiler, NotLegal, UnsafeInput
from codegen.launch import feed_forward_op, operands, routed_host
from codegen.launch.feed_forward_op import conditional, mixture
from codegen.ops.routed_feed_forward import torch_body
from codegen.ops.routed_feed_forward.cpp_kernel import kernel_name, source
from codegen.routed import RoutedFeedForward, of_mixture
from tests.kernels.golden_source import require_golden
from tests.kernels.problems import TORCH, here
from tests.kernels.routed_problems import SPECS, K, Operands, distance, draw
from tests.kernels.test_render import HOSTILE
from tests.kernels.test_routed_operator import BRANCHES, MIXTURES, parameters_of

needs_kernels = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

Run = Callable[[RoutedFeedForward, Operands], Tensor]


def run(spec: RoutedFeedForward, x: Operands) -> Tensor:
    return routed_host.launch(spec, x.x, x.rows, x.weights, x.parameters, x.base)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Isa], None]:
    """Builds for another instruction set than the best one here."""

    def choose(isa: Isa) -> None:
        if isa not in here():
            pytest.skip(f"this processor has no {isa.value}")
        monkeypatch.setattr(operands, "host", lambda: replace(host(), arch=isa.value))

    return choose


@needs_kernels
@pytest.mark.parametrize(
    ("name", "dtype", "isa"),
    [
        ("experts", DType.FLOAT32, Isa.AVX512), ("experts", DType.BFLOAT16, Isa.AVX2),
        ("gated, odd widths", DType.FLOAT32, Isa.AVX2), ("gated, odd widths", DType.FLOAT16, Isa.AVX512),
        ("one place", DType.FLOAT32, Isa.AVX512), ("heavy branch", DType.FLOAT32, Isa.AVX512),
        ("heavy branch", DType.FLOAT16, Isa.AVX2),
    ],
    ids=lambda value: value if isinstance(value, str) else value.value,
)  # fmt: skip
def test_it_is_within_rounding_of_the_oracle(name: str, dtype: DType, isa: Isa, on: Callable[[Isa], None]) -> None:
    """Several tasks of places, few tokens, one, and none; one expert is empty."""
    on(isa)
    spec = SPECS[name]
    for tokens, places in ((300, 140), (70, 17), (1, 1), (0, 3), (3, 0)):
        x = draw(spec, TORCH[dtype], tokens, places, based=name in ("experts", "heavy branch"))
        assert distance(spec, x, run(spec, x)) < K, (tokens, places)
    x = draw(spec, TORCH[dtype], 70, 17)
    found = run(spec, x)
    assert distance(spec, replace(x, weights=x.weights * 1.05), found) > K, "the control: other weights"
    assert distance(spec, replace(x, rows=x.rows.flip(1)), found) > K, "the control: other tokens"


@needs_kernels
@pytest.mark.parametrize("kind", [Activation.TANH, Activation.QUICK_GELU], ids=lambda a: a.value)
def test_the_other_activations(kind: Activation) -> None:
    spec = RoutedFeedForward(16, 200, 1, kind, down_bias=True)
    x = draw(spec, torch.float32, 9, 7)
    assert distance(spec, x, run(spec, x)) < K
    assert distance(replace(spec, activation=Activation.SILU), x, run(spec, x)) > K, "the control"


@needs_kernels
def test_numbers_do_not_depend_on_threads() -> None:
    spec, threads = replace(SPECS["experts"], hidden=300, activation=Activation.RELU), torch.get_num_threads()
    x = draw(spec, torch.float32, 300, 140)
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(run(spec, x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert distance(spec, x, found[0]) < K


@needs_kernels
def test_what_is_refused() -> None:
    spec = SPECS["experts"]
    x = draw(spec, torch.float32, 9, 3)
    with pytest.raises(NotLegal, match="float64"):
        run(spec, replace(x, x=x.x.double()))
    with pytest.raises(ValueError, match="below 9"):
        run(spec, replace(x, rows=x.rows + 9))
    wide = RoutedFeedForward(9000, 1)
    with pytest.raises(NotLegal, match="8192"):
        run(wide, draw(wide, torch.float32, 2, 1))


@needs_kernels
def test_by_name_modules_call_it_and_train_by_torch() -> None:
    spec, x = MIXTURES["tokens choose, two each"], torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(2))
    held = {n: p.requires_grad_() for n, p in parameters_of(spec.shapes, torch.float32).items()}
    found, right = (mixture(spec, x, held, kernels=kernels).output for kernels in ("cpp", "off"))
    assert not torch.equal(found, right) and (found - right).abs().max() < 1e-5
    leaves = [held["router_weight"], held["up_weight"]]
    expected = torch.autograd.grad(right.sum(), leaves)
    for gradient, wanted in zip(torch.autograd.grad(found.sum(), leaves), expected, strict=True):
        assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max()


@needs_kernels
def test_auto_takes_it_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RoutedFeedForward] = []
    spec, x = replace(MIXTURES["experts choose"], hidden=64, expert_hidden=40), torch.randn(1, 9, 64)
    held = parameters_of(spec.shapes, torch.float32)

    def spy(own: RoutedFeedForward, *rest: Any) -> Tensor:
        seen.append(own)
        return torch_body.routed_feed_forward(own, *rest)

    monkeypatch.setattr(routed_host, "launch", spy)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        mixture(spec, x, held)
        assert not seen, "too small for what was measured"
        monkeypatch.setattr(feed_forward_op, "faster", lambda *_: True)
        mixture(spec, x, held)
        assert seen == [of_mixture(spec)]
        torch.set_num_threads(2)
        mixture(spec, x, held)
        assert len(seen) == 1, "there is no slice for a second thread"
        torch.set_num_threads(1)
        monkeypatch.setattr(routed_host, "launch", _without_a_compiler)
        found, right = (mixture(spec, x, held, kernels=kernels).output for kernels in ("auto", "off"))
        assert torch.equal(found, right), "without a compiler torch goes on"
    finally:
        torch.set_num_threads(threads)


def _without_a_compiler(*_: Any) -> Tensor:
    raise NoCompiler("there is none")


@needs_kernels
def test_a_heavy_branch_by_name() -> None:
    held, x = parameters_of(BRANCHES.shapes, torch.float32), torch.randn(2, 11, 12)
    found, right = (conditional(BRANCHES, x, held, kernels=kernels) for kernels in ("cpp", "off"))
    assert not torch.equal(found, right) and (found - right).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["experts", "gated, odd widths"])
def test_golden_source(name: str) -> None:
    dtype, isa = (DType.FLOAT32, Isa.AVX512) if name == "experts" else (DType.BFLOAT16, Isa.AVX2)
    require_golden(f"routed_{name.split(',')[0]}_{dtype.short}_{isa.value}.cpp", source(SPECS[name], dtype, isa))


@pytest.mark.parametrize(
    "change",
    [{"hidden": 40}, {"inner": 32}, {"experts": 4}, {"activation": Activation.SILU}, {"gated": True},
     {"up_bias": False}, {"down_bias": False}],
    ids=str,
)  # fmt: skip
def test_every_field_that_counts_changes_the_source_and_the_name(change: dict[str, object]) -> None:
    """Whether tokens have one place is the cards' concern: here results are added up where they belong in any case."""
    specs = (SPECS["experts"], replace(SPECS["experts"], **change))  # type: ignore[arg-type]
    names = [str(kernel_name(s, DType.FLOAT32, Isa.AVX2)) for s in specs]
    texts = [source(s, DType.FLOAT32, Isa.AVX2).replace(n, "NAME") for s, n in zip(specs, names, strict=True)]
    codes = [[line for line in text.splitlines() if not line.startswith("//")] for text in texts]
    assert names[0] != names[1] and codes[0] != codes[1]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["hidden", "activation", "gated"])
def test_nothing_but_numbers_flags_and_enums_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = replace(SPECS["experts"])
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.FLOAT32, Isa.AVX2)
