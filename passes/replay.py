"""Replay: recompute an attention from its description alone and compare with what the program computed.

A description that does not reproduce the recorded operands, scores and output is wrong, whatever it looks
like. Tolerances follow the dtype the program computes in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import Array, Flow, Node, Value
from passes.match.canonical_order import in_blocks
from passes.match.operand_view import OperandView
from passes.match.operands import Tokens, Traced
from passes.match.roundings import Rounding, executed, operand_roundings, rounded_in_branches, unrounded
from passes.match.score_terms import apply_modifier
from passes.match.scores import ScorePath
from passes.site import Projection

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2, "int8": 6e-2}
"""Largest relative error by dtype; half precisions round rotations twice, "int8" stands for programs that quantise
activations on the way. A wrong row map is off by about 1."""


def tolerance(flow: Flow, values: Iterable[Value]) -> float:
    """For what is computed from the program's weights and recorded as these values: that of the coarsest dtype."""
    return max(TOLERANCES[flow.dtype], *(TOLERANCES.get(flow.dtypes.get(v, flow.dtype), 0.0) for v in values))


FAR = 1e3
"""exp(-1000) is 0 in every floating dtype."""

_WIDENED = 1 << 19
"""Numbers of a weight that are held in float64 at a time."""


@dataclass(frozen=True)
class Replay:
    """Relative errors of one replay, worst element over the tensor's largest magnitude."""

    q: float
    k: float
    v: float
    scores: float
    output: float
    rounding: float = 0.0
    """How far the output would be from what it is if nothing were quantised between score and softmax; no error."""

    @property
    def worst(self) -> float:
        return max(self.q, self.k, self.v, self.scores, self.output)


def replay(flow: Flow, path: ScorePath, q: Traced, k: Traced, v: Traced) -> Replay:
    """Recompute q, k, v from weights and maps, then scores and output, on the flow's recording."""
    operands = ((path.q, q), (path.k, k), (path.v, v))
    seen = [recorded(flow, view, t.tokens) for view, t in operands]
    rebuilt = [_rebuilt(flow, view, t, s) for (view, t), s in zip(operands, seen, strict=True)]
    mine, errors = [m for m, _ in rebuilt], [error for _, error in rebuilt]
    rounds = flow.dtype == "int8"  # roundings add up: check link by link, each from what was recorded before it
    heads = mine[0].shape[1]
    query, *spread = seen if rounds else mine
    keys, values = (_spread(x, heads) for x in spread)
    scores = products(query, keys, path.scale)
    before = len(path.modifiers) - path.behind
    for count, modifier in enumerate(path.modifiers[:before]):
        scores = executed(flow, (r for r in path.roundings if r.after == count), scores)
        scores = apply_modifier(flow, modifier, scores)
    scores = executed(flow, (r for r in path.roundings if r.after == before), scores)
    scores = _as_computed(scores, flow.dtype)
    score_error = 0.0
    if path.scores is not None:
        seen_scores = _by_head(np.asarray(flow.value(path.scores), dtype=np.float64), path, q.tokens, scores.shape)
        pair = (_from_top(scores), _from_top(seen_scores)) if path.shifted else (scores, seen_scores)
        score_error = relative(*_shown(*pair))
        scores = seen_scores if rounds else scores
    for modifier in path.modifiers[before:]:
        scores = apply_modifier(flow, modifier, scores)
    output = softmax(scores)[..., : values.shape[2]] @ values
    seen_output = recorded(flow, path.output_view, q.tokens)
    rounding = 0.0
    if path.roundings:
        clean = products(query, keys, path.scale)
        for modifier in path.modifiers:
            clean = apply_modifier(flow, modifier, clean)
        unrounded_output = softmax(clean)[..., : values.shape[2]] @ values
        rounding = _output_error(unrounded_output, output, scores)
    return Replay(errors[0], errors[1], errors[2], score_error, _output_error(output, seen_output, scores), rounding)


def _rebuilt(flow: Flow, view: OperandView, traced: Traced, seen: Array) -> tuple[Array, float]:
    """(the recorded operand with each stream's tokens recomputed, worst relative error of these)."""
    mine, errors = seen.copy(), []
    for part in traced.parts:
        made = rebuild(flow, part, view)
        wished = _without_roundings(flow, view, part)
        wished = seen if wished is None else wished
        errors += [relative(made, wished[:, :, part.tokens.new]), _norm_error(flow, part), _gains_error(flow, part)]
        if errors[-3] < float("inf"):
            mine[:, :, part.tokens.new] = made
    return mine, max(errors)


def _without_roundings(flow: Flow, view: OperandView, traced: Traced) -> Array | None:
    """The operand [B, H, T, D] as the program would compute it if it quantised nothing on the way; None where `rebuild`
    executes all of that.

    Each branch of a rotation is rounded and cut off by itself, which the description knows nothing of.
    """
    operand = traced.operand
    if flow.dtype != "int8" or not rounded_in_branches(flow, operand.projection.output, view.value):
        return None
    starts = {flow.nodes[operand.projection.node].outputs[0]} | ({operand.norm.output} if operand.norm else set())
    clean = unrounded(flow, view.value, starts)
    return recorded(
        replace(flow, read=lambda name: clean if name == view.value else flow.read(name)), view, traced.tokens
    )


def rebuild(flow: Flow, traced: Traced, view: OperandView | None = None) -> Array:
    """[B, H, T, D] of new tokens, from the projection's input and weight, the columns and the rotation.

    With `view`, where the anchor reads the operand, fake quantisation on the way is executed too.
    """
    operand, tokens = traced.operand, traced.tokens
    projection = operand.projection
    if operand.headwise:
        assert view is not None
        return _run_by_head(flow, traced, view)
    matrix = flow.nodes[projection.node].outputs[0]
    early, late = operand_roundings(flow, matrix, projection.output, view.value) if view is not None else ((), ())
    projected = project(flow, projection, early)
    if operand.norm is not None:
        projected = _normed(flow, traced, projected)
    out = rotated(projected, tokens.columns, traced)
    return executed(flow, late, out if tokens.offset is None else out + tokens.offset)


def _run_by_head(flow: Flow, traced: Traced, view: OperandView) -> Array:
    """An operand whose path is not read: it is run for each head on that head's columns alone."""
    operand, tokens = traced.operand, traced.tokens
    whole = project(flow, operand.projection).reshape(flow.shape(operand.projection.output))
    nodes, out = [flow.nodes[i] for i in operand.path], recorded(flow, view, tokens)
    for head in range(operand.heads):
        given = columns_alone(whole, operand.columns[head])
        mine = [h for h, group in enumerate(traced.group) if group == head]
        out[:, mine] = recorded(run_between(flow, nodes, operand.projection.output, given), view, tokens)[:, mine]
    return out


def columns_alone(projected: Array, columns: Array) -> Array:
    """A projection's output with zeros in all other columns."""
    given = np.zeros_like(projected)
    given[..., columns] = projected[..., columns]
    return given


def run_between(flow: Flow, nodes: Iterable[Node], start: Value, given: Array) -> Flow:
    """The flow with `given` in the place of `start`, and what `nodes` make of that."""
    held = {start: given.astype(flow.value(start).dtype)}
    for node in nodes:
        arguments = [held[v] if v in held else flow.value(v) if v else None for v in node.inputs]
        with np.errstate(all="ignore"):  # zeros may be normalised
            held.update(zip(node.outputs, node.evaluate(arguments), strict=False))
    return replace(flow, read=lambda name: held[name] if name in held else flow.read(name))


def rotated(projected: Array, columns: Array, traced: Traced) -> Array:
    """[B, H, T, D] out of [rows, features]: `columns` [H, D] of each token, turned as the operand is."""
    tokens, rows = traced.tokens, traced.tokens.rows
    out = projected[rows[:, None, :, None], columns[None, :, None, :]] * tokens.own[:, None]
    if tokens.other is not None and traced.operand.rotary is not None:
        partner = columns[:, np.asarray(traced.operand.rotary.partner)]
        out = out + projected[rows[:, None, :, None], partner[None, :, None, :]] * tokens.other[:, None]
    return np.asarray(out)


def project(flow: Flow, projection: Projection, roundings: Iterable[Rounding] = ()) -> Array:
    """[rows, features], float64: the projection applied to its recorded input; `roundings` come before the bias."""
    x = np.asarray(flow.value(projection.input), dtype=np.float64)
    w = projection.matrix(flow.value(projection.weight))
    product = widened_product(x.reshape(-1, x.shape[-1]), w.T if projection.out_first else w)
    out = executed(flow, roundings, product)
    if projection.bias is not None:
        bias = np.asarray(flow.value(projection.bias), dtype=np.float64).reshape(-1)
        positions = projection.bias_positions(np.arange(projection.features))
        out = out + np.where(positions < 0, 0.0, bias[positions])
    return np.asarray(out)


def widened_product(x: Array, matrix: Array) -> Array:
    """``x @ matrix`` for a few rows `x` [rows, in], block by block of `matrix` [in, out], which may be mapped from a
    file that no memory holds.

    float64, but for matrices of single precision or less that take more than one block: products within a block are in
    float32 then, sums of blocks in float64 (relative error 2e-7, hundreds of times below what a replay may be off).
    """
    step = max(1, _WIDENED // matrix.shape[1])
    dtype = np.float32 if matrix.dtype.itemsize <= 4 and step < len(matrix) else np.float64
    total = np.zeros((len(x), matrix.shape[1]))
    x = x.astype(dtype)
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        total += x[:, part] @ matrix[part].astype(dtype, copy=False)
    return total


def _normed(flow: Flow, traced: Traced, projected: Array) -> Array:
    """The norm's recorded output, laid out like the projection's."""
    assert traced.operand.norm is not None and traced.tokens.normed is not None
    rows, columns = traced.tokens.normed
    out = np.full(projected.shape, np.nan)
    out[rows, columns] = np.asarray(flow.value(traced.operand.norm.output), dtype=np.float64).reshape(-1)
    return out


def _norm_error(flow: Flow, traced: Traced) -> float:
    """What enters the norm against the projection it is said to come from."""
    if traced.operand.norm is None or traced.tokens.normed is None:
        return 0.0
    seen = np.asarray(flow.value(traced.operand.norm.input), dtype=np.float64).reshape(-1)
    projected = project(flow, traced.operand.projection)
    if traced.tokens.turned is None:
        return relative(projected[traced.tokens.normed], seen)
    laid_out = np.full(projected.shape, np.nan)
    laid_out[traced.tokens.normed] = seen
    tokens, (own, other) = traced.tokens, traced.tokens.turned
    mine = rotated(projected, tokens.columns, replace(traced, tokens=replace(tokens, own=own, other=other)))
    return relative(mine, laid_out[tokens.rows[:, None, :, None], tokens.columns[None, :, None, :]])


def _gains_error(flow: Flow, traced: Traced) -> float:
    """What leaves the norm against what enters it times the gains of each head, at a scale of each token's own."""
    norm, tokens = traced.operand.norm, traced.tokens
    if norm is None or norm.gains is None or tokens.normed is None:
        return 0.0
    rows, columns = tokens.normed
    width = int(columns.max()) + 1
    given, seen = (np.full((int(rows.max()) + 1, width), np.nan) for _ in range(2))
    given[rows, columns] = np.asarray(flow.value(norm.input), dtype=np.float64).reshape(-1)
    seen[rows, columns] = np.asarray(flow.value(norm.output), dtype=np.float64).reshape(-1)
    gain, shift = np.full(width, np.nan), np.zeros(width)
    own = traced.operand.columns
    gain[own] = np.asarray(flow.value(norm.gains.gain), dtype=np.float64).reshape(-1)[norm.gains.places]
    if norm.gains.shift is not None:
        shift[own] = np.asarray(flow.value(norm.gains.shift), dtype=np.float64).reshape(-1)[norm.gains.places]
    given, seen = (x[tokens.rows.reshape(-1)][:, own] for x in (given, seen))  # [tokens, heads, dim]
    axes = (2,) if norm.per_head else (1, 2)
    if norm.kind == "layer":
        given = given - given.mean(axis=axes, keepdims=True)
    mine, wished = given * gain[own], seen - shift[own]
    energy = (mine * mine).sum(axis=axes, keepdims=True)
    scale = (mine * wished).sum(axis=axes, keepdims=True) / np.maximum(energy, 1e-30)
    return relative(scale * mine, wished)


def _spread(array: Array, heads: int) -> Array:
    """Key/value heads as `heads` query heads read them."""
    return array[:, np.arange(heads) * array.shape[1] // heads]


def recorded(flow: Flow, view: OperandView, tokens: Tokens) -> Array:
    """The anchor's recorded operand as [B, H, T, D]."""
    array = np.asarray(flow.value(view.value), dtype=np.float64)
    if view.heads:
        return array.reshape(*array.shape[:-1], view.heads, -1).transpose(0, 2, 1, 3)
    array = view.arranged(array)
    lead, heads = tokens.axes[:-2], len(tokens.columns)
    tail = array.shape[-2:]
    if lead == ("b",):
        return array[:, None]
    if in_blocks(lead):
        return np.moveaxis(array, lead.index("h"), 2).reshape(-1, heads, *tail)
    if lead in {("b", "h"), ("bh",)}:  # the output may have one axis for both where the query has two, or the reverse
        return array.reshape(-1, heads, *tail)
    return array.reshape(heads, -1, *tail).swapaxes(0, 1)


def _by_head(seen: Array, path: ScorePath, tokens: Tokens, shape: tuple[int, ...]) -> Array:
    """Recorded scores as [B, H, S, T]."""
    batch, heads, queries, keys = shape
    seen = seen.reshape(-1, keys, queries).swapaxes(1, 2) if path.turned else seen
    if in_blocks(tokens.axes):
        return np.moveaxis(seen, tokens.axes.index("h"), 2).reshape(shape)
    if tokens.axes[0] in ("h", "hb"):
        return seen.reshape(heads, batch, queries, keys).swapaxes(0, 1)
    return seen.reshape(shape)


def products(query: Array, keys: Array, scale: float) -> Array:
    """[B, H, S, T], every query [B, H, S, D] with every key [B, H, T, D]; matmul has them done by BLAS, einsum not."""
    scores: Array = query @ keys.swapaxes(-1, -2) * scale
    return scores


def softmax(scores: Array) -> Array:
    """Over the last axis; rows that are masked everywhere give zeros."""
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.asarray(np.divide(weights, total, out=np.zeros_like(weights), where=total > 0))


def _as_computed(scores: Array, dtype: str) -> Array:
    """Round to the program's range: rows that are masked everywhere rely on how float32 absorbs small numbers."""
    if dtype == "float64":
        return scores
    with np.errstate(over="ignore"):  # a mask of the lowest number on a negative score is minus infinity there too
        return scores.astype(np.float32).astype(np.float64)


def _from_top(scores: Array) -> Array:
    return np.asarray(scores - scores.max(-1, keepdims=True))


def _shown(a: Array, b: Array) -> tuple[Array, Array]:
    """Two scores without what both hide: so far below their row's largest, or masked outright, softmax sees nothing."""
    hidden = [~(s > np.maximum(s.max(-1, keepdims=True) - FAR, -1e4)) for s in (a, b)]
    both = hidden[0] & hidden[1]
    return np.where(both, 0.0, a), np.where(both, 0.0, b)


def _output_error(mine: Array, seen: Array, scores: Array) -> float:
    """Rows that are masked everywhere are left out: programs disagree on them (NaN, zeros, a uniform mean)."""
    alive = (scores > -1e4).any(-1)
    return relative(mine[alive], seen[alive])


def relative(mine: Array, seen: Array) -> float:
    """Largest difference over the largest recorded magnitude; infinite if shapes or finiteness differ."""
    if mine.shape != seen.shape or not np.isfinite(mine).all():
        return float("inf")
    if mine.size == 0:
        return 0.0
    return float(np.abs(mine - seen).max() / max(float(np.abs(seen).max()), 1e-6))
