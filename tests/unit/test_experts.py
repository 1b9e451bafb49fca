"""Dense blocks become mixtures of experts: exact where nothing is left out, nearer where it is fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from codegen.ops.activation.reference import activate
from codegen.ops.mixture_of_experts.reference import mixture_of_experts
from codegen.spec import Activation, MixtureOfExperts
from passes.dataflow import Array
from passes.weights.experts import (
    DenseBlock,
    Products,
    balanced_clusters,
    central_router,
    copies,
    fitted_router,
    split,
)

HIDDEN, INNER, EXPERTS = 12, 32, 4


def block(gated: bool, seed: int = 0) -> DenseBlock:
    random = np.random.default_rng(seed)

    def array(*shape: int) -> Array:
        return random.normal(size=shape).astype(np.float32)

    gate = (array(HIDDEN, INNER), array(INNER)) if gated else (None, None)
    return DenseBlock(array(HIDDEN, INNER), array(INNER, HIDDEN), gate[0], array(INNER), gate[1], array(HIDDEN))


def dense(weights: DenseBlock, x: Array, kind: Activation = Activation.SILU) -> Array:
    assert weights.up_bias is not None and weights.down_bias is not None
    up = x.astype(np.float64) @ weights.up + weights.up_bias
    hidden = activate(kind, up)
    if weights.gate is not None:
        assert weights.gate_bias is not None
        hidden = activate(kind, x @ weights.gate + weights.gate_bias) * up
    return np.asarray(hidden @ weights.down + weights.down_bias)


def spec(gated: bool, inner: int, capacity_factor: float) -> MixtureOfExperts:
    return MixtureOfExperts(
        HIDDEN, inner, EXPERTS, activation=Activation.SILU, capacity_factor=capacity_factor, gated=gated,
        down_bias=False, bias=True,
    )  # fmt: skip


def even_router() -> dict[str, Array]:
    return {"router_weight": np.zeros((HIDDEN, EXPERTS), np.float32), "router_bias": np.zeros(EXPERTS, np.float32)}


def tokens(count: int = 20, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(1, count, HIDDEN)).astype(np.float32)


def off(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_split_block_with_room_for_all_tokens_is_the_dense_one(gated: bool) -> None:
    weights, x = block(gated), tokens()
    clusters = balanced_clusters(weights.up.T, EXPERTS)
    parameters = split(weights, clusters, np.full(EXPERTS, EXPERTS)) | even_router()
    whole = spec(gated, INNER // EXPERTS, EXPERTS)
    assert off(mixture_of_experts(whole, x, **parameters).output, dense(weights, x)) < 1e-6
    unscaled = split(weights, clusters, np.ones(EXPERTS)) | even_router()
    assert off(mixture_of_experts(whole, x, **unscaled).output, dense(weights, x)) > 0.1
    narrow = replace(whole, capacity_factor=1.0)
    assert off(mixture_of_experts(narrow, x, **parameters).output, dense(weights, x)) > 0.1
    wrong = clusters.copy()
    wrong[0, 0] = clusters[1, 0]
    twice = split(weights, wrong, np.full(EXPERTS, EXPERTS)) | even_router()
    assert off(mixture_of_experts(whole, x, **twice).output, dense(weights, x)) > 1e-3


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_copies_that_see_all_tokens_are_the_dense_block_whatever_the_router(gated: bool) -> None:
    weights, x = block(gated), tokens()
    router = {"router_weight": tokens(EXPERTS)[0].T, "router_bias": np.arange(EXPERTS, dtype=np.float32)}
    parameters = copies(weights, EXPERTS, np.ones(EXPERTS)) | router
    assert off(mixture_of_experts(spec(gated, INNER, EXPERTS), x, **parameters).output, dense(weights, x)) < 1e-6


def test_clusters_are_balanced_and_find_what_is_active_together() -> None:
    random = np.random.default_rng(0)
    true = random.permutation(np.repeat(np.arange(4), 8))
    profiles = random.normal(size=(4, 50))[true] + 0.2 * random.normal(size=(32, 50))
    found = balanced_clusters(profiles, 4)
    assert found.shape == (4, 8) and sorted(found.reshape(-1)) == list(range(32))
    assert all(len(set(true[members])) == 1 for members in found)
    assert np.array_equal(found, balanced_clusters(profiles, 4))
    mixed = balanced_clusters(random.normal(size=(32, 50)), 4)
    assert any(len(set(true[members])) > 1 for members in mixed), "the control: noise has no such clusters"
    with pytest.raises(ValueError, match="do not divide"):
        balanced_clusters(profiles, 5)


def test_a_fitted_router_gives_probabilities_in_proportion_to_importance() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(400, HIDDEN))
    logits = x @ random.normal(size=(HIDDEN, EXPERTS)) + random.normal(size=EXPERTS)
    router = fitted_router(x, np.exp(logits - logits.max(axis=1, keepdims=True)), ridge=1e-9)
    got = x @ router["router_weight"] + router["router_bias"]

    def probabilities(scores: Array) -> Array:
        return np.asarray(np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True))

    found, wanted = probabilities(got), probabilities(logits)
    assert np.mean(np.argmax(found, axis=1) == np.argmax(wanted, axis=1)) > 0.95
    shuffled = fitted_router(x, np.exp(logits - logits.max(axis=1, keepdims=True))[::-1])
    other = x @ shuffled["router_weight"] + shuffled["router_bias"]
    assert np.mean(np.argmax(other, axis=1) == np.argmax(wanted, axis=1)) < 0.7


def test_a_router_without_data_points_at_each_experts_own_columns() -> None:
    weights = block(gated=False)
    parameters = split(weights, balanced_clusters(weights.up.T, EXPERTS), np.ones(EXPERTS))
    router = central_router(parameters)
    means = parameters["up_weight"] / np.linalg.norm(parameters["up_weight"], axis=1, keepdims=True)
    scores = means.mean(axis=2) @ router["router_weight"]
    assert np.array_equal(np.argmax(scores, axis=1), np.arange(EXPERTS))
    larger = {**parameters, "up_weight": parameters["up_weight"] * 3, "up_bias": parameters["up_bias"] * 3}
    assert all(np.allclose(a, central_router(larger)[n], atol=1e-6) for n, a in router.items())


def test_fitted_scales_undo_what_gates_take_away() -> None:
    random = np.random.default_rng(0)
    outputs, scales = random.normal(size=(EXPERTS, 30, HIDDEN)), np.array([1.0, 2.0, 3.0, 0.5])
    gates = random.random((30, EXPERTS)) * (random.random((30, EXPERTS)) > 0.3)
    wanted = np.einsum("ne,enh,e->nh", gates, outputs, scales)
    found, explained = Products.of(outputs, wanted).scales(gates)
    assert np.allclose(found, scales, rtol=1e-3) and 0.9 < explained <= 1.0001
    other, less = Products.of(outputs, wanted + 5 * random.normal(size=wanted.shape)).scales(gates)
    assert not np.allclose(other, scales, rtol=1e-2) and less < explained


def test_every_token_counts_in_a_fit_however_large_it_is() -> None:
    random = np.random.default_rng(0)
    outputs, gates = random.normal(size=(EXPERTS, 40, HIDDEN)), np.ones((40, EXPERTS))
    right = np.full((40, 1), 2.0)
    right[0] = 9.0
    wanted = right * outputs.sum(axis=0)
    size = np.ones((40, 1))
    size[0] = 1000.0
    found, _ = Products.of(outputs * size, wanted * size).scales(gates)
    assert np.abs(found - 2.0).max() < 1.0, "one huge token does not decide"
