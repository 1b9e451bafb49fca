"""Conjugate gradients over several arrays: exact after as many steps as there are numbers, nearer with each."""

from __future__ import annotations

import numpy as np
import pytest

from passes.weights.conjugate_gradients import Vector, added, conjugate_gradients, inner


def problem(seed: int = 0) -> tuple[np.ndarray, Vector]:
    """(a positive definite matrix on 7 numbers, a right side of two arrays)"""
    g = np.random.default_rng(seed)
    root = g.normal(size=(7, 7))
    return root @ root.T + np.eye(7), {"a": g.normal(size=(2, 2)), "b": g.normal(size=3)}


def as_row(vector: Vector) -> np.ndarray:
    return np.concatenate([vector["a"].reshape(-1), vector["b"]])


def as_vector(row: np.ndarray) -> Vector:
    return {"a": row[:4].reshape(2, 2), "b": row[4:]}


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
def test_all_steps_solve_the_system(preconditioned: bool) -> None:
    matrix, right = problem()
    scale = np.diag(matrix) if preconditioned else np.ones(7)
    found = conjugate_gradients(
        lambda v: as_vector(matrix @ as_row(v)), right, lambda v: as_vector(as_row(v) / scale), 7
    )
    np.testing.assert_allclose(as_row(found), np.linalg.solve(matrix, as_row(right)), atol=1e-6)


def test_each_step_comes_nearer_and_few_are_not_enough() -> None:
    matrix, right = problem(1)
    exact = np.linalg.solve(matrix, as_row(right))
    errors = []
    for steps in range(7):
        found = conjugate_gradients(lambda v: as_vector(matrix @ as_row(v)), right, lambda v: v, steps)
        off = as_row(found) - exact
        errors.append(float(off @ matrix @ off))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[3] > 1e-6


def test_nothing_to_solve_is_zero() -> None:
    matrix, right = problem()
    found = conjugate_gradients(lambda v: as_vector(matrix @ as_row(v)), added(right, right, -1.0), lambda v: v, 5)
    assert inner(found, found) == 0.0
