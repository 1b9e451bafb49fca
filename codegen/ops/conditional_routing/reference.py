"""Float64 oracle of routing: who is routed, with which weight; those left out have weight 0."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.conditional import ConditionalAttention, ConditionalFeedForward, Router

Float64 = NDArray[np.float64]


def weights(
    router: Router, scores: NDArray[Any], shown: NDArray[np.bool_] | None = None, *, soft: bool = False
) -> Float64:
    """[B, S] of scores [B, S].

    Args:
        shown: [B, S], False for padding.
        soft: as in training.
    """
    wide = scores.astype(np.float64)
    seen = np.ones(wide.shape, bool) if shown is None else shown
    given = np.stack([_soft(router, s, m) if soft else m.astype(np.float64) for s, m in zip(wide, seen, strict=True)])
    order = np.argsort(np.where(seen, -wide, np.inf), axis=1, kind="stable")
    kept = np.zeros(wide.shape)
    np.put_along_axis(kept, order[:, : router.kept(wide.shape[1], soft=soft)], 1.0, axis=1)
    return np.asarray(kept * given)


def soft_top_k(router: Router, scores: NDArray[Any], shown: NDArray[np.bool_] | None = None) -> Float64:
    """[B, S] of scores [B, S]: numbers between 0 and 1 that add up to k, or nearly, before any are left out.

    From b = -s on, ``a = ε (log k - logsumexp((s + b) / ε))`` and ``b = -relu(s + a)`` in turn; at last
    ``exp((s + a + b) / ε)``.
    """
    wide = scores.astype(np.float64)
    seen = np.ones(wide.shape, bool) if shown is None else shown
    return np.stack([_soft(router, s, m) for s, m in zip(wide, seen, strict=True)])


def _soft(router: Router, scores: Float64, seen: NDArray[np.bool_]) -> Float64:
    """Of one sequence [S]."""
    s, found = scores[seen], np.zeros(len(scores))
    if s.size:
        a, b = 0.0, -s
        for _ in range(router.iterations):
            exponents = (s + b) / router.epsilon
            highest = exponents.max()
            total = highest + np.log(np.exp(exponents - highest).sum())
            a = router.epsilon * (np.log(router.budget(len(scores))) - total)
            b = -np.maximum(s + a, 0)
        found[seen] = np.exp((s + a + b) / router.epsilon)
    return found


def require_fitting(
    spec: ConditionalFeedForward | ConditionalAttention, x: tuple[int, ...], parameters: dict[str, tuple[int, ...]]
) -> None:
    """Raises ValueError where shapes contradict the spec."""
    if len(x) != 3 or x[-1] != spec.hidden:
        raise ValueError(f"x has shape {x}, which contradicts {spec}")
    if parameters != spec.shapes:
        wrong = {n for n in parameters.keys() | spec.shapes.keys() if parameters.get(n) != spec.shapes.get(n)}
        told = ", ".join(f"{n}: {parameters.get(n)} instead of {spec.shapes.get(n)}" for n in sorted(wrong))
        raise ValueError(f"parameters contradict {spec}: {told}")
