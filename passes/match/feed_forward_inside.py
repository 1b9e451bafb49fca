"""The nodes between a feed-forward block's projections: run on other numbers, and by index, to see which column goes
where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Node, Value
from passes.match.feed_forward_blocks import Block
from passes.match.linear_map import linear_map
from passes.match.roundings import Rounding, executed, quantizer_of
from passes.match.verdicts import NotUnderstood
from passes.operator_kinds import PASS_THROUGH, data_operands
from passes.site import Projection


@dataclass(frozen=True)
class Slot:
    """One projected number that a hidden feature is a function of.

    Attributes:
        source: which projection.
        columns: [hidden] its column.
    """

    source: int
    columns: Array


@dataclass(frozen=True)
class Inside:
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
    slots: tuple[Slot, ...]
    biases: frozenset[tuple[int, int]]

    @staticmethod
    def of(flow: Flow, block: Block) -> Inside:
        projections = tuple(linear_map(flow, flow.nodes[i]) for i in block.projections)
        shapes = tuple((*flow.shape(p.input)[:-1], p.features) for p in projections)
        indices = _Indices(flow, block, projections, shapes)
        slots = indices.slots()
        return Inside(flow, block, indices.projections, shapes, slots, frozenset(indices.biases))

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

    def slots(self) -> tuple[Slot, ...]:
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

    def _slot(self, ids: Array) -> Slot:
        source = int(np.searchsorted(self.bases, ids.reshape(-1)[0], side="right")) - 1
        features = self.projections[source].features
        local = ids.reshape(-1, ids.shape[-1]) - self.bases[source]
        columns = local[0] % features
        expected = np.arange(len(local))[:, None] * features + columns
        if not np.array_equal(local, expected) or len(np.unique(columns)) != len(columns):
            raise NotUnderstood("its hidden features are not laid out alike for every token")
        return Slot(source, columns)


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
