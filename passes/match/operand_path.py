"""What lies between a projection and the attention: layouts on the path, stem and seam, reshapes, outputs."""

from __future__ import annotations

import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Node, Value
from passes.forms import Opaque, Source
from passes.match.canonical_order import Axes, varies, varying_fields
from passes.match.origins import Origin
from passes.match.verdicts import NotUnderstood
from passes.operator_kinds import PASS_THROUGH, data_operands
from passes.provenance import Tracer
from passes.site import Projection
from passes.whole_projection import projection_at


def presents_on(tracer: Tracer, path: tuple[int, ...], stem: Value, lookup: Lookup) -> tuple[tuple[Value, int], ...]:
    """Program outputs on the path, or cut out of what lies there, cast or, from the stem on, laid out otherwise: the
    grown cache that a decoder hands back."""
    flow = tracer.flow
    values = [v for i in path for v in flow.nodes[i].outputs]
    cut = [(v, r.outputs[0]) for v in values for r in flow.live_readers(v) if r.op in {"Slice", "Cast", "Identity"}]
    returned = [(v, out) for v, out in (*((v, v) for v in values), *cut) if out in flow.outputs]
    found = []
    for value, output in returned:
        axes = _axes_at(tracer, value, lookup)
        if axes is None or "h" not in axes:
            raise NotUnderstood(f"the program also returns {output}, which is not exactly the operand's heads")
        found.append((output, axes.index("h")))
    turned = (v for n in _beside(flow, path, stem) for v in n.outputs if v in flow.outputs and v not in values)
    found += [(v, axes.index("h")) for v in turned if (axes := _axes_at(tracer, v, lookup)) is not None and "h" in axes]
    return tuple(dict.fromkeys(found))


def _beside(flow: Flow, path: tuple[int, ...], stem: Value) -> list[Node]:
    """Transpositions, off the path, of the stem or of what lies on the path behind it."""
    values = [stem]
    for index in path:
        node = flow.nodes[index]
        if stem not in node.outputs and any(v in values for v in node.inputs):
            values += node.outputs
    return [r for v in values if v for r in _turned(flow, v, path)]


def _turned(flow: Flow, value: Value, path: tuple[int, ...]) -> list[Node]:
    """Transpositions of a value that lie off the path."""
    return [r for r in flow.live_readers(value) if r.op == "Transpose" and r.index not in path]


def reshapes_on(tracer: Tracer, path: tuple[int, ...], lookup: Lookup) -> tuple[tuple[int, int], ...]:
    """Reshapes and expansions on the path, with the axis of their output along which heads vary."""
    found = []
    for index in path:
        node = tracer.flow.nodes[index]
        if node.op in {"Reshape", "Expand"} and tracer.flow.data_dependent(node.outputs[0]):
            axes = (_head_axis(tracer, v, lookup) for v in (node.outputs[0], *_met(tracer.flow, node.outputs[0])))
            axis = next((axis for axis in axes if axis is not None), None)
            if axis is not None:
                found.append((index, axis))
    return tuple(found)


def _met(flow: Flow, value: Value) -> list[Value]:
    """What a value meets element by element: a norm that was expanded to the heads that it divides."""
    readers = [n for n in flow.consumers(value) if n.op in {"Mul", "Div"}]
    return [v for n in readers for v in n.inputs if v and v != value and flow.shape(v) == flow.shape(value)]


def _head_axis(tracer: Tracer, value: Value, lookup: Lookup) -> int | None:
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
    varying = [a for a in range(new.ndim) if new.shape[a] > 1 and varies(heads, a)]
    return varying[0] if len(varying) == 1 else None


class Lookup:
    """Tells batch, token, head and feature of any id of the main source. `foreign` are sources of other streams."""

    def __init__(
        self, source: Source, origin: Origin, rows: Array, columns: Array, foreign: frozenset[Value] = frozenset()
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
        varying = varying_fields(code, axis, fields)
        if len(varying) > 1:  # the part that changes at the first step is the minor one
            varying.sort(key=varying_fields(code.take((0, 1), axis=axis), axis, fields).__contains__)
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


def seam_of(tracer: Tracer, value: Value, lookup: Lookup) -> tuple[Value, Axes, float]:
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


def _axes_at(tracer: Tracer, value: Value, lookup: Lookup, pure: bool = False) -> Axes | None:
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


def stem_of(
    tracer: Tracer, projection: Projection, path: tuple[int, ...], lookup: Lookup
) -> tuple[Value, Axes, tuple[int, ...]]:
    """(value, axes, features): the last pure re-layout of the projection through which the whole path passes; not
    behind one that leaves the program by a transposition of its own, which is to have as many heads."""
    flow = tracer.flow
    nodes = [flow.nodes[i] for i in path]
    candidates = [(projection.output, nodes)]
    candidates += [(v, nodes[i + 1 :]) for i, n in enumerate(nodes) for v in n.outputs if v]
    best: tuple[Value, Axes, tuple[int, ...]] | None = None
    own = {projection.output, *(v for n in nodes for v in n.outputs if v)}
    for value, later in reversed(candidates):  # the last plain one, else the last
        handed_out = any(n.outputs[0] in flow.outputs for n in _turned(flow, value, path))
        if best is not None and _plain(best[1]) and not handed_out:
            continue
        if not _is_gate(flow, later, value, own if lookup.foreign else None):
            continue
        axes = _axes_at(tracer, value, lookup, pure=True)
        if axes is None or (best is not None and not _plain(axes)):
            continue
        ids = tracer.trace(value).ids[0]
        features = lookup.features(ids, axes, tracer.source_of(ids)[0])
        if features is not None:
            best = (value, axes, features)
    if best is None and lookup.gathers:
        raise NotUnderstood(
            "some of its tokens stand in several places (blocks of keys that are gathered for each block of queries), "
            "as sparse attention in blocks lays them out; all tokens with a mask are the same and are read"
        )
    if best is None and any(n.op == "Clip" for n in nodes):
        raise NotUnderstood(
            "what is projected is kept within bounds (clipped) before queries, keys and values are cut out of it; cut "
            "them out first and clip each, which is the same and is read"
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
