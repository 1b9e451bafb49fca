"""Distances between rows of a model's answer: cosine of each, KL divergence of the distributions that logits mean."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array


def cosines(before: Array, after: Array) -> Array:
    """Cosine of each pair of rows, [N, D] and [N, D] to [N]; 1 where both rows are zero."""
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    dots = np.einsum("nd,nd->n", before, after)
    both_zero = ~before.any(axis=-1) & ~after.any(axis=-1)
    result: Array = np.where(both_zero, 1.0, dots / np.where(norms > 0, norms, 1.0))
    return result


def divergences(before: Array, after: Array) -> Array:
    """KL(softmax(before) ‖ softmax(after)) of each pair of rows in nats, [N, D] and [N, D] to [N]."""
    log_p, log_q = _log_softmax(before), _log_softmax(after)
    result: Array = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)
    return result


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
