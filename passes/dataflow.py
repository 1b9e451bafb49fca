"""A read-only view of a program: executable nodes, recorded values, weight handles.

Both doors (torch.export, ONNX) yield a `Flow`; everything in `passes` consumes only what is here.
Operators carry ONNX-style canonical names whatever the program was written in. Values are named by
strings; recorded values and weights are numpy arrays (bfloat16 and float16 are widened to float32).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
from numpy.typing import NDArray

Value = str
"""The name of one tensor in the program; "" stands for an omitted optional input."""

Array = NDArray[Any]

LAYOUT = frozenset(
    {
        "Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile",
        "Gather", "GatherND", "GatherElements", "Concat", "Pad", "Trilu", "ScatterND", "ScatterElements",
        "Where", "Identity", "Dropout", "Roll", "SliceScatter", "SelectScatter",
    }
)  # fmt: skip
"""Operators that only move elements: provenance runs them on index tensors."""

PACKED_WEIGHTS: Mapping[str, int] = {
    "MatMulInteger": 1, "MatMulNBits": 1, "MatMulBnb4": 1, "MatMulFpQ4": 1, "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1, "MatMulBlockQuantizedFp4Weight": 1, "MatMulBlockQuantizedFp8Weight": 1,
    "GemmFloat8": 1, "QOrderedMatMul": 2, "QGemm": 3, "QLinearMatMul": 3,
}  # fmt: skip
"""Products whose weight, the input at that position, is stored in a form of the operator's own."""

CONTRACTIONS = frozenset({"MatMul", "Gemm", "Linear", "Einsum", "FusedMatMul", "Conv", *PACKED_WEIGHTS})
"""Operators that sum products over a shared axis."""

PRODUCTS = CONTRACTIONS | {"Baddbmm"}
"""Those, and what adds such sums to something: its two factors come last."""

SHAPE_READERS = frozenset({"Shape", "Size"})
"""Operators whose output depends on a tensor's shape and not on its elements."""


@dataclass(frozen=True)
class Weight:
    """A lazy handle to one constant of the program.

    Attributes:
        name: what the door calls it (a state-dict key, an initializer).
        shape: as stored.
        dtype: as stored, e.g. ``"float32"``, ``"bfloat16"``, ``"int8"``.
        readers: how many nodes read it; more than one means that it is shared.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    readers: int


def unlike() -> None:
    """The likeness of a node of which nothing is known: it is like no other."""


@dataclass(frozen=True)
class Node:
    """One operation that can be run on other inputs than the recorded ones.

    ``evaluate`` takes one array per input (None where omitted) and returns one array per output. ``likeness`` is equal
    for two nodes whose ``evaluate`` gives equal results on equal inputs; None where that is not known.
    """

    index: int
    op: str
    domain: str
    attrs: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    evaluate: Callable[[Sequence[Array | None]], tuple[Array, ...]] = field(repr=False, compare=False)
    owner: str = ""
    """Opaque id, from the door, of whatever the node belongs to (a module path, a scope); "" if unknown."""
    name: str = ""
    likeness: Callable[[], Hashable | None] = field(default=unlike, repr=False, compare=False)


def read_inputs(node: Node) -> tuple[Value, ...]:
    """The inputs whose elements a node reads: CastLike takes no more than a type from its second."""
    return node.inputs[:1] if node.op == "CastLike" else node.inputs


@dataclass(frozen=True)
class Flow:
    """The program as a graph of `Node`s with one recording of its values.

    Attributes:
        nodes: in execution order; ``nodes[i].index == i``.
        inputs: the program's inputs (not weights).
        outputs: the program's outputs.
        weights: constants by value name.
        read: returns the recorded (or constant) value of a name; raises KeyError if it was not recorded.
        dtype: the floating dtype the program computes in; sets replay tolerances.
        dtypes: of values that are floating in another dtype (in a region with autocast).
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: Mapping[Value, Weight]
    read: Callable[[Value], Array]
    dtype: str = "float32"
    dtypes: Mapping[Value, str] = field(default_factory=dict)

    @cached_property
    def _producers(self) -> dict[Value, Node]:
        return {out: node for node in self.nodes for out in node.outputs if out}

    @cached_property
    def _consumers(self) -> dict[Value, list[Node]]:
        table: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    table.setdefault(name, []).append(node)
        return table

    @cached_property
    def graph(self) -> nx.DiGraph[int]:
        """Node indices, with an edge wherever one node reads another's output."""
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(len(self.nodes)))
        for node in self.nodes:
            graph.add_edges_from((p.index, node.index) for v in node.inputs if (p := self.producer(v)) is not None)
        return graph

    def producer(self, value: Value) -> Node | None:
        return self._producers.get(value)

    def consumers(self, value: Value) -> Sequence[Node]:
        return self._consumers.get(value, ())

    def readers(self, value: Value) -> list[Node]:
        """Nodes that read the elements of `value`, not only its shape."""
        return [n for n in self.consumers(value) if n.op not in SHAPE_READERS]

    def live_readers(self, value: Value) -> list[Node]:
        """Those of `readers` that an output of the program depends on; all of them if it depends on none."""
        readers = self.readers(value)
        return [n for n in readers if n.index in self._live] or readers

    def is_read(self, value: Value) -> bool:
        """Whether an output of the program depends on it; true of every value of a program without outputs."""
        return value in self.outputs or not self._live or any(n.index in self._live for n in self.readers(value))

    @cached_property
    def _live(self) -> frozenset[int]:
        return frozenset(n.index for n in self.ancestors(*self.outputs))

    def value(self, name: Value) -> Array:
        return self.read(name)

    @cached_property
    def _constant(self) -> frozenset[Value]:
        known: set[Value] = set(self.weights)
        for node in self.nodes:
            if all(v in known for v in node.inputs if v):
                known.update(node.outputs)
        return frozenset(known)

    def is_constant(self, value: Value) -> bool:
        """True when no input of the program reaches `value`, not even its shape."""
        return value in self._constant

    @cached_property
    def _fed(self) -> frozenset[Value]:
        """Values reached by an input's elements (not only by its shape)."""
        fed: set[Value] = set(self.inputs)
        for node in self.nodes:
            if node.op not in SHAPE_READERS and any(v in fed for v in read_inputs(node)):
                fed.update(node.outputs)
        return frozenset(fed)

    def is_fed(self, value: Value) -> bool:
        """True when elements of some program input reach `value`."""
        return value in self._fed

    @cached_property
    def _projected(self) -> frozenset[Value]:
        projected: set[Value] = set()
        for node in self.nodes:
            if node.op in SHAPE_READERS:
                continue
            if any(v in projected for v in read_inputs(node)) or self.projection_operands(node) is not None:
                projected.update(node.outputs)
        return frozenset(projected)

    def data_dependent(self, value: Value) -> bool:
        """True when `value` depends on hidden states: a learned projection of fed data lies above it.

        Masks, positions and position tables depend on inputs too, but pass through no projection.
        """
        return value in self._projected

    def projection_operands(self, node: Node) -> tuple[int, int] | None:
        """(activation, weight) input positions if `node` multiplies fed data by a constant matrix."""
        if node.op not in CONTRACTIONS or len(node.inputs) < 2:
            return None
        if node.outputs[0] not in self._operands:
            self._operands[node.outputs[0]] = self._find_operands(node)
        return self._operands[node.outputs[0]]

    @cached_property
    def _operands(self) -> dict[Value, tuple[int, int] | None]:
        """What `projection_operands` found so far, by a contraction's result."""
        return {}

    @cached_property
    def projections(self) -> dict[Value, tuple[Node, Value | None] | None]:
        """What `provenance.projection_at` found so far."""
        return {}

    def _find_operands(self, node: Node) -> tuple[int, int] | None:
        if node.op in {"Linear", "Conv"} or node.op in PACKED_WEIGHTS:
            pairs: Iterable[tuple[int, int]] = ((0, PACKED_WEIGHTS.get(node.op, 1)),)
        else:
            pairs = ((0, 1), (1, 0))
        for x, w in pairs:
            if w < len(node.inputs) and self.is_constant(node.inputs[w]) and self.is_fed(node.inputs[x]):
                shape = self.shape(node.inputs[w])
                if len(shape) != 2 and node.op in PACKED_WEIGHTS:  # packed, not by rows and columns
                    return x, w
                # an outer product (positions times inverse frequencies) contracts an axis of size 1
                if len(shape) < 2 or self.turned_pairs(node) is not None:
                    continue
                if node.op == "Linear" or self._contracted(node, w, shape) > 1:
                    return x, w
        return None

    def turned_pairs(self, node: Node) -> tuple[int, int] | None:
        """(data, table) input positions of an Einsum that multiplies pairs of features by matrices of two rows, which
        differ along an axis of the data: a rotation by position. None for any other node."""
        terms, _, result = str(node.attrs.get("equation", "")).replace(" ", "").partition("->")
        named = terms.split(",")
        if node.op != "Einsum" or len(named) != 2 or "." in terms or not result:
            return None
        for data, table in ((0, 1), (1, 0)):
            mine, theirs = named[data], named[table]
            summed = [c for c in theirs if c in mine and c not in result]
            own = [c for c in theirs if c not in mine]
            along = [c for c in theirs if c in mine and c in result]
            whole = len(summed) == len(own) == 1 and along and all(c in result for c in mine if c not in summed)
            if whole and self.is_fed(node.inputs[data]) and not self.is_fed(node.inputs[table]):
                sizes = dict(zip(theirs, self.shape(node.inputs[table]), strict=True))
                return (data, table) if sizes[summed[0]] == sizes[own[0]] == 2 else None
        return None

    def _contracted(self, node: Node, w: int, shape: tuple[int, ...]) -> int:
        """Over how many elements a product with a matrix of this shape sums."""
        if node.op == "Conv":
            return min(shape[1], 2)
        if node.op == "Linear" or (node.attrs.get("transB", 0) and w == 1):
            return shape[-1]
        if node.op == "Einsum":
            return min(shape[-2:])
        return shape[-2 if w else -1]

    def shape(self, value: Value) -> tuple[int, ...]:
        """Shape of a value in this recording."""
        weight = self.weights.get(value)
        return weight.shape if weight is not None else tuple(self.read(value).shape)

    def weights_above(self, value: Value) -> list[Value]:
        """The weights that a constant is computed from, each once; itself if it is one."""
        found: dict[Value, None] = {}
        seen, todo = {value}, [value]
        while todo:
            current = todo.pop()
            if current in self.weights:
                found[current] = None
                continue
            node = self.producer(current)
            above = [v for v in (node.inputs if node is not None else ()) if v and v not in seen]
            seen.update(above)
            todo.extend(reversed(above))
        return list(found)

    def ancestors(self, *values: Value, stop: Callable[[Node], bool] | None = None) -> list[Node]:
        """Nodes above any of `values` in execution order; nodes for which `stop` holds are included, not passed."""
        seen: dict[int, Node] = {}
        todo = list(values)
        while todo:
            node = self.producer(todo.pop())
            if node is None or node.index in seen:
                continue
            seen[node.index] = node
            if stop is None or not stop(node):
                todo.extend(v for v in node.inputs if v)
        return [seen[i] for i in sorted(seen)]


def unflattened(flow: Flow, value: Value) -> Iterator[Value]:
    """What a projection's input was before its tokens were flattened."""
    passed = {"Reshape", "Flatten", "Unsqueeze", "Squeeze", "Identity", "Cast", "QuantizeLinear", "DequantizeLinear"}
    while (node := flow.producer(value)) is not None and node.op in passed:
        value = node.inputs[0]
        yield value
