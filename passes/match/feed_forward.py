"""Candidate → layout → activation → replay: every feed-forward block ends as a site or as a refusal.

Which column of which projection feeds which hidden feature is told by running the layout operators on indices; what the
activation is, by running the other nodes between the projections on chosen numbers. A description must then reproduce
the block's recorded output from its recorded input.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from passes.contents import Contents
from passes.dataflow import LAYOUT, Array, Flow, Node, Value
from passes.feed_forward_site import Activation, FeedForwardSite, HiddenInput
from passes.match.feed_forward_blocks import Block, blocks, mixtures
from passes.match.linear_map import linear_map
from passes.match.names import common_scope, exporter_scope, layer_of
from passes.match.roundings import Rounding, executed, operand_roundings, quantizer_of
from passes.match.verdicts import NotUnderstood, Unrelated
from passes.nonlinearities import NONLINEARITIES
from passes.provenance import PASS_THROUGH, data_operands
from passes.replay import TOLERANCES, relative
from passes.site import Projection, Refusal

_NAMING_TOLERANCE = {"float64": 2e-5, "float32": 2e-5}
"""How far the program's activation may be from a named one, relative to values above 1; other dtypes store constants
with few digits (the two usual forms of GELU are 5e-4 apart)."""
_COARSE = 4e-3


@dataclass(frozen=True)
class FeedForwards:
    """Everything found in one flow, in execution order."""

    sites: tuple[FeedForwardSite, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def find_feed_forward(flow: Flow, taken: Iterable[str] = ()) -> FeedForwards:
    """Match every feed-forward block of a program and verify each by replay.

    Args:
        flow: a recording that holds `feed_forward_blocks.recorded_values`.
        taken: names of attentions; a block inside whose scope one lies is not named after that scope alone.
    """
    names = _Names(flow, frozenset(taken))
    readings = _Readings(Contents(flow))
    sites: list[FeedForwardSite] = []
    refusals: dict[tuple[str, str], Refusal] = {}

    def refuse(name: str, layer: int, reason: str, anchor: int, owner: str) -> None:
        refusals.setdefault((owner or name, reason), Refusal(name, layer, reason, anchor, owner))

    for block in blocks(flow):
        name, layer, owner = names.of(block)
        try:
            sites.append(_match(flow, block, readings, name, layer, owner))
        except Unrelated:
            continue
        except NotUnderstood as reason:
            refuse(name, layer, str(reason), block.down, owner)
        except (ArithmeticError, LookupError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            refuse(name, layer, f"matching it failed: {type(error).__name__}: {first}", block.down, owner)
    for node in mixtures(flow):
        name = node.owner or exporter_scope(node.name) or f"mixture_of_experts.{node.index}"
        refuse(name, layer_of(name, 0), "it is a mixture of experts already", node.index, node.owner)
    alone, shared = _without_shared(flow, sites)
    for site in shared:
        refuse(site.name, site.layer, "a weight of it is read by something else too", site.anchor, site.owner)
    return FeedForwards(tuple(alone), tuple(sorted(refusals.values(), key=lambda r: r.anchor)))


def confirm_feed_forward(first: FeedForwards, second: FeedForwards) -> FeedForwards:
    """`first` without sites that `second`, the same program recorded at another size, does not describe alike."""
    others = {s.anchor: s for s in second.sites}
    sites: list[FeedForwardSite] = []
    refusals = list(first.refusals)
    for site in first.sites:
        other = others.get(site.anchor)
        if other is None or not _alike(site, other):
            reason = "its description differs from one size to another"
            refusals.append(Refusal(site.name, site.layer, reason, site.anchor, site.owner))
        else:
            sites.append(replace(site, replay_error=max(site.replay_error, other.replay_error)))
    return FeedForwards(tuple(sites), tuple(sorted(refusals, key=lambda r: r.anchor)))


def _alike(a: FeedForwardSite, b: FeedForwardSite) -> bool:
    if (a.gate is None) != (b.gate is None) or a.activation.name != b.activation.name:
        return False
    pairs = [(a.up, b.up)] if a.gate is None or b.gate is None else [(a.up, b.up), (a.gate, b.gate)]
    return all(x.projection.node == y.projection.node and np.array_equal(x.columns, y.columns) for x, y in pairs)


# ------------------------------------------------------------------ one block


def _match(flow: Flow, block: Block, readings: _Readings, name: str, layer: int, owner: str) -> FeedForwardSite:
    """Raises NotUnderstood with the refusal's reason, Unrelated where there is no nonlinearity at all."""
    if block.obstacle is not None:
        raise NotUnderstood(block.obstacle)
    inside = _Inside.of(flow, block)
    reading = readings.of(inside)
    factors = [HiddenInput(inside.projections[s.source], s.columns) for s in inside.slots]
    gate = factors[reading.gate] if reading.gate is not None else None
    up = factors[0 if reading.gate is None else 1 - reading.gate]
    down = linear_map(flow, flow.nodes[block.down])
    error = _replay_error(flow, inside, reading, down)
    if not error <= TOLERANCES[flow.dtype]:
        raise NotUnderstood(f"it does not replay from its weights (relative error {error:.1e})")
    return FeedForwardSite(
        name=name,
        layer=layer,
        width=down.features,
        hidden=len(up.columns),
        up=up,
        gate=gate,
        activation=Activation(reading.name, reading.of, block.inner),
        down=down,
        input=block.input,
        residual=block.residual,
        nodes=_nodes(flow, block),
        replay_error=error,
        owner=owner,
    )


def _nodes(flow: Flow, block: Block) -> tuple[int, ...]:
    ends = {block.down, *block.projections, *block.inner}
    for value in (*block.sources, block.output):
        node = flow.producer(value)
        while node is not None and node.index not in ends:  # a bias, perhaps with roundings in front of it
            ends.add(node.index)
            fed = [v for v in node.inputs if v and flow.is_fed(v)]
            node = flow.producer(fed[0]) if fed else None
    return tuple(sorted(ends))


@dataclass(frozen=True)
class _Slot:
    """One projected number that a hidden feature is a function of.

    Attributes:
        source: which projection.
        columns: [hidden] its column.
    """

    source: int
    columns: Array


@dataclass(frozen=True)
class _Inside:
    """What lies between the projections of one block.

    Attributes:
        projections: with biases that are added further on taken in.
        shapes: of their complete outputs.
        slots: one in a plain block, two in a gated one.
        biases: (node, input) of those biases.
    """

    flow: Flow
    block: Block
    projections: tuple[Projection, ...]
    shapes: tuple[tuple[int, ...], ...]
    slots: tuple[_Slot, ...]
    biases: frozenset[tuple[int, int]]

    @staticmethod
    def of(flow: Flow, block: Block) -> _Inside:
        projections = tuple(linear_map(flow, flow.nodes[i]) for i in block.projections)
        shapes = tuple((*flow.shape(p.input)[:-1], p.features) for p in projections)
        indices = _Indices(flow, block, projections, shapes)
        slots = indices.slots()
        return _Inside(flow, block, indices.projections, shapes, slots, frozenset(indices.biases))

    @property
    def rows(self) -> int:
        return int(np.prod(self.shapes[0][:-1], dtype=np.int64))

    def hidden(self, projected: Iterable[Array]) -> Array:
        """[rows, hidden], float32: the program's own nodes on these projected numbers ([rows, features] each)."""
        values = {
            v: np.asarray(p, dtype=np.float32).reshape(s)
            for v, p, s in zip(self.block.sources, projected, self.shapes, strict=True)
        }
        for index in self.block.inner:
            node = self.flow.nodes[index]
            values.update(zip(node.outputs, self._step(node, values), strict=False))
        return np.asarray(values[self.block.hidden]).reshape(self.rows, -1)

    def _step(self, node: Node, values: Mapping[Value, Array]) -> tuple[Array, ...]:
        if node.op in PASS_THROUGH:
            x = values[node.inputs[0]]
            quantize = quantizer_of(self.flow, node)
            x = x if quantize is None else executed(self.flow, [Rounding(quantize, 1.0, 0)], x).astype(np.float32)
            return (x.astype(np.float32) if x.dtype == np.bool_ else x,)
        arguments = [self._argument(node, i, v, values) for i, v in enumerate(node.inputs)]
        with np.errstate(all="ignore"):
            return node.evaluate(arguments)

    def _argument(self, node: Node, position: int, value: Value, values: Mapping[Value, Array]) -> Array | None:
        if not value:
            return None
        if value in values:
            return values[value]
        constant = self.flow.value(value)
        return np.zeros_like(constant) if (node.index, position) in self.biases else constant


class _Indices:
    """Runs the layout operators of one block on indices; every other operator is taken for elementwise, which running
    it on numbers will confirm or not."""

    def __init__(
        self, flow: Flow, block: Block, projections: tuple[Projection, ...], shapes: tuple[tuple[int, ...], ...]
    ) -> None:
        self.flow, self.block, self.projections, self.shapes = flow, block, projections, shapes
        self.biases: list[tuple[int, int]] = []
        sizes = [int(np.prod(s, dtype=np.int64)) for s in shapes]
        self.bases = np.cumsum([0, *sizes])
        self.held: dict[Value, tuple[Array, ...]] = {
            v: (np.arange(b, b + n).reshape(s),)
            for v, b, n, s in zip(block.sources, self.bases, sizes, shapes, strict=False)
        }

    def slots(self) -> tuple[_Slot, ...]:
        """Which column feeds which hidden feature, the same for every token. Raises NotUnderstood."""
        for index in self.block.inner:
            node = self.flow.nodes[index]
            if node.op in PASS_THROUGH:
                self.held[node.outputs[0]] = self.held[node.inputs[0]]
            elif node.op in LAYOUT and node.op != "Where":
                self._move(node)
            else:
                self._combine(node)
        found = self.held[self.block.hidden]
        if len(found) > 2:
            raise NotUnderstood(f"each hidden feature is made of {len(found)} projected ones")
        return tuple(self._slot(ids) for ids in found)

    def _move(self, node: Node) -> None:
        data = [v for i in data_operands(node) if i < len(node.inputs) and (v := node.inputs[i])]
        if any(v not in self.held for v in data) or len({len(self.held[v]) for v in data}) != 1:
            raise NotUnderstood(f"{node.op} joins its hidden features with something else")
        moved = [
            node.evaluate([self._argument(v, slot) for v in node.inputs]) for slot in range(len(self.held[data[0]]))
        ]
        for which, name in enumerate(node.outputs):
            self.held[name] = tuple(np.asarray(outputs[which]) for outputs in moved if which < len(outputs))

    def _argument(self, value: Value, slot: int) -> Array | None:
        if not value:
            return None
        return self.held[value][slot] if value in self.held else self.flow.value(value)

    def _combine(self, node: Node) -> None:
        merged: list[Array] = []
        for value in node.inputs:
            for ids in self.held.get(value, ()):
                if not any(np.array_equal(ids, other) for other in merged):
                    merged.append(ids)
        if len({ids.shape for ids in merged}) != 1:
            raise NotUnderstood("features of different tokens meet between its projections")
        for position, value in enumerate(node.inputs):
            if not value or value in self.held or (array := self.flow.value(value)).size == 1:
                continue
            try:
                self._take_bias(node, position, merged)
            except NotUnderstood:
                if (array != array.reshape(-1)[0]).any():  # one number written out many times is one number
                    raise
        for name in node.outputs:
            self.held[name] = tuple(merged)

    def _take_bias(self, node: Node, position: int, merged: list[Array]) -> None:
        """A vector that has the same effect as a bias of the projection becomes its bias. Raises NotUnderstood."""
        vector = np.asarray(self.flow.value(node.inputs[position]), dtype=np.float32)
        fed = [i for i, v in enumerate(node.inputs) if v in self.held]
        ids = merged[0]
        if len(merged) != 1 or len(fed) != 1 or not _adds(node, fed[0], position, vector, ids.shape):
            raise NotUnderstood("its activation has numbers of its own for each feature")
        slot = self._slot(ids)
        projection = self.projections[slot.source]
        if projection.bias is not None or vector.size != ids.shape[-1]:
            raise NotUnderstood("two vectors are added to its hidden features")
        index = np.full(projection.features, -1)
        index[slot.columns] = np.arange(vector.size)
        taken = replace(projection, bias=node.inputs[position], bias_index=index)
        self.projections = tuple(taken if i == slot.source else p for i, p in enumerate(self.projections))
        self.biases.append((node.index, position))

    def _slot(self, ids: Array) -> _Slot:
        source = int(np.searchsorted(self.bases, ids.reshape(-1)[0], side="right")) - 1
        features = self.projections[source].features
        local = ids.reshape(-1, ids.shape[-1]) - self.bases[source]
        columns = local[0] % features
        expected = np.arange(len(local))[:, None] * features + columns
        if not np.array_equal(local, expected) or len(np.unique(columns)) != len(columns):
            raise NotUnderstood("its hidden features are not laid out alike for every token")
        return _Slot(source, columns)


def _adds(node: Node, fed: int, position: int, vector: Array, shape: tuple[int, ...]) -> bool:
    """Whether an operator with a number for each feature does what it does to the sum of both."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if np.broadcast_shapes(vector.shape, shape) != shape:
        return False

    def run(data: Array, other: Array) -> Array:
        arguments: list[Array | None] = [None] * len(node.inputs)
        arguments[fed], arguments[position] = data, other
        return np.asarray(node.evaluate(arguments)[0])

    return bool(np.allclose(run(x, vector), run(x + vector, np.zeros_like(vector)), atol=1e-5, rtol=1e-5))


# ------------------------------------------------------------------ the activation


@dataclass(frozen=True)
class _Reading:
    """Attributes:
    name, of: as in `Activation`.
    gate: which slot is activated and multiplied with the other; None in a plain block.
    """

    name: str | None
    of: Callable[[Array], Array] | None
    gate: int | None


class _Readings:
    """Activations, read once for all blocks of the same structure; replay proves each block by itself."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.known: dict[Hashable, _Reading] = {}

    def of(self, inside: _Inside) -> _Reading:
        """Raises NotUnderstood, Unrelated."""
        try:
            structure = self._structure(inside)
        except KeyError:  # something was not recorded
            structure = None
        if structure is None:
            return _read_activation(inside)
        if structure not in self.known:
            self.known[structure] = _read_activation(inside)
        known = self.known[structure]
        return known if known.name else replace(known, of=_program(inside, known.gate))

    def _structure(self, inside: _Inside) -> Hashable | None:
        """Equal for blocks whose nodes do the same, on equal numbers; None if that is not known of some node."""
        flow, block = inside.flow, inside.block
        number = {v: i for i, v in enumerate(block.sources)}
        entries: list[Hashable] = []
        for index in block.inner:
            node = flow.nodes[index]
            if (likeness := node.likeness()) is None:
                return None
            read: list[Hashable] = []
            for position, value in enumerate(node.inputs):
                if (index, position) in inside.biases:
                    read.append(("bias", flow.shape(value)))
                else:
                    read.append(number[value] if value in number or not value else self.contents.of(value))
            entries.append((node.op, likeness, tuple(read)))
            number.update({v: len(number) + i for i, v in enumerate(node.outputs) if v})
        slots = tuple((s.source, s.columns.tobytes()) for s in inside.slots)
        return (inside.shapes, slots, number[block.hidden], tuple(entries))


def _read_activation(inside: _Inside) -> _Reading:
    """Run the nodes on chosen numbers. Raises NotUnderstood where they are not elementwise, Unrelated where linear."""
    probe = _Probe.of(inside)
    seen = probe.run()
    limit = _NAMING_TOLERANCE.get(inside.flow.dtype, _COARSE)
    if len(inside.slots) == 1:
        name = _named({n: f(probe.points[0]) for n, f in NONLINEARITIES.items()}, seen, limit)
        if name == "identity" or (name is None and _is_affine(probe.points[0], seen)):
            raise Unrelated("there is no nonlinearity between its projections")
        return _Reading(name, NONLINEARITIES[name] if name else _program(inside, None), None)
    for gate in (0, 1):
        activated, other = probe.points[gate], probe.points[1 - gate]
        name = _named({n: f(activated) * other for n, f in NONLINEARITIES.items()}, seen, limit)
        if name is not None:
            return _Reading(name, NONLINEARITIES[name], gate)
    for gate in (0, 1):
        if np.allclose(probe.run(doubled=1 - gate), 2.0 * seen, rtol=1e-4, atol=1e-5):
            return _Reading(None, _program(inside, gate), gate)
    raise NotUnderstood("gate and up are combined otherwise than by a product with an activation")


@dataclass(frozen=True)
class _Probe:
    """Numbers for the projections' outputs such that every hidden feature of every token gets one point of a list.

    Attributes:
        which: [rows, hidden] the point's number; each is used several times.
        points: for each slot its number at each point.
    """

    inside: _Inside
    which: Array
    points: tuple[Array, ...]

    @staticmethod
    def of(inside: _Inside) -> _Probe:
        size = inside.rows * len(inside.slots[0].columns)
        count = max(min(997, size // 3), 2)
        random = np.random.default_rng(0)
        which = random.permutation(np.resize(np.arange(count), size)).reshape(inside.rows, -1)
        base = np.linspace(-9.0, 9.0, count)
        return _Probe(inside, which, tuple(base if s == 0 else random.permutation(base) for s in range(2)))

    def run(self, doubled: int | None = None) -> Array:
        """[points] what the nodes make of each point. Raises NotUnderstood if its place matters."""
        inside = self.inside
        projected = [np.zeros((inside.rows, p.features), np.float32) for p in inside.projections]
        for number, slot in enumerate(inside.slots):
            factor = 2.0 if doubled == number else 1.0
            projected[slot.source][:, slot.columns] = factor * self.points[number][self.which]
        hidden = inside.hidden(projected).astype(np.float64).reshape(-1)
        flat = self.which.reshape(-1)
        seen = np.zeros(len(self.points[0]))
        seen[flat] = hidden
        if hidden.size != flat.size or not np.allclose(hidden, seen[flat], rtol=1e-4, atol=1e-5):
            raise NotUnderstood("what stands between its projections is not elementwise")
        return seen


def _named(candidates: Mapping[str, Array], seen: Array, limit: float) -> str | None:
    errors = {n: float((np.abs(c - seen) / np.maximum(np.abs(c), 1.0)).max()) for n, c in candidates.items()}
    best = min(errors, key=lambda n: errors[n])
    return best if errors[best] <= limit else None


def _is_affine(x: Array, y: Array) -> bool:
    slope, offset = np.polyfit(x, y, 1)
    return bool(np.abs(slope * x + offset - y).max() <= 1e-4 * max(float(np.abs(y).max()), 1.0))


def _program(inside: _Inside, gate: int | None) -> Callable[[Array], Array]:
    """The activation as the program's own nodes, for arrays of any shape."""

    def activation(array: Array) -> Array:
        flat = np.asarray(array, dtype=np.float32).reshape(-1)
        hidden = len(inside.slots[0].columns)
        step = inside.rows * hidden
        pieces = [_piece(np.resize(flat[i : i + step], (inside.rows, hidden))) for i in range(0, flat.size, step)]
        return np.concatenate([p.reshape(-1) for p in pieces])[: flat.size].reshape(np.shape(array))

    def _piece(values: Array) -> Array:
        projected = [np.zeros((inside.rows, p.features), np.float32) for p in inside.projections]
        for number, slot in enumerate(inside.slots):
            projected[slot.source][:, slot.columns] = values if gate in (None, number) else 1.0
        return inside.hidden(projected)

    return activation


# ------------------------------------------------------------------ replay


def _replay_error(flow: Flow, inside: _Inside, reading: _Reading, down: Projection) -> float:
    projected = [_projected(flow, p) for p in inside.projections]
    if reading.name is None or flow.dtype == "int8":
        hidden = inside.hidden(projected)
    else:
        factors = [projected[s.source][:, s.columns] for s in inside.slots]
        activated = NONLINEARITIES[reading.name](factors[reading.gate or 0])
        hidden = activated if reading.gate is None else activated * factors[1 - reading.gate]
    mine = _applied(flow, down, hidden.astype(np.float32))
    seen = np.asarray(flow.value(down.output), dtype=np.float64).reshape(mine.shape)
    return relative(mine.astype(np.float64), seen)


def _projected(flow: Flow, projection: Projection) -> Array:
    x = np.asarray(flow.value(projection.input), dtype=np.float32)
    return _applied(flow, projection, x.reshape(-1, x.shape[-1]))


def _applied(flow: Flow, projection: Projection, x: Array) -> Array:
    """[rows, features] in float32, as programs compute; a weight is not copied to be widened."""
    w = np.asarray(flow.value(projection.weight), dtype=np.float32)
    out = x @ (w.T if projection.out_first else w)
    if flow.dtype == "int8":
        matrix = flow.nodes[projection.node].outputs[0]
        early, _ = operand_roundings(flow, matrix, projection.output, projection.output)
        out = executed(flow, early, out)
    if projection.bias is not None:
        bias = np.asarray(flow.value(projection.bias), dtype=np.float32).reshape(-1)
        positions = projection.bias_positions(np.arange(projection.features))
        out = out + np.where(positions < 0, np.float32(0.0), bias[positions])
    return np.asarray(out)


# ------------------------------------------------------------------ sharing and names


def _without_shared(flow: Flow, sites: list[FeedForwardSite]) -> tuple[list[FeedForwardSite], list[FeedForwardSite]]:
    """(sites, those of them with a weight that anything but the same projection of another block reads too)."""
    readers = _readers_of_stored(flow)
    roles = {node: role for s in sites for node, role in _roles(s).items()}

    def is_shared(site: FeedForwardSite) -> bool:
        for node, role in _roles(site).items():
            weight = next(v for v in flow.nodes[node].inputs if flow.is_constant(v) and len(flow.shape(v)) > 1)
            others = {n for stored in _stored(flow, weight) for n in readers.get(stored, ())}
            if any(roles.get(n) != role for n in others):
                return True
        return False

    shared = [s for s in sites if is_shared(s)]
    return [s for s in sites if s not in shared], shared


def _roles(site: FeedForwardSite) -> dict[int, tuple[str, ...]]:
    """By contraction, what it computes; a fused one computes both factors."""
    named = [("gate", site.gate.projection.node)] if site.gate is not None else []
    named += [("up", site.up.projection.node), ("down", site.down.node)]
    return {node: tuple(role for role, other in named if other == node) for _, node in named}


def _readers_of_stored(flow: Flow) -> dict[Value, set[int]]:
    """For each stored matrix the nodes that work on fed data with it, perhaps computed further first."""
    readers: dict[Value, set[int]] = {}
    for node in flow.nodes:
        if all(flow.is_constant(v) for v in node.inputs if v):
            continue
        for value in node.inputs:
            if value and flow.is_constant(value):
                for stored in _stored(flow, value):
                    readers.setdefault(stored, set()).add(node.index)
    return readers


def _stored(flow: Flow, value: Value) -> list[Value]:
    """The stored matrices that a constant is made of."""
    return [v for v in flow.weights_above(value) if len(flow.weights[v].shape) > 1]


class _Names:
    """Names of blocks: the scope that their projections share, told apart from attentions and from each other."""

    def __init__(self, flow: Flow, taken: frozenset[str]) -> None:
        self.flow, self.taken = flow, taken
        self.used: dict[str, int] = {}

    def of(self, block: Block) -> tuple[str, int, str]:
        """(name, layer, owner)."""
        into = [*(self.flow.nodes[i] for i in block.projections), *self._producers(block.sources)]
        out = [self.flow.nodes[block.down], *self._producers([block.output])]
        owners = [[n.owner for n in side if n.owner] for side in (into, out)]
        owner = common_scope([name for side in owners for name in side]) if all(owners) else ""
        scope = owner or common_scope(self._stored([*into, *out]))
        base = scope or f"feed_forward.{len(self.used)}"
        if any(t == scope or t.startswith(f"{scope}.") for t in self.taken) and scope:
            base = f"{scope}.feed_forward"
        number = self.used.get(base, 0)
        self.used[base] = number + 1
        name = base if number == 0 else f"{base}#{number}"
        return name, layer_of(name, len(self.used) - 1), owner

    def _producers(self, values: Iterable[Value]) -> list[Node]:
        return [node for v in values if (node := self.flow.producer(v)) is not None]

    def _stored(self, nodes: Iterable[Node]) -> list[str]:
        names = [self.flow.weights[v].name for n in nodes for v in n.inputs if v in self.flow.weights]
        return [n for n in names if "." in n]
