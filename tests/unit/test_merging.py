"""Merging heads, on plain arrays: turned copies are recovered, perturbed ones are not, and the answers are the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.dataflow import Array
from passes.weights.alignment import align_keys, align_values, procrustes
from passes.weights.group import Blocks, Group, KeyMerge, ValueMerge, complex_moment, weight_moments
from passes.weights.joint import join_keys, join_values
from passes.weights.merge import Freedom, contiguous, merge_heads
from passes.weights.projection import SiteWeights
from tests.targets.turned_twin import rotation

DIM, VALUE_DIM, WIDTH, MODEL = 8, 6, 30, 20
HALF = (4, 5, 6, 7, 0, 1, 2, 3)
INTERLEAVED = (1, 0, 3, 2, 5, 4, 7, 6)
PARTIAL = (2, 3, 0, 1, 4, 5, 6, 7)
PARTNERS = pytest.mark.parametrize(
    "partner", [None, HALF, INTERLEAVED, PARTIAL], ids=["unrotated", "half", "interleaved", "partial"]
)


def random_group(seed: int, *, members: int = 3, readers: int = 2) -> Group:
    g = np.random.default_rng(seed)
    heads = members * readers
    q, k = g.normal(size=(heads, DIM, WIDTH + 1)), g.normal(size=(members, DIM, WIDTH + 1))
    v, out = g.normal(size=(members, VALUE_DIM, WIDTH + 1)), g.normal(size=(heads, MODEL, VALUE_DIM))
    return Group(q, k, v, out, tuple(h // readers for h in range(heads)))


def twin(seed: int, partner: tuple[int, ...] | None, *, wrong: float = 0.0) -> Group:
    """All key/value heads are turned copies of one; `wrong` is noise on the last one's."""
    group, g = random_group(seed), np.random.default_rng(seed + 1)
    q, k, v = group.q.copy(), group.k.copy(), group.v.copy()
    assert group.out is not None
    out = group.out.copy()
    for j in range(group.members):
        turn, turn_v = rotation(DIM, partner, g), rotation(VALUE_DIM, None, g)
        k[j], v[j] = turn @ group.k[0], turn_v @ group.v[0]
        for h in (h for h, r in enumerate(group.reads) if r == j):
            q[h], out[h] = turn @ group.q[h], group.out[h] @ turn_v.T
    k[-1] += wrong * g.normal(size=k[-1].shape)
    v[-1] += wrong * g.normal(size=v[-1].shape)
    return Group(q, k, v, out, group.reads)


def stacked(heads: Array) -> Array:
    return heads.reshape(-1, heads.shape[-1])


def score_error(group: Group, merge: KeyMerge, partner: tuple[int, ...] | None, seed: int = 0) -> float:
    """Worst relative error of differences of scores between two keys, over heads, with the rotation applied."""
    g = np.random.default_rng(seed)
    turn = rotation(DIM, partner, g) if partner is not None else np.eye(DIM)
    free = [d for d in range(DIM) if partner is None or partner[d] == d]
    turn[np.ix_(free, free)] = np.eye(len(free))
    x, y, z = (np.append(g.normal(size=WIDTH), 1.0) for _ in range(3))
    worst = 0.0
    for h, r in enumerate(group.reads):
        q = group.q[h] @ x
        old = [q @ turn @ group.k[r] @ t for t in (y, z)]
        new = [(merge.query[h] @ q) @ turn @ (merge.key @ stacked(group.k) @ t) for t in (y, z)]
        worst = max(worst, abs((old[0] - old[1]) - (new[0] - new[1])) / (abs(old[0]) + abs(old[1])))
    return float(worst)


def output_error(group: Group, merge: ValueMerge, seed: int = 0) -> float:
    """Relative error of the attention output for inputs of which each head attends to its own; rows sum to one."""
    g = np.random.default_rng(seed)
    assert group.out is not None
    old, new = np.zeros(MODEL), merge.offset.copy()
    for h, r in enumerate(group.reads):
        x = np.append(g.normal(size=WIDTH), 1.0)
        old += group.out[h] @ group.v[r] @ x
        new += merge.out[h] @ merge.value @ stacked(group.v) @ x
    return float(np.abs(old - new).max() / np.abs(old).max())


def key_merges(group: Group, partner: tuple[int, ...] | None) -> dict[str, KeyMerge]:
    moments, blocks = weight_moments(group), Blocks.of(DIM, partner)
    return {
        "aligned": align_keys(group, moments, blocks),
        "joint": join_keys(group, moments, blocks, centred=True),
        "joint, not centred": join_keys(group, moments, blocks, centred=False),
    }


def value_merges(group: Group) -> dict[str, ValueMerge]:
    moments = weight_moments(group)
    return {
        "aligned": align_values(group, moments),
        "joint": join_values(group, moments, offset=True),
        "joint, no output bias": join_values(group, moments, offset=False),
    }


@PARTNERS
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_turned_copies_are_recovered_and_perturbed_ones_are_not(partner: tuple[int, ...] | None, seed: int) -> None:
    same, other = twin(seed, partner), twin(seed, partner, wrong=0.2)
    for name, merge in key_merges(same, partner).items():
        assert score_error(same, merge, partner) < 1e-8 and merge.lost < 1e-12, name
    for name, merge in value_merges(same).items():
        assert output_error(same, merge) < 1e-7 and merge.lost < 1e-12, name
    assert all(m.lost > 1e-4 for m in (*key_merges(other, partner).values(), *value_merges(other).values()))
    assert all(output_error(other, m) > 1e-3 for m in value_merges(other).values())


@PARTNERS
def test_averaging_does_not_recover_turned_copies(partner: tuple[int, ...] | None) -> None:
    group = twin(3, partner)
    mean = np.tile(np.eye(DIM), (1, 3)) / 3
    assert score_error(group, KeyMerge(mean, np.tile(np.eye(DIM), (6, 1, 1)), 1.0), partner) > 0.05


def test_a_rotation_that_does_not_commute_is_not_undone_under_a_rotary_embedding() -> None:
    """Control: heads turned freely are no twins where features rotate in pairs."""
    group = twin(5, None)
    for merge in key_merges(group, HALF).values():
        assert merge.lost > 0.01


@PARTNERS
def test_what_is_merged_still_commutes_with_the_rotation(partner: tuple[int, ...] | None) -> None:
    if partner is None:
        return
    turn = rotation(DIM, partner, np.random.default_rng(1))
    free = [d for d in range(DIM) if partner[d] == d]
    turn[np.ix_(free, free)] = np.eye(len(free))
    wide = np.kron(np.eye(3), turn)
    for merge in key_merges(random_group(2), partner).values():
        np.testing.assert_allclose(merge.key @ wide, turn @ merge.key, atol=1e-10)
        for query in merge.query:
            np.testing.assert_allclose(query @ turn, turn @ query, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_other_subspace_keeps_more(seed: int) -> None:
    """The joint key head against random ones and the aligned one: no score error under the moments is smaller."""
    group = random_group(seed)
    moments, g = weight_moments(group), np.random.default_rng(seed)

    def error(merge: KeyMerge) -> float:
        total = 0.0
        for h, r in enumerate(group.reads):
            reading = np.zeros((DIM, 3 * DIM))
            reading[:, r * DIM : (r + 1) * DIM] = np.eye(DIM)
            gap = reading - merge.query[h].T @ merge.key
            total += float(np.trace(moments.queries[h] @ gap @ moments.spread @ gap.T))
        return total

    joint = join_keys(group, moments, Blocks.of(DIM, None), centred=True)
    aligned = align_keys(group, moments, Blocks.of(DIM, None))
    assert error(joint) <= error(aligned) * (1 + 1e-9)
    for _ in range(3):
        nudged = replace(joint, key=joint.key + 1e-3 * g.normal(size=joint.key.shape))
        assert error(joint) <= error(nudged) * (1 + 1e-9)


def test_the_complex_moment_is_that_of_complex_keys() -> None:
    g = np.random.default_rng(0)
    samples = g.normal(size=(500, 3 * DIM)) @ g.normal(size=(3 * DIM, 3 * DIM))
    moment = samples.T @ samples / len(samples)
    pair = np.array([1, 5])
    z = np.stack([samples[:, j * DIM + 1] + 1j * samples[:, j * DIM + 5] for j in range(3)], axis=1)
    np.testing.assert_allclose(complex_moment(moment, 3, pair), z.T @ z.conj() / len(z), atol=1e-10)


def test_alignment_restores_the_norm() -> None:
    group = random_group(1)
    merged = align_values(group, weight_moments(group)).value @ stacked(group.v)
    wanted = np.mean([np.linalg.norm(v) for v in group.v])
    assert np.linalg.norm(merged) == pytest.approx(wanted)
    assert np.linalg.norm(group.v.mean(axis=0)) < 0.8 * wanted


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_procrustes_turns_are_orthogonal_and_agree_more_than_none(seed: int) -> None:
    heads = np.random.default_rng(seed).normal(size=(4, DIM, WIDTH))
    moment = stacked(heads) @ stacked(heads).T
    turns = procrustes(moment, 4)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.tile(np.eye(DIM), (4, 1, 1)), atol=1e-10)
    together = np.linalg.norm(sum(t @ h for t, h in zip(turns, heads, strict=True)))
    assert together >= np.linalg.norm(heads.sum(axis=0)) * (1 - 1e-12)


# ------------------------------------------------------------------ one attention


def site(seed: int = 0, *, bias: bool = True) -> SiteWeights:
    group = random_group(seed, members=4, readers=2)
    g = np.random.default_rng(seed + 7)
    return SiteWeights(group.q, group.k, group.v, group.out, g.normal(size=MODEL) if bias else None)


GROUP = (0, 0, 1, 1, 2, 2, 3, 3)


@pytest.mark.parametrize("method", ["mean", "aligned", "joint"])
def test_operands_that_must_be_averaged_are(method: str) -> None:
    weights = site()
    freedom = Freedom(keys="a norm", values="no output")
    merged = merge_heads(weights, GROUP, contiguous(4, 2), method, freedom)  # type: ignore[arg-type]
    np.testing.assert_allclose(merged.weights.k, weights.k.reshape(2, 2, DIM, -1).mean(axis=1))
    np.testing.assert_allclose(merged.weights.v, weights.v.reshape(2, 2, VALUE_DIM, -1).mean(axis=1))
    np.testing.assert_array_equal(merged.weights.q, weights.q)
    assert merged.weights.out is not None and weights.out is not None
    np.testing.assert_array_equal(merged.weights.out, weights.out)
    assert dict(merged.notes) == ({} if method == "mean" else {"keys": "a norm", "values": "no output"})
    assert not merged.exact


def test_heads_in_any_groups_keep_their_own_queries() -> None:
    merged = merge_heads(site(), GROUP, ((0, 3), (2, 1)), "joint", Freedom())
    assert merged.order == (0, 1, 6, 7, 4, 5, 2, 3) and not merged.in_place
    assert merge_heads(site(), GROUP, contiguous(4, 2), "joint", Freedom()).in_place


def test_groups_of_different_sizes_are_no_groups() -> None:
    with pytest.raises(ValueError, match="one size"):
        merge_heads(site(), GROUP, ((0, 1, 2), (3,)), "joint", Freedom())


def test_the_output_bias_moves_only_if_there_is_one() -> None:
    with_bias, without = (merge_heads(site(bias=b), GROUP, contiguous(4, 2), "joint", Freedom()) for b in (True, False))
    assert without.weights.out_bias is None
    assert with_bias.weights.out_bias is not None and site().out_bias is not None
    assert np.abs(with_bias.weights.out_bias - site().out_bias).max() > 1e-3
