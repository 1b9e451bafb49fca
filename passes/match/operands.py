"""From an operand at the anchor back to its projection: columns, heads, rotation, norm, cache, and the seam.

Everything is read off the numbers of the operand's affine form; no layout is matched by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from passes.dataflow import LAYOUT, PACKED_WEIGHTS, Array, Flow, Node, Value
from passes.match.head_gains import FoundGains, find_gains, require_mergeable
from passes.match.scores import NotUnderstood, OperandView
from passes.projections import Layout, layout_of
from passes.provenance import PASS_THROUGH, Form, Opaque, Source, Tracer, data_operands, projection_at
from passes.site import Norm, Operand, Projection, Rotary

Axes = tuple[str, ...]


def in_blocks(axes: Axes) -> bool:
    """Whether sequences are blocks of tokens, which have an axis of their own behind the batch's."""
    return axes.count("b") > 1


@dataclass(frozen=True)
class Tokens:
    """An operand's elements in canonical order; what replay recomputes it from.

    Attributes:
        rows: [B, T] row of the projection's output (flattened over all but its last axis) per token.
        columns: [H, D] own column per head (as the anchor sees heads) and feature.
        own, other: [B, T, D] coefficient of the own column and of the partner's; `other` is None without rotation.
        offset: [B, H, T, D] bias added after layout; None if there is none.
        new: slice of the token axis that comes from the projection (the rest from a cache).
        axes: what each axis of the anchor's operand is.
        normed: with a norm, (row, column) in the projection's output for each flat element of the norm.
        turned: where what is normalised was rotated before, (own, other) of that rotation; `own` above is then what the
            norm's output is multiplied with.
    """

    rows: Array
    columns: Array
    own: Array
    other: Array | None
    offset: Array | None
    new: slice
    axes: Axes
    normed: tuple[Array, Array] | None = None
    turned: tuple[Array, Array] | None = None


class HeadsApart(NotUnderstood):
    """Two leading axes of an operand hold its heads, and a view that joins them may be understood."""


@dataclass(frozen=True)
class Traced:
    operand: Operand
    tokens: Tokens
    group: tuple[int, ...]
    factor: float
    """Scalar between the seam and the anchor."""
    streams: tuple[Traced, ...] = ()
    """As `Operand.streams`."""

    @property
    def parts(self) -> tuple[Traced, ...]:
        return (self, *self.streams)


def trace_operand(tracer: Tracer, view: OperandView, *, shared_heads: bool) -> Traced:
    """Describe one operand. `shared_heads`: repeated heads are one head (k and v), not many (q).

    Raises NotUnderstood with the reason.
    """
    form = _form(tracer, view.value)
    if view.heads:
        form = _split_features(form, view.heads)
        view = OperandView(view.value, 1, 3)
    ids, coefficients = _active_terms(form, view)
    joined = _streams(tracer, ids)
    if not joined:
        return _traced(tracer, view, form, (ids, coefficients), _main_source(tracer, ids), (), shared_heads)
    parts = [
        _traced(tracer, view, form, _active_at(ids, coefficients, here), source, joined, shared_heads)
        for source, here in joined
    ]
    return _together(parts)


Terms = tuple[list[Array], list[Array]]
Streams = tuple[tuple[Source, slice], ...]
"""Sources that tokens are joined from, and which tokens are of each; in the order of tokens."""


def _streams(tracer: Tracer, ids: list[Array]) -> Streams:
    """Empty where tokens are of one source, or not joined one source after the other."""
    learned = list({s.value: s for s in tracer.source_of(ids[0]) if s.kind != "input"}.values())
    if len(learned) < 2 or (ids[0] == 0).any() or any(s.kind == "input" for s in tracer.source_of(ids[0])):
        return ()
    number = _numbered(ids[0], learned)
    line = number.reshape(-1, *number.shape[-2:])[0, :, 0]
    if (number != line[:, None]).any():
        return ()
    starts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
    if len(starts) - 1 != len(learned):
        return ()
    return tuple((learned[int(line[start]) - 1], slice(start, stop)) for start, stop in pairwise(starts))


def _active_at(ids: list[Array], coefficients: list[Array], here: slice) -> Terms:
    """The terms that count for some tokens, those without zeros first."""
    active = [t for t, (i, c) in enumerate(zip(ids, coefficients, strict=True)) if (c * (i > 0))[..., here, :].any()]
    active.sort(key=lambda t: int((ids[t][..., here, :] == 0).sum()))
    return [ids[t] for t in active], [coefficients[t] for t in active]


def _together(parts: list[Traced]) -> Traced:
    """One operand out of those of its streams. Raises NotUnderstood where they cannot share heads."""
    first = parts[0]
    for other in parts[1:]:
        a, b = first.operand, other.operand
        if (a.heads, a.dim, first.group) != (b.heads, b.dim, other.group):
            raise NotUnderstood("its tokens are joined from projections to different heads")
        if not a.seam or (a.seam, a.seam_axes) != (b.seam, b.seam_axes) or abs(first.factor - other.factor) > 1e-6:
            raise NotUnderstood(
                "its tokens are joined where heads are not apart from features, or are repeated already"
            )
        if abs(a.gain - b.gain) > 2e-2 * abs(a.gain):  # half precisions round rotations
            raise NotUnderstood("its tokens are joined from projections that are scaled differently")
    streams = tuple(p.operand for p in parts[1:])
    return replace(first, operand=replace(first.operand, streams=streams), streams=tuple(parts[1:]))


def _traced(
    tracer: Tracer,
    view: OperandView,
    form: Form,
    terms: Terms,
    source: Source,
    streams: Streams,
    shared_heads: bool,
) -> Traced:
    """One operand, or what one of its `streams` brings."""
    flow = tracer.flow
    ids, coefficients = terms
    gains = find_gains(flow, source, ids[0].shape[-1])
    if gains is not None and streams:
        raise NotUnderstood("its tokens are joined from projections behind norms with numbers for each head")
    if gains is not None:
        coefficients = gains.divided_out(flow, source, ids, coefficients)
    new, past = _cache_split(tracer, ids[0], source) if not streams else (_stream_of(streams, source), None)
    origin = _origin(tracer, source)
    projection, norm = origin.projection, origin.norm
    to_rows, to_columns = origin.places[source.value]
    flat = ids[0][..., new, :] - source.base
    if _features_for_tokens(to_rows[flat], to_columns[flat]):
        raise NotUnderstood(
            "tokens stand where features should: it weighs features by features (channel or cross-covariance "
            "attention), or a projection mixes its tokens, and has no heads over tokens to share"
        )
    lead = _lead_roles(to_rows[flat], to_columns[flat])
    bias = None if form.bias is None else view.arranged(np.broadcast_to(form.bias, form.shape))
    canonical = _Canonical(ids, coefficients, source, bias, new, lead)
    origin, found = _positions(canonical, origin, source)
    own_columns, own, other = found.columns, found.own, found.other
    group, distinct = _distinct_heads(own_columns, shared_heads)
    head_columns = own_columns[distinct]
    if norm is not None:
        norm = _described(norm, gains, origin.places[source.value][1], head_columns, source.shape[-1])
    if norm is not None and shared_heads:
        require_mergeable(norm.gains, norm.kind, not norm.per_head, source.shape[-1], *head_columns.shape)
    canonical.require_equal_heads(distinct if shared_heads else None)
    tokens = Tokens(found.rows, own_columns, own, other, canonical.offset, new, canonical.axes,
                    origin.places[source.value] if norm else None, found.turned)  # fmt: skip
    foreign = frozenset(v for s, _ in streams if s.value != source.value for v in _origin(tracer, s).places)
    lookup = _Lookup(source, origin, found.rows, head_columns, foreign)
    seam, axes, factor = _seam(tracer, view.value, lookup)
    path = path_between(flow, projection.output, seam or view.value)
    stem, stem_axes, stem_features = _stem(tracer, projection, path, lookup)
    operand = Operand(
        projection=projection,
        columns=head_columns,
        seam=seam,
        seam_axes=axes,
        path=path,
        stem=stem,
        stem_axes=stem_axes,
        stem_features=stem_features,
        batch_first=_batch_first(found.rows),
        gain=_gain(own, other, factor),
        rotary=_rotary(found.partner, other if found.turned is None else found.turned[1]),
        norm=norm,
        past=past,
        past_head_axis=_past_head_axis(tracer, ids[0], new, past, canonical),
        presents=_presents(tracer, path, lookup),
        reshapes=_reshapes(tracer, path_between(flow, stem, seam), lookup) if seam else (),
    )
    return Traced(operand, tokens, group, factor)


def _stream_of(streams: Streams, source: Source) -> slice:
    return next(here for s, here in streams if s.value == source.value)


def _described(norm: Norm, gains: FoundGains | None, to_columns: Array, columns: Array, features: int) -> Norm:
    """A norm over `features` of a projection's output, with what it multiplies heads with these `columns` by."""
    per_head = norm.kind == "clip" or features <= columns.shape[1]
    if gains is None:
        return replace(norm, per_head=per_head)
    return replace(norm, per_head=per_head, output=gains.output, gains=gains.of(to_columns, columns))


@dataclass(frozen=True)
class _Found:
    """Where an operand's elements lie in the projection, and how they are rotated; fields as in `Tokens`."""

    rows: Array
    columns: Array
    partner: Array | None
    own: Array
    other: Array | None
    turned: tuple[Array, Array] | None = None


def _positions(canonical: _Canonical, origin: _Origin, source: Source) -> tuple[_Origin, _Found]:
    """(the origin, with places behind a rotation in front of a norm; positions). Raises NotUnderstood."""
    if origin.turn is None:
        rows, tables = canonical.positions(*origin.places[source.value])
        return origin, _Found(rows, *canonical.rotation(tables))
    before = canonical.under(origin.turn)
    rows, tables = before.positions(*origin.places[origin.turn.source.value])
    columns, partner, own, other = before.rotation(tables)
    before.require_equal_heads(np.arange(len(columns)))
    assert other is not None
    places = origin.settled(source, canonical.ids[0] - source.base, rows, columns)
    return places, _Found(rows, columns, partner, canonical.coefficients[0][:, 0], None, (own, other))


def _form(tracer: Tracer, value: Value) -> Form:
    try:
        return tracer.trace(value)
    except Opaque as error:
        raise NotUnderstood(str(error)) from error


def _split_features(form: Form, heads: int) -> Form:
    """[B, S, H * D] as [B, S, H, D]."""

    def split(array: Array) -> Array:
        return array.reshape(*array.shape[:-1], heads, array.shape[-1] // heads)

    bias = None if form.bias is None else split(form.bias)
    return Form(tuple(split(i) for i in form.ids), tuple(split(c) for c in form.coefficients), bias)


def _active_terms(form: Form, view: OperandView) -> tuple[list[Array], list[Array]]:
    """Terms with any nonzero coefficient, axes moved to (lead..., token, feature)."""
    active = [t for t, c in enumerate(form.coefficients) if (c * (form.ids[t] > 0)).any()]
    if not active or len(active) > 2:
        raise NotUnderstood(f"the operand sums {len(active)} elements of its projection, not one or a rotated pair")
    active.sort(key=lambda t: int((form.ids[t] == 0).sum()))
    return [view.arranged(form.ids[t]) for t in active], [view.arranged(form.coefficients[t]) for t in active]


def _gain(own: Array, other: Array | None, factor: float) -> float:
    """The scalar that all coefficients share once the seam's factor and rotations are divided out; else 1."""
    size = own if other is None else np.sqrt(own**2 + other**2)
    first = float(size.reshape(-1)[0]) / factor
    return first if np.abs(size / factor - first).max() <= 2e-2 * abs(first) else 1.0


def _batch_first(rows: Array) -> bool:
    """Whether the next token of a sequence is the next row."""
    return rows.shape[1] == 1 or bool(rows[0, 1] - rows[0, 0] == 1)


def _past_head_axis(tracer: Tracer, ids: Array, new: slice, past: Value | None, canonical: _Canonical) -> int | None:
    """Which axis of the cache changes from one head to the next, all else equal."""
    if past is None:
        return None
    source = next(s for s in tracer.source_of(ids) if s.value == past)
    grid = canonical.arrange(ids[..., : new.start, :])
    where = np.stack(np.unravel_index(grid - source.base, source.shape))
    moved = (np.diff(where, axis=2) != 0).reshape(len(source.shape), -1).any(axis=1)
    return int(moved.argmax()) if moved.sum() == 1 else None


def _presents(tracer: Tracer, path: tuple[int, ...], lookup: _Lookup) -> tuple[tuple[Value, int], ...]:
    """Program outputs on the path, or cut out of what lies there: the grown cache that a decoder hands back."""
    flow = tracer.flow
    values = [v for i in path for v in flow.nodes[i].outputs]
    cut = [(v, r.outputs[0]) for v in values for r in flow.live_readers(v) if r.op == "Slice"]
    returned = [(v, out) for v, out in (*((v, v) for v in values), *cut) if out in flow.outputs]
    found = []
    for value, output in returned:
        axes = _axes_at(tracer, value, lookup)
        if axes is None or "h" not in axes:
            raise NotUnderstood(f"the program also returns {output}, which is not exactly the operand's heads")
        found.append((output, axes.index("h")))
    return tuple(dict.fromkeys(found))


def _reshapes(tracer: Tracer, path: tuple[int, ...], lookup: _Lookup) -> tuple[tuple[int, int], ...]:
    """Reshapes and expansions on the path, with the axis of their output along which heads vary."""
    found = []
    for index in path:
        node = tracer.flow.nodes[index]
        if node.op in {"Reshape", "Expand"} and tracer.flow.data_dependent(node.outputs[0]):
            axis = _head_axis(tracer, node.outputs[0], lookup)
            if axis is not None:
                found.append((index, axis))
    return tuple(found)


def _head_axis(tracer: Tracer, value: Value, lookup: _Lookup) -> int | None:
    """The one axis of a value on the path along which its elements belong to different heads."""
    try:
        ids = tracer.trace(value).ids[0]
    except Opaque:
        return None
    sources = lookup.mine(tracer, ids)
    if len(sources) != 1:
        return None
    new = _without_cache(np.where(ids > 0, ids, sources[0].base), sources[0])
    found = None if new is None else lookup.positions(new, sources[0])
    if new is None or found is None or found[1].max() >= len(lookup.head):
        return None
    heads = lookup.head[found[1]]
    varying = [a for a in range(new.ndim) if new.shape[a] > 1 and _varies(heads, a)]
    return varying[0] if len(varying) == 1 else None


def _main_source(tracer: Tracer, ids: list[Array]) -> Source:
    found = {s.value: s for array in ids for s in tracer.source_of(array)}
    learned = [s for s in found.values() if s.kind != "input"]
    if len(learned) > 1 and all(s.kind == "norm" for s in learned):
        raise NotUnderstood(
            f"its heads are normalised by {len(learned)} norms, each with weights of its own; merged heads would have "
            "to share one"
        )
    if len(learned) > 1 and len(ids) > 1 and _sources_apart(tracer, ids):
        if len({_state(tracer.flow, s.under or s.value) for s in learned}) > 1:
            raise NotUnderstood(
                "it is the sum of projections of different hidden states (as of a layer's own values and those of an "
                "earlier layer), whose heads could only be merged together; leave this attention as it is (layers= "
                "selects others)"
            )
        raise NotUnderstood(
            "it is the sum of two projections (as of a layer and a low-rank adapter beside it); merge the adapter into "
            "the layer's weights first"
        )
    if len(learned) > 1 and _joined_along_tokens(ids[0], learned) and _alike_along_tokens(ids[0], learned):
        raise NotUnderstood(
            f"its heads are joined from {len(learned)} projections, one for each; make them by one projection (their "
            "weights one under the other), which is the same"
        )
    if len(learned) > 1 and _joined_along_tokens(ids[0], learned):
        raise NotUnderstood(
            f"its tokens are joined from {len(learned)} projections (as of two streams, or of global tokens beside "
            "local ones); each of them would have to change"
        )
    if len(learned) > 1:
        raise NotUnderstood(
            f"each head is put together from {len(learned)} projections (as in latent attention, whose cache holds "
            "no heads to share); merging heads would have to change all of them"
        )
    if not learned:
        raise NotUnderstood("the operand comes from no projection")
    if (ids[0] == 0).any():
        raise NotUnderstood("tokens are padded and attended in blocks, which is not read" if ids[0].ndim > 4 else
                            "zeros or learned tokens, which no projection makes, are joined to it (add_zero_attn, "
                            "add_bias_kv, a prefix); without them it is read")  # fmt: skip
    return learned[0]


def _state(flow: Flow, value: Value) -> Value:
    """What a projection reads; where another one gives that (an adapter's first matrix), what that one reads."""
    while (node := flow.producer(value)) is not None:
        found = projection_at(flow, value)
        operands = None if found is None else flow.projection_operands(found[0])
        if found is not None and operands is not None:
            value = found[0].inputs[operands[0]]
        elif node.op in LAYOUT | PASS_THROUGH | {"Mul", "Div"}:
            above = [v for v in node.inputs if v and flow.data_dependent(v)]
            if len(above) != 1:
                break
            value = above[0]
        else:
            break
    return value


def _sources_apart(tracer: Tracer, ids: list[Array]) -> bool:
    """Whether every term has one source, and no two the same."""
    held = [[s.value for s in tracer.source_of(term) if s.kind != "input"] for term in ids]
    return all(len(h) == 1 for h in held) and len({h[0] for h in held}) == len(held)


def _joined_along_tokens(ids: Array, sources: list[Source]) -> bool:
    """Whether each token has all its features from one source."""
    number = _numbered(ids, sources)
    return bool((number == number[..., :1]).all())


def _alike_along_tokens(ids: Array, sources: list[Source]) -> bool:
    """Whether all tokens have the same features from the same source: then it is heads that are joined."""
    number = _numbered(ids, sources)
    return bool((number == number[..., :1, :]).all())


def _numbered(ids: Array, sources: list[Source]) -> Array:
    """Which source each element is of, from 1."""
    number = np.zeros(ids.shape, np.int64)
    for count, source in enumerate(sources, 1):
        number[source.holds(ids)] = count
    return number


def _cache_split(tracer: Tracer, ids: Array, source: Source) -> tuple[slice, Value | None]:
    """Which tokens are new, and the cache the others come from."""
    mine = source.holds(ids)
    length = ids.shape[-2]
    if mine.all():
        return slice(0, length), None
    per_token = mine.reshape(-1, length, ids.shape[-1])
    new: Array = np.asarray(per_token.all(axis=(0, 2)))
    if (per_token.any(axis=(0, 2)) != new).any() or not new[int(new.argmax()) :].all():
        raise NotUnderstood("cached and new elements are interleaved")
    caches = [s for s in tracer.source_of(ids) if s.kind == "input"]
    if len(caches) != 1:
        raise NotUnderstood(f"the operand joins {len(caches)} caches")
    return slice(int(new.argmax()), length), caches[0].value


class _Canonical:
    """Terms of an operand with axes [B, H, T, D], new tokens only."""

    def __init__(
        self,
        ids: list[Array],
        coefficients: list[Array],
        source: Source,
        bias: Array | None,
        new: slice,
        lead: tuple[Array, Array, Axes],
    ) -> None:
        self.source = source
        self._batch, self._head, names = lead
        self.axes: Axes = (*names, "s", "d")
        self.ids = [self.arrange(i[..., new, :]) for i in ids]
        self.coefficients = [self.arrange(c[..., new, :]) for c in coefficients]
        self.offset = None if bias is None else self.arrange(bias[..., new, :])

    def under(self, turn: _Turn) -> _Canonical:
        """The rotated pairs that a norm was given, arranged as what it gives. Raises NotUnderstood."""
        if len(self.ids) > 1:
            raise NotUnderstood("it is rotated both before and after it is normalised")
        flat = self.ids[0] - self.source.base
        found = copy(self)
        found.source, found.offset = turn.source, None
        found.ids = [ids[flat] for ids in turn.ids]
        found.coefficients = [c[flat] for c in turn.coefficients]
        return found

    def arrange(self, array: Array) -> Array:
        flat = array.reshape(-1, *array.shape[-2:])
        batches, heads = int(self._batch.max()) + 1, int(self._head.max()) + 1
        out = np.empty((batches, heads, *flat.shape[1:]), array.dtype)
        out[self._batch, self._head] = flat
        return out

    def positions(self, to_rows: Array, to_columns: Array) -> tuple[Array, list[Array]]:
        """(rows [B, T], one [H, D] column table per term); refuses tables that vary over tokens."""
        tables = []
        rows = None
        for ids in self.ids:
            present: Array = np.asarray(ids > 0)
            flat: Array = np.where(present, ids - self.source.base, 0)
            columns, row = to_columns[flat], to_rows[flat]
            table = np.where(present, columns, -1).max(axis=(0, 2))
            if ((columns != table[None, :, None, :]) & present).any():
                raise NotUnderstood("features are arranged differently from token to token")
            if rows is None:
                rows = row[:, 0, :, 0]
            if ((row != rows[:, None, :, None]) & present).any():
                raise NotUnderstood("one token's features come from several tokens")
            tables.append(table)
        assert rows is not None
        return rows, tables

    def rotation(self, tables: list[Array]) -> tuple[Array, Array | None, Array, Array | None]:
        """(own columns [H, D], partner feature [D], own coefficient [B, T, D], partner's); one head stands for all."""
        gains = [c[:, 0] for c in self.coefficients]
        if len(tables) == 1:
            return tables[0], None, gains[0], None
        return _untangle(tables, gains)

    def require_equal_heads(self, heads: Array | None) -> None:
        """Shared heads must be treated alike, or merging their weights would not merge the heads."""
        if heads is None:
            return
        for c in self.coefficients:
            if np.abs(c - c[:, :1]).max() > 1e-6 * max(1.0, float(np.abs(c).max())):
                raise NotUnderstood(
                    "its heads are rotated by angles of their own (learned positions), so merged heads would have to "
                    "share them"
                    if len(self.coefficients) > 1
                    else "key or value heads are scaled differently from each other"
                )
        if self.offset is not None and np.abs(self.offset - self.offset[:, :1]).max() > 1e-6:
            raise NotUnderstood(
                "numbers of their own for each head (such as projected positions) are added to the keys or values "
                "behind the projection; heads that are merged would have to share them"
            )


def _lead_roles(rows: Array, columns: Array) -> tuple[Array, Array, Axes]:
    """Batch and head index of each leading position, and what each leading axis is.

    `rows` and `columns` are [lead..., T, D]: position in the projection's output. An axis along which rows
    vary runs over sequences, any other over heads (repeated heads have equal columns).
    """
    lead = rows.shape[:-2]
    row_of = _index_of(rows[..., 0].reshape(-1, rows.shape[-2]))
    if len(lead) == 2:
        return _two_lead_axes(row_of.reshape(lead))
    if len(lead) == 1:
        batches = int(row_of.max()) + 1
        heads = lead[0] // batches
        number = np.arange(lead[0])
        if batches == lead[0] and batches > 1:
            return number, np.zeros_like(number), ("b",)
        if (row_of == number // heads).all():
            return number // heads, number % heads, ("bh",)
        if (row_of == number % batches).all():
            return number % batches, number // batches, ("hb",)
    if len(lead) == 3:
        row_of = row_of.reshape(lead)
        if not (_varies(row_of, 1) or _varies(row_of, 2)):
            raise HeadsApart("its heads lie along two axes, the query's do not")
        if (found := _blocks(row_of)) is not None:
            return found
    raise NotUnderstood(
        f"its {len(lead)} leading axes are not a batch and heads, nor a batch, groups and heads, nor a batch, blocks "
        "of tokens and heads; attention in blocks of tokens is also read where blocks lie on the batch axis "
        "([batch * blocks, ...]), which is the same"
    )


def _blocks(row_of: Array) -> tuple[Array, Array, Axes] | None:
    """Where two of three leading axes run over sequences, which are blocks of tokens then; else None."""
    same = [axis for axis in range(3) if not _varies(row_of, axis)]
    wide = [axis for axis in same if row_of.shape[axis] > 1]
    if not same or len(wide) > 1:
        return None
    by_head = (wide or same)[-1]
    index = np.indices(row_of.shape).reshape(3, -1)
    outer, inner = (axis for axis in range(3) if axis != by_head)
    names = tuple("h" if axis == by_head else "b" for axis in range(3))
    return index[outer] * row_of.shape[inner] + index[inner], index[by_head], names


def _two_lead_axes(row_of: Array) -> tuple[Array, Array, Axes]:
    lead = row_of.shape
    wide = [a for a, n in enumerate(lead) if n > 1]
    batch_axis = next((a for a in wide if _varies(row_of, a)), None)
    if batch_axis is None:
        batch_axis = 1 if lead[1] == 1 and lead[0] > 1 else 0
    if any(_varies(row_of, a) for a in wide if a != batch_axis):
        raise NotUnderstood("both leading axes of an operand run over sequences")
    index = np.indices(lead).reshape(2, -1)
    return index[batch_axis], index[1 - batch_axis], ("b", "h") if batch_axis == 0 else ("h", "b")


def _features_for_tokens(rows: Array, columns: Array) -> bool:
    """Whether tokens run along the last axis of [lead..., T, D] and columns along the one before it."""
    turned = _varies(rows, rows.ndim - 1) and _varies(columns, columns.ndim - 2)
    return turned and not _varies(rows, rows.ndim - 2) and not _varies(columns, columns.ndim - 1)


def _varies(array: Array, axis: int) -> bool:
    lines = array.swapaxes(0, axis)
    return bool((lines[1:] != lines[:-1]).any())


def _varying(code: Array, axis: int, fields: dict[str, int]) -> list[str]:
    """The fields of `code` that are not constant along an axis."""
    lines = code.swapaxes(0, axis)
    changed = int(np.bitwise_or.reduce(lines[1:] ^ lines[:-1], axis=None))
    return [name for name, mask in fields.items() if changed & mask]


def _index_of(signatures: Array) -> Array:
    """Number of the first occurrence of each row among distinct rows."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(r.tobytes(), len(seen)) for r in np.ascontiguousarray(signatures)])


def _partners(first: Array, second: Array) -> Array:
    """For each feature the one that is made from the same two columns."""
    where: dict[frozenset[int], list[int]] = {}
    for d, (a, b) in enumerate(zip(first, second, strict=True)):
        where.setdefault(frozenset((int(a), int(b))), []).append(d)
    partner = np.arange(len(first))
    for pair in where.values():
        if len(pair) == 2:
            partner[pair[0]], partner[pair[1]] = pair[1], pair[0]
    return partner


def _untangle(tables: list[Array], gains: list[Array]) -> tuple[Array, Array, Array, Array]:
    """Tell the own term of a rotated pair from the partner's: own coefficients are equal on both features.

    A column's gain (a norm's weight, a long-context factor) multiplies it at both features of its pair and is
    divided out first: gain(x)^2 = own^2 + partner^2, constant over tokens.
    """
    first, second = tables[0].copy(), tables[1].copy()
    own, other = gains[0].copy(), gains[1].copy()

    def swap(where: Array) -> None:
        first[:, where], second[:, where] = second[:, where], first[:, where].copy()
        own[..., where], other[..., where] = other[..., where], own[..., where].copy()

    partner = _partners(first[0], second[0])
    index = np.arange(len(partner))
    turned = partner != index
    swap((first[0] == first[0][partner]) & turned & (index > partner))
    other[..., ~turned] *= (second[0] >= 0)[~turned]
    if np.abs(other[..., ~turned]).max(initial=0.0) > 0 or not (first[:, partner] == second)[:, turned].all():
        raise NotUnderstood("pairs of features are combined, but not by a rotation")
    gain = np.where(turned, np.sqrt(own**2 + other[..., partner] ** 2), np.abs(own))
    if np.abs(gain - gain[:1, :1]).max() > 2e-2 * gain.max():
        raise NotUnderstood("pairs of features are combined with weights that vary over tokens, not by a rotation")
    gain = np.maximum(gain, 1e-30)
    cos = own / gain
    swap(turned & (np.abs(cos - cos[..., partner]).max(axis=(0, 1)) > 2e-2))
    gain = np.where(turned, np.sqrt(own**2 + other[..., partner] ** 2), np.maximum(np.abs(own), 1e-30))
    cos, sin = own / gain, other / gain[..., partner]
    if np.abs(cos - cos[..., partner]).max() > 2e-2 or np.abs(sin + sin[..., partner])[..., turned].max() > 2e-2:
        raise NotUnderstood("pairs of features are combined, but not by a rotation")
    return first, partner, own, other


def _rotary(partner: Array | None, other: Array | None) -> Rotary | None:
    if partner is None or other is None:
        return None
    index = np.arange(len(partner))
    turned = partner != index
    count = int(turned.sum())
    spread = np.abs(partner - index)[turned]
    if count == 0:
        return None
    kind: Literal["half", "interleaved", "partial"] = "interleaved" if (spread == 1).all() and count > 2 else "half"
    return Rotary("partial" if count < len(partner) else kind, tuple(int(p) for p in partner))


def _distinct_heads(columns: Array, shared: bool) -> tuple[tuple[int, ...], Array]:
    """(group of each head, positions of the first of each distinct head)."""
    if not shared:
        return tuple(range(len(columns))), np.arange(len(columns))
    index = _index_of(columns)
    return tuple(int(i) for i in index), np.array([int((index == g).argmax()) for g in range(int(index.max()) + 1)])


@dataclass(frozen=True)
class _Origin:
    """What lies under a source.

    Attributes:
        places: (row, column) in the projection's output for each flat element of the source and of those under it.
        ground: the source that is the projection, its bias included.
        norm: a norm between the two, if there is one.
        turn: a rotation in front of that norm, if there is one.
    """

    projection: Projection
    places: Mapping[Value, tuple[Array, Array]]
    ground: Value
    norm: Norm | None = None
    turn: _Turn | None = None

    def settled(self, source: Source, flat: Array, rows: Array, columns: Array) -> _Origin:
        """Places in the norm `source` once the rotation in front of it is known; `flat` is [B, H, T, D].

        Raises NotUnderstood if other elements are normalised too.
        """
        to_rows, to_columns = (np.full(source.size, -1) for _ in range(2))
        to_rows[flat], to_columns[flat] = rows[:, None, :, None], columns[None, :, None, :]
        if (to_rows < 0).any():
            raise NotUnderstood("what is normalised is more than its heads")
        return replace(self, places={**self.places, source.value: (to_rows, to_columns)})


@dataclass(frozen=True)
class _Turn:
    """Rotated pairs that are normalised: for each flat element of the norm's input two ids of `source`, and factors."""

    source: Source
    ids: tuple[Array, ...]
    coefficients: tuple[Array, ...]


def _origin(tracer: Tracer, source: Source) -> _Origin:
    """The projection under a source, and what is done to it first."""
    if source.kind == "projection":
        projection, layout = _describe(tracer.flow, source.value)
        return _Origin(projection, {source.value: (layout.rows, layout.columns)}, source.value)
    assert source.under is not None
    inner = _form(tracer, source.under)
    if source.kind == "norm" and len(inner.ids) > 1:
        return _turned_origin(tracer, source, inner)
    below = tracer.source_of(inner.ids[0]) if inner.plain else []
    if len(below) != 1 or below[0].kind not in {"projection", "biased"}:
        raise NotUnderstood("what is normalised is not one plain projection")
    origin = _origin(tracer, below[0])
    flat = inner.ids[0].reshape(-1) - below[0].base
    rows, columns = origin.places[below[0].value]
    origin = replace(origin, places={**origin.places, source.value: (rows[flat], columns[flat])})
    if source.kind == "biased":
        projection = replace(origin.projection, bias=source.bias, bias_index=source.bias_index)
        return replace(origin, projection=projection, ground=source.value)
    assert source.norm is not None
    return replace(origin, norm=Norm(source.norm, True, source.under, source.value))


def _turned_origin(tracer: Tracer, source: Source, inner: Form) -> _Origin:
    """Under a norm of what was rotated before. Raises NotUnderstood."""
    active = [t for t, c in enumerate(inner.coefficients) if (c * (inner.ids[t] > 0)).any()]
    active.sort(key=lambda t: int((inner.ids[t] == 0).sum()))
    ids = tuple(np.broadcast_to(inner.ids[t], inner.shape).reshape(-1) for t in active)
    below = {s.value: s for i in ids for s in tracer.source_of(i)}
    ground = next(iter(below.values()))
    if len(active) != 2 or inner.bias is not None or len(below) != 1 or ground.kind == "norm" or (ids[0] == 0).any():
        raise NotUnderstood("what is normalised is neither one plain projection nor a rotated one")
    assert source.norm is not None and source.under is not None
    origin = _origin(tracer, ground)
    rows, columns = origin.places[ground.value]
    first = ids[0] - ground.base
    return replace(
        origin,
        places={**origin.places, source.value: (rows[first], columns[first])},
        norm=Norm(source.norm, True, source.under, source.value),
        turn=_Turn(ground, ids, tuple(inner.coefficients[t].reshape(-1) for t in active)),
    )


def _describe(flow: Flow, output: Value) -> tuple[Projection, Layout]:
    """The projection whose complete output this is, and how that is laid out. Raises NotUnderstood."""
    found = projection_at(flow, output)
    assert found is not None
    node, bias = found
    operands = flow.projection_operands(node)
    assert operands is not None
    x, w = (node.inputs[i] for i in operands)
    if node.op in PACKED_WEIGHTS:
        raise NotUnderstood(
            f"the projection's weight is stored for {node.op}; rewrite the float model and quantise it afterwards"
        )
    if node.op == "Conv":
        raise NotUnderstood(_convolved(flow, node, w))
    layout = layout_of(flow, node)
    if isinstance(layout, str):
        raise NotUnderstood(layout)
    if layout.summed != 1:
        raise NotUnderstood("the projection sums over two axes, so its heads would not be found at its input")
    axes, factor = layout.weight_axes, layout.factor
    return Projection(
        node.index, x, output, w, layout.out_first, bias, layout.features, weight_axes=axes, factor=factor
    ), layout


def _convolved(flow: Flow, node: Node, weight: Value) -> str:
    """Why a convolution's heads are not read, and what would be."""
    shape = flow.shape(weight)
    inputs = flow.shape(node.inputs[0])[1]
    if any(n != 1 for n in shape[2:]):
        return f"the projection is a convolution over {' x '.join(map(str, shape[2:]))} tokens, so it mixes tokens too"
    if shape[1] != inputs:
        return (
            f"the projection is a convolution in {inputs // shape[1]} groups, of which each sees its own part of the "
            "features: heads of different groups cannot be merged"
        )
    return (
        "the projection is written as a convolution of kernel size 1; write it as a linear layer over the last axis "
        "(nn.Linear with the same weights, features transposed to the end), which is the same map and is rewritten"
    )


class _Lookup:
    """Tells batch, token, head and feature of any id of the main source. `foreign` are sources of other streams."""

    def __init__(
        self, source: Source, origin: _Origin, rows: Array, columns: Array, foreign: frozenset[Value] = frozenset()
    ) -> None:
        self.foreign = foreign
        self.source, self.places, self.ground = source, origin.places, origin.ground
        to_rows, to_columns = origin.places[source.value]
        batches, tokens = rows.shape
        self.batch = np.full(int(to_rows.max()) + 1, -1)
        self.token = np.full(int(to_rows.max()) + 1, -1)
        self.gathers = len(np.unique(rows)) < rows.size
        """Whether some token stands in several places."""
        self.batch[rows] = np.arange(batches)[:, None]
        self.token[rows] = np.arange(tokens)[None]
        self.head = np.full(int(to_columns.max()) + 1, -1)
        self.feature = np.full(int(to_columns.max()) + 1, -1)
        self.head[columns] = np.arange(columns.shape[0])[:, None]
        self.feature[columns] = np.arange(columns.shape[1])[None]
        self.size = batches * tokens * columns.size
        widths = {"b": batches, "s": tokens, "h": columns.shape[0], "d": columns.shape[1]}
        shifts = dict(zip(widths, np.cumsum([0, *(n.bit_length() for n in widths.values())]).tolist(), strict=False))
        self.fields = {k: ((1 << n.bit_length()) - 1) << shifts[k] for k, n in widths.items()}
        self.row_code = np.where(self.batch < 0, -1, (self.batch << shifts["b"]) | (self.token << shifts["s"]))
        self.column_code = np.where(self.head < 0, -1, (self.head << shifts["h"]) | (self.feature << shifts["d"]))

    def positions(self, ids: Array, source: Source) -> tuple[Array, Array] | None:
        """(rows, columns) in the projection's output; None if an id is of no source under the operand."""
        flat = ids - source.base
        if source.value not in self.places or (flat < 0).any() or (flat >= source.size).any():
            return None
        rows, columns = self.places[source.value]
        return rows[flat], columns[flat]

    def mine(self, tracer: Tracer, ids: Array) -> list[Source]:
        """The sources that these ids point into, but caches and other streams."""
        return [s for s in tracer.source_of(ids) if s.kind != "input" and s.value not in self.foreign]

    def features(self, ids: Array, axes: Axes, source: Source) -> tuple[int, ...] | None:
        """Order of features along their axis at a pure re-layout; None if heads are out of order there."""
        found = self.positions(ids, source)
        if found is None or "dh" in axes:
            return None
        line = {letter: next((i for i, a in enumerate(axes) if letter in a), None) for letter in "hgd"}
        assert line["h"] is not None and line["d"] is not None
        group = 1 if line["g"] is None else ids.shape[line["g"]]
        heads = _order_along(self.head[found[1]], line["h"])
        features = _order_along(self.feature[found[1]], line["d"])
        return tuple(int(f) for f in features) if (heads == group * np.arange(len(heads))).all() else None

    def axes(self, ids: Array, source: Source) -> Axes | None:
        """What each axis runs over, if these ids are exactly the operand's elements, each once; else None."""
        found = self.positions(ids, source) if ids.size == self.size else None
        if found is None:
            return None
        rows, columns = found
        if columns.max() >= len(self.head) or rows.max() >= len(self.batch):
            return None
        code = self.row_code[rows] | self.column_code[columns]
        if (code < 0).any() or np.bincount(ids.reshape(-1) - source.base).max() > 1:
            return None
        return _groups_apart(_name_axes(code, self.fields), self.head[columns])


def _order_along(parts: Array, axis: int) -> Array:
    """The sequence of numbers along one axis, repeats dropped."""
    line = parts[tuple(slice(None) if a == axis else 0 for a in range(parts.ndim))]
    return np.array(list(dict.fromkeys(line.tolist())))


def _name_axes(code: Array, fields: dict[str, int]) -> Axes:
    """What varies along each axis of `code`, whose bits hold batch, token, head and feature as `fields` masks them."""
    names = []
    for axis in range(code.ndim):
        varying = _varying(code, axis, fields)
        if len(varying) > 1:  # the part that changes at the first step is the minor one
            varying.sort(key=_varying(code.take((0, 1), axis=axis), axis, fields).__contains__)
        names.append("".join(varying))
    missing = [k for k in "bsdh" if not any(k in n for n in names)]  # heads of size 1 are told from features last
    missing = missing if len(missing) > names.count("") else sorted(missing, key="bhsd".index)
    for axis, name in enumerate(names):
        if not name and missing:
            names[axis] = missing.pop(0)
    if missing == ["b"] and names[0] == "h" and sorted(names) == ["d", "h", "s"]:  # one sequence: a batch of one
        return ("bh", *names[1:])
    for key in missing:  # an axis of size 1 that was squeezed into its neighbour
        minor = next((i for i, n in enumerate(names) if ("d" if key == "h" else "s") in n), None)
        if minor is None:
            raise NotUnderstood("it has a single token and a single head here; pass example_inputs with more tokens")
        names[minor] = key + names[minor]
    return tuple(names)


def _groups_apart(names: Axes, heads: Array) -> Axes:
    """Where heads run over two axes, the one that counts the heads of a group is named "g"."""
    axes = [a for a, name in enumerate(names) if name == "h"]
    if len(axes) != 2:
        return names
    origin, *firsts = heads.flat[0], *(heads.take(1, axis=a).flat[0] for a in axes)
    minor = axes[int(np.argmin([first - origin for first in firsts]))]
    return tuple("g" if a == minor else name for a, name in enumerate(names))


def _seam(tracer: Tracer, value: Value, lookup: _Lookup) -> tuple[Value, Axes, float]:
    """Walk up from the anchor over layout and scalar factors: the last value with axes b, h, s, d if there is one,
    else the first with one axis for each, else the last. ("", (), 1) if heads are repeated before they are changed."""
    flow = tracer.flow
    best: tuple[Value, Axes, float] | None = None
    factor = 1.0
    while True:
        axes = _axes_at(tracer, value, lookup)
        if axes is not None and (best is None or _plain(axes)):
            best = (value, axes, factor)
            if axes == ("b", "h", "s", "d"):
                break
        node = flow.producer(value)
        if node is None or projection_at(flow, value) is not None:
            break
        if node.op in PASS_THROUGH or (node.op in LAYOUT and len(data_operands(node)) == 1):
            value = node.inputs[0]
        elif node.op == "Concat" and (whole := _taken_apart(flow, node)) is not None:
            value = whole
        elif node.op in {"Mul", "Div"} and (scalar := _scalar(flow, node)) is not None:
            value, number = scalar
            factor *= number
        else:
            break
    return ("", (), 1.0) if best is None else best


def _taken_apart(flow: Flow, node: Node) -> Value | None:
    """The one value whose parts, or which itself, a node joins (heads are repeated so); None if there are several."""
    if len(set(node.inputs)) == 1:
        return node.inputs[0]
    cuts = [n for v in node.inputs if (n := flow.producer(v)) is not None and n.op in {"Split", "Slice", "Gather"}]
    whole = {n.inputs[0] for n in cuts}
    return whole.pop() if len(cuts) == len(node.inputs) and len(whole) == 1 else None


def _scalar(flow: Flow, node: Node) -> tuple[Value, float] | None:
    a, b = node.inputs[:2]
    data, other = (a, b) if flow.data_dependent(a) else (b, a)
    if flow.data_dependent(other) or flow.is_fed(other) or (node.op == "Div" and data != a):
        return None
    number = flow.value(other)
    if number.size != 1:
        return None
    return data, float(number.reshape(())) if node.op == "Mul" else 1.0 / float(number.reshape(()))


def _axes_at(tracer: Tracer, value: Value, lookup: _Lookup, pure: bool = False) -> Axes | None:
    """Axes of any value on the path, cached tokens left out; None if it is not exactly the operand.

    `pure`: only where it is a mere re-layout of the projection, bias included.
    """
    try:
        form = tracer.trace(value)
    except Opaque:
        return None
    if pure and not form.plain:
        return None
    order = sorted(range(len(form.ids)), key=lambda t: int((form.ids[t] == 0).sum())) if len(form.ids) > 1 else [0]
    ids = form.ids[order[0]]
    if len(order) == 2:
        ids = _told_apart(ids, form.ids[order[1]])
    sources = lookup.mine(tracer, ids)
    if len(sources) != 1 or (pure and sources[0].value != lookup.ground):
        return None
    new = _without_cache(ids, sources[0])
    return None if new is None else lookup.axes(new, sources[0])


def _without_cache(ids: Array, source: Source) -> Array | None:
    """`ids` without the tokens that come from elsewhere than `source`; None if they do not lie along one axis."""
    mine = source.holds(ids)
    for axis in range(ids.ndim):
        keep = mine.all(axis=tuple(a for a in range(ids.ndim) if a != axis))
        if not keep.all() and keep.any() and not mine.take(np.flatnonzero(~keep), axis=axis).any():
            ids = ids.take(np.flatnonzero(keep), axis=axis)
            mine = mine.take(np.flatnonzero(keep), axis=axis)
    return ids if mine.all() else None


def _told_apart(first: Array, second: Array) -> Array:
    """Ids of a rotated value, each once: a rotation may be written with one feature first at both of its places."""
    flat = first.reshape(-1).copy()
    again = np.ones(flat.size, dtype=bool)
    again[np.unique(flat, return_index=True)[1]] = False
    again &= (flat > 0) & (second.reshape(-1) > 0)
    flat[again] = second.reshape(-1)[again]
    return flat.reshape(first.shape)


def path_between(flow: Flow, start: Value, end: Value) -> tuple[int, ...]:
    """Nodes on any route from `start` to `end`, shape subgraphs included, in order."""
    if start == end:
        return ()
    below: set[Value] = {start}
    path = []
    producer = flow.producer(start)
    first = -1 if producer is None else producer.index
    for node in flow.ancestors(end, stop=lambda n: n.index <= first):  # what runs before `start` reads nothing of it
        if any(v in below for v in node.inputs):
            below.update(node.outputs)
            path.append(node.index)
    return tuple(path)


def _stem(
    tracer: Tracer, projection: Projection, path: tuple[int, ...], lookup: _Lookup
) -> tuple[Value, Axes, tuple[int, ...]]:
    """(value, axes, features): the last pure re-layout of the projection through which the whole path passes."""
    flow = tracer.flow
    nodes = [flow.nodes[i] for i in path]
    candidates = [(projection.output, nodes)]
    candidates += [(v, nodes[i + 1 :]) for i, n in enumerate(nodes) for v in n.outputs if v]
    best: tuple[Value, Axes, tuple[int, ...]] | None = None
    own = {projection.output, *(v for n in nodes for v in n.outputs if v)}
    for value, later in reversed(candidates):  # the last plain one, else the last
        if not _is_gate(flow, later, value, own if lookup.foreign else None):
            continue
        axes = _axes_at(tracer, value, lookup, pure=True)
        if axes is None or (best is not None and not _plain(axes)):
            continue
        ids = tracer.trace(value).ids[0]
        features = lookup.features(ids, axes, tracer.source_of(ids)[0])
        if features is not None:
            best = (value, axes, features)
            if _plain(axes):
                break
    if best is None and lookup.gathers:
        raise NotUnderstood(
            "some of its tokens stand in several places (blocks of keys that are gathered for each block of queries), "
            "as sparse attention in blocks lays them out; all tokens with a mask are the same and are read"
        )
    if best is None:
        raise NotUnderstood("the operand's heads are never separate from other features before they are changed")
    return best


def _plain(axes: Axes) -> bool:
    """One axis for each of batch, heads, tokens and features; none of them split in two."""
    return all(len(a) == 1 for a in axes) and len(set(axes)) == len(axes) and "g" not in axes


def _is_gate(flow: Flow, later: list[Node], value: Value, own: set[Value] | None) -> bool:
    """No later node of the path mixes what comes through `value` with elements that do not.

    Joining tokens with those of another stream, which are not the path's `own` values, is no mixing.
    """
    through = {value}
    for node in later:
        reads = [v for v in node.inputs if v and flow.data_dependent(v)]
        if own is not None and node.op == "Concat":
            reads = [v for v in reads if v in own]
        if any(v in through for v in reads):
            if any(v not in through for v in reads):
                return False
            through.update(node.outputs)
    return True
