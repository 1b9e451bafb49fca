"""How far a lossy step moves one site's output, on recorded activations and without running the program."""

from __future__ import annotations

import numpy as np

from codegen.ops.grouped_query_attention.reference import shown
from codegen.ops.linear_attention.reference import linear_attention
from codegen.ops.token_mixing import token_mixing
from codegen.spec import GroupedQueryAttention, TokenMixing
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.match.operand_view import OperandView
from passes.match.operands import Traced
from passes.match.score_terms import apply_modifier
from passes.replay import products, recorded, rotated, softmax, widened_product
from passes.targets.replacement import Replacement


def site_error(flow: Flow, evidence: Evidence, replacement: Replacement) -> tuple[float, float] | None:
    """(error, floor): relative root-mean-square error of the attention output, and of an output of zeros.

    Where the output projection changes too, or goes, it is taken behind that. None where a q/k norm with its own
    weights, or a path that is not read, makes the keys' step not computable outside the program.
    """
    if replacement.mixing is not None:
        return _mixing_error(flow, replacement, replacement.mixing)
    if replacement.linear is not None:
        return _linear_error(flow, evidence, replacement)
    spec = replacement.grouped
    if spec.pattern:
        return _sparse_error(flow, evidence, spec)
    if replacement.site.headwise or any(operand.norm is not None for _, operand in replacement.site.shared):
        return None
    turned = "q_weight" in replacement.tensors
    heads = spec.heads
    if turned:
        query = _projected(flow, evidence.q, replacement, "q", heads)
    else:
        query = np.asarray(recorded(flow, evidence.path.q, evidence.q.tokens), dtype=np.float64)
    keys, values = (
        _shared_heads(flow, view, traced, replacement, role, count)
        for role, view, traced, count in (
            ("k", evidence.path.k, evidence.k, replacement.kv_heads[0]),
            ("v", evidence.path.v, evidence.v, replacement.kv_heads[1]),
        )
    )
    reference: Array = recorded(flow, evidence.path.output_view, evidence.q.tokens)
    decoupled = replacement.decoupled is not None
    keys, values = (
        x[:, np.arange(heads) * x.shape[1] // heads if decoupled else list(replacement.reads)] for x in (keys, values)
    )
    past = evidence.k.tokens.new.start
    output, alive = _attended(flow, evidence, query, keys, values, past)
    if past:
        reference, _ = _attended(flow, evidence, *_recorded_heads(flow, evidence, heads), past)
    if "out_weight" in replacement.tensors:
        output, reference = _behind(flow, replacement, output, reference)
        alive = np.asarray(alive.all(axis=1))
    size = float(np.linalg.norm(reference[alive]))
    return float(np.linalg.norm((output - reference)[alive])) / max(size, 1e-30), 1.0


def _attended(
    flow: Flow, evidence: Evidence, query: Array, keys: Array, values: Array, past: int
) -> tuple[Array, Array]:
    """(output [B, H, S, Dv], which queries see anything [B, H, S]) without the first `past` keys.

    Those are cached, and what a recording holds there is made up: no projection wrote it.
    """
    scores = products(query, keys, evidence.path.scale)
    for modifier in evidence.path.modifiers:
        scores = apply_modifier(flow, modifier, scores)
    scores[..., :past] = -np.inf
    alive = np.asarray((scores > -1e4).any(-1))
    return softmax(scores)[..., : values.shape[2]] @ values, alive


def _recorded_heads(flow: Flow, evidence: Evidence, heads: int) -> tuple[Array, Array, Array]:
    """Query, keys and values as recorded, each with all query heads."""
    path = evidence.path
    query, keys, values = (
        np.asarray(recorded(flow, view, traced.tokens), dtype=np.float64)
        for view, traced in ((path.q, evidence.q), (path.k, evidence.k), (path.v, evidence.v))
    )
    keys, values = (x[:, np.arange(heads) * x.shape[1] // heads] for x in (keys, values))
    return query, keys, values


def _sparse_error(flow: Flow, evidence: Evidence, spec: GroupedQueryAttention) -> tuple[float, float]:
    """Of the attention's output: the recorded operands, and fewer keys."""
    path = evidence.path
    query, keys, values = _recorded_heads(flow, evidence, spec.heads)
    reference = recorded(flow, path.output_view, evidence.q.tokens)
    scores = products(query, keys, path.scale)
    further = [m for m in path.modifiers if m.kind == "sinks"]
    for modifier in (m for m in path.modifiers if m.kind != "sinks"):
        scores = apply_modifier(flow, modifier, scores)
    alive = np.asarray((scores > -1e4).any(-1))
    scores = np.where(shown(spec, *scores.shape[-2:]), scores, -np.inf)
    for modifier in further:
        scores = apply_modifier(flow, modifier, scores)
    output = softmax(scores)[..., : values.shape[2]] @ values
    size = float(np.linalg.norm(reference[alive]))
    return float(np.linalg.norm((output - reference)[alive])) / max(size, 1e-30), 1.0


def _linear_error(flow: Flow, evidence: Evidence, replacement: Replacement) -> tuple[float, float]:
    """Of the attention's output, on the recorded operands without what is multiplied in behind their projections."""
    path, site, spec = evidence.path, replacement.site, replacement.linear
    assert spec is not None
    query, keys, values = (
        np.asarray(recorded(flow, view, traced.tokens), dtype=np.float64)
        for view, traced in ((path.q, evidence.q), (path.k, evidence.k), (path.v, evidence.v))
    )
    reference = recorded(flow, path.output_view, evidence.q.tokens)
    keys, values = (x[:, np.arange(site.kv_heads) * x.shape[1] // site.kv_heads] for x in (keys, values))
    scores = products(query, np.repeat(keys, spec.attention.group, axis=1), path.scale)
    for modifier in path.modifiers:
        scores = apply_modifier(flow, modifier, scores)
    alive = scores > -1e4
    query, keys = query / site.q.gain, keys / site.k.gain
    output = linear_attention(spec, query, keys, values, replacement.tensors, np.asarray(alive.any(axis=(1, 2))))
    rows = alive.any(-1)
    size = float(np.linalg.norm(reference[rows]))
    return float(np.linalg.norm((output - reference)[rows])) / max(size, 1e-30), 1.0


def _mixing_error(flow: Flow, replacement: Replacement, spec: TokenMixing) -> tuple[float, float] | None:
    """Of the whole sublayer, on all recorded tokens, padding left out where the mix heeds it. None where its output was
    not recorded."""
    around = replacement.around
    try:
        hidden, output = flow.value(around.input), flow.value(around.output)
    except KeyError:
        return None
    reference = np.asarray(around.by_token(output, hidden.shape), dtype=np.float64)
    mixed = token_mixing(spec, around.by_token(hidden, hidden.shape), replacement.shown, **replacement.tensors)
    if replacement.shown is not None:
        mixed, reference = mixed[replacement.shown], reference[replacement.shown]
    size = float(np.linalg.norm(reference))
    return float(np.linalg.norm(mixed - reference)) / max(size, 1e-30), 1.0


def _behind(flow: Flow, replacement: Replacement, new: Array, old: Array) -> tuple[Array, Array]:
    """[B, S, E] each: what the new and the old output projection make of [B, H, S, Dv]."""
    out = replacement.site.out
    assert out is not None
    before = np.asarray(out.matrix(flow.value(out.weight)), dtype=np.float64)
    before = before if out.out_first else before.T
    after = np.asarray(replacement.tensors["out_weight"], dtype=np.float64)
    results = [
        x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1) @ w.T for x, w in ((new, after), (old, before))
    ]
    if out.bias is not None and "out_bias" in replacement.tensors:
        results[0] = results[0] + (replacement.tensors["out_bias"] - np.asarray(flow.value(out.bias)).reshape(-1))
    return results[0], results[1]


def _shared_heads(
    flow: Flow, view: OperandView, traced: Traced, replacement: Replacement, role: str, heads: int
) -> Array:
    """[B, heads, T, D]: new keys or values, cached tokens and those of other streams included."""
    parts = [_projected(flow, t, replacement, f"{role}{n or ''}", heads) for n, t in enumerate(traced.parts)]
    return np.concatenate(parts, axis=2) if traced.streams else _with_cache(flow, view, traced, parts[0])


def _with_cache(flow: Flow, view: OperandView, traced: Traced, pooled: Array) -> Array:
    """[B, N, T, D]: cached tokens, as the mean of each group's heads, before the new ones."""
    cached = recorded(flow, view, traced.tokens)[:, :, : traced.tokens.new.start]
    batch, heads, length, dim = cached.shape
    groups = pooled.shape[1]
    if not length:
        return pooled
    merged = cached.reshape(batch, groups, heads // groups, length, dim).mean(axis=2)
    return np.concatenate([merged, pooled], axis=2)


def _projected(flow: Flow, traced: Traced, replacement: Replacement, role: str, heads: int) -> Array:
    """[B, heads, T, D]: queries, keys or values made with the new weights, rotated like the old ones."""
    weight = replacement.tensors[f"{role}_weight"]
    x = np.asarray(flow.value(traced.operand.projection.input), dtype=np.float64)
    projected = widened_product(x.reshape(-1, x.shape[-1]), weight.T)
    if (bias := replacement.tensors.get(f"{role}_bias")) is not None:
        projected = projected + np.asarray(bias, dtype=np.float64)
    columns = np.arange(len(weight)).reshape(heads, -1)
    return rotated(projected, columns, traced)
