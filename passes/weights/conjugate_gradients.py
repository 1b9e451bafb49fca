"""Linear systems too large to write down: preconditioned conjugate gradients on several arrays at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from passes.dataflow import Array

Vector = dict[str, Array]
"""Arrays by name that together are one vector."""

_DONE = 1e-8
"""Part of the first residual's energy, as the preconditioner measures it, at which nothing is left to do."""


def conjugate_gradients(
    apply: Callable[[Vector], Vector], right: Vector, precondition: Callable[[Vector], Vector], steps: int
) -> Vector:
    """An approximate solution of ``apply(x) = right`` after at most so many steps, from zero.

    `apply` and `precondition` are symmetric and positive definite on the space in which `right` lies. Stopped early,
    the solution keeps to directions that the preconditioner and the data agree on.
    """
    solution = {name: 0.0 * array for name, array in right.items()}
    left = dict(right)
    along = turned = precondition(left)
    energy = first = inner(left, turned)
    for _ in range(steps):
        if not energy > _DONE * first:
            break
        image = apply(along)
        step = energy / max(inner(along, image), 1e-300)
        solution = added(solution, along, step)
        left = added(left, image, -step)
        turned = precondition(left)
        before, energy = energy, inner(left, turned)
        along = added(turned, along, energy / before)
    return solution


def inner(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """The inner product of two vectors of the same names."""
    return sum(float((a[name] * b[name]).sum()) for name in a)


def added(a: Mapping[str, Array], b: Mapping[str, Array], factor: float = 1.0) -> Vector:
    """``a + factor b``."""
    return {name: a[name] + factor * b[name] for name in a}
