"""Routed feed-forward blocks in Triton without a card: interpreted against the oracle, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codegen.activation import Activation
from codegen.device import Device, DType, Language
from codegen.errors import UnsafeInput
from codegen.launch.routed_triton import places_of_tokens
from codegen.ops.routed_feed_forward.triton_kernel import kernel_name, legal, signatures, source, tiling
from codegen.registry import select
from codegen.routed import RoutedFeedForward
from codegen.toolchain.triton_aot import Binary, compile_kernel
from tests.kernels.golden_source import require_golden
from tests.kernels.problems import TORCH
from tests.kernels.routed_problems import SPECS, K, Operands, distance, draw
from tests.kernels.test_render import HOSTILE
from tests.kernels.test_triton_binaries import SHARED

pytest.importorskip("triton")

Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def interpreted(triton_worker: Callable[..., Tensor]) -> Run:
    def run(spec: RoutedFeedForward, x: Operands) -> Tensor:
        described = asdict(spec) | {"activation": spec.activation.value}
        operands = (x.x, x.rows, x.weights, x.base, *(x.parameters[name] for name in spec.shapes))
        return triton_worker("routed", described, operands, arch="sm_90")

    return run


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.short)
@pytest.mark.parametrize("name", SPECS)
def test_it_is_within_rounding_of_the_oracle(interpreted: Run, name: str, dtype: DType) -> None:
    """One expert is empty, others have empty places; there is something to add to in half of the cases."""
    spec = SPECS[name]
    x = draw(spec, TORCH[dtype], 70, 17, based=name in ("experts", "heavy branch"))
    found = interpreted(spec, x)
    assert distance(spec, x, found) < K
    assert distance(spec, replace(x, weights=x.weights * 1.05), found) > K, "the control: other weights"
    taken = int(x.rows.max())
    moved = torch.where(x.rows == taken, next(n for n in range(70) if n not in x.rows), x.rows)
    assert distance(spec, replace(x, rows=moved), found) > K, "the control: another token"


@pytest.mark.parametrize("kind", [Activation.RELU, Activation.TANH, Activation.QUICK_GELU], ids=lambda a: a.value)
def test_the_other_activations(interpreted: Run, kind: Activation) -> None:
    spec = RoutedFeedForward(16, 16, 1, kind, once=True)
    x = draw(spec, torch.float32, 9, 7)
    found = interpreted(spec, x)
    assert distance(spec, x, found) < K
    assert distance(replace(spec, activation=Activation.SILU), x, found) > K, "the control"


def test_sizes_at_the_edges(interpreted: Run) -> None:
    """No token, no place, one of each, a second tile of places, and nothing but empty places."""
    spec, based = replace(SPECS["experts"], experts=2), SPECS["heavy branch"]
    for tokens, places in ((0, 3), (3, 0), (1, 1), (70, 66)):
        for own in (spec, based):
            x = draw(own, torch.float32, tokens, places, filled=1.0, based=own is based)
            assert distance(own, x, interpreted(own, x)) < K
    empty = replace(x, rows=torch.full_like(x.rows, -1))
    assert x.base is not None and torch.equal(interpreted(based, empty), x.base)


def test_where_each_token_stands() -> None:
    table = places_of_tokens(torch.tensor([[2, 0, -1], [-1, 2, 3]], dtype=torch.int32), 5)
    assert table.tolist() == [[1, -1], [-1, -1], [0, 4], [-1, 5], [-1, -1]]


def test_the_way_there() -> None:
    spec = SPECS["experts"]
    assert select(spec, Device("cuda", "sm_90"), DType.BFLOAT16, Language.TRITON) is not None
    assert select(spec, Device("hip", "gfx942"), DType.FLOAT32, Language.TRITON) is not None
    assert "numbers" in str(legal(replace(spec, hidden=1 << 16, inner=1 << 16), DType.BFLOAT16))


# ---------------------------------------------------------------------- binaries and sources

SPLIT = RoutedFeedForward(768, 192, 16, up_bias=True)
"""BERT's block cut in 16."""
BUILT = {
    "split block": (SPLIT, DType.BFLOAT16),
    "mixer": (RoutedFeedForward(512, 2048, 16, Activation.GELU, up_bias=True, down_bias=True), DType.FLOAT16),
    "heavy branch": (RoutedFeedForward(768, 2048, 1, gated=True, once=True), DType.BFLOAT16),
    "heavy branch, float32": (RoutedFeedForward(768, 2048, 1, gated=True, once=True), DType.FLOAT32),
}


def build(folder: Path, spec: RoutedFeedForward, dtype: DType, arch: str) -> dict[str, Binary]:
    """By the suffix of the kernel's name."""
    cut, kernel = tiling(spec, dtype, arch), str(kernel_name(spec, dtype, arch))
    path = folder / f"{kernel}.py"
    path.write_text(source(spec, dtype, arch))
    options = {"warps": cut.warps, "stages": cut.stages}
    return {s: compile_kernel(path, kernel + s, own, arch, **options) for s, own in signatures(spec, dtype).items()}


SOON = {
    ("split block", "sm_90"), ("mixer", "sm_80"), ("heavy branch", "sm_100"), ("heavy branch, float32", "gfx942"),
}  # fmt: skip
"""What is compiled in every run."""

PAIRS = [(name, arch) for name in BUILT for arch in SHARED]


@pytest.mark.parametrize(
    ("name", "arch"),
    [pytest.param(*p, marks=[] if p in SOON else pytest.mark.exhaustive, id=f"{p[0]}-{p[1]}") for p in PAIRS],
)
def test_binaries_fit_and_spill_nothing(tmp_path: Path, name: str, arch: str) -> None:
    for suffix, made in build(tmp_path, *BUILT[name], arch).items():
        found = made.resources
        assert (found.stack, found.spills) == (0, 0), (suffix, found)
        assert found.shared <= SHARED[arch], (suffix, found)
        assert (found.matrix > 0) == (suffix != "_sum") and found.vector_copies > 0, (suffix, found)


GOLDEN = {
    "routed_experts_f16_gfx942": ("experts", DType.FLOAT16, "gfx942"),
    "routed_gated_f32_sm_80": ("gated, odd widths", DType.FLOAT32, "sm_80"),
    "routed_heavy_branch_bf16_sm_90": ("heavy branch", DType.BFLOAT16, "sm_90"),
}


@pytest.mark.parametrize("file", GOLDEN)
def test_golden_source(file: str) -> None:
    name, dtype, arch = GOLDEN[file]
    require_golden(f"{file}.py.txt", source(SPECS[name], dtype, arch))


@pytest.mark.parametrize(
    "change",
    [{"hidden": 40}, {"inner": 32}, {"experts": 4}, {"activation": Activation.SILU}, {"gated": True},
     {"up_bias": False}, {"down_bias": False}, {"once": True}],
    ids=str,
)  # fmt: skip
def test_every_field_changes_the_source_and_the_name(change: dict[str, object]) -> None:
    specs = (SPECS["experts"], replace(SPECS["experts"], **change))  # type: ignore[arg-type]
    names = [str(kernel_name(s, DType.BFLOAT16, "sm_90")) for s in specs]
    texts = [source(s, DType.BFLOAT16, "sm_90").replace(n, "NAME") for s, n in zip(specs, names, strict=True)]
    codes = [[line for line in text.splitlines() if not line.startswith('"""')] for text in texts]
    assert names[0] != names[1] and codes[0] != codes[1]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["hidden", "experts", "activation", "gated", "once"])
def test_nothing_but_numbers_flags_and_enums_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = replace(SPECS["experts"])
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.BFLOAT16, "sm_90")
