"""Gated attention units: the torch body against the float64 oracle; no leak, prefixes, decoding, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codegen.ops.gated_attention import torch_body
from codegen.ops.gated_attention.reference import gated_attention as oracle
from codegen.ops.gated_attention.reference import rotated, score_bias
from codegen.spec import Activation, GatedAttention, PositionBias
from tests.unit.gated_problems import distance, hidden_of, specs, tensors, weights_of

CLOSE = 1e-5
"""Largest difference in float32, relative to the largest number of the oracle's answer."""


def by_torch(spec: GatedAttention, x: NDArray[Any], seed: int = 0, shown: NDArray[Any] | None = None) -> NDArray[Any]:
    mask = None if shown is None else torch.from_numpy(shown)
    return torch_body.gated_attention(spec, torch.from_numpy(x), tensors(weights_of(spec, seed)), mask).numpy()


# ------------------------------------------------------------------ the oracle itself


def test_the_oracle_is_the_papers_sum() -> None:
    """Written out for one query token: gate times the sum over keys of relu(q k / n + bias) squared times value."""
    spec = GatedAttention(3, 4, 2, length=5, causal=True, bias=PositionBias.TOEPLITZ, span=3)
    weights, x = weights_of(spec), hidden_of(spec, 1, 6)
    expected = np.zeros((6, 3))
    rows = x[0].astype(np.float64) @ weights["expand_weight"].T.astype(np.float64) + weights["expand_bias"]
    rows = rows / (1 + np.exp(-rows))
    for i in range(6):
        total = np.zeros(4)
        for j in range(i + 1):
            query, key = (weights["scale"][h] * rows[t, 8:] + weights["offset"][h] for h, t in ((0, i), (1, j)))
            turn = np.array([[np.cos(i - j), np.sin(i - j)], [-np.sin(i - j), np.cos(i - j)]])
            bias = weights["distances"][min(i - j, 2) + 2]
            total += max(query @ turn @ key / 5 + bias, 0) ** 2 * rows[j, 4:8]
        expected[i] = weights["out_weight"] @ (rows[i, :4] * total) + weights["out_bias"]
    assert distance(oracle(spec, x, weights)[0], expected) < 1e-6


def test_rotary_bias_depends_on_distance_alone_and_is_the_papers_toeplitz_matrix() -> None:
    spec = GatedAttention(2, 2, 6, length=4, bias=PositionBias.ROTARY)
    bias = score_bias(spec, weights_of(spec), np.arange(7), np.arange(7))
    for offset in range(-6, 7):
        diagonal = np.diagonal(bias, offset)
        assert np.allclose(diagonal, diagonal[0])
    assert not np.allclose(bias, bias.T)


def test_the_rotation_is_by_position() -> None:
    x = np.ones((2, 4))
    turned = rotated(x, np.array([0, 3]))
    assert np.allclose(turned[0], 1)
    assert np.allclose(turned[1, 0], np.cos(3) - np.sin(3)) and np.allclose(turned[1, 3], np.cos(0.03) + np.sin(0.03))


def test_operands_must_fit_the_spec() -> None:
    spec = GatedAttention(4, 6, 2, length=3, bias=PositionBias.TOEPLITZ)
    weights, x = weights_of(spec), hidden_of(spec, 1, 3)
    for wrong in ({**weights, "scale": weights["scale"][:1]}, {k: v for k, v in weights.items() if k != "distances"}):
        with pytest.raises(ValueError, match="contradict"):
            oracle(spec, x, wrong)
        with pytest.raises(ValueError, match="contradict"):
            torch_body.gated_attention(spec, torch.from_numpy(x), tensors(wrong))
    with pytest.raises(ValueError, match="contradicts"):
        oracle(spec, x[..., :3], weights)
    for bad in ({"causal": True, "length": None}, {"base": 3}, {"hidden": 0}, {"length": 0}, {"span": 0}):
        with pytest.raises(ValueError):
            replace(spec, **bad)


# ------------------------------------------------------------------ torch


@given(spec=specs(chunked=False), batch=st.integers(1, 2), tokens=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_torch_equals_the_oracle(spec: GatedAttention, batch: int, tokens: int, seed: int) -> None:
    x = hidden_of(spec, batch, tokens, seed)
    shown = np.random.default_rng(seed).random((batch, tokens)) > 0.3
    for mask in (None, shown):
        assert distance(by_torch(spec, x, seed, mask), oracle(spec, x, weights_of(spec, seed), mask)) < CLOSE


@pytest.mark.parametrize("bias", list(PositionBias), ids=lambda b: str(b.value))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_blocks_of_rows_are_the_whole(causal: bool, bias: PositionBias, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GatedAttention(6, 8, 4, length=20, causal=causal, bias=bias, span=5)
    x = hidden_of(spec, 2, 33)
    monkeypatch.setattr(torch_body, "ROWS", 8)
    assert distance(by_torch(spec, x), oracle(spec, x, weights_of(spec))) < CLOSE


FIELDS: dict[str, dict[str, Any]] = {
    "length": {"length": 12},
    "causal": {"causal": False},
    "span": {"span": 4},
    "rotary": {"rotary": False},
    "gate": {"gate": Activation.GELU},
    "value": {"value": None},
    "latent": {"latent": Activation.RELU},
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_counts(name: str) -> None:
    """The control: an oracle with one field changed is not what the bodies compute."""
    spec = GatedAttention(6, 8, 4, length=10, causal=True, bias=PositionBias.TOEPLITZ, span=5)
    changed = replace(spec, **FIELDS[name])
    weights, x = weights_of(spec), hidden_of(spec, 1, 11)
    weights["distances"] = np.arange(1, 10, dtype=np.float32)
    other = {**weights, "distances": weights["distances"][1:-1]} if name == "span" else weights
    found = torch_body.gated_attention(spec, torch.from_numpy(x), tensors(weights)).numpy()
    assert distance(found, oracle(spec, x, weights)) < CLOSE
    assert distance(found, oracle(changed, x, other)) > 1e-3


def test_a_later_token_changes_no_earlier_bit() -> None:
    spec = GatedAttention(16, 24, 8, length=64, causal=True, bias=PositionBias.TOEPLITZ)
    x = hidden_of(spec, 1, 600)
    moved = x.copy()
    moved[:, 411] += 3
    before, after = by_torch(spec, x), by_torch(spec, moved)
    assert np.array_equal(before[:, :411], after[:, :411])
    assert not np.allclose(before[:, 411:], after[:, 411:])
    loose = replace(spec, causal=False)
    assert not np.array_equal(by_torch(loose, x)[:, :411], by_torch(loose, moved)[:, :411])  # the control


def test_a_prefix_alone_is_the_same_inside() -> None:
    """Which a divisor that is the current length would break: it does in the bidirectional control."""
    spec = GatedAttention(16, 24, 8, length=700, causal=True, bias=PositionBias.ROTARY)
    x = hidden_of(spec, 1, 700)
    assert distance(by_torch(spec, x[:, :300]), by_torch(spec, x)[:, :300]) < 1e-6
    own = replace(spec, causal=False, length=None)
    assert distance(by_torch(own, x[:, :300]), by_torch(own, x)[:, :300]) > 1e-2


@given(spec=specs(chunked=False, causal=True), seed=st.integers(0, 9), cut=st.integers(0, 14))
@settings(max_examples=15, deadline=None)
def test_decoding_token_by_token_is_the_parallel_form(spec: GatedAttention, seed: int, cut: int) -> None:
    x, weights = hidden_of(spec, 2, 15, seed), tensors(weights_of(spec, seed))
    given_ = torch.from_numpy(x)
    state = torch_body.start(spec, 2, given_)
    pieces = [given_[:, :cut], *given_[:, cut:].split(1, dim=1)]
    found = [torch_body.resume(spec, piece, weights, state) for piece in pieces if piece.shape[1]]
    assert distance(torch.cat(found, 1).numpy(), oracle(spec, x, weights_of(spec, seed))) < CLOSE
    assert state.position == 15 and state.nbytes == 4 * 2 * 15 * (spec.base + spec.expanded)


def test_a_bidirectional_unit_cannot_go_on() -> None:
    with pytest.raises(ValueError, match="causal"):
        torch_body.start(GatedAttention(2, 2, 2), 1, torch.zeros(1))


@pytest.mark.parametrize("bias", list(PositionBias), ids=lambda b: str(b.value))
def test_gradients_are_those_of_finite_differences(bias: PositionBias) -> None:
    spec = GatedAttention(3, 4, 2, length=5, causal=True, bias=bias, span=3)
    names = list(spec.shapes)
    given_ = [torch.from_numpy(w).double().requires_grad_() for w in weights_of(spec).values()]
    x = torch.from_numpy(hidden_of(spec, 1, 4)).double().requires_grad_()

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch_body.gated_attention(spec, x, dict(zip(names, weights, strict=True)))

    assert torch.autograd.gradcheck(call, (x, *given_))


def test_half_precision_keeps_small_scores() -> None:
    """Of which the squares are below float16's smallest number."""
    spec = GatedAttention(8, 8, 4, length=262_144, value=None)
    weights = weights_of(spec)
    weights["expand_bias"][8:16], weights["out_bias"] = 20_000, np.zeros(8, np.float32)
    x = hidden_of(spec, 1, 12).astype(np.float16)
    half = {role: weight.half() for role, weight in tensors(weights).items()}
    found = torch_body.gated_attention(spec, torch.from_numpy(x), half)
    expected = oracle(spec, x, {role: weight.numpy() for role, weight in half.items()})
    query, key = torch_body.heads(spec, torch_body.expanded(spec, torch.from_numpy(x), half)[2], half)
    assert found.dtype is torch.float16 and distance(found.float().numpy(), expected) < 0.05
    assert not (query / 262_144 @ key.transpose(1, 2)).square().any()  # the control: in float16 all is lost


def test_an_exported_program_takes_any_length() -> None:
    spec = GatedAttention(6, 8, 4, length=16, causal=True, bias=PositionBias.TOEPLITZ, span=5)
    weights = tensors(weights_of(spec))

    class Unit(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_body.gated_attention(spec, x, weights)

    dims = ({1: torch.export.Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(Unit(), (torch.from_numpy(hidden_of(spec, 1, 10)),), dynamic_shapes=dims)
    for tokens in (10, 17, 601):
        x = hidden_of(spec, 1, tokens)
        assert distance(program.module()(torch.from_numpy(x)).numpy(), oracle(spec, x, weights_of(spec))) < CLOSE
