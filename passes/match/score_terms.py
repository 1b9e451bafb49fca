"""Masks, biases and other modifiers of scores as numbers."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array, Flow
from passes.site import Modifier

HIDDEN = 1e4
"""Scores so far down are masked; no score that counts is so far up either."""


def total_bias(flow: Flow, modifiers: tuple[Modifier, ...], shape: tuple[int, int, int, int]) -> Array:
    """All additive and masking modifiers as one float64 tensor of `shape` [B, H, S, T]."""
    bias = np.zeros(shape)
    for modifier in modifiers:
        bias = apply_modifier(flow, modifier, bias)
    return bias


def apply_modifier(flow: Flow, modifier: Modifier, scores: Array) -> Array:
    """One modifier on scores [B, H, S, T], float64; sinks make them wider."""
    if modifier.kind == "sinks":
        columns = _by_head(flow, modifier, scores.shape).astype(np.float64)
        wide = np.broadcast_to(columns, (*scores.shape[:-1], columns.shape[-1]))
        return np.concatenate([scores, wide], axis=-1)
    if modifier.kind == "softcap":
        assert modifier.number is not None
        return np.asarray(modifier.number * np.tanh(scores / modifier.number))
    if modifier.kind == "causal":
        rows, columns = scores.shape[-2:]
        keep = np.arange(columns)[None] <= np.arange(rows)[:, None] + (columns - rows)
        return np.where(keep, scores, -np.inf)
    assert modifier.number is not None
    operand = _by_head(flow, modifier, scores.shape)
    if modifier.kind == "temperature":
        return np.asarray(scores * operand.astype(np.float64) ** modifier.number)
    if modifier.kind == "bias":
        return np.asarray(scores + operand.astype(np.float64) * modifier.number)
    keep = operand.astype(bool) if modifier.kind == "mask" else ~operand.astype(bool)
    return np.where(keep, scores, modifier.number)


def _by_head(flow: Flow, modifier: Modifier, shape: tuple[int, ...]) -> Array:
    """A modifier's tensor, broadcastable to [B, H, S, T]."""
    assert modifier.value is not None
    array = flow.value(modifier.value)
    if modifier.windows is not None:
        return join_windows(array, modifier.windows, shape[0])
    if modifier.heads_first:
        return array.reshape(shape[1], shape[0], *array.shape[1:]).swapaxes(0, 1)
    return unfuse_heads(array, shape) if modifier.apart is None else join_heads(array, modifier.apart)


def join_heads(array: Array, apart: tuple[int, int]) -> Array:
    """What broadcasts to [B, KV, G, S, T], as what broadcasts to [B, KV * G, S, T]; `apart` is (KV, G)."""
    array = array.reshape((1,) * (5 - array.ndim) + array.shape)
    batch, *heads, rows, columns = array.shape
    if heads == [1, 1]:
        return array.reshape(batch, 1, rows, columns)
    return np.broadcast_to(array, (batch, *apart, rows, columns)).reshape(batch, -1, rows, columns)


def join_windows(array: Array, windows: int, batch: int) -> Array:
    """What broadcasts to [batch / windows, windows, H, S, T], as what broadcasts to [batch, H, S, T]."""
    array = array.reshape((1,) * (5 - array.ndim) + array.shape)
    wide = np.broadcast_to(array, (batch // windows, windows, *array.shape[2:]))
    return wide.reshape(batch, *array.shape[2:])


def unfuse_heads(array: Array, shape: tuple[int, ...]) -> Array:
    """A mask written over a fused batch·head axis, as [B, H, S, T]."""
    if array.ndim == 3 and array.shape[0] == shape[0] * shape[1] and array.shape[0] != 1:
        return array.reshape(shape[0], shape[1], *array.shape[1:])
    return array
