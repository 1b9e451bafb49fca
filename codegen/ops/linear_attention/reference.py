"""Float64 oracle of linear attention: all weights written out, near ones and far ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.spec import FeatureMap, LinearAttention

Float64 = NDArray[np.float64]


def linear_attention(
    spec: LinearAttention,
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    parameters: Mapping[str, NDArray[Any]],
    shown: NDArray[Any] | None = None,
) -> Float64:
    """[B, heads, S, value_dim] of q [B, heads, S, D], k [B, kv_heads, T, D], v [B, kv_heads, T, value_dim].

    `parameters` are those of the spec's `shapes`; keys are hidden where `shown` [B, T] is False.

    Raises ValueError if an operand contradicts the spec.
    """
    check(spec, q, k, v, parameters)
    weights = attention_weights(spec, q, k, parameters, shown)
    total = weights.sum(-1, keepdims=True)
    return weights @ _repeated(spec, v) / np.where(total > 0, total, 1.0)


def attention_weights(
    spec: LinearAttention,
    q: NDArray[Any],
    k: NDArray[Any],
    parameters: Mapping[str, NDArray[Any]],
    shown: NDArray[Any] | None = None,
) -> Float64:
    """[B, heads, S, T], before they are divided by their sum."""
    wide = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    q, k = q.astype(np.float64), _repeated(spec, k)
    scores = q @ np.swapaxes(k, -1, -2) * spec.attention.scale
    near, seen = visible(spec, *scores.shape[-2:])
    hidden = np.zeros(k.shape[0::2], bool) if shown is None else ~np.asarray(shown, bool)
    seen = seen & ~hidden[:, None, None, :]
    nearby = np.where(near & seen, scores, -np.inf)
    greatest = nearby.max(-1, keepdims=True, initial=-np.inf)
    greatest = np.where(np.isneginf(greatest), 0.0, greatest)
    gain = np.exp(wide["log_gain"])[:, None, None]
    far = gain * (features(spec, q, wide, "query_map") @ np.swapaxes(features(spec, k, wide, "key_map"), -1, -2))
    if spec.features is FeatureMap.FAVOR:
        far = far * np.exp(-greatest)
    return np.asarray(np.exp(nearby - greatest) + np.where(~near & seen, far, 0.0))


def visible(spec: LinearAttention, queries: int, keys: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[S, T] each: whether a key is near, and whether the order lets the query see it."""
    rows, columns = np.arange(keys - queries, keys)[:, None], np.arange(keys)
    apart = abs(rows // spec.chunk - columns // spec.chunk)
    return apart <= 1, columns <= rows if spec.attention.causal else np.ones_like(apart, bool)


def check(spec: LinearAttention, q: Any, k: Any, v: Any, parameters: Mapping[str, Any]) -> None:
    """For arrays and tensors alike. Raises ValueError if a shape contradicts the spec."""
    plain = spec.attention
    wanted = {"q": (plain.heads, plain.head_dim), "k": (plain.kv_heads, plain.head_dim)}
    wanted["v"] = (plain.kv_heads, plain.value_dim)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4 or (x.shape[1], x.shape[3]) != wanted[name]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, which contradicts {spec}")
    if k.shape[2] != v.shape[2] or q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries, {k.shape[2]} keys and {v.shape[2]} values do not go together")
    found = {name: tuple(value.shape) for name, value in parameters.items()}
    if found != spec.shapes:
        raise ValueError(f"parameters of shapes {found} contradict {spec.shapes}")


def _repeated(spec: LinearAttention, x: NDArray[Any]) -> Float64:
    return np.repeat(x.astype(np.float64), spec.attention.group, axis=1)


def features(spec: LinearAttention, x: Float64, parameters: Mapping[str, Float64], own: str) -> Float64:
    """[B, heads, tokens, features] of x [B, heads, tokens, D]."""
    plain = spec.attention
    x = x * plain.scale**0.5
    if spec.features is FeatureMap.FAVOR:
        directions = np.repeat(parameters["directions"], plain.group, axis=0)
        exponents = x @ np.swapaxes(directions, -1, -2) - (x**2).sum(-1, keepdims=True) / 2
        return np.asarray(np.exp(exponents) / spec.directions**0.5)
    x = x * plain.head_dim**0.25
    if spec.features is FeatureMap.ELU1:
        return np.asarray(np.where(x > 0, x + 1, np.exp(np.minimum(x, 0.0))))
    matrix = parameters[own]
    turned = x @ np.swapaxes(np.repeat(matrix, plain.heads // len(matrix), axis=0), -1, -2)
    return np.concatenate([_softmax(turned), _softmax(-turned)], axis=-1)


def _softmax(x: Float64) -> Float64:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))
