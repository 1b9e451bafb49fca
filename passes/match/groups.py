"""Query heads that lie along two axes, groups and the heads of a group: read as the one axis that they are.

Programs that never repeat keys also write q [B, KV, G, S, D], keys and values [B, KV, 1, T, D] (or, in an Einsum,
[B, KV, T, D]), and scores [B, KV, G, S, T]. All of it is described as if heads were never taken apart: operands by a
view that joins the axes, masks by what they are once joined, the output by the value in which heads are one axis again.
"""

from __future__ import annotations

from dataclasses import replace

from passes.dataflow import Flow
from passes.match.head_axis import with_heads_together
from passes.match.operand_view import OperandView
from passes.match.operands import Traced
from passes.match.repeats import trace_repeated
from passes.match.scores import ScorePath
from passes.match.verdicts import NotUnderstood
from passes.provenance import Tracer
from passes.site import Modifier


def joined(tracer: Tracer, path: ScorePath) -> tuple[ScorePath, Traced]:
    """The path and its query, seen as if the heads of [B, KV, G, ...] were one axis.

    Raises NotUnderstood with the reason if that does not make it a query or an output by heads.
    """
    flow = tracer.flow
    _, groups, heads = _lead(flow, path.q)
    q, k, v, output = (_view(flow, view) for view in (path.q, path.k, path.v, path.output_view))
    ranks = path.ranks or (len(flow.shape(path.q.value)),) * len(path.modifiers)
    modifiers = tuple(_modifier(flow, m, r, (groups, heads)) for m, r in zip(path.modifiers, ranks, strict=True))
    query = trace_repeated(tracer, q, shared_heads=False)
    path = replace(path, q=q, k=k, v=v, modifiers=modifiers, output_view=output)
    together = with_heads_together(flow, path, query.tokens) if output.apart else path
    if together is None:
        raise NotUnderstood("query heads lie along two axes, and the output's are not joined again in their order")
    return together, query


def require_groups(flow: Flow, path: ScorePath, k: Traced, v: Traced) -> None:
    """Refuse what only looks like groups of queries: keys that differ along the axis within a group.

    Raises NotUnderstood.
    """
    if not path.q.apart:
        return
    groups = _lead(flow, path.q)[1]
    if max(k.operand.heads, v.operand.heads) > groups:
        raise NotUnderstood("heads lie along two axes, and keys or values differ along the second of them")


def _view(flow: Flow, view: OperandView) -> OperandView:
    return replace(view, apart=len(flow.shape(view.value)) == 5)


def _lead(flow: Flow, view: OperandView) -> tuple[int, int, int]:
    """Sizes of the leading axes: batch, groups, heads of a group."""
    shape = flow.shape(view.value)
    skipped = {view.token_axis % len(shape), view.feature_axis % len(shape)}
    batch, groups, heads = (n for axis, n in enumerate(shape) if axis not in skipped)
    return batch, groups, heads


def _modifier(flow: Flow, modifier: Modifier, rank: int, apart: tuple[int, int]) -> Modifier:
    """A mask or bias that meets scores of five axes; what has no axis for heads is broadcastable as it is."""
    if modifier.value is None or rank < 5 or len(flow.shape(modifier.value)) < 3:
        return modifier
    return replace(modifier, apart=apart)
