"""The C++ kernel of mixed chunk attention against the float64 oracle, and which calls it computes."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codegen.device import DType, Isa, host
from codegen.errors import NoCompiler, NotLegal
from codegen.launch import chunk_host, chunk_op
from codegen.launch.host import ChunkLaunch, load
from codegen.launch.mixing_op import mix
from codegen.ops.mixed_chunk_attention import reference, torch_body
from codegen.spec import MixedChunkAttention, PositionBias
from codegen.tuning import chunks as tuning
from tests.kernels.problems import ROUNDOFF, TORCH, choice, here
from tests.unit.gated_problems import distance, hidden_of, tensors, weights_of

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

CLOSE = 3e-6
CAUSAL = MixedChunkAttention(12, 20, 6, chunk=7, causal=True, bias=PositionBias.TOEPLITZ, span=5)
SPECS = {
    "causal": CAUSAL,
    "both ways": MixedChunkAttention(12, 64, 34, chunk=20, bias=PositionBias.ROTARY),
    "several slices": MixedChunkAttention(8, 530, 8, chunk=33, causal=True, averaged=False),
}


def found(spec: MixedChunkAttention, x: Any, weights: Any, shown: Any = None, dtype: DType = DType.FLOAT32) -> Tensor:
    hidden = None if shown is None else torch.from_numpy(shown)
    given = torch.from_numpy(x).to(TORCH[dtype])
    return chunk_host.mixed_chunk_attention(spec, given, tensors(weights, TORCH[dtype]), hidden)


@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_is_the_oracle(name: str) -> None:
    spec = SPECS[name]
    weights = weights_of(spec)
    assert found(spec, hidden_of(spec, 2, 0), weights).shape == (2, 0, spec.hidden)
    for tokens in (1, 6, 7, 8, 40, 70):
        x = hidden_of(spec, 2, tokens)
        for shown in (None, np.random.default_rng(1).random((2, tokens)) < 0.7):
            right = reference.mixed_chunk_attention(spec, x, weights, shown)
            assert distance(found(spec, x, weights, shown).numpy(), right) < CLOSE, (tokens, shown is None)
    _require_scratch(spec, DType.FLOAT32, Isa(host().arch))
    for change in ({"chunk": spec.chunk + 1}, {"bias": PositionBias.NONE} if spec is CAUSAL else {"causal": False}):
        other = replace(spec, **change)
        if other != spec:  # the control
            kept = {role: weights[role] for role in other.shapes}
            assert distance(found(spec, x, weights).numpy(), reference.mixed_chunk_attention(other, x, kept)) > 1e-3


def _require_scratch(spec: MixedChunkAttention, dtype: DType, isa: Isa) -> None:
    """What is said of a thread's scratch is what it takes."""
    made = choice(spec, dtype, isa)
    block = ChunkLaunch(batch=1, tokens=0, threads=1)
    assert load(made).plan(ctypes.byref(block)) == made.resources()["scratch_bytes"]


def test_results_are_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels fall to tasks differently, and sums stay as they were."""
    spec = SPECS["several slices"]
    weights, x = weights_of(spec), hidden_of(spec, 3, 70)
    alone = found(spec, x, weights)
    assert distance(alone.numpy(), reference.mixed_chunk_attention(spec, x, weights)) < CLOSE
    for threads in (2, 3, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(found(spec, x, weights), alone)
    assert not torch.equal(found(spec, x + 1e-5, weights), alone)  # the control


@pytest.mark.parametrize("name", ["causal", "several slices"])
def test_long_causal_sequences_go_block_by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    weights, x = weights_of(spec), hidden_of(spec, 2, 5 * spec.chunk + 3)
    right = {
        mask is None: reference.mixed_chunk_attention(spec, x, weights, mask)
        for mask in (None, np.random.default_rng(1).random(x.shape[:2]) < 0.7)
    }
    monkeypatch.setattr(chunk_host, "BLOCK", 2 * spec.chunk)
    for shown in (None, np.random.default_rng(1).random(x.shape[:2]) < 0.7):
        assert distance(found(spec, x, weights, shown).numpy(), right[shown is None]) < CLOSE
    real = chunk_host.launch
    monkeypatch.setattr(
        chunk_host, "launch", lambda *given, out: real(*given[:6], out=out)
    )  # the control: nothing came before
    assert distance(found(spec, x, weights).numpy(), right[True]) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "isa"), [(DType.FLOAT16, Isa.AVX512), (DType.BFLOAT16, Isa.AVX2)], ids=["f16", "bf16"]
)
def test_other_formats_round_operands_and_results_alone(
    dtype: DType, isa: Isa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the projections; these are torch's."""
    if isa not in here():
        pytest.skip(f"this processor has no {isa.value}")
    monkeypatch.setattr("codegen.launch.operands.host", lambda: replace(host(), arch=isa.value))
    random = torch.Generator().manual_seed(0)
    gate, value, *heads = (torch.randn(2, 30, size, generator=random).to(TORCH[dtype]) for size in (20, 20, 6, 6, 6, 6))
    spec = replace(CAUSAL, bias=PositionBias.NONE)
    output = chunk_host.launch(spec, gate, value, heads, None, None)
    wide = [x.double().numpy() for x in (gate, value, *heads)]
    within = reference.within_chunks(spec, wide[2], wide[4], wide[1], {})
    right = wide[0] * (within + reference.between_chunks(spec, wide[3], wide[5], wide[1]))
    _require_scratch(spec, dtype, isa)
    limit = ROUNDOFF[TORCH[dtype]] * np.abs(right) + 1e-5
    assert (np.abs(output.double().numpy() - right) <= limit).all()


def test_later_tokens_leave_no_trace_in_earlier_results() -> None:
    weights, x = weights_of(CAUSAL), hidden_of(CAUSAL, 1, 40)
    before = found(CAUSAL, x, weights)
    x[:, 19:] = 1e3
    after = found(CAUSAL, x, weights)
    assert torch.equal(after[:, :19], before[:, :19]) and not torch.equal(after[:, 19:], before[:, 19:])


def test_which_calls_the_kernel_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MixedChunkAttention] = []
    real = chunk_host.launch

    def spy(spec: MixedChunkAttention, *rest: Any, **more: Any) -> Tensor:
        seen.append(spec)
        return real(spec, *rest, **more)

    monkeypatch.setattr(chunk_host, "launch", spy)
    weights, x = tensors(weights_of(CAUSAL)), torch.from_numpy(hidden_of(CAUSAL, 1, 20))
    right = torch_body.mixed_chunk_attention(CAUSAL, x, weights)
    for kernels in ("auto", "off"):
        assert torch.equal(mix(CAUSAL, x, weights, kernels=kernels), right)
    mix(CAUSAL, x.clone().requires_grad_(), weights, kernels="cpp").sum().backward()
    assert not seen
    torch.testing.assert_close(mix(CAUSAL, x, weights, kernels="cpp"), right, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    with pytest.raises(NotLegal, match="float64"):
        mix(CAUSAL, x.double(), {role: w.double() for role, w in weights.items()}, kernels="cpp")
    wide = replace(CAUSAL, chunk=2000)
    with pytest.raises(NotLegal, match="1024"):
        mix(wide, x, tensors(weights_of(wide)), kernels="cpp")


def test_auto_goes_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = chunk_host.mixed_chunk_attention
    monkeypatch.setattr(chunk_host, "mixed_chunk_attention", lambda *given: seen.append(1) or real(*given))
    row = tuning.Measured("float32", host().arch, True, 12, 80, 6, 7, 40, 1.5)
    monkeypatch.setattr(tuning, "measurements", lambda: (row,))
    spec = replace(CAUSAL, expanded=80)
    weights, x = tensors(weights_of(spec)), torch.from_numpy(hidden_of(spec, 1, 40))
    unlike = (x[:, :5], x.double(), x.clone().requires_grad_())
    for given in unlike:
        tuning.faster.cache_clear()
        mix(spec, given, {role: w.to(given.dtype) for role, w in weights.items()})
    mix(spec, x, weights, kernels="off")
    slower = replace(row, speedup=1.0)
    for rows in ((slower,), (replace(row, causal=False),), ()):
        tuning.faster.cache_clear()
        monkeypatch.setattr(tuning, "measurements", lambda rows=rows: rows)
        mix(spec, x, weights)
    assert not seen
    tuning.faster.cache_clear()
    monkeypatch.setattr(tuning, "measurements", lambda: (row,))
    output = mix(spec, x, weights)
    assert seen
    assert distance(output.numpy(), reference.mixed_chunk_attention(spec, x.numpy(), weights_of(spec))) < CLOSE
    tuning.faster.cache_clear()


def test_auto_is_torch_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise NoCompiler("there is none", hint="")

    monkeypatch.setattr(chunk_op, "_worthwhile", lambda *_: True)
    monkeypatch.setattr(chunk_host, "mixed_chunk_attention", fails)
    weights, x = tensors(weights_of(CAUSAL)), torch.from_numpy(hidden_of(CAUSAL, 1, 20))
    assert torch.equal(mix(CAUSAL, x, weights), torch_body.mixed_chunk_attention(CAUSAL, x, weights))
    with pytest.raises(NoCompiler):
        mix(CAUSAL, x, weights, kernels="cpp")
