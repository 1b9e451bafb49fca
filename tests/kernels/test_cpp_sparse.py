"""The C++ kernel under sparse patterns against the float64 oracle, and that it leaves out what nobody sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.device import DType, Isa
from codegen.launch.torch_op import attention
from codegen.ops.grouped_query_attention import torch_body
from codegen.sight import as_numbers, from_numbers
from codegen.spec import GroupedQueryAttention
from tests.kernels.problems import SPARSE, TORCH, K, Operands, choice, distance, here, operands, run, sparse_variants

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

SIZES = [(1, 1), (1, 700), (3, 130), (7, 7), (130, 40), (40, 190), (300, 300)]


@pytest.mark.parametrize(("name", "dtype", "isa"), sparse_variants(), ids=lambda value: getattr(value, "value", value))
def test_every_pattern_is_the_oracle(name: str, dtype: DType, isa: Isa) -> None:
    if isa not in here():
        pytest.skip(f"this processor has no {isa.value}")
    spec = SPARSE[name]
    made = choice(spec, dtype, isa)
    for queries, keys in SIZES:
        for bias in ("additive", "boolean") if spec.bias else ("additive",):
            x = operands(spec, TORCH[dtype], 2, queries, keys, bias=bias, seed=queries + keys)
            assert distance(made, x) <= K, (queries, keys, bias)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["window", "strided", "three kinds by head", "all at once"]),
    st.integers(0, 2),
    st.integers(0, 140),
    st.integers(0, 300),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_any_size(name: str, batch: int, queries: int, keys: int, threads: int, seed: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = operands(SPARSE[name], torch.float32, batch, queries, keys, seed=seed)
        assert distance(choice(SPARSE[name], DType.FLOAT32), x) <= K
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("change", ["reach", "sinks", "a hidden key", "a key that is seen", "no pattern"])
def test_control_the_comparison_sees_a_change(change: str) -> None:
    spec = SPARSE["window"]
    made = choice(spec, DType.FLOAT32)
    x = operands(spec, torch.float32, 1, 90, 90)
    output = run(made, x)
    assert distance(made, x, output) <= K
    v = x.v.clone()
    if change == "a hidden key":
        v[0, :, 40, 0] += 1.0  # what the last queries do not see, those near to it do
        assert torch.equal(run(made, Operands(x.q, x.k, v, None, None))[:, :, 60:], output[:, :, 60:])
    elif change == "a key that is seen":
        v[0, :, 2, 0] += 1e-4
    else:
        (sight,) = spec.pattern
        other = {"reach": (replace(sight, reach=10),), "sinks": (replace(sight, sinks=2),), "no pattern": ()}[change]
        made = replace(made, spec=replace(spec, pattern=other))
    assert distance(made, Operands(x.q, x.k, v, None, None), output) > 3 * K


@pytest.mark.parametrize("name", ["window", "strided"])
def test_keys_that_no_query_sees_are_never_read(name: str) -> None:
    """NaNs in them would show: a weight of zero times NaN is NaN."""
    spec = SPARSE[name]
    x = operands(spec, torch.float32, 1, 4, 600)
    right = run(choice(spec, DType.FLOAT32), x)
    (sight,) = spec.pattern
    positions = torch.arange(600)
    far = (positions < 600 - sight.reach - 3) & (positions >= sight.sinks)
    if sight.strided:
        far &= ~torch.isin(positions % sight.stride, positions[-4:] % sight.stride)
    assert int(far.sum()) > 100
    x.k[:, :, far], x.v[:, :, far] = torch.nan, torch.nan
    assert torch.equal(run(choice(spec, DType.FLOAT32), x), right)


def test_keys_split_over_threads_give_what_one_thread_gives() -> None:
    spec = SPARSE["all at once"]
    made = choice(spec, DType.FLOAT32)
    x = operands(spec, torch.float32, 1, 1, 5000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert distance(made, x) <= K
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["window", "three kinds by head"])
def test_the_operator_is_the_torch_body_and_has_its_gradient(name: str) -> None:
    spec = SPARSE[name]
    x = operands(spec, torch.float32, 2, 60, 60)
    assert from_numbers(as_numbers(spec.pattern)) == spec.pattern
    found = []
    for kernels in ("cpp", "off"):
        q, k, v = (t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v))
        y = attention(spec, q, k, v, x.bias, kernels=kernels)
        y.square().sum().backward()
        found.append((y.detach(), q.grad, k.grad, v.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    full = torch_body.grouped_query_attention(replace(spec, pattern=()), x.q, x.k, x.v, x.bias)
    assert (full - found[0][0]).abs().max() > 1e-2  # the control


def test_a_compiled_module_calls_the_kernel_whatever_the_length() -> None:
    spec: GroupedQueryAttention = SPARSE["window"]

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(spec, q, k, v, kernels="cpp")

    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for length in (20, 33):
        x = operands(spec, torch.float32, 1, length, length)
        torch.testing.assert_close(compiled(x.q, x.k, x.v), run(choice(spec, DType.FLOAT32), x))
