"""Attentions whose scores are not read as products and terms: run whole, from their projections to their merged heads.

What is found is a site whose forward stays; its heads can be shared and nothing else be done with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import Flow, Node, Value
from passes.match.operand_view import OperandView
from passes.match.operands import Tokens, Traced
from passes.match.scores import ScorePath
from passes.match.stretch import Stretch, stretch_of
from passes.match.stretch_heads import Heads, HeadSearch, Part
from passes.match.verdicts import DRAWN, TOO_LONG, NotTried
from passes.site import AttentionSite, Modifier, Operand, Refusal

_LARGEST = 400_000_000
"""Numbers that one run may compute; telling heads takes some thirty of them."""
_DRAWING = frozenset({
    *(f"aten.{name}" for name in ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like")),
    *("aten.bernoulli", "aten.multinomial", "aten.normal", "Bernoulli", "Multinomial"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
})  # fmt: skip
"""Operators that give other numbers each time."""
_WRITES = ("Scatter", "index_put", "index_copy", "copy_")
"""In names of operators that write into tensors."""


@dataclass(frozen=True)
class RunWhole:
    """A site, what stands for its evidence, and the numbers of all nodes that are part of it."""

    site: AttentionSite
    path: ScorePath
    q: Traced
    k: Traced
    v: Traced
    inside: frozenset[int]


def run_whole(flow: Flow, anchor: Node, name: str, layer: int, reason: str) -> RunWhole | None:
    """The attention that an anchor is part of, not read for this `reason`; None where running it tells no heads.

    Raises NotTried if it was recorded on too many tokens to be run time after time, or never answers alike.
    """
    if flow.dtype == "int8":
        return None
    try:
        stretch = stretch_of(flow, anchor)
        if stretch is not None and stretch.size > _LARGEST:
            raise NotTried(TOO_LONG)
        if stretch is not None and any(node.op in _DRAWING for node in stretch.above):
            raise NotTried(DRAWN)
        heads = _heads(stretch) if stretch is not None else None
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError):  # not recorded, or an operator's own
        return None
    if stretch is None or heads is None or _caches(stretch, heads):
        return None
    return _described(stretch, heads, anchor, Refusal(name, layer, reason, anchor.index))


def _caches(stretch: Stretch, heads: Heads) -> bool:
    """Whether keys or values are handed on, or join others that come from outside: each head would be held twice."""
    flow, shared = stretch.flow, [p.projection.output for p in (*heads.k, *heads.v)]
    made = set(shared)
    for node in stretch.between(shared):
        if any(v in flow.outputs for v in node.outputs if v != stretch.merged):
            return True
        others = [v for v in node.inputs if v and v not in made and not flow.data_dependent(v)]
        writes = any(name in node.op for name in _WRITES)
        if (writes or node.op == "Concat") and any(_is_held(flow, v, writes) for v in others):
            return True
        made.update(node.outputs)
    return False


def _is_held(flow: Flow, value: Value, written: bool) -> bool:
    """Whether a value holds keys or values of earlier calls: fed, or stored where new ones are written."""
    array = np.asarray(flow.value(value))
    if array.ndim < 3 or not np.issubdtype(array.dtype, np.floating):
        return False
    stored = flow.is_constant(value) and bool(flow.weights_above(value))
    return flow.is_fed(value) or (stored and written)


def _heads(stretch: Stretch) -> Heads | None:
    search = HeadSearch(stretch)
    return search.found() if search.finite else HeadSearch(stretch, least=1e-3).found()  # iterations may not converge


def _described(stretch: Stretch, heads: Heads, anchor: Node, instead: Refusal) -> RunWhole:
    flow, (key, value) = stretch.flow, (_joined(stretch, parts) for parts in (heads.k, heads.v))
    query = _traced(stretch, heads.q)
    inside = frozenset(n.index for n in stretch.nodes)
    modifiers = (Modifier("bias", None, 1.0, source=heads.bias),) if heads.bias else ()
    count, kv_heads = heads.q.heads, heads.k[0].heads
    rank = len(flow.shape(stretch.merged))
    axes = ("bs", "hd") if rank == 2 else ("b", *("s" for _ in range(rank - 2)), "hd")
    site = AttentionSite(
        name=instead.name,
        layer=instead.layer,
        heads=count,
        kv_heads=kv_heads,
        head_dim=int(heads.k[0].columns.shape[1]),
        value_dim=int(heads.v[0].columns.shape[1]),
        group=tuple(h * kv_heads // count for h in range(count)),
        q=query.operand,
        k=key.operand,
        v=value.operand,
        scale=1.0,
        modifiers=modifiers,
        causal=heads.causal,
        cross=False,
        anchor=anchor.index,
        output=stretch.merged,
        output_axes=axes,
        merged=stretch.merged,
        out=stretch.out,
        nodes=tuple(sorted(inside)),
        replay_error=heads.error,
        owner=anchor.owner or flow.nodes[heads.q.projection.node].owner,
        whole=instead.reason.partition("; leave this attention")[0],
    )
    q, k, v = (OperandView(t.operand.projection.output, -2, -1) for t in (query, key, value))
    path = ScorePath(anchor, q, k, v, 1.0, modifiers, None, OperandView(stretch.merged, -2, -1), site.nodes)
    return RunWhole(site, path, query, key, value, inside)


def _joined(stretch: Stretch, parts: tuple[Part, ...]) -> Traced:
    first, *others = (_traced(stretch, part) for part in parts)
    if not others:
        return first
    operand = replace(first.operand, streams=tuple(t.operand for t in others))
    return replace(first, operand=operand, streams=tuple(others))


def _traced(stretch: Stretch, part: Part) -> Traced:
    projection, (heads, dim) = part.projection, part.columns.shape
    lead = stretch.flow.shape(projection.output)[:-1]
    rows = np.arange(int(np.prod(lead))).reshape(lead[0] if len(lead) > 1 else 1, -1)
    operand = Operand(
        projection=projection,
        columns=part.columns,
        seam="",
        seam_axes=(),
        path=tuple(n.index for n in stretch.between([projection.output])),
        stem=projection.output,
        stem_axes=("bs", "hd"),
        stem_features=tuple(range(dim)),
        batch_first=True,
        headwise=True,
    )
    tokens = Tokens(
        rows, part.columns, np.ones((*rows.shape, dim)), None, None, slice(0, rows.shape[1]), ("b", "h", "s", "d")
    )
    return Traced(operand, tokens, tuple(range(heads)), 1.0)
