"""Mixed chunk attention: its parts and the whole against the float64 oracle; no leak, any length, fixed-size state."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codegen.ops.gated_attention import reference as unit
from codegen.ops.mixed_chunk_attention import torch_body
from codegen.ops.mixed_chunk_attention.reference import between_chunks, chunks, prefixes, within_chunks
from codegen.ops.mixed_chunk_attention.reference import mixed_chunk_attention as oracle
from codegen.spec import Activation, GatedAttention, MixedChunkAttention, PositionBias
from tests.unit.gated_problems import distance, hidden_of, model, run, specs, tensors, weights_of

CLOSE = 1e-5
SPEC = MixedChunkAttention(12, 20, 6, chunk=64, causal=True, bias=PositionBias.TOEPLITZ, span=64)


def by_torch(
    spec: MixedChunkAttention, x: NDArray[Any], seed: int = 0, shown: NDArray[Any] | None = None
) -> NDArray[Any]:
    mask = None if shown is None else torch.from_numpy(shown)
    return torch_body.mixed_chunk_attention(spec, torch.from_numpy(x), tensors(weights_of(spec, seed)), mask).numpy()


# ------------------------------------------------------------------ the oracles


@pytest.mark.parametrize("averaged", [True, False], ids=["averaged", "summed"])
def test_the_prefix_is_exclusive_and_divided_as_the_spec_says(averaged: bool) -> None:
    """Written out token by token."""
    spec = MixedChunkAttention(2, 3, 2, chunk=3, causal=True, averaged=averaged)
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((1, 8, 2)), rng.standard_normal((1, 8, 3))
    found = prefixes(spec, key, value)
    for number, state in enumerate(found):
        expected = np.zeros((2, 3))
        for token in range(3 * number):
            expected += np.outer(key[0, token], value[0, token])
        divisor = 3 * (max(number, 1) if averaged else 1)
        assert np.allclose(state[0], expected / divisor)
    assert not found[0].any() and len(found) == 3


def test_the_bidirectional_sum_is_over_all_tokens() -> None:
    spec = MixedChunkAttention(2, 3, 2, chunk=3)
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((1, 8, 2)), rng.standard_normal((1, 8, 3))
    for state in prefixes(spec, key, value):
        assert np.allclose(state[0], key[0].T @ value[0] / 8)


def test_the_parts_add_up_behind_the_gate() -> None:
    weights, x = weights_of(SPEC), hidden_of(SPEC, 2, 150)
    gate, value, latent = unit.expanded(SPEC, x, weights)
    quad_query, lin_query, quad_key, lin_key = unit.heads(SPEC, latent, weights)
    within = within_chunks(SPEC, quad_query, quad_key, value, weights)
    between = between_chunks(SPEC, lin_query, lin_key, value)
    whole = (gate * (within + between)) @ weights["out_weight"].T.astype(np.float64) + weights["out_bias"]
    assert distance(oracle(SPEC, x, weights), whole) < 1e-12
    assert not between[:, :64].any() and between[:, 64:].any()


def test_each_part_of_the_torch_body_is_its_oracle() -> None:
    weights, x = weights_of(SPEC), hidden_of(SPEC, 2, 150)
    _, value, latent = unit.expanded(SPEC, x, weights)
    quad_query, lin_query, quad_key, lin_key = unit.heads(SPEC, latent, weights)
    q, k, lq, lk, v = (torch.from_numpy(a).float() for a in (quad_query, quad_key, lin_query, lin_key, value))
    within = torch_body.within_chunks(SPEC, q, k, v, tensors(weights)).numpy()
    assert distance(within, within_chunks(SPEC, quad_query, quad_key, value, weights)) < CLOSE
    shifted, after = torch_body.running_sums(SPEC, lk, v, None)
    states = (shifted / torch_body.divisors(SPEC, shifted, 0)).numpy()
    for number, expected in enumerate(prefixes(SPEC, lin_key, value)):
        assert distance(states[:, number], expected) < CLOSE
    assert distance(after.numpy(), lin_key.transpose(0, 2, 1) @ value) < CLOSE
    assert lq.shape == lk.shape


def test_one_chunk_that_holds_everything_is_the_quadratic_form() -> None:
    x = hidden_of(SPEC, 2, 50)
    weights = weights_of(SPEC)
    quadratic = GatedAttention(12, 20, 6, length=64, causal=True, bias=PositionBias.TOEPLITZ, span=64)
    halves = {**weights, "scale": weights["scale"][[0, 2]], "offset": weights["offset"][[0, 2]]}
    expected = unit.gated_attention(quadratic, x, halves)
    assert distance(oracle(SPEC, x, weights), expected) < 1e-12
    assert distance(by_torch(SPEC, x), expected) < CLOSE
    assert distance(run(model(SPEC, weights, 17), x), expected) < CLOSE
    smaller = replace(SPEC, chunk=32)
    assert distance(by_torch(smaller, x), expected) > 1e-3  # the control: two chunks are not


def test_chunks_cover_every_token_once() -> None:
    assert [(c.start, c.stop) for c in chunks(SPEC, 130)] == [(0, 64), (64, 128), (128, 130)]


# ------------------------------------------------------------------ torch


@given(spec=specs(chunked=True), batch=st.integers(1, 2), tokens=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_torch_equals_the_oracle(spec: MixedChunkAttention, batch: int, tokens: int, seed: int) -> None:
    x = hidden_of(spec, batch, tokens, seed)
    shown = np.random.default_rng(seed).random((batch, tokens)) > 0.3
    for mask in (None, shown):
        assert distance(by_torch(spec, x, seed, mask), oracle(spec, x, weights_of(spec, seed), mask)) < CLOSE


@given(spec=specs(chunked=True), tokens=st.integers(1, 40), seed=st.integers(0, 9), block=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_long_sequences_without_gradients_go_by_blocks(
    spec: MixedChunkAttention, tokens: int, seed: int, block: int
) -> None:
    x = hidden_of(spec, 2, tokens, seed)
    shown = np.random.default_rng(seed).random((2, tokens)) > 0.3
    kept = torch_body.BLOCK, torch_body.MANY
    torch_body.BLOCK, torch_body.MANY = block, 1
    try:
        with torch.no_grad():
            for mask in (None, shown):
                assert distance(by_torch(spec, x, seed, mask), oracle(spec, x, weights_of(spec, seed), mask)) < CLOSE
    finally:
        torch_body.BLOCK, torch_body.MANY = kept


@pytest.mark.parametrize("bias", list(PositionBias), ids=lambda b: str(b.value))
def test_halves_of_a_chunk_are_the_whole(bias: PositionBias, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of even and odd chunks; the control are chunks of half the size."""
    monkeypatch.setattr(torch_body, "HALVED", 4)
    for chunk in (4, 7):
        spec = MixedChunkAttention(6, 8, 4, chunk=chunk, causal=True, bias=bias, span=5)
        x, weights = hidden_of(spec, 2, 19), weights_of(spec)
        shown = np.random.default_rng(0).random((2, 19)) > 0.3
        with torch.no_grad():
            for mask in (None, shown):
                assert distance(by_torch(spec, x, shown=mask), oracle(spec, x, weights, mask)) < CLOSE
            wrong = replace(spec, chunk=chunk // 2, span=5)
            assert distance(by_torch(wrong, x), oracle(spec, x, weights)) > 1e-3


FIELDS: dict[str, dict[str, Any]] = {
    "chunk": {"chunk": 32},
    "causal": {"causal": False},
    "averaged": {"averaged": False},
    "rotary": {"rotary": False},
    "gate": {"gate": Activation.GELU},
    "value": {"value": None},
    "latent": {"latent": Activation.RELU},
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_counts(name: str) -> None:
    """The control: an oracle with one field changed is not what the bodies compute."""
    x, changed = hidden_of(SPEC, 1, 200), replace(SPEC, **FIELDS[name])
    assert distance(by_torch(SPEC, x), oracle(SPEC, x, weights_of(SPEC))) < CLOSE
    assert distance(by_torch(SPEC, x), oracle(changed, x, weights_of(SPEC))) > 1e-3


@pytest.mark.parametrize("gradients", [True, False], ids=["parallel", "blocks"])
@pytest.mark.parametrize("place", [100, 255, 256, 511], ids=str)
def test_a_later_token_changes_no_earlier_bit(place: int, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_body, "BLOCK", 128)
    x = hidden_of(SPEC, 1, 600)
    moved = x.copy()
    moved[:, place] += 3
    loose = replace(SPEC, causal=False)
    with torch.set_grad_enabled(gradients):
        before, after = by_torch(SPEC, x), by_torch(SPEC, moved)
        control = by_torch(loose, x)[:, :place], by_torch(loose, moved)[:, :place]
    assert np.array_equal(before[:, :place], after[:, :place])
    assert not np.allclose(before[:, place:], after[:, place:])
    assert not np.array_equal(*control)


def test_a_prefix_alone_is_the_same_inside() -> None:
    x = hidden_of(SPEC, 1, 700)
    assert distance(by_torch(SPEC, x[:, :300]), by_torch(SPEC, x)[:, :300]) < 1e-6
    loose = replace(SPEC, causal=False)
    assert distance(by_torch(loose, x[:, :300]), by_torch(loose, x)[:, :300]) > 1e-2  # the control


@given(spec=specs(chunked=True, causal=True), seed=st.integers(0, 9), cuts=st.lists(st.integers(1, 29), max_size=3))
@settings(max_examples=25, deadline=None)
def test_going_on_from_any_token_is_the_parallel_form(spec: MixedChunkAttention, seed: int, cuts: list[int]) -> None:
    """In pieces of any size, and token by token; the state's size does not change."""
    x, weights = hidden_of(spec, 2, 30, seed), tensors(weights_of(spec, seed))
    given_, expected = torch.from_numpy(x), oracle(spec, x, weights_of(spec, seed))
    for places in (sorted(set(cuts)), list(range(1, 30))):
        state = torch_body.start(spec, 2, given_)
        size = state.nbytes
        pieces = torch.tensor_split(given_, places, dim=1)
        found = torch.cat([torch_body.resume(spec, piece, weights, state) for piece in pieces], 1)
        assert distance(found.numpy(), expected) < CLOSE
        assert state.position == 30 and state.nbytes == size


def test_a_state_that_forgets_is_noticed() -> None:
    """The control of the test above."""
    x, weights = hidden_of(SPEC, 1, 200), tensors(weights_of(SPEC))
    given_ = torch.from_numpy(x)
    state = torch_body.start(SPEC, 1, given_)
    torch_body.resume(SPEC, given_[:, :150], weights, state)
    state.before.zero_()
    rest = torch_body.resume(SPEC, given_[:, 150:], weights, state)
    assert distance(rest.numpy(), oracle(SPEC, x, weights_of(SPEC))[:, 150:]) > 1e-2


def test_a_bidirectional_unit_cannot_go_on() -> None:
    with pytest.raises(ValueError, match="causal"):
        torch_body.start(replace(SPEC, causal=False), 1, torch.zeros(1))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_gradients_are_those_of_finite_differences(causal: bool) -> None:
    spec = MixedChunkAttention(3, 4, 2, chunk=3, causal=causal, bias=PositionBias.TOEPLITZ, span=3)
    names = list(spec.shapes)
    given_ = [torch.from_numpy(w).double().requires_grad_() for w in weights_of(spec).values()]
    x = torch.from_numpy(hidden_of(spec, 1, 8)).double().requires_grad_()

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch_body.mixed_chunk_attention(spec, x, dict(zip(names, weights, strict=True)))

    assert torch.autograd.gradcheck(call, (x, *given_))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_an_exported_program_takes_any_length(causal: bool) -> None:
    spec = replace(SPEC, causal=causal, chunk=8)
    weights = tensors(weights_of(spec))

    class Unit(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_body.mixed_chunk_attention(spec, x, weights)

    dims = ({1: torch.export.Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(Unit(), (torch.from_numpy(hidden_of(spec, 1, 21)),), dynamic_shapes=dims)
    for tokens in (5, 21, 64):
        x = hidden_of(spec, 1, tokens)
        assert distance(program.module()(torch.from_numpy(x)).numpy(), oracle(spec, x, weights_of(spec))) < CLOSE


MEASURE = """
import torch
from codegen.ops.mixed_chunk_attention.torch_body import mixed_chunk_attention
from codegen.spec import MixedChunkAttention, PositionBias
torch.set_num_threads(1)
spec = MixedChunkAttention(64, 512, 32, causal={causal}, bias=PositionBias.TOEPLITZ)
weights = {{role: torch.zeros(shape) for role, shape in spec.shapes.items()}}

def highest():
    # not ru_maxrss, which begins with what the process was forked from
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

def grown(tokens, gradients):
    before = highest()
    with torch.set_grad_enabled(gradients):
        mixed_chunk_attention(spec, torch.zeros(1, tokens, 64), weights)
    return highest() - before

grown(4096, False)
print(grown(65_536, False), grown(65_536, True))
"""


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_memory_at_64k_tokens_is_input_output_and_a_block(causal: bool) -> None:
    """The gates alone of 65,536 tokens are 128 MiB, all scores of all chunks 64 MiB: with gradients they are there."""
    script = MEASURE.format(causal=causal)
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    blocks, parallel = (int(kibibytes) / 1024 for kibibytes in told.split())
    own = 2 * 65_536 * 64 * 4 / 2**20
    assert blocks < own + 24 and parallel > own + 200
