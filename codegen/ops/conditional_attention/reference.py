"""Float64 oracle of conditional attention: both branches attend from all tokens to all, masks and weights select."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_routing.reference import require_fitting, weights

Float64 = NDArray[np.float64]


def conditional_attention(
    spec: ConditionalAttention,
    x: NDArray[Any],
    shown: NDArray[np.bool_] | None = None,
    *,
    soft: bool = False,
    **parameters: NDArray[Any],
) -> Float64:
    """[B, S, hidden] of x [B, S, hidden] and parameters of `ConditionalAttention.shapes`.

    Args:
        shown: [B, S], False for padding.
        soft: as in training.

    Raises:
        ValueError: if x or a parameter contradicts the spec, or a parameter is given or missing against it.
    """
    require_fitting(spec, x.shape, {name: array.shape for name, array in parameters.items()})
    held = {name: array.astype(np.float64) for name, array in parameters.items()}
    wide, at = x.astype(np.float64), np.arange(x.shape[1])
    seen = np.ones(x.shape[:2], bool) if shown is None else shown
    distance = at[None, :] - at[:, None]
    near = (np.abs(distance) <= spec.radius) & seen[:, None, :]
    query = weights(spec.queries, wide @ held["query_router"], seen, soft=soft)
    scores = wide @ held["key_router"]
    key = weights(spec.keys, scores, seen, soft=soft)
    some = np.broadcast_to(_kept(spec, scores, seen, soft=soft)[:, None, :], near.shape)
    light = _branch(spec, "light", wide, wide, near, held)
    heavy = _branch(spec, "heavy", wide, key[..., None] * wide, some, held)
    found = light + query[..., None] * heavy
    return found + held["output_bias"] if spec.output_bias else found


def _kept(spec: ConditionalAttention, scores: Float64, seen: NDArray[np.bool_], *, soft: bool) -> NDArray[np.bool_]:
    """Who is a key: told by ranks, since a weight may have become 0."""
    order = np.argsort(np.where(seen, -scores, np.inf), axis=1, kind="stable")
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order[:, : spec.keys.kept(scores.shape[1], soft=soft)], True, axis=1)
    return kept & seen


def _branch(
    spec: ConditionalAttention,
    name: str,
    x: Float64,
    source: Float64,
    visible: NDArray[np.bool_],
    held: dict[str, Float64],
) -> Float64:
    """Attention from x to what is `visible` [B, S, S] of source [B, S, hidden]."""

    def projected(role: str, given: Float64) -> Float64:
        product = given @ held[f"{name}_{role}_weight"]
        product = product + held.get(f"{name}_{role}_bias", 0.0)
        return product.reshape(*given.shape[:2], -1, spec.head_dim).transpose(0, 2, 1, 3)

    scores = spec.scale * projected("query", x) @ projected("key", source).swapaxes(2, 3)
    if spec.buckets:
        at = np.arange(x.shape[1])
        heads = slice(spec.light_heads) if name == "light" else slice(spec.light_heads, None)
        scores = scores + held["distances"][:, heads][bucket(spec, at[None, :] - at[:, None])].transpose(2, 0, 1)
    scores = np.where(visible[:, None], scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    exponents = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = exponents.sum(axis=-1, keepdims=True)
    attended = exponents / np.where(total > 0, total, 1) @ projected("value", source)
    return np.asarray(attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ held[f"{name}_output_weight"])


def bucket(spec: ConditionalAttention, distance: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which number is added at a key's position minus the query's: T5's, for both directions.

    Half of the buckets are for keys behind the query. Of each half, half are for one distance each, the others for
    ranges that grow by a constant factor up to `farthest`.
    """
    half = spec.buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), exact).astype(np.float32)  # in float32, as published models were trained
    steps = np.log(far / np.float32(exact)) / np.float32(np.log(spec.farthest / exact)) * np.float32(half - exact)
    rank = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(exact + steps.astype(np.int64), half - 1))
    return np.asarray(rank + np.where(distance > 0, half, 0))
