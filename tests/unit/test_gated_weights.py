"""Gated attention units out of trained weights: the subspace is the best one, a feed-forward is kept exactly."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.ops.gated_attention.reference import activated, gated_attention
from codegen.ops.mixed_chunk_attention.reference import mixed_chunk_attention
from codegen.spec import Activation, GatedAttention, MixedChunkAttention, PositionBias
from passes.weights.gated import (
    attention_unit,
    chunked,
    feed_forward_unit,
    harmonic_profile,
    mean_score_map,
    score_subspace,
)
from passes.weights.projection import SiteWeights

Float64 = NDArray[np.float64]
WIDTH, HEADS, SIZE = 12, 3, 4
GROUP = (0, 0, 1)


def random(*shape: int, seed: int = 0) -> Float64:
    return np.random.default_rng(seed).standard_normal(shape)


def site(size: float = 0.3) -> SiteWeights:
    """Three query heads on two of keys and values."""
    q, k, v = random(3, SIZE, WIDTH + 1), random(2, SIZE, WIDTH + 1, seed=1), random(2, SIZE, WIDTH + 1, seed=2)
    return SiteWeights(q * size, k * size, v, random(HEADS, WIDTH, SIZE, seed=3), random(WIDTH, seed=4))


def scores_of(weights: SiteWeights, x: Float64, scale: float) -> Float64:
    """[H, S, S]"""
    wide = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return np.stack([scale * (wide @ weights.q[h].T) @ (wide @ weights.k[g].T).T for h, g in enumerate(GROUP)])


def test_the_map_gives_the_mean_of_all_heads_scores() -> None:
    weights, x = site(), random(7, WIDTH, seed=5)
    wide = np.concatenate([x, np.ones((7, 1))], axis=1)
    found = wide @ mean_score_map(weights, GROUP, 0.5) @ wide.T
    assert np.allclose(found, scores_of(weights, x, 0.5).mean(axis=0))


def test_a_full_subspace_is_the_symmetric_part_and_what_is_linear_in_keys() -> None:
    score_map, x = mean_score_map(site(), GROUP, 0.5), random(7, WIDTH, seed=5)
    found = score_subspace(score_map, WIDTH)
    symmetric = (score_map + score_map.T)[:-1, :-1] / 2
    assert np.allclose(found.scores(x), x @ symmetric @ x.T + (x @ score_map[-1, :-1])[None])
    assert found.explained == pytest.approx(1.0)
    assert not np.allclose(found.scores(x), x @ score_map[:-1, :-1] @ x.T)  # what no shared base can have


def test_a_small_subspace_is_the_best_for_the_tokens_that_there_are() -> None:
    """Beside the one for tokens without correlation, and beside random changes of its strengths and rows."""
    score_map = mean_score_map(site(), GROUP, 0.5)
    mixing = random(WIDTH, WIDTH, seed=6) * np.geomspace(3, 0.05, WIDTH)
    moment = mixing @ mixing.T
    wished = (score_map + score_map.T)[:-1, :-1] / 2

    def error(base: Float64, strength: Float64) -> float:
        gap = mixing.T @ (wished - base[:, :-1].T @ np.diag(strength) @ base[:, :-1]) @ mixing
        return float((gap**2).sum())

    best = score_subspace(score_map, 3, moment)
    reached = error(best.base, best.strength)
    total = float(((mixing.T @ wished @ mixing) ** 2).sum())
    assert reached == pytest.approx(total * (1 - best.explained))
    plain = score_subspace(score_map, 3)
    assert reached < 0.9 * error(plain.base, plain.strength)
    for seed in range(20):
        moved = best.base + 1e-2 * random(*best.base.shape, seed=seed) * (np.arange(WIDTH + 1) < WIDTH)
        assert error(moved, best.strength) > reached
        assert error(best.base, best.strength * (1 + 1e-2 * random(3, seed=seed))) > reached


def test_directions_that_no_token_has_are_left_alone() -> None:
    score_map, moment = mean_score_map(site(), GROUP, 0.5), np.diag([1.0] * 8 + [0.0] * 4)
    found = score_subspace(score_map, 6, moment)
    assert np.isfinite(found.base).all() and np.allclose(found.base[:, 8:], 0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_profile_is_a_distribution_over_distances(causal: bool) -> None:
    found = harmonic_profile(5, causal=causal)
    assert len(found) == 9 and found.sum() == pytest.approx(1.0) and found.argmax() == 4
    assert found[4] == pytest.approx(2 * found[5]) and (found[:4] == 0).all() is np.bool_(causal)


def unit_spec(**fields: object) -> GatedAttention:
    known = {"length": 9, "bias": PositionBias.TOEPLITZ, "span": 16, "rotary": False, "value": None,
             "gate": None, "latent": None}  # fmt: skip
    return GatedAttention(WIDTH, HEADS * SIZE, WIDTH + 1, **{**known, **fields})  # type: ignore[arg-type]


def test_small_scores_make_the_unit_a_softmax_weighted_by_the_profile() -> None:
    """Up to squares of scores: with scores a tenth as large the difference is a hundredth. All heads look alike."""
    x, profile = random(1, 9, WIDTH, seed=5), np.full(31, 1 / 9)
    errors = []
    for size in (0.06, 0.006):
        weights = site()
        score_map = size * random(WIDTH + 1, WIDTH + 1, seed=7) / WIDTH
        score_map = score_map + score_map.T
        score_map[:, -1] = 0
        subspace = score_subspace(score_map, WIDTH)
        tensors = attention_unit(weights, GROUP, subspace, profile, 9, WIDTH + 1)
        found = gated_attention(unit_spec(), x, tensors)[0]
        scores = subspace.scores(x[0])
        scores = scores - scores.mean(axis=1, keepdims=True)
        shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        wide = np.concatenate([x[0], np.ones((9, 1))], axis=1)
        heads = [shares @ (wide @ weights.v[g].T) @ weights.out[h].T for h, g in enumerate(GROUP)]  # type: ignore[index]
        expected = np.sum(heads, axis=0) + weights.out_bias
        # what a softmax is blind to, the mean score of a row, a square is not
        size_of = 1 + subspace.scores(x[0]).mean(axis=1, keepdims=True)
        errors.append(float(np.abs(found - ((expected - weights.out_bias) * size_of + weights.out_bias)).max()))
    assert errors[0] < 0.05 and errors[1] < errors[0] / 60


@pytest.mark.parametrize("kind", [Activation.SILU, Activation.GELU, Activation.RELU], ids=lambda k: str(k.value))
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_a_feed_forward_is_kept_exactly(kind: Activation, gated: bool) -> None:
    up, gate = random(10, WIDTH + 1, seed=1), random(10, WIDTH + 1, seed=2) if gated else None
    down, bias, latent = random(WIDTH, 10, seed=3), random(WIDTH, seed=4), random(6, WIDTH + 1, seed=5)
    x = random(2, 20, WIDTH, seed=6)
    wide = np.concatenate([x, np.ones((2, 20, 1))], axis=2)
    hidden = activated(kind, wide @ up.T) if gate is None else activated(kind, wide @ gate.T) * (wide @ up.T)
    expected = hidden @ down.T + bias
    tensors = feed_forward_unit(up, gate, down, bias, latent, 8)
    common = {"gate": kind, "value": None, "latent": None, "rotary": False, "span": 8,
              "bias": PositionBias.TOEPLITZ}  # fmt: skip
    quad = GatedAttention(WIDTH, 10, 6, length=5, causal=True, **common)  # type: ignore[arg-type]
    assert np.allclose(gated_attention(quad, x, tensors), expected, atol=1e-12)
    chunks = MixedChunkAttention(WIDTH, 10, 6, chunk=8, causal=True, **common)  # type: ignore[arg-type]
    assert np.allclose(mixed_chunk_attention(chunks, x, chunked(tensors, 0.0)), expected, atol=1e-12)
    seen = feed_forward_unit(up, gate, down, bias, latent, 8, seen=0.1)
    assert np.abs(gated_attention(quad, x, seen) - expected).max() > 1e-3  # the control: tokens that are seen count


def test_far_tokens_count_alike() -> None:
    """Zero scores in the chunk, and `far` beyond: the mean of earlier chunks' values."""
    down, latent = random(WIDTH, 10, seed=3), random(6, WIDTH + 1, seed=5)
    up = random(10, WIDTH + 1, seed=1)
    tensors = chunked(feed_forward_unit(up, None, down, None, latent, 8), 0.5)
    tensors["distances"] = np.zeros(15)
    tensors["expand_weight"][10:20], tensors["expand_bias"][10:20] = up[:, :-1], up[:, -1]
    spec = MixedChunkAttention(WIDTH, 10, 6, chunk=8, causal=True, rotary=False, span=8, bias=PositionBias.TOEPLITZ,
                               gate=None, value=None, latent=None)  # fmt: skip
    x = random(1, 20, WIDTH, seed=6)
    values = x @ up[:, :-1].T + up[:, -1]
    expected = 0.5 * values[:, 16:] * values[:, :16].mean(axis=1, keepdims=True) @ down.T
    assert np.allclose(mixed_chunk_attention(spec, x, tensors)[:, 16:], expected)
