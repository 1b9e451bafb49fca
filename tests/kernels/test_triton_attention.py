"""Triton attention without a graphics card: what the interpreter computes, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.device import DType
from codegen.ops.grouped_query_attention import triton_kernel
from codegen.spec import GroupedQueryAttention
from tests.covering import covering
from tests.kernels.problems import (
    BIASED,
    CAUSAL,
    EVERYTHING,
    MULTI_QUERY,
    PLAIN,
    SINKS,
    TORCH,
    K,
    Operands,
    floor,
    operands,
    oracle,
)

pytest.importorskip("triton")

WEIGHTS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Softmax weights are rounded to the operands' format before they meet the values."""

Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def interpreted(triton_worker: Callable[..., Tensor]) -> Run:
    def run(spec: GroupedQueryAttention, x: Operands, *, arch: str = "sm_90", processors: int = 1) -> Tensor:
        operands = (x.q, x.k, x.v, x.bias, x.sinks)
        return triton_worker("attention", asdict(spec), operands, arch=arch, processors=processors)

    return run


def distance(spec: GroupedQueryAttention, x: Operands, output: Tensor) -> float:
    """The largest error in units of what rounding alone makes; infinite if NaNs are not where they should be."""
    found, right = output.double(), torch.from_numpy(oracle(spec, x))
    if found.shape != right.shape or not torch.equal(found.isnan(), right.isnan()):
        return float("inf")
    unit = torch.from_numpy(floor(spec, x, WEIGHTS[x.q.dtype]))
    return float(((found - right).nan_to_num().abs() / unit).max()) if found.numel() else 0.0


SPECS = {
    "plain": PLAIN, "causal": CAUSAL, "multi-query": MULTI_QUERY, "everything": EVERYTHING, "biased": BIASED,
    "sinks": SINKS, "group of 7": GroupedQueryAttention(7, 1, 20, 20, 0.2, causal=True),
    "softcap": GroupedQueryAttention(4, 2, 32, 32, 0.3, softcap=2.0, masked_rows_are_zero=True),
}  # fmt: skip


KINDS = {"prefill": (37, 37, 1), "decode": (1, 133, 8)}
"""Queries, keys and processors."""


@pytest.mark.parametrize(("problem", "dtype"), covering(tuple(product(SPECS, KINDS)), tuple(DType)))
def test_it_is_within_rounding_of_the_oracle(interpreted: Run, problem: tuple[str, str], dtype: DType) -> None:
    spec, (queries, keys, processors) = SPECS[problem[0]], KINDS[problem[1]]
    x = operands(spec, TORCH[dtype], 2, queries, keys)
    found = interpreted(spec, x, processors=processors)
    assert distance(spec, x, found) < K
    nudged = found.clone()
    nudged[0, -1, -1, -1] += 30 * WEIGHTS[x.q.dtype] * float(x.v.abs().max())
    assert distance(spec, x, nudged) > K, "the control: a small error in one number is seen"


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (1, 0), (3, 0), (1, 1), (2, 1), (65, 64), (130, 16), (5, 200)])
@pytest.mark.parametrize("processors", [1, 16])
def test_lengths_at_the_edges(interpreted: Run, queries: int, keys: int, processors: int) -> None:
    for spec in (replace(MULTI_QUERY, heads=4), EVERYTHING, replace(PLAIN, causal=True)):
        x = operands(spec, torch.float32, 1, queries, keys)
        assert distance(spec, x, interpreted(spec, x, processors=processors)) < K


@pytest.mark.parametrize("bias", ["additive", "per head", "boolean"])
def test_biases_broadcast_and_booleans_hide(interpreted: Run, bias: str) -> None:
    x = operands(BIASED, torch.float32, 2, 9, 40, bias=bias)
    found = interpreted(BIASED, x)
    assert distance(BIASED, x, found) < K
    assert x.bias is not None
    other = replace(x, bias=x.bias.roll(1, -1))
    assert distance(BIASED, other, found) > 100 * K, "the control: another mask gives other numbers"


@st.composite
def problems(draw: st.DrawFn) -> tuple[GroupedQueryAttention, DType, int, int, int]:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 32]))
    spec = GroupedQueryAttention(
        kv_heads * group,
        kv_heads,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.floats(0.01, 1.0)),
        causal=draw(st.booleans()),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 0.5, 30.0])),
        masked_rows_are_zero=draw(st.booleans()),
        sinks=draw(st.booleans()),
    )
    lengths = draw(st.integers(1, 20)), draw(st.integers(1, 70))
    return spec, draw(st.sampled_from(list(DType))), *lengths, draw(st.sampled_from([1, 16]))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_spec(interpreted: Run, problem: tuple[GroupedQueryAttention, DType, int, int, int]) -> None:
    spec, dtype, queries, keys, processors = problem
    x = operands(spec, TORCH[dtype], 1, queries, keys)
    assert distance(spec, x, interpreted(spec, x, processors=processors)) < K


def test_a_wrong_kernel_is_seen(interpreted: Run) -> None:
    """Another scale is another function; its result must not pass for this one's."""
    x = operands(CAUSAL, torch.bfloat16, 1, 12, 12)
    assert distance(CAUSAL, x, interpreted(replace(CAUSAL, scale=CAUSAL.scale * 1.1), x)) > K


def test_what_is_beyond_the_kernel_says_so() -> None:
    wide = replace(PLAIN, head_dim=320)
    assert "more than 256" in str(triton_kernel.legal(wide, DType.BFLOAT16))
    assert "more than 128" in str(triton_kernel.legal(replace(PLAIN, value_dim=160), DType.FLOAT32))
    assert triton_kernel.legal(PLAIN, DType.FLOAT32) is None
