"""Light and heavy branches, and routers, out of weights: pure functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from codegen.activation import Activation
from codegen.conditional import ConditionalFeedForward, Router
from codegen.ops.conditional_feed_forward.reference import conditional_feed_forward
from passes.weights.experts import DenseBlock, hidden_layer
from passes.weights.light_block import Light, branches, fitted, selected
from passes.weights.router import RouterSums, amplified

RANDOM = np.random.default_rng(3)
E, F, f = 6, 10, 4


def block(*, gated: bool, biased: bool) -> DenseBlock:
    def normal(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
        return RANDOM.normal(size=shape).astype(np.float32)

    plain = DenseBlock(normal(E, F), normal(F, E), gate=normal(E, F) if gated else None)
    if not biased:
        return plain
    return replace(plain, up_bias=normal(F), gate_bias=normal(F) if gated else None, down_bias=normal(E))


def answer(dense: DenseBlock, kind: Activation, light: Light, x: np.ndarray, fraction: float) -> np.ndarray:  # type: ignore[type-arg]
    spec = ConditionalFeedForward(
        E, f, F, Router(fraction), kind, gated=dense.gate is not None, up_bias=dense.up_bias is not None,
        down_bias=light.bias is not None,
    )  # fmt: skip
    return conditional_feed_forward(spec, x, soft=False, **branches(dense, light))


@pytest.mark.parametrize("gated", [pytest.param(False, id="plain"), pytest.param(True, id="gated")])
@pytest.mark.parametrize("biased", [pytest.param(False, id="bare"), pytest.param(True, id="biased")])
def test_a_routed_token_gets_what_the_block_gave_whatever_is_light(gated: bool, biased: bool) -> None:
    dense, kind = block(gated=gated, biased=biased), Activation.GELU
    x = RANDOM.normal(size=(1, 64, E)).astype(np.float32)
    wanted = hidden_layer(dense, kind, x[0]) @ dense.down + (0 if dense.down_bias is None else dense.down_bias)
    odd = Light(np.array([1, 2, 5, 9]), RANDOM.normal(size=(f, E)), RANDOM.normal(size=E), RANDOM.normal(size=E))
    for light in (odd, selected(dense, f), fitted(dense, kind, f, x[0])):
        assert np.allclose(answer(dense, kind, light, x, 1.0)[0], wanted, atol=1e-4)
        half = np.abs(answer(dense, kind, light, x, 0.5)[0] - wanted).max(axis=1)
        assert (half < 1e-4).sum() == 32 and half.max() > 1e-2  # those that are not routed differ


def test_fitting_loses_less_and_routes_those_that_lose_most() -> None:
    dense, kind = block(gated=True, biased=True), Activation.SILU
    x, other = (RANDOM.normal(size=(1, 400, E)).astype(np.float32) + 0.5 for _ in range(2))
    wanted = hidden_layer(dense, kind, other[0]) @ dense.down + dense.down_bias

    def loss(light: Light, fraction: float) -> float:
        return float(np.linalg.norm(answer(dense, kind, light, other, fraction)[0] - wanted))

    chosen, made = selected(dense, f), fitted(dense, kind, f, x[0])
    assert loss(made, 1e-9) < loss(chosen, 1e-9)
    assert loss(made, 0.25) < loss(replace(made, router=-made.router), 0.25)
    assert len(made.notes) == 2


def test_routers_find_a_direction_that_is_there() -> None:
    x, u = RANDOM.normal(size=(500, E)), RANDOM.normal(size=E)
    sums = RouterSums()
    for rows in (slice(0, 200), slice(200, None)):
        sums.add(x[rows], 3 * x[rows] @ u + 7)
    found = sums.solve()
    assert found.explained > 0.99 and np.std(x @ found.direction) == pytest.approx(1.0)
    cosine = float(found.direction @ u / np.linalg.norm(found.direction) / np.linalg.norm(u))
    assert cosine > 0.999
    noise = RouterSums()
    noise.add(x, RANDOM.normal(size=500))
    assert noise.solve().explained < 0.1  # the control
    even = RouterSums()
    even.add(x, np.ones(500))
    assert not even.solve().direction.any()


def test_what_a_map_enlarges_most_is_its_first_singular_vector() -> None:
    m = RANDOM.normal(size=(E, 9))
    found = amplified(E, lambda v: m @ (m.T @ v))
    vectors, sizes, _ = np.linalg.svd(m)
    assert abs(found @ vectors[:, 0]) > 0.99 > abs(found @ vectors[:, 1]) and found[np.abs(found).argmax()] > 0
    assert not amplified(E, lambda v: 0 * v).any() and sizes[0] > 0
