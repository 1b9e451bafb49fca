"""Query heads that lie along two axes, groups and the heads of a group: read as the one axis that they are.

Programs that never repeat keys also write q [B, KV, G, S, D], keys and values [B, KV, 1, T, D] (or, in an Einsum,
[B, KV, T, D]), and scores [B, KV, G, S, T]. All of it is described as if heads were never taken apart: operands by a
view that joins the axes, masks by what they are once joined, the output by the value in which heads are one axis again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Value
from passes.match.operands import Tokens, Traced
from passes.match.scores import NotUnderstood, OperandView, ScorePath
from passes.provenance import PASS_THROUGH
from passes.replay import recorded
from passes.site import Modifier

STEPS = 6
"""Layout operators between heads apart and heads together; more than any program needs."""


def joined(flow: Flow, path: ScorePath) -> ScorePath:
    """The path with operands and masks seen as if the heads of [B, KV, G, ...] were one axis; the output comes later."""
    q, k, v = (_view(flow, view) for view in (path.q, path.k, path.v))
    lead = _lead(flow, path.q)
    ranks = path.ranks or (len(flow.shape(path.q.value)),) * len(path.modifiers)
    modifiers = tuple(_modifier(flow, m, r, lead[1:]) for m, r in zip(path.modifiers, ranks, strict=True))
    output = _view(flow, path.output_view)
    return replace(path, q=q, k=k, v=v, modifiers=modifiers, output_view=output)


def require_groups(flow: Flow, path: ScorePath, k: Traced, v: Traced) -> None:
    """Refuse what only looks like groups of queries: keys that differ along the axis within a group.

    Raises NotUnderstood.
    """
    if not path.q.apart:
        return
    groups = _lead(flow, path.q)[1]
    if max(k.operand.heads, v.operand.heads) > groups:
        raise NotUnderstood("heads lie along two axes, and keys or values differ along the second of them")


def heads_again(flow: Flow, view: OperandView, tokens: Tokens) -> OperandView:
    """The attention output where its heads are one axis again, or lie side by side in the features.

    Raises NotUnderstood if they never are.
    """
    if not view.apart:
        return view
    wanted = recorded(flow, view, tokens)
    for value in _below(flow, view.value):
        found = _placed(np.asarray(flow.value(value), dtype=np.float64), wanted, tokens)
        if found is not None:
            return replace(found, value=value)
    raise NotUnderstood("query heads lie along two axes, and the output's are not joined again in their order")


def _view(flow: Flow, view: OperandView) -> OperandView:
    return replace(view, apart=len(flow.shape(view.value)) == 5)


def _lead(flow: Flow, view: OperandView) -> tuple[int, int, int]:
    """Sizes of the leading axes, (batch, groups, heads of a group)."""
    skipped = {view.token_axis % 5, view.feature_axis % 5}
    batch, groups, heads = (n for axis, n in enumerate(flow.shape(view.value)) if axis not in skipped)
    return batch, groups, heads


def _modifier(flow: Flow, modifier: Modifier, rank: int, apart: tuple[int, ...]) -> Modifier:
    """A mask or bias that meets scores of five axes; what has no axis for heads is broadcastable as it is."""
    if modifier.value is None or rank < 5 or len(flow.shape(modifier.value)) < 3:
        return modifier
    return replace(modifier, apart=(apart[0], apart[1]))


def _placed(array: Array, wanted: Array, tokens: Tokens) -> OperandView | None:
    """How `array` holds `wanted` [B, H, S, D], with batch and heads in the order of the query's axes."""
    by_token = wanted.transpose(0, 2, 1, 3)
    if array.shape == (*by_token.shape[:2], by_token.shape[2] * by_token.shape[3]):
        if np.array_equal(array, by_token.reshape(array.shape), equal_nan=True):
            return OperandView("", -2, -1, wanted.shape[1])
    if array.ndim != 4:
        return None
    lead = tokens.axes[:-2]
    for order in permutations("bhsd"):
        if tuple(a for a in order if a in "bh") != lead:
            continue
        laid = wanted.transpose(["bhsd".index(a) for a in order])
        if laid.shape == array.shape and np.array_equal(array, laid, equal_nan=True):
            return OperandView("", order.index("s") - 4, order.index("d") - 4)
    return None


def _below(flow: Flow, value: Value) -> Iterator[Value]:
    """What becomes of a value by layout operators alone, nearest first."""
    for _ in range(STEPS):
        readers = flow.live_readers(value)
        if len(readers) != 1 or readers[0].op not in LAYOUT | PASS_THROUGH:
            return
        value = readers[0].outputs[0]
        yield value
