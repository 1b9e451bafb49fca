"""From an anchor (a softmax, or a fused attention operator) to its contractions and everything between.

Nothing here knows where operands come from; that is `operands`. A step that is not understood raises `NotUnderstood`
for a real attention, `Unrelated` for a softmax that mixes no tokens (`verdicts`). Upwards from the softmax
`score_walk` reads, downwards `weighted_values`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import CONTRACTIONS, LAYOUT, Flow, Node, Value
from passes.match.choosing import content_bias, is_chosen
from passes.match.contractions import contracts, first_contraction, query_and_key, require_projected
from passes.match.operand_view import OperandView
from passes.match.roundings import Rounding
from passes.match.score_walk import ScoreWalk
from passes.match.verdicts import (
    INTEGER_SCORES,
    LEARNED_QUERY,
    TURNED,
    FreeQuery,
    NotUnderstood,
    OtherInputs,
    SurelyAttention,
    Unrelated,
)
from passes.match.weighted_values import Mix, reaches_contraction, values_weighted_by
from passes.operator_kinds import PASS_THROUGH
from passes.site import Modifier

FUSED_ANCHORS = frozenset({"Attention", "GroupedQueryAttention"})
FOREIGN_ANCHORS = frozenset({"MultiHeadAttention"})


@dataclass(frozen=True)
class ScorePath:
    """One anchor, from operands to output.

    Attributes:
        q, k, v: the operands.
        scale: factor on q·k; modifiers follow in order.
        scores: softmax input, None if fused.
        output: the attention output per head, with its axes in `output_view`.
        nodes: indices of the contractions, modifiers and softmax.
    """

    anchor: Node
    q: OperandView
    k: OperandView
    v: OperandView
    scale: float
    modifiers: tuple[Modifier, ...]
    scores: Value | None
    output_view: OperandView
    nodes: tuple[int, ...]
    masked_rows_are_zero: bool = False
    turned: bool = False
    """Whether the softmax is given [keys, queries] and runs over the first of them."""
    shifted: bool = False
    """Whether a number per row is subtracted before the softmax: scores are then known up to it."""
    roundings: tuple[Rounding, ...] = ()
    """Fake quantisation between the contraction and the softmax, in order; `after` counts modifiers."""
    behind: int = 0
    """How many modifiers, the last ones, are applied to the weights: `scores` are without them."""
    ranks: tuple[int, ...] = ()
    """How many axes the scores have where each modifier meets them; empty for fused anchors."""
    weights_read: bool = False
    """Whether something else than the product with values reads the weights, too."""


def anchors(flow: Flow) -> list[Node]:
    """Every node that could be the heart of an attention, in execution order."""
    hearts = {"Softmax", "QLinearSoftmax"} | FUSED_ANCHORS | FOREIGN_ANCHORS
    return [n for n in flow.nodes if n.op in hearts]


def score_path(flow: Flow, anchor: Node) -> ScorePath:
    """Read one anchor. Raises NotUnderstood or Unrelated."""
    if (reason := anchor.attrs.get("unread")) is not None:
        raise NotUnderstood(str(reason))
    if anchor.op == "QLinearSoftmax":
        raise _integer_scores(flow, anchor)
    if anchor.domain == "com.microsoft" or anchor.op in FOREIGN_ANCHORS:
        raise NotUnderstood(f"the fused operator {anchor.domain}::{anchor.op} is not read yet")
    if anchor.op in FUSED_ANCHORS:
        return _fused(flow, anchor)
    return _written_out(flow, anchor)


ORDER_OF_OTHERS = (
    "its operator is causal over {keys} keys for {queries} queries, counted from the first of each, so it compares "
    "positions of different sequences (as where cross-attention is called without a mask); pass example_inputs with "
    "the mask that this model is used with"
)


_LEARNED = (
    "all that it attends to is learned (object queries that have not met the input yet), so its result is the same "
    "for every input and can be stored instead of computed"
)


def _fused(flow: Flow, anchor: Node) -> ScorePath:
    q, k, v = anchor.inputs[:3]
    mask = anchor.inputs[3] if len(anchor.inputs) > 3 else ""
    if len(anchor.inputs) > 4 and any(anchor.inputs[4:]):
        raise NotUnderstood("the attention operator keeps its own key/value cache (past_key, past_value inputs)")
    if not any(flow.is_fed(operand) for operand in (q, k, v)):
        raise NotUnderstood(_LEARNED)
    for operand in (k, v):
        require_projected(flow, operand)
    deep = [flow.data_dependent(x) for x in (q, k, v)]
    if deep == [False, True, True]:
        raise FreeQuery(q, NotUnderstood(LEARNED_QUERY))
    if not all(deep):
        named = [name for name, projected in zip(("queries", "keys", "values"), deep, strict=True) if not projected]
        raise NotUnderstood(f"its {' and '.join(named)} are no learned projection of what the program is given")
    modifiers: list[Modifier] = []
    if anchor.attrs.get("is_causal"):
        queries, keys = (flow.shape(v)[-2] for v in (q, k))
        if queries != keys and anchor.op == "Attention":
            raise OtherInputs(ORDER_OF_OTHERS.format(queries=queries, keys=keys))
        modifiers.append(Modifier("causal"))
    if softcap := float(anchor.attrs.get("softcap", 0.0)):
        modifiers.append(Modifier("softcap", number=softcap))
    if mask:
        if flow.data_dependent(mask) and (flow.value(mask).dtype == np.bool_ or is_chosen(flow, mask)):
            raise NotUnderstood(content_bias(flow, mask))
        modifiers.append(_mask_or_bias(flow, mask))
    heads, kv_heads = anchor.attrs.get("q_num_heads"), anchor.attrs.get("kv_num_heads")
    flat = len(flow.shape(q)) == 3 and bool(heads)
    default = (flow.shape(q)[-1] // (int(heads) if flat and heads else 1)) ** -0.5
    scale = float(anchor.attrs.get("scale") or default)

    def view(value: Value, count: int | None) -> OperandView:
        return OperandView(value, -2, -1, int(count) if flat and count else None)

    return ScorePath(
        anchor, view(q, heads), view(k, kv_heads), view(v, kv_heads), scale, tuple(modifiers), None,
        view(anchor.outputs[0], heads), (anchor.index,), masked_rows_are_zero=True,
    )  # fmt: skip


def _integer_scores(flow: Flow, softmax: Node) -> NotUnderstood | Unrelated:
    """What a softmax of integers is: an attention that is not read, or a projection's."""
    node: Node | None = softmax
    while node is not None:
        if flow.projection_operands(node) is not None:
            return Unrelated("it normalises a learned projection (a router, a classifier or weights for pooling)")
        if node.op in CONTRACTIONS:
            break
        node = flow.producer(node.inputs[0])
    return NotUnderstood(INTEGER_SCORES)


def _mask_or_bias(flow: Flow, value: Value) -> Modifier:
    if flow.value(value).dtype == np.bool_:
        return Modifier("mask", value, -np.inf)
    return Modifier("bias", value, 1.0)


def _written_out(flow: Flow, softmax: Node) -> ScorePath:
    if not any(flow.is_read(v) for v in softmax.outputs if v):
        raise Unrelated("nothing reads what it gives")
    rank = len(flow.shape(softmax.inputs[0]))
    axis = int(softmax.attrs.get("axis", -1)) % max(rank, 1)
    columns = rank >= 2 and axis == rank - 2
    mixes = values_weighted_by(flow, softmax.outputs[0], turned=columns)
    try:
        behind = mixes.masks if isinstance(mixes, Mix) else ()
        back = ScoreWalk(flow, turned=columns, behind=tuple(m for m, _ in behind)).run(softmax.inputs[0])
    except Unrelated as error:
        reason = _learned_alone(flow, softmax) or _samples(flow, softmax)
        if reason is not None:
            raise NotUnderstood(reason) from error
        raise
    except NotUnderstood as error:
        if isinstance(error, FreeQuery) and not isinstance(mixes, Mix):
            raise error.otherwise from error
        if isinstance(error, SurelyAttention):
            raise
        if not isinstance(mixes, Mix) and not reaches_contraction(flow, softmax):
            raise Unrelated(f"its result weighs no value tokens ({mixes or 'it reaches no contraction'})") from error
        raise
    if axis != rank - 1 and not columns:
        raise NotUnderstood(
            f"softmax runs over axis {axis} of the scores, not over one of the last two; have scores end in queries "
            "and keys behind batch and heads, which is the same numbers"
        )
    if mixes is None or isinstance(mixes, str):
        raise NotUnderstood(f"the attention weights do not lead to one contraction with values: {mixes or 'no reader'}")
    q, k, added = query_and_key(flow, back.contraction)
    if back.turned:
        if added is not None:
            raise NotUnderstood(TURNED)
        q, k = k, q
    alpha, beta = (float(back.contraction.attrs.get(n, 1.0)) for n in ("alpha", "beta"))
    first = () if added is None else (Modifier("bias", added, back.scale * beta),)
    contracted = flow.shape(back.contraction.outputs[0])
    if behind and any(m.kind == "sinks" for m in back.modifiers):
        raise NotUnderstood("the weights of scores with attention sinks are masked behind the softmax")
    met = (_by_window(m, contracted, shape) for m, shape in zip(back.modifiers, back.shapes, strict=True))
    before = (*first, *reversed([*met]))
    modifiers = (*before, *(_by_window(m, contracted, shape) for m, shape in behind))
    ranks = (*(3 for _ in first), *reversed(back.ranks), *(len(shape) for _, shape in behind))
    roundings = tuple(replace(r, after=len(before) - r.after) for r in reversed(back.roundings))
    return ScorePath(
        softmax, q, k, mixes.v, back.scale * alpha, modifiers, softmax.inputs[0], mixes.output,
        (back.contraction.index, *back.nodes, softmax.index, *mixes.nodes), mixes.zero_nan,
        columns, back.shifted, roundings, len(behind), ranks, mixes.read,
    )  # fmt: skip


def _learned_alone(flow: Flow, softmax: Node) -> str | None:
    """What to say of an attention among parameters; None if there is none: no product of two projections is scored."""
    if flow.data_dependent(softmax.inputs[0]):
        return None
    scores = first_contraction(flow, softmax.inputs[0])
    projected = scores is not None and all(first_contraction(flow, v) is not None for v in scores.inputs[:2])
    if not projected or flow.is_fed(scores.outputs[0] if scores else "") or not reaches_contraction(flow, softmax):
        return None
    return _LEARNED


def _samples(flow: Flow, softmax: Node) -> str | None:
    """What to say of weights for values that are sampled at computed places (deformable attention); None otherwise."""
    value = softmax.outputs[0]
    while len(readers := flow.live_readers(value)) == 1 and readers[0].op in LAYOUT | PASS_THROUGH:
        value = readers[0].outputs[0]
    for reader in readers:
        above = flow.ancestors(*(v for v in reader.inputs if v and v != value), stop=contracts)
        if reader.op in CONTRACTIONS | {"Mul"} and any("gridsample" in n.op.lower().replace("_", "") for n in above):
            return (
                "it weighs values that are sampled at computed places (deformable attention), by a projection of the "
                "query alone: there are no keys whose heads could be shared"
            )
    return None


def _by_window(modifier: Modifier, contracted: tuple[int, ...], met: tuple[int, ...]) -> Modifier:
    """A mask that meets scores [B * W, H, S, T] where they are laid out as [B, W, H, S, T]."""
    apart = len(contracted) == 4 and len(met) == 5 and met[2:] == contracted[1:] and modifier.value is not None
    return replace(modifier, windows=met[1]) if apart else modifier
