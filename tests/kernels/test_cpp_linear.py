"""The C++ kernel of linear attention against the float64 oracle, and which calls it computes."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegen.device import DType, Isa, host
from codegen.errors import NotLegal
from codegen.launch import linear_host, linear_op
from codegen.launch.host import LinearLaunch, load
from codegen.launch.linear_op import attention
from codegen.ops.linear_attention import reference, torch_body
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention
from passes.targets.linear_attention import initial
from tests.kernels.problems import ROUNDOFF, TORCH, choice, here

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

Float64 = NDArray[np.float64]


def spec_of(
    kv_heads: int, dims: tuple[int, int], chunk: int, features: FeatureMap, *, causal: bool = True
) -> LinearAttention:
    plain = GroupedQueryAttention(4, kv_heads, *dims, dims[0] ** -0.5, causal=causal, masked_rows_are_zero=True)
    return LinearAttention(plain, chunk, features)


CAUSAL = spec_of(2, (6, 5), 4, FeatureMap.LEARNED)
BOTH_WAYS = spec_of(4, (33, 32), 20, FeatureMap.LEARNED, causal=False)
SPECS = {
    "causal": (CAUSAL, DType.FLOAT32, None),
    "both ways": (BOTH_WAYS, DType.FLOAT32, None),
    "elu": (spec_of(1, (16, 16), 17, FeatureMap.ELU1), DType.FLOAT16, Isa.AVX512),
    "elu both ways": (spec_of(2, (8, 40), 32, FeatureMap.ELU1, causal=False), DType.BFLOAT16, Isa.AVX2),
}


class Problem:
    """Operands in a number format, and what the oracle makes of them as they were rounded."""

    def __init__(self, spec: LinearAttention, dtype: torch.dtype, queries: int, keys: int, *, hidden: bool) -> None:
        random, plain = torch.Generator().manual_seed(queries + keys), spec.attention

        def draw(heads: int, tokens: int, size: int) -> Tensor:
            return torch.randn(2, tokens, heads, size, generator=random).transpose(1, 2).to(dtype)

        self.spec = spec
        self.q = draw(plain.heads, queries, plain.head_dim)
        self.k, self.v = (draw(plain.kv_heads, keys, size) for size in (plain.head_dim, plain.value_dim))
        noise = np.random.default_rng(keys)
        drawn = {n: a + 0.3 * noise.standard_normal(a.shape) for n, a in initial(spec).items()}
        self.parameters = {n: torch.from_numpy(a).float() for n, a in drawn.items()}
        self.shown = torch.rand(2, keys, generator=random) < 0.7 if hidden else None

    def distance(self, found: Tensor) -> float:
        """The largest error in units of what rounding makes of a result and of its sums."""
        q, k, v = (x.double().numpy() for x in (self.q, self.k, self.v))
        wide = {n: p.double().numpy() for n, p in self.parameters.items()}
        shown = None if self.shown is None else self.shown.numpy()
        right: Float64 = reference.linear_attention(self.spec, q, k, v, wide, shown)
        spread = reference.linear_attention(self.spec, q, k, np.abs(v), wide, shown)
        floor = ROUNDOFF[found.dtype] * np.abs(right) + 16 * 2.0**-24 * spread + 1e-30
        assert found.shape == right.shape
        return float((np.abs(found.double().numpy() - right) / floor).max(initial=0.0))

    def run(self) -> Tensor:
        return linear_host.launch(self.spec, self.q, self.k, self.v, self.parameters, self.shown)


@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_is_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every length, of the last queries alone, with hidden keys, heads that share keys and heads that do not."""
    spec, dtype, isa = SPECS[name]
    if isa is not None:
        if isa not in here():
            pytest.skip(f"this processor has no {isa.value}")
        monkeypatch.setattr("codegen.launch.operands.host", lambda: replace(host(), arch=isa.value))
    for keys in (0, 1, 3, 4, 9, 40, 41, 130):
        for queries in sorted({keys, keys // 3, min(keys, 1)}):
            for hidden in (False, True):
                problem = Problem(spec, TORCH[dtype], queries, keys, hidden=hidden)
                assert problem.distance(problem.run()) <= 4, (keys, queries, hidden)
    made = choice(spec, dtype, isa)
    block = LinearLaunch(batch=1, queries=0, keys=0, threads=1)
    assert load(made).plan(ctypes.byref(block)) == made.resources()["scratch_bytes"]


@pytest.mark.parametrize("change", ["chunk", "a map", "gain", "a hidden key", "a far value"])
def test_control_the_comparison_sees_a_change(change: str) -> None:
    problem = Problem(CAUSAL, torch.float32, 40, 40, hidden=True)
    found = problem.run()
    assert problem.distance(found) <= 4
    if change == "chunk":
        problem.spec = replace(CAUSAL, chunk=5)
    elif change == "a map":
        problem.parameters["key_map"][1, 2, 3] += 1e-3
    elif change == "gain":
        problem.parameters["log_gain"][3] += 1e-4
    elif change == "a hidden key":
        assert problem.shown is not None
        problem.shown[0, 7] ^= True
    else:
        problem.v[0, 1, 2, 0] += 1e-2
    assert problem.distance(found) > 12


def test_later_tokens_leave_no_trace_in_earlier_results() -> None:
    problem = Problem(CAUSAL, torch.float32, 40, 40, hidden=False)
    before = problem.run()
    problem.k[:, :, 21:], problem.v[:, :, 21:] = 1e6, 1e6
    assert torch.equal(problem.run()[:, :, :21], before[:, :, :21])


def test_threads_give_what_one_thread_gives() -> None:
    problem = Problem(BOTH_WAYS, torch.float32, 50, 130, hidden=True)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            outputs.append(problem.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_which_calls_the_kernel_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LinearAttention] = []
    real = linear_host.launch

    def spy(spec: LinearAttention, *rest: Tensor) -> Tensor:
        seen.append(spec)
        return real(spec, *rest)

    monkeypatch.setattr(linear_host, "launch", spy)
    problem = Problem(CAUSAL, torch.float32, 9, 30, hidden=False)
    operands = (problem.q, problem.k, problem.v, problem.parameters)
    right = torch_body.linear_attention(CAUSAL, *operands)
    assert torch.equal(attention(CAUSAL, *operands), right) and not seen, "a problem this small is left to torch"
    torch.testing.assert_close(attention(CAUSAL, *operands, kernels="cpp"), right, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    monkeypatch.setattr(linear_op, "SMALLEST", 0)
    attention(CAUSAL, *operands)
    assert len(seen) == 2
    attention(CAUSAL, *operands, kernels="off")
    attention(CAUSAL, problem.q.requires_grad_(), *operands[1:]).sum().backward()
    assert problem.q.grad is not None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        attention(CAUSAL, *operands)
    problem.q = problem.q.detach()
    traced = torch.jit.trace(lambda q: attention(CAUSAL, q, *operands[1:]), problem.q, check_trace=False)
    torch.testing.assert_close(traced(2 * problem.q), torch_body.linear_attention(CAUSAL, 2 * problem.q, *operands[1:]))
    assert len(seen) == 2


def test_what_is_not_legal_is_an_error() -> None:
    favor = spec_of(2, (6, 5), 4, FeatureMap.FAVOR)
    problem = Problem(favor, torch.float32, 5, 9, hidden=False)
    operands = (problem.q, problem.k, problem.v, problem.parameters)
    with pytest.raises(NotLegal, match="FAVOR"):
        attention(favor, *operands, kernels="cpp")
    wide = tuple(x.double() for x in operands[:3])
    with pytest.raises(NotLegal, match="float64"):
        attention(CAUSAL, *wide, Problem(CAUSAL, torch.float32, 5, 9, hidden=False).parameters, kernels="cpp")
    with pytest.raises(ValueError, match="contradict"):
        attention(favor, problem.q[:, :3], *operands[1:], kernels="cpp")
