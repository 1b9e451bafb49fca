"""Which activation a feed-forward block has: its own nodes are run on chosen numbers and compared with named ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from passes.contents import Contents
from passes.dataflow import Array
from passes.match.feed_forward_inside import Inside
from passes.match.verdicts import NotUnderstood, Unrelated
from passes.nonlinearities import NONLINEARITIES

_NAMING_TOLERANCE = {"float64": 2e-5, "float32": 2e-5}
"""How far the program's activation may be from a named one, relative to values above 1; other dtypes store constants
with few digits (the two usual forms of GELU are 5e-4 apart)."""

_COARSE = 4e-3


@dataclass(frozen=True)
class Reading:
    """Attributes:
    name, of: as in `Activation`.
    gate: which slot is activated and multiplied with the other; None in a plain block.
    """

    name: str | None
    of: Callable[[Array], Array] | None
    gate: int | None


class Readings:
    """Activations, read once for all blocks of the same structure; replay proves each block by itself."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.known: dict[Hashable, Reading] = {}

    def of(self, inside: Inside) -> Reading:
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

    def _structure(self, inside: Inside) -> Hashable | None:
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


def _read_activation(inside: Inside) -> Reading:
    """Run the nodes on chosen numbers. Raises NotUnderstood where they are not elementwise, Unrelated where linear."""
    probe = _Probe.of(inside)
    seen = probe.run()
    limit = _NAMING_TOLERANCE.get(inside.flow.dtype, _COARSE)
    if len(inside.slots) == 1:
        name = _named({n: f(probe.points[0]) for n, f in NONLINEARITIES.items()}, seen, limit)
        if name == "identity" or (name is None and _is_affine(probe.points[0], seen)):
            raise Unrelated("there is no nonlinearity between its projections")
        return Reading(name, NONLINEARITIES[name] if name else _program(inside, None), None)
    for gate in (0, 1):
        activated, other = probe.points[gate], probe.points[1 - gate]
        name = _named({n: f(activated) * other for n, f in NONLINEARITIES.items()}, seen, limit)
        if name is not None:
            return Reading(name, NONLINEARITIES[name], gate)
    for gate in (0, 1):
        if np.allclose(probe.run(doubled=1 - gate), 2.0 * seen, rtol=1e-4, atol=1e-5):
            return Reading(None, _program(inside, gate), gate)
    raise NotUnderstood("gate and up are combined otherwise than by a product with an activation")


@dataclass(frozen=True)
class _Probe:
    """Numbers for the projections' outputs such that every hidden feature of every token gets one point of a list.

    Attributes:
        which: [rows, hidden] the point's number; each is used several times.
        points: for each slot its number at each point.
    """

    inside: Inside
    which: Array
    points: tuple[Array, ...]

    @staticmethod
    def of(inside: Inside) -> _Probe:
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


def _program(inside: Inside, gate: int | None) -> Callable[[Array], Array]:
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
