"""From an operand at the anchor back to its projection: columns, heads, rotation, norm, cache, and the seam.

Everything is read off the numbers of the operand's affine form; no layout is matched by name. Which projections its
elements come from is in `operand_sources`, where these lie in `origins`, in which order elements stand in
`canonical_order`, and what lies on the path between them in `operand_path`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from passes.dataflow import Array, Value
from passes.forms import Form, Source
from passes.match.canonical_order import Axes, Canonical, features_for_tokens, index_of, lead_roles
from passes.match.head_gains import FoundGains, find_gains, require_mergeable
from passes.match.operand_path import Lookup, path_between, presents_on, reshapes_on, seam_of, stem_of
from passes.match.operand_sources import Streams, cache_split, form_of, main_source, stream_of, streams_of
from passes.match.operand_view import OperandView
from passes.match.origins import Origin, origin_of
from passes.match.verdicts import NotUnderstood
from passes.provenance import Tracer
from passes.site import Norm, Operand, Rotary


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
    form = form_of(tracer, view.value)
    if view.heads:
        form = _split_features(form, view.heads)
        view = OperandView(view.value, 1, 3)
    ids, coefficients = _active_terms(form, view)
    joined = streams_of(tracer, ids)
    if not joined:
        return _traced(tracer, view, form, (ids, coefficients), main_source(tracer, ids), (), shared_heads)
    parts = [
        _traced(tracer, view, form, _active_at(ids, coefficients, here), source, joined, shared_heads)
        for source, here in joined
    ]
    return _together(parts)


Terms = tuple[list[Array], list[Array]]


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
    new, past = cache_split(tracer, ids[0], source) if not streams else (stream_of(streams, source), None)
    origin = origin_of(tracer, source)
    projection, norm = origin.projection, origin.norm
    to_rows, to_columns = origin.places[source.value]
    flat = ids[0][..., new, :] - source.base
    if features_for_tokens(to_rows[flat], to_columns[flat]):
        raise NotUnderstood(
            "tokens stand where features should: it weighs features by features (channel or cross-covariance "
            "attention), or a projection mixes its tokens, and has no heads over tokens to share"
        )
    lead = lead_roles(to_rows[flat], to_columns[flat], view.blocks)
    bias = None if form.bias is None else view.arranged(np.broadcast_to(form.bias, form.shape))
    canonical = Canonical(ids, coefficients, source, bias, new, lead)
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
    foreign = frozenset(v for s, _ in streams if s.value != source.value for v in origin_of(tracer, s).places)
    lookup = Lookup(source, origin, found.rows, head_columns, foreign)
    seam, axes, factor = seam_of(tracer, view.value, lookup)
    path = path_between(flow, projection.output, seam or view.value)
    stem, stem_axes, stem_features = stem_of(tracer, projection, path, lookup)
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
        presents=presents_on(tracer, path, stem, lookup),
        reshapes=reshapes_on(tracer, path_between(flow, stem, seam), lookup) if seam else (),
    )
    return Traced(operand, tokens, group, factor)


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


def _positions(canonical: Canonical, origin: Origin, source: Source) -> tuple[Origin, _Found]:
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


def _past_head_axis(tracer: Tracer, ids: Array, new: slice, past: Value | None, canonical: Canonical) -> int | None:
    """Which axis of the cache changes from one head to the next, all else equal."""
    if past is None:
        return None
    source = next(s for s in tracer.source_of(ids) if s.value == past)
    grid = canonical.arrange(ids[..., : new.start, :])
    where = np.stack(np.unravel_index(grid - source.base, source.shape))
    moved = (np.diff(where, axis=2) != 0).reshape(len(source.shape), -1).any(axis=1)
    return int(moved.argmax()) if moved.sum() == 1 else None


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
    index = index_of(columns)
    return tuple(int(i) for i in index), np.array([int((index == g).argmax()) for g in range(int(index.max()) + 1)])
