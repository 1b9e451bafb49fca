"""How far a lossy step moves one site's output, on recorded activations and without running the program."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.match.operands import Traced
from passes.match.scores import OperandView, apply_modifier
from passes.replay import rebuild, recorded, rotated, softmax
from passes.targets.replacement import Replacement


def site_error(flow: Flow, evidence: Evidence, replacement: Replacement) -> tuple[float, float] | None:
    """(error, floor): relative root-mean-square error of the attention output, and of an output of zeros.

    None where a q/k norm with its own weights makes the keys' step not computable outside the program.
    """
    if evidence.k.operand.norm is not None or evidence.v.operand.norm is not None:
        return None
    query = rebuild(flow, evidence.q)
    keys = _with_cache(flow, evidence.path.k, evidence.k, _pooled(flow, evidence.k, replacement, "k"))
    values = _with_cache(flow, evidence.path.v, evidence.v, _pooled(flow, evidence.v, replacement, "v"))
    reference = recorded(flow, evidence.path.output_view, evidence.q.tokens)
    index = np.arange(query.shape[1]) // replacement.spec.group
    scores = np.einsum("bhsd,bhtd->bhst", query, keys[:, index]) * evidence.path.scale
    for modifier in evidence.path.modifiers:
        scores = apply_modifier(flow, modifier, scores)
    output = np.einsum("bhst,bhtd->bhsd", softmax(scores)[..., : values.shape[2]], values[:, index])
    alive = (scores > -1e4).any(-1)
    size = float(np.linalg.norm(reference[alive]))
    return float(np.linalg.norm((output - reference)[alive])) / max(size, 1e-30), 1.0


def _with_cache(flow: Flow, view: OperandView, traced: Traced, pooled: Array) -> Array:
    """[B, N, T, D]: cached tokens, as the mean of each group's heads, before the new ones."""
    cached = recorded(flow, view, traced.tokens)[:, :, : traced.tokens.new.start]
    batch, heads, length, dim = cached.shape
    groups = pooled.shape[1]
    if not length:
        return pooled
    merged = cached.reshape(batch, groups, heads // groups, length, dim).mean(axis=2)
    return np.concatenate([merged, pooled], axis=2)


def _pooled(flow: Flow, traced: Traced, replacement: Replacement, role: str) -> Array:
    """[B, N, T, D]: keys or values made with the new weights, rotated like the old ones."""
    weight = np.asarray(replacement.tensors[f"{role}_weight"], dtype=np.float64)
    x = np.asarray(flow.value(traced.operand.projection.input), dtype=np.float64)
    projected = x.reshape(-1, x.shape[-1]) @ weight.T
    if (bias := replacement.tensors.get(f"{role}_bias")) is not None:
        projected = projected + np.asarray(bias, dtype=np.float64)
    columns = np.arange(len(weight)).reshape(replacement.spec.kv_heads, -1)
    return rotated(projected, columns, traced)
