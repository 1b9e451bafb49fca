"""Refining merged heads: the derivative is the attention's own, and the result is nearer on inputs not seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import passes.attention_jacobian
import passes.merging_fit
import passes.refine
import rewriter
from passes.attention_jacobian import Features, Linearised
from passes.refine import Refinement, _changed, refined, refitted, tokens
from passes.targets import GroupedQuery
from passes.weights.conjugate_gradients import Vector, inner
from passes.weights.group import Blocks
from passes.weights.merge import Merged
from tests.targets.lossless_twin import legal_pool
from tests.zoo.models import ZOO

NAMES = ("bert-sdpa", "llama-sdpa", "phi-sdpa", "t5-sdpa")
LENGTH = 12


def job_of(name: str) -> tuple[Refinement, Merged]:
    """What `refined` is given at the first site of a model with random weights."""
    case = ZOO[name]
    found: list[tuple[Refinement, Merged]] = []

    def watched(job: Refinement, merged: Merged) -> Merged:
        found.append((job, merged))
        return refitted(job.site, merged, job.seen, job.reference)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.merging_fit, "refined", watched)
        rewriter.optimize(
            case.build().eval(), GroupedQuery(legal_pool(case)), verify=False,
            calibration=[case.inputs(4, LENGTH, 100 + seed) for seed in range(4)],
            example_inputs=case.inputs(2, LENGTH, 0),
        )  # fmt: skip
    return found[0]


@pytest.fixture(scope="module", params=[pytest.param(n, id=n) for n in NAMES])
def given(request: Any) -> Iterator[tuple[Refinement, Merged]]:
    yield job_of(request.param)


def features(job: Refinement, merged: Merged) -> list[Features]:
    return [
        Features.of(look, job.weights, merged.order, (job.keys, job.values), tokens(job.site, look, wished))
        for look, wished in zip(job.seen, job.reference, strict=True)
    ]


def random_change(job: Refinement, point: Linearised, seed: int) -> Vector:
    g = np.random.default_rng(seed)
    point_shapes = {
        "q": (point.queries.shape[1], job.site.head_dim, job.site.head_dim),
        "k": (len(job.keys), job.site.head_dim, point.features.keys.shape[-1]),
        "v": (len(job.values), job.site.value_dim, point.features.values.shape[-1]),
    }
    drawn = {name: g.normal(size=point_shapes[name]) for name in job.operands}
    return {name: x if name == "v" else job.blocks.commuting(x) for name, x in drawn.items()}


def test_products_with_the_jacobian_are_small_changes_of_the_weights(given: tuple[Refinement, Merged]) -> None:
    job, merged = given
    seen = features(job, merged)[0]
    here = Linearised.at(seen, merged.weights)
    change = random_change(job, here, 1)
    assert set(change) == {"q", "k", "v"}
    step = 1e-3
    there, back = (Linearised.at(seen, _changed(job, merged, change, s)) for s in (step, -step))
    measured = (back.left - there.left) / (2 * step)
    error = np.abs(measured - here.moved(change)).max() / np.abs(measured).max()
    assert error < 2e-2
    for name in change:  # control: each operand counts
        without = {other: x for other, x in change.items() if other != name}
        assert np.abs(measured - here.moved(without)).max() / np.abs(measured).max() > 5e-2, name


def test_the_other_product_is_the_adjoint(given: tuple[Refinement, Merged]) -> None:
    job, merged = given
    here = Linearised.at(features(job, merged)[0], merged.weights)
    change = random_change(job, here, 2)
    answer = (
        np.random.default_rng(3).normal(size=here.left.shape).astype(np.float32) * here.features.look.asking[..., None]
    )
    pulled = here.pulled(answer, job.operands)
    forward, backward = float((here.moved(change) * answer).sum()), inner(pulled, change)
    assert forward == pytest.approx(backward, rel=1e-3)
    for name in change:  # control
        assert abs(inner({name: pulled[name]}, {name: change[name]})) > 1e-3 * abs(forward), name


def test_refined_heads_are_nearer_where_they_were_fitted(given: tuple[Refinement, Merged]) -> None:
    job, merged = given
    plain, better = refitted(job.site, merged, job.seen, job.reference), refined(job, merged)
    missed = [sum(Linearised.at(f, m.weights).missed for f in features(job, merged)) for m in (merged, plain, better)]
    assert missed[2] < 0.97 * missed[1] < missed[0]


def test_thinned_products_are_those_of_the_queries_left(given: tuple[Refinement, Merged]) -> None:
    job, merged = given
    here = Linearised.at(features(job, merged)[0], merged.weights)
    thin, change = here.thinned(3), random_change(job, here, 4)
    np.testing.assert_allclose(thin.moved(change), here.moved(change)[:, ::3], rtol=1e-4, atol=1e-5)
    only = np.zeros_like(here.left)
    only[:, ::3] = here.left[:, ::3]
    some, every = thin.pulled(thin.left, job.operands), here.pulled(here.left, job.operands)
    for name, matrix in here.pulled(only, job.operands).items():
        size = np.abs(matrix).max()
        np.testing.assert_allclose(some[name], matrix, atol=1e-4 * size)
        assert np.abs(every[name] - matrix).max() > 1e-2 * size, name  # control: the others count


def test_some_queries_at_a_time_come_to_the_same(given: tuple[Refinement, Merged], monkeypatch: Any) -> None:
    job, merged = given
    seen = features(job, merged)[0]
    whole = Linearised.at(seen, merged.weights)
    monkeypatch.setattr(passes.attention_jacobian, "_QUERIES", 5)
    parted, change = Linearised.at(seen, merged.weights), random_change(job, whole, 5)
    assert [len(whole.spans), len(parted.spans)] == [1, 3]
    pairs = sum(len(range(*s.indices(LENGTH))) * len(range(*t.indices(LENGTH))) for s, t in parted.spans)
    causal = not np.triu(whole.attention, 1).any()
    assert pairs == (5 * 5 + 5 * 10 + 2 * 12 if causal else LENGTH * LENGTH)
    size = np.abs(whole.moved(change)).max()
    np.testing.assert_allclose(parted.moved(change), whole.moved(change), atol=1e-5 * size)
    pulled = parted.pulled(whole.left, job.operands)
    less = replace(parted, spans=parted.spans[1:])  # control: each stretch counts
    assert np.abs(less.moved(change) - whole.moved(change)).max() > 1e-2 * size
    for name, matrix in whole.pulled(whole.left, job.operands).items():
        np.testing.assert_allclose(pulled[name], matrix, atol=1e-5 * np.abs(matrix).max())
        assert np.abs(less.pulled(whole.left, job.operands)[name] - matrix).max() > 1e-2 * np.abs(matrix).max()


def test_some_queries_tell_the_curvature(given: tuple[Refinement, Merged], monkeypatch: pytest.MonkeyPatch) -> None:
    job, merged = given
    thinned: list[int] = []
    whole = Linearised.thinned

    def watched(point: Linearised, every: int) -> Linearised:
        thinned.append(every)
        return whole(point, every)

    monkeypatch.setattr(Linearised, "thinned", watched)
    monkeypatch.setattr(passes.refine, "EACH", 0)
    monkeypatch.setattr(passes.refine, "CURVED", sum(int(look.asking.sum()) for look in job.seen) // 2)
    found = refined(job, merged)
    assert set(thinned) == {2}
    plain = refitted(job.site, merged, job.seen, job.reference)
    left = [sum(Linearised.at(f, m.weights).missed for f in features(job, merged)) for m in (plain, found)]
    assert left[1] < 0.97 * left[0]


@pytest.mark.parametrize("name", ["llama-sdpa", "phi-sdpa"])
def test_rotations_are_left_in_peace(name: str) -> None:
    """Keys of a refined attention still turn with their positions: changes act within pairs."""
    job, _ = job_of(name)
    blocks = Blocks.of(job.site.head_dim, job.freedom.partner)  # no pair counts as still
    g = np.random.default_rng(0)
    matrix = g.normal(size=(3, job.site.head_dim, 2 * job.site.head_dim))
    kept = blocks.commuting(matrix)
    np.testing.assert_allclose(blocks.commuting(kept), kept)
    assert float((kept * (matrix - kept)).sum()) == pytest.approx(0.0, abs=1e-9)
    look = job.seen[0]
    keys = look.keys(job.weights)[:, :1].astype(np.float32)
    one = blocks.commuting(g.normal(size=(job.site.head_dim, job.site.head_dim))).astype(np.float32)
    outside, inside = look.turned_keys(keys) @ one.T, look.turned_keys(keys @ one.T)
    assert np.abs(outside - inside).max() < 1e-3 * np.abs(inside).max()
    other = g.normal(size=one.shape).astype(np.float32)  # control: a matrix that mixes pairs does not commute
    outside, inside = look.turned_keys(keys) @ other.T, look.turned_keys(keys @ other.T)
    assert np.abs(outside - inside).max() > 0.1 * np.abs(inside).max()


def test_free_features_stay_free() -> None:
    blocks = Blocks.of(6, (2, 1, 0, 3, 4, 5))
    matrix = np.random.default_rng(0).normal(size=(6, 6))
    kept = blocks.commuting(matrix)
    free = np.array([1, 3, 4, 5])
    np.testing.assert_array_equal(kept[np.ix_(free, free)], matrix[np.ix_(free, free)])
    assert not kept[np.ix_([0, 2], free)].any() and not kept[np.ix_(free, [0, 2])].any()
