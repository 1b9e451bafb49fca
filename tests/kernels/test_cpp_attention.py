"""The C++ kernels against the float64 oracle, over specs, number formats, instruction sets, sizes and masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.device import DType, Isa
from codegen.spec import GroupedQueryAttention
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
    choice,
    distance,
    here,
    operands,
    run,
    variants,
)  # fmt: skip

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

SIZES = [(1, 1), (1, 63), (1, 64), (1, 700), (2, 2), (3, 130), (7, 7), (129, 129), (130, 40), (40, 190)]


def _name(value: object) -> str:
    if isinstance(value, GroupedQueryAttention):
        return f"{value.heads}on{value.kv_heads}d{value.head_dim}"
    return str(getattr(value, "value", value))


@pytest.mark.parametrize(("spec", "dtype", "isa"), variants(), ids=_name)
def test_every_variant_is_the_oracle(spec: GroupedQueryAttention, dtype: DType, isa: Isa) -> None:
    if isa not in here():
        pytest.skip(f"this processor has no {isa.value}")
    made = choice(spec, dtype, isa)
    for queries, keys in SIZES:
        for bias in ("additive", "per head", "boolean") if spec.bias else ("additive",):
            x = operands(spec, TORCH[dtype], 2, queries, keys, bias=bias, seed=queries + keys)
            assert distance(made, x) <= K, (queries, keys, bias)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([PLAIN, CAUSAL, MULTI_QUERY, EVERYTHING, BIASED, SINKS]),
    st.integers(0, 3),
    st.integers(0, 140),
    st.integers(0, 300),
    st.sampled_from(["additive", "per head", "boolean"]),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_any_size(
    spec: GroupedQueryAttention, batch: int, queries: int, keys: int, bias: str, threads: int, seed: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = operands(spec, torch.float32, batch, queries, keys, bias=bias, seed=seed)
        assert distance(choice(spec, DType.FLOAT32), x) <= K
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([PLAIN, EVERYTHING, BIASED]),
    st.integers(0, 70),
    st.integers(0, 300),
    st.sampled_from(["additive", "boolean"]),
    st.integers(0, 9),
)
def test_any_size_in_pairs(spec: GroupedQueryAttention, queries: int, keys: int, bias: str, seed: int) -> None:
    """Of bfloat16, where products take them: few rows and many are different code on matrix units."""
    x = operands(spec, torch.bfloat16, 1, queries, keys, bias=bias, seed=seed)
    assert distance(choice(spec, DType.BFLOAT16), x) <= K


@pytest.mark.parametrize("change", ["key", "last key", "order"])
def test_control_pairs_are_seen_to_be_perturbed(change: str) -> None:
    made = choice(CAUSAL, DType.BFLOAT16)
    x = operands(CAUSAL, torch.bfloat16, 1, 70, 70)
    output = run(made, x)
    assert distance(made, x, output) <= K
    k, v = x.k.clone(), x.v.clone()
    if change == "key":
        k[0, 0, 3] *= 1.5
    elif change == "last key":
        v[0, :, -1] = 0.0
    else:
        v[0, :, :2] = v[0, :, :2].flip(1)  # of a pair, the second for the first
    assert distance(made, Operands(x.q, k, v, None, None), output) > 3 * K


@pytest.mark.parametrize(
    "group",
    [pytest.param(g, marks=[] if g in (1, 3, 8, 32) else [pytest.mark.exhaustive]) for g in (*range(1, 9), 16, 32)],
)
def test_every_group_size(group: int) -> None:
    spec = GroupedQueryAttention(2 * group, 2, 8, 8, 0.35, causal=True)
    made = choice(spec, DType.FLOAT32)
    for queries, keys in ((1, 90), (5, 70), (33, 33)):
        assert distance(made, operands(spec, torch.float32, 2, queries, keys)) <= K


@pytest.mark.parametrize("change", ["scale", "causal", "key", "value", "last key", "group"])
def test_control_the_comparison_sees_a_perturbation(change: str) -> None:
    made = choice(CAUSAL, DType.FLOAT32)
    x = operands(CAUSAL, torch.float32, 1, 70, 70)
    output = run(made, x)
    assert distance(made, x, output) <= K
    k, v = x.k.clone(), x.v.clone()
    if change == "key":
        k[0, 0, 3, 0] += 1e-3
    elif change == "value":
        v[0, 0, 3, 0] += 1e-4
    elif change == "last key":
        v[0, :, -1] = 0.0
    elif change == "group":
        k = k.flip(1)
    elif change == "scale":
        made = replace(made, spec=replace(CAUSAL, scale=CAUSAL.scale * (1 + 1e-4)))
    else:
        made = replace(made, spec=replace(CAUSAL, causal=False))
    assert distance(made, Operands(x.q, k, v, None, None), output) > 3 * K


@pytest.mark.parametrize("dtype", list(DType))
def test_long_sums_keep_their_precision(dtype: DType) -> None:
    x = operands(PLAIN, TORCH[dtype], 1, 1, 20_000)
    assert distance(choice(PLAIN, dtype), x) <= K


def test_keys_split_over_threads_give_what_one_thread_gives() -> None:
    made = choice(MULTI_QUERY, DType.FLOAT32)
    x = operands(MULTI_QUERY, torch.float32, 1, 1, 5000)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append([run(made, x) for _ in range(3)])
            assert distance(made, x, outputs[-1][0]) <= K
            assert all(torch.equal(outputs[-1][0], again) for again in outputs[-1]), "a run differs from the next"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("zero", [True, False])
def test_rows_without_a_key_follow_the_spec(zero: bool) -> None:
    spec = replace(BIASED, masked_rows_are_zero=zero)
    x = operands(spec, torch.float32, 2, 5, 9, bias="additive")
    assert x.bias is not None
    x.bias[1, :, 3] = -torch.inf
    output = run(choice(spec, DType.FLOAT32), x)
    assert bool((output[1, :, 3] == 0).all()) is zero
    assert bool(output[1, :, 3].isnan().all()) is not zero
    assert output[0].isfinite().all()
    empty = operands(spec, torch.float32, 1, 3, 0)
    found = run(choice(spec, DType.FLOAT32), empty)
    assert (found == 0).all() and found.shape == (1, 4, 3, 40), "a sum over no keys is zero whatever the spec says"


def test_masks_of_the_lowest_finite_number_leave_the_mean() -> None:
    """Exporters hide keys so; a row that hides all of them is their mean, as softmax has it, and no NaN."""
    x = operands(BIASED, torch.float32, 1, 4, 70, bias="additive")
    assert x.bias is not None
    x.bias[:] = torch.finfo(torch.float32).min
    output = run(choice(BIASED, DType.FLOAT32), x)
    torch.testing.assert_close(output, x.v.mean(2, keepdim=True).expand_as(output), rtol=1e-5, atol=1e-6)


def test_a_nan_is_not_swallowed() -> None:
    x = operands(PLAIN, torch.float32, 1, 3, 100)
    x.k[0, 1, 77, 5] = torch.nan
    output = run(choice(PLAIN, DType.FLOAT32), x)
    assert output[:, 4:].isnan().all() and output[:, :4].isfinite().all()


def test_nothing_is_read_or_written_behind_the_operands() -> None:
    """Operands that end where their memory ends, with NaNs behind every token that is not theirs."""
    for spec in (EVERYTHING, SINKS, PLAIN):
        x = operands(spec, torch.float32, 1, 3, 67, bias="boolean")
        wide = [torch.full((*t.shape[:2], t.shape[2] + 5, t.shape[3] + 3), torch.nan) for t in (x.q, x.k, x.v)]
        parts = []
        for whole, part in zip(wide, (x.q, x.k, x.v), strict=True):
            view = whole[:, :, : part.shape[2], : part.shape[3]]
            view.copy_(part)
            parts.append(view)
        assert distance(choice(spec, DType.FLOAT32), Operands(parts[0], parts[1], parts[2], x.bias, x.sinks)) <= K
