"""Anchor → peel → provenance → replay: every anchor ends as a site, a refusal, or "not attention"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import LAYOUT, Flow, Node, Value
from passes.match.canonical_order import HeadsApart, in_blocks
from passes.match.choosing import REASON as CHOSEN
from passes.match.edge_softmax import edge_softmaxes
from passes.match.folded import unfolded
from passes.match.groups import joined, require_groups
from passes.match.headwise import trace_headwise
from passes.match.hidden_bias import with_sources
from passes.match.learned_query import with_learned_queries
from passes.match.linear_map import output_map
from passes.match.names import common_scope, exporter_scope, layer_of
from passes.match.operand_view import OperandView
from passes.match.operands import Traced
from passes.match.repeats import trace_repeated
from passes.match.run_whole import RunWhole, run_whole
from passes.match.score_terms import total_bias
from passes.match.scores import ScorePath, anchors, score_path
from passes.match.verdicts import (
    BIAS_NOT_ASKED_FOR,
    TOO_LARGE,
    FreeQuery,
    NotTried,
    NotUnderstood,
    OtherInputs,
    SurelyAttention,
    Unrelated,
)
from passes.match.without_softmax import without_softmax
from passes.operator_kinds import PASS_THROUGH
from passes.provenance import Memory, Tracer
from passes.replay import Replay, replay, tolerance
from passes.site import AttentionSite, Modifier, NotAttention, Projection, Refusal

_NO_SCORES = (
    "none of its scores is finite on the example inputs (a quantiser has an infinite scale, say, or masks leave no key "
    "to any query), so nothing can be told from them: check what the model computes from such inputs"
)


@dataclass(frozen=True)
class Evidence:
    """What a site was read from; replay can be run on it again."""

    path: ScorePath
    q: Traced
    k: Traced
    v: Traced


@dataclass(frozen=True)
class Matches:
    """Everything found in one flow, in execution order. `evidence` is keyed by site name."""

    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    not_attention: tuple[NotAttention, ...]
    evidence: dict[str, Evidence]

    @property
    def names(self) -> tuple[str, ...]:
        """Of everything that is an attention, understood or not."""
        return (*(s.name for s in self.sites), *(r.name for r in self.refusals))


def find_attention(flow: Flow, *, hidden_biases: bool = False) -> Matches:
    """Match every attention of a program and verify each by replay.

    Args:
        hidden_biases: whether attentions whose scores get a bias that hidden states make are sites; refusals else.
    """
    sites: list[AttentionSite] = []
    refusals: list[Refusal] = []
    unrelated: list[NotAttention] = []
    evidence: dict[str, Evidence] = {}
    unread: dict[int, NotUnderstood] = {}
    names, memory = _Names(flow), Memory(flow)
    for anchor in anchors(flow):
        name, layer = names.of(anchor)
        try:
            # a tracer of its own: what one attention is read from serves no other, and would be held until the end
            site, proof = _match(Tracer(flow, memory), anchor, name, layer)
            if site.hidden_bias and not hidden_biases:
                raise NotUnderstood(BIAS_NOT_ASKED_FOR)
        except Unrelated as reason:
            unrelated.append(NotAttention(name, str(reason), anchor.index))
        except NotUnderstood as reason:
            refusals.append(Refusal(name, layer, str(reason), anchor.index, anchor.owner))
            unread[anchor.index] = reason
        except (ArithmeticError, LookupError, ValueError, NotImplementedError) as error:  # an operator used unusually
            failure = f"matching it failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            refusals.append(Refusal(name, layer, failure, anchor.index, anchor.owner))
        except MemoryError:
            refusals.append(Refusal(name, layer, TOO_LARGE, anchor.index, anchor.owner))
        else:
            site = names.settled(site)
            sites.append(site)
            evidence[site.name] = proof
    for node, missing in (*without_softmax(flow, {n.anchor for n in unrelated}), *edge_softmaxes(flow)):
        name, layer = names.of(node)
        refusals.append(Refusal(name, layer, missing, node.index, node.owner))
    refusals.sort(key=lambda r: r.anchor)
    found = Matches(tuple(sites), tuple(refusals), tuple(unrelated), evidence)
    return _with_whole(flow, found, unread, hidden_biases) if unread else found


def _with_whole(flow: Flow, matches: Matches, unread: Mapping[int, NotUnderstood], hidden_biases: bool) -> Matches:
    """With those attentions as sites that can be run whole; each takes the place of all that is part of it."""
    done = set[int]()
    for refusal in matches.refusals:
        reason = unread.get(refusal.anchor)
        if reason is None or refusal.anchor in done or not _may_be_whole(reason):
            continue
        try:
            whole = run_whole(flow, flow.nodes[refusal.anchor], refusal.name, refusal.layer, str(reason))
        except NotTried as why:
            untried = replace(refusal, reason=f"{refusal.reason}; {why}")
            matches = replace(matches, refusals=tuple(untried if r is refusal else r for r in matches.refusals))
            continue
        if whole is None:
            continue
        done |= whole.inside
        if whole.site.hidden_bias and not hidden_biases:
            if not str(reason).startswith(_OF_OPERANDS) and str(reason) != CHOSEN:
                asked = {r.anchor: BIAS_NOT_ASKED_FOR for r in matches.refusals if r.anchor in whole.inside}
                refusals = tuple(replace(r, reason=asked.get(r.anchor, r.reason)) for r in matches.refusals)
                matches = replace(matches, refusals=refusals)
            continue
        matches = _instead(flow, matches, whole)
    return matches


_OF_OPERANDS = ("query:", "key:", "value:")
"""How reasons begin that are of what lies before the scores."""


def _may_be_whole(reason: NotUnderstood) -> bool:
    surely = isinstance(reason, SurelyAttention | FreeQuery | OtherInputs)
    return not surely and str(reason) != BIAS_NOT_ASKED_FOR


def _instead(flow: Flow, matches: Matches, whole: RunWhole) -> Matches:
    """With an attention that was run whole in the place of all that is part of it."""
    parts = [s for s in matches.sites if s.anchor in whole.inside]
    refused = [r for r in matches.refusals if r.anchor in whole.inside]
    places = [(s.anchor, s.name, s.layer) for s in parts] + [(r.anchor, r.name, r.layer) for r in refused]
    _, name, layer = min(places)
    site = replace(whole.site, name=name, layer=layer, cross=_is_cross(flow, whole.q, whole.k))
    gone = {part.name for part in parts}
    evidence = {name: proof for name, proof in matches.evidence.items() if name not in gone}
    return Matches(
        tuple(sorted([*(s for s in matches.sites if s.name not in gone), site], key=lambda s: s.anchor)),
        tuple(r for r in matches.refusals if r not in refused),
        tuple(n for n in matches.not_attention if n.anchor not in whole.inside),
        {**evidence, site.name: Evidence(whole.path, whole.q, whole.k, whole.v)},
    )


def _match(tracer: Tracer, anchor: Node, name: str, layer: int) -> tuple[AttentionSite, Evidence]:
    try:
        return match_anchor(tracer, anchor, name, layer)
    except FreeQuery as error:
        flow = with_learned_queries(tracer.flow, error.query)
        if flow is None:
            raise error.otherwise from error
        return match_anchor(Tracer(flow), anchor, name, layer)


def match_anchor(tracer: Tracer, anchor: Node, name: str, layer: int) -> tuple[AttentionSite, Evidence]:
    """One anchor. Raises NotUnderstood or Unrelated."""
    flow = tracer.flow
    path, q = _query(tracer, score_path(flow, anchor))
    path = _by_blocks(flow, _heads_first(flow, path, q), q)
    k, v = _shared(tracer, path.k, "key"), _shared(tracer, path.v, "value")
    require_groups(flow, path, k, v)
    heads = q.operand.heads
    group = _group(k, heads)
    if group != _group(v, heads):
        raise NotUnderstood(
            "keys and values are shared by different query heads (as in differential attention, where two heads with "
            "keys of their own weigh one head's values), so no group of heads could share both; leave this attention "
            "as it is (layers= selects others)"
        )
    replayed = replay(flow, path, q, k, v)
    limit = tolerance(flow, (path.q.value, path.k.value, path.v.value, path.output_view.value))
    if not replayed.worst <= limit or _without_scores(flow, path):
        raise NotUnderstood(_off(flow, path, replayed))
    shared = (*k.operand.parts, *v.operand.parts)
    path = replace(path, modifiers=with_sources(flow, path.modifiers, q.operand, shared))
    merged, out = _output_projection(flow, path.output_view.value)
    site = AttentionSite(
        name=name,
        layer=layer,
        heads=heads,
        kv_heads=k.operand.heads,
        head_dim=q.operand.dim,
        value_dim=v.operand.dim,
        group=group,
        q=q.operand,
        k=k.operand,
        v=v.operand,
        scale=path.scale * q.factor * k.factor,
        modifiers=path.modifiers,
        causal=_is_causal(flow, path, q, k, heads),
        cross=_is_cross(flow, q, k),
        anchor=anchor.index,
        output=path.output_view.value,
        output_axes=_output_axes(flow, path, q),
        merged=merged,
        out=out,
        nodes=path.nodes,
        masked_rows_are_zero=path.masked_rows_are_zero,
        weights_read=path.weights_read,
        scores_rounded=replayed.rounding > limit,
        replay_error=replayed.worst,
        owner=_owner(flow, q, anchor),
    )
    return _checked(site, v), Evidence(path, q, k, v)


def _query(tracer: Tracer, path: ScorePath) -> tuple[ScorePath, Traced]:
    try:
        return _read_query(tracer, path)
    except NotUnderstood:
        found = trace_headwise(tracer, path.q, shared_heads=False)
        if found is None:
            raise
        return path, found


def _read_query(tracer: Tracer, path: ScorePath) -> tuple[ScorePath, Traced]:
    try:
        return path, _named(tracer, path.q, "query", shared=False)
    except HeadsApart:
        return _joined(tracer, path)
    except NotUnderstood:
        found = unfolded(tracer, path)
        if found is None:
            raise
        return found


def _shared(tracer: Tracer, view: OperandView, role: str) -> Traced:
    """Keys or values."""
    try:
        return _named(tracer, view, role, shared=True)
    except NotUnderstood:
        found = trace_headwise(tracer, view, shared_heads=True)
        if found is None:
            raise
        return found


def _joined(tracer: Tracer, path: ScorePath) -> tuple[ScorePath, Traced]:
    """Heads along two axes; where one of these has a single element, it may as well count blocks of tokens."""
    try:
        return joined(tracer, path)
    except NotUnderstood:
        shape, rank = tracer.flow.shape(path.q.value), len(tracer.flow.shape(path.q.value))
        skipped = {path.q.token_axis % rank, path.q.feature_axis % rank}
        if 1 not in [n for axis, n in enumerate(shape) if axis not in skipped][1:]:
            raise
        q, k, v = (replace(view, blocks=True) for view in (path.q, path.k, path.v))
        path = replace(path, q=q, k=k, v=v)
        return path, _named(tracer, q, "query", shared=False)


def _heads_first(flow: Flow, path: ScorePath, q: Traced) -> ScorePath:
    """Where batch and heads are one axis, heads outermost, masks of three axes are laid out like that too."""
    if q.tokens.axes[0] != "hb":
        return path
    lead = len(q.tokens.rows) * q.operand.heads

    def laid(modifier: Modifier) -> Modifier:
        shape = flow.shape(modifier.value) if modifier.value is not None else ()
        return replace(modifier, heads_first=len(shape) == 3 and shape[0] == lead)

    return replace(path, modifiers=tuple(laid(m) for m in path.modifiers))


def _by_blocks(flow: Flow, path: ScorePath, q: Traced) -> ScorePath:
    """Where blocks of tokens have an axis of their own, masks meet scores of five axes.

    Raises NotUnderstood for masks that tell blocks apart which heads lie before.
    """
    if not in_blocks(q.tokens.axes):
        return path
    masks = [m for m in path.modifiers if m.value is not None and len(flow.shape(m.value)) > 2]
    if masks and q.tokens.axes.index("h") != 2:
        raise NotUnderstood(
            "its scores are [batch, heads, blocks, ...] with masks or biases by block; they are read where blocks come "
            "before heads, or lie on the batch axis"
        )
    blocks = flow.shape(path.q.value)[1]
    modifiers = (replace(m, windows=blocks) if m in masks else m for m in path.modifiers)
    return replace(path, modifiers=tuple(modifiers))


def _named(tracer: Tracer, view: OperandView, role: str, *, shared: bool) -> Traced:
    try:
        return trace_repeated(tracer, view, shared_heads=shared)
    except HeadsApart as error:
        raise HeadsApart(f"{role}: {error}") from error
    except NotUnderstood as error:
        raise NotUnderstood(f"{role}: {error}") from error


def _checked(site: AttentionSite, v: Traced) -> AttentionSite:
    if abs(v.factor - 1.0) > 1e-6:
        raise NotUnderstood("values are scaled between projection and contraction")
    if len(set(np.bincount(site.group).tolist())) != 1:
        raise NotUnderstood("key/value heads serve different numbers of query heads")
    return site


def _group(traced: Traced, heads: int) -> tuple[int, ...]:
    """Distinct key/value head of each query head; operators may leave the repetition to themselves."""
    at_anchor = len(traced.group)
    if heads % at_anchor:
        raise NotUnderstood(f"{at_anchor} key/value heads do not divide {heads} query heads")
    return tuple(traced.group[h * at_anchor // heads] for h in range(heads))


def _output_axes(flow: Flow, path: ScorePath, q: Traced) -> tuple[str, ...]:
    if path.output_view.heads:
        return ("b", "s", "hd")
    lead = list(q.tokens.axes[:-2])
    rank = 4 if path.output_view.fold > 1 or path.output_view.apart else len(flow.shape(path.output_view.value))
    if len(lead) + 2 != rank and (together := "".join(lead)) in {"bh", "hb"}:
        lead = list(together) if rank == 4 else [together]
    rank = len(lead) + 2
    token, feature = path.output_view.token_axis % rank, path.output_view.feature_axis % rank
    return tuple("s" if a == token else "d" if a == feature else lead.pop(0) for a in range(rank))


def _is_causal(flow: Flow, path: ScorePath, q: Traced, k: Traced, heads: int) -> bool:
    """Whether every later token is masked for every query of the recording."""
    if any(m.kind == "causal" for m in path.modifiers):
        return True
    batch, queries = q.tokens.rows.shape
    keys = k.tokens.new.stop
    if q.streams or k.streams:
        return False
    if in_blocks(q.tokens.axes) and (q.operand.headwise or k.operand.headwise):  # positions in a block, of more keys
        return False
    if queries < 2 or keys < queries:
        return False
    masks = tuple(m for m in path.modifiers if m.kind not in {"softcap", "sinks"})
    bias = total_bias(flow, masks, (batch, heads, queries, keys))
    later = np.arange(keys)[None] > np.arange(queries)[:, None] + (keys - queries)
    return bool((bias[..., later] <= -1e4).all())


def _is_cross(flow: Flow, q: Traced, k: Traced) -> bool:
    a, b = q.operand.projection.input, k.operand.projection.input
    return a != b and _root(flow, a) != _root(flow, b)


def _root(flow: Flow, value: Value) -> Value:
    while (node := flow.producer(value)) is not None and node.op in PASS_THROUGH | {"Reshape", "Transpose"}:
        value = node.inputs[0]
    return value


def _owner(flow: Flow, q: Traced, anchor: Node) -> str:
    return anchor.owner or flow.nodes[q.operand.projection.node].owner


def _without_scores(flow: Flow, path: ScorePath) -> bool:
    """Whether none of the recorded scores is a finite number."""
    return path.scores is not None and not np.isfinite(flow.value(path.scores)).any()


def _off(flow: Flow, path: ScorePath, replayed: Replay) -> str:
    """What is wrong with a replay."""
    operands = {"queries": path.q.value, "keys": path.k.value, "values": path.v.value}
    wild = next((name for name, value in operands.items() if not np.isfinite(flow.value(value)).all()), None)
    if wild is not None:
        return (
            f"its {wild} are not finite on the example inputs, so nothing can be told from them: check its weights, "
            "and what the model computes from such inputs"
        )
    if _without_scores(flow, path):
        return _NO_SCORES
    limit = tolerance(flow, (*operands.values(), path.output_view.value))
    if max(replayed.q, replayed.k, replayed.v, replayed.output) <= limit:
        return (
            "its scores have their axes in another order than its queries (heads first, say, in an einsum's result); "
            "have them end in queries and keys behind batch and heads in the queries' order, which is the same numbers"
        )
    return (
        f"it does not replay from its weights (relative error q {replayed.q:.1e}, k {replayed.k:.1e}, "
        f"v {replayed.v:.1e}, scores {replayed.scores:.1e}, output {replayed.output:.1e})"
    )


def _output_projection(flow: Flow, value: Value) -> tuple[Value | None, Projection | None]:
    """Follow the output through layout to the projection that reads it."""
    while True:
        readers = flow.live_readers(value)
        if len(readers) != 1:
            return None, None
        node = readers[0]
        operands = flow.projection_operands(node)
        if operands is not None and operands == (0, 1):
            out = output_map(flow, node)
            return (None, None) if out is None else (value, out)
        if node.op not in LAYOUT | PASS_THROUGH:
            return None, None
        value = node.outputs[0]


class _Names:
    """Site names and layer numbers: from owners where the door has them, else from weights, else counted."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.taken: dict[str, int] = {}

    def of(self, anchor: Node) -> tuple[str, int]:
        count = len(self.taken)
        base = anchor.owner or exporter_scope(anchor.name) or f"attention.{count}"
        number = self.taken.get(base, 0)
        self.taken[base] = number + 1
        name = base if number == 0 else f"{base}#{number}"
        return name, layer_of(name, count)

    def settled(self, site: AttentionSite) -> AttentionSite:
        """A site that could only be numbered takes the name that its weights share, if they have a scope."""
        if site.owner or not site.name.startswith("attention."):
            return site
        roots = [self._stored(v) for o in (site.q, site.k, site.v) for v in (o.projection.bias, o.projection.weight)]
        name = common_scope([r for r in roots if "." in r][:6])
        if not name or name in self.taken:
            return site
        self.taken[name] = 1
        return replace(site, name=name, layer=layer_of(name, site.layer))

    def _stored(self, value: Value | None) -> str:
        weight = self.flow.weights.get(value) if value is not None else None
        return weight.name if weight is not None else ""
