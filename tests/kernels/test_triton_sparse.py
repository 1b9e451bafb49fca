"""Sparse attention in Triton without a graphics card: interpreted against the oracle, and compiled ahead of time."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.device import Device, DType, Language
from codegen.errors import NotLegal, UnsafeInput
from codegen.launch.torch_op import attention
from codegen.launch.triton_op import launch
from codegen.ops.grouped_query_attention import triton_sight
from codegen.ops.grouped_query_attention.triton_kernel import kernel_name, legal, source
from codegen.registry import select
from codegen.sight import Pattern, Sight, from_numbers
from codegen.spec import GroupedQueryAttention
from codegen.tuning.table import Problem, faster
from tests.covering import covering
from tests.kernels.golden_source import require_golden
from tests.kernels.problems import TORCH, K, operands
from tests.kernels.test_render import HOSTILE
from tests.kernels.test_triton_attention import Run, distance, interpreted
from tests.kernels.test_triton_binaries import KINDS, SHARED, build

pytest.importorskip("triton")

__all__ = ["interpreted"]  # a fixture

COLUMNS = Sight(block=16, period=16, first=13, last=16, ordered=True)
SHIFTED = tuple(replace(COLUMNS, first=13 - 3 * n, last=16 - 3 * n) for n in range(4))
ALL_AT_ONCE = Sight(reach=4, block=6, sinks=2, period=11, first=2, last=4, stride=9)
SPECS = {
    "window": GroupedQueryAttention(4, 2, 8, 8, 0.3, causal=True, pattern=(Sight(reach=9, sinks=3, ordered=True),)),
    "window, both ways": GroupedQueryAttention(4, 1, 20, 20, 0.3, pattern=(Sight(reach=9, sinks=3),)),
    "fixed": GroupedQueryAttention(32, 1, 16, 16, 0.3, causal=True, pattern=(COLUMNS,)),
    "fixed, both ways": GroupedQueryAttention(3, 3, 5, 7, 0.3, bias=True, pattern=(replace(COLUMNS, ordered=False),)),
    "by head": GroupedQueryAttention(6, 2, 8, 8, 0.3, causal=True, pattern=SHIFTED),
    "by head, both ways": GroupedQueryAttention(
        6, 2, 8, 8, 0.3, sinks=True, pattern=tuple(replace(s, ordered=False) for s in SHIFTED)
    ),
    "strided": GroupedQueryAttention(4, 2, 33, 17, 0.3, causal=True, pattern=(Sight(reach=7, stride=6, ordered=True),)),
    "strided by head": GroupedQueryAttention(
        4, 2, 8, 8, 0.3, softcap=3.0, pattern=(Sight(reach=7, ordered=True), Sight(stride=6, ordered=True))
    ),
    "all at once": GroupedQueryAttention(
        4, 2, 8, 8, 0.3, bias=True, masked_rows_are_zero=True, pattern=(ALL_AT_ONCE,)
    ),
    "both ways, but causal": GroupedQueryAttention(2, 2, 8, 8, 0.3, causal=True, pattern=(ALL_AT_ONCE,)),
}  # fmt: skip


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("queries", "keys", "processors"), [(75, 75, 1), (1, 133, 8)], ids=["prefill", "decode"])
def test_it_is_within_rounding_of_the_oracle(
    interpreted: Run, name: str, queries: int, keys: int, processors: int
) -> None:
    spec, dtype = SPECS[name], list(DType)[list(SPECS).index(name) % 3]
    x = operands(spec, TORCH[dtype], 1, queries, keys)
    found = interpreted(spec, x, processors=processors)
    assert distance(spec, x, found) < K
    assert distance(replace(spec, pattern=()), x, found) > K, "the control: a result of all keys is another"


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (1, 1), (7, 7), (64, 65), (5, 200)])
@pytest.mark.parametrize("processors", [1, 16])
def test_lengths_at_the_edges(interpreted: Run, queries: int, keys: int, processors: int) -> None:
    for name in ("window, both ways", "all at once"):
        x = operands(SPECS[name], torch.float32, 1, queries, keys)
        assert distance(SPECS[name], x, interpreted(SPECS[name], x, processors=processors)) < K, name


@st.composite
def sights(draw: st.DrawFn) -> Sight:
    period = draw(st.integers(1, 40))
    last = draw(st.integers(0, period))
    return Sight(
        reach=draw(st.integers(1, 30)),
        block=draw(st.sampled_from([1, 3, 16, 500])),
        sinks=draw(st.sampled_from([0, 1, 5, 90])),
        period=period,
        first=draw(st.integers(0, last)),
        last=last,
        stride=draw(st.sampled_from([2**31 - 1, 1, 7])),
    )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(sights(), min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(1, 3),
    st.integers(1, 20), st.integers(0, 60),
)  # fmt: skip
def test_any_pattern(
    interpreted: Run, pattern: list[Sight], ordered: bool, causal: bool, kv_heads: int, queries: int, before: int
) -> None:
    seen: Pattern = tuple(replace(s, ordered=ordered) for s in pattern)
    spec = GroupedQueryAttention(2 * kv_heads, kv_heads, 8, 8, 0.4, causal=causal, pattern=seen)
    x = operands(spec, torch.float32, 1, queries, queries + before)
    assert distance(spec, x, interpreted(spec, x, processors=1)) < K


# ---------------------------------------------------------------------- work


@pytest.mark.parametrize("name", ["window", "fixed", "by head"])
def test_keys_that_no_row_of_a_tile_sees_are_not_read(interpreted: Run, name: str) -> None:
    """Weights of zero would not hide a value that is not a number; only keys that are left out do."""
    spec = SPECS[name]
    x = operands(spec, torch.float32, 1, 5, 300)
    near = 300 - 5 - max(s.reach + s.block for s in spec.pattern)
    unseen = [j for j in range(near) if not any(j < s.sinks or s.first <= j % s.period < s.last for s in spec.pattern)]
    assert len(unseen) > 50
    holes = replace(x, v=x.v.clone())
    holes.v[:, :, unseen] = torch.nan
    assert torch.equal(interpreted(spec, holes), interpreted(spec, x))
    assert bool(interpreted(replace(spec, pattern=()), holes).isnan().any()), "the control"


def test_work_grows_with_the_length_or_with_its_root_beside() -> None:
    def most(sight: Sight, tokens: int) -> int:
        spec = GroupedQueryAttention(8, 8, 64, 64, 0.125, pattern=(sight,))
        return triton_sight.most_keys(spec, 64, tokens, tokens)

    window = Sight(reach=128, sinks=4, ordered=True)
    assert most(window, 4096) == most(window, 65536) < 512
    for root in (64, 128, 256):
        fixed = Sight(block=root, period=root, first=root - 8, last=root, ordered=True)
        assert most(fixed, root**2) <= 8 * root + 2 * root + 128
    assert most(Sight(reach=5, stride=64, ordered=True), 4096) == 4096, "strides are masked, not skipped"


# ---------------------------------------------------------------------- the way there


def test_cards_take_patterns_and_auto_takes_what_was_measured() -> None:
    spec = replace(SPECS["fixed"], head_dim=64, value_dim=64)
    assert select(spec, Device("cuda", "sm_90"), DType.BFLOAT16, Language.TRITON) is not None
    for arch in ("sm_90", "gfx942"):
        assert not faster(spec, DType.BFLOAT16, arch, Problem(1, 8192, 8192, 1))
    mixed = replace(spec, pattern=(COLUMNS, replace(COLUMNS, ordered=False)))
    assert "ordered" in str(legal(mixed, DType.BFLOAT16))
    x = operands(spec, torch.float32, 1, 6, 5)
    with pytest.raises(NotLegal, match="6 queries are not the last of 5 keys"):
        launch(spec, x.q, x.k, x.v, arch="sm_90", processors=1)


def test_an_exported_program_holds_the_operator_with_its_pattern() -> None:
    spec = SPECS["by head"]

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(spec, q, k, v, kernels="triton")

    x = operands(spec, torch.float32, 1, 20, 20)
    program = torch.export.export(Attend(), (x.q, x.k, x.v), strict=False)
    (call,) = [n for n in program.graph.nodes if "grouped_query_attention" in str(n.target)]
    assert from_numbers(next(a for a in call.args if isinstance(a, list))) == spec.pattern


# ---------------------------------------------------------------------- binaries and sources

FIXED = Sight(block=128, period=128, first=120, last=128, ordered=True)
BUILT: dict[str, tuple[GroupedQueryAttention, DType]] = {
    "fixed": (GroupedQueryAttention(32, 8, 128, 128, 0.088, causal=True, pattern=(FIXED,)), DType.BFLOAT16),
    "fixed, both ways": (
        GroupedQueryAttention(12, 12, 64, 64, 0.125, pattern=(replace(FIXED, ordered=False),)), DType.FLOAT16,
    ),
    "window": (
        GroupedQueryAttention(16, 2, 256, 256, 0.06, causal=True, softcap=50.0,
                              pattern=(Sight(reach=128, sinks=4, ordered=True),)), DType.BFLOAT16,
    ),
    "strided, float32": (
        GroupedQueryAttention(32, 8, 128, 128, 0.088, pattern=(Sight(reach=129, stride=128, ordered=True),)),
        DType.FLOAT32,
    ),
}  # fmt: skip
CUDA_ONLY: dict[str, tuple[GroupedQueryAttention, DType]] = {
    "biased": (replace(BUILT["fixed, both ways"][0], bias=True), DType.FLOAT16),
    "by head": (
        GroupedQueryAttention(
            32, 8, 64, 64, 0.125, pattern=tuple(replace(FIXED, first=120 - 8 * n, last=128 - 8 * n) for n in range(16))
        ),
        DType.BFLOAT16,
    ),
}  # fmt: skip
"""On gfx942 some of their scalar registers go to vector registers; nothing goes to memory there either."""


@pytest.mark.parametrize(("name", "arch", "kind"), covering(tuple(BUILT | CUDA_ONLY), tuple(SHARED), tuple(KINDS)))
def test_binaries_fit_and_spill_nothing(tmp_path: Path, name: str, arch: str, kind: str) -> None:
    spec, dtype = (BUILT | CUDA_ONLY)[name]
    found = build(tmp_path, spec, dtype, arch, KINDS[kind]).resources
    assert found.stack == 0, found
    assert found.spills == 0 or (name in CUDA_ONLY and arch == "gfx942"), found
    assert found.shared <= SHARED[arch] and found.matrix > 0 and found.vector_copies > 0, found


GOLDEN = {
    "window_bf16_sm_90": (SPECS["window"], DType.BFLOAT16, "sm_90"),
    "fixed_by_head_f16_sm_80": (SPECS["by head, both ways"], DType.FLOAT16, "sm_80"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_source(name: str) -> None:
    require_golden(f"{name}.py.txt", source(*GOLDEN[name]))


@pytest.mark.parametrize("field", [f.name for f in fields(Sight)])
def test_every_number_of_a_pattern_changes_the_source_and_the_name(field: str) -> None:
    spec = SPECS["all at once"]
    changed = not ALL_AT_ONCE.ordered if field == "ordered" else getattr(ALL_AT_ONCE, field) + 1
    texts = []
    for sight in (ALL_AT_ONCE, replace(ALL_AT_ONCE, **{field: changed})):
        other = replace(spec, pattern=(sight,))
        name = str(kernel_name(other, DType.FLOAT32, "sm_80"))
        texts.append((name, source(other, DType.FLOAT32, "sm_80").replace(name, "NAME")))
    assert texts[0][0] != texts[1][0] and texts[0][1] != texts[1][1]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["reach", "sinks", "ordered"])
def test_nothing_but_numbers_comes_through_a_pattern(field: str, hostile: object) -> None:
    sight = Sight(reach=3)
    object.__setattr__(sight, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(replace(SPECS["window"], pattern=(sight,)), DType.FLOAT32, "sm_90")
