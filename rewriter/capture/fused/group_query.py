"""com.microsoft's GroupQueryAttention: fewer key/value heads, rotation, a cache that may forget."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.capture.fused.reads import present, sliding
from rewriter.capture.fused.writer import Writer
from rewriter.onnx_nodes import input_at

_GROUP_QUERY_LIMITS = {
    12: "its cache is quantised",
    13: "its cache is quantised",
    14: "it normalises queries and keys itself",
    15: "it normalises queries and keys itself",
}
"""What inputs that are not covered mean."""


def group_query_obstacle(node: ir.Node) -> str | None:
    for position, reason in _GROUP_QUERY_LIMITS.items():
        if input_at(node, position) is not None:
            return reason
    if present(node, 3):
        return "it returns its scores"
    pasts = [input_at(node, 3), input_at(node, 4)]
    if sliding(node) and None in pasts:
        return "it fills a cache that forgets tokens outside a window, and is given none"
    return None if all(v is None or v.is_graph_input() for v in pasts) else "its cache is changed before it is read"


class GroupQuery(Writer):
    """com.microsoft GroupQueryAttention, for batches whose sequences are equally long."""

    def _head_counts(self) -> tuple[int, int]:
        return self.node.attributes["num_heads"].as_int(), self.node.attributes["kv_num_heads"].as_int()

    def _operands(self) -> list[ir.Value]:
        q, k, v = (input_at(self.node, i) for i in range(3))
        assert q is not None
        if k is None or v is None:
            split = self._split(q, self.heads + 2 * self.kv_heads)
            parts = self._slices(split, [self.heads, self.kv_heads, self.kv_heads], axis=1)
        else:
            parts = [self._split(x, n) for x, n in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))]
        if not self.node.attributes.get_int("do_rotary", 0):
            return parts
        cos, sin = self._angles(parts[0])
        return [self._rotated(parts[0], cos, sin), self._rotated(parts[1], cos, sin), parts[2]]

    def _angles(self, q: ir.Value) -> list[ir.Value]:
        """Rows [B, 1, S, R / 2] of both caches at each token's position."""
        positions = input_at(self.node, 9)
        if positions is None:
            last, length = input_at(self.node, 5), self._size(q, [2])
            assert last is not None
            wide = self._op("Cast", [last], "last", to=int(ir.DataType.INT64))
            row = self._op("Reshape", [wide, self._ints([-1, 1, 1])], "last_row")
            start = self._op("Sub", [self._op("Add", [row, self._int(1)], "end"), length], "start")
            scalar = self._op("Gather", [self._op("Shape", [q], "shape"), self._int(2)], "length")
            steps = self._op("Range", [self._int(0), scalar, self._int(1)], "steps")
            positions = self._op("Add", [start, steps], "positions")
        else:
            positions = self._op("Reshape", [positions, self._ints([0, 1, -1])], "positions")
        tables = [input_at(self.node, 7), input_at(self.node, 8)]
        return [self._op("Gather", [t, positions], "angle", axis=0) for t in tables if t is not None]

    def _rotated(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        half = self._size(cos, [3])
        width = self._op("Add", [half, half], "width")
        interleaved = bool(self.node.attributes.get_int("rotary_interleaved", 0))
        zero, one, two, axis = (self._ints([n]) for n in (0, 1, 2, 3))
        if interleaved:
            pair = [self._op("Slice", [x, begin, width, axis, two], "piece") for begin in (zero, one)]
        else:
            pair = [self._op("Slice", [x, a, b, axis], "piece") for a, b in ((zero, half), (half, width))]
        first = self._op("Sub", [self._mul(pair[0], cos), self._mul(pair[1], sin)], "first")
        second = self._op("Add", [self._mul(pair[1], cos), self._mul(pair[0], sin)], "second")
        if interleaved:
            apart = [self._op("Reshape", [y, self._ints([0, 0, 0, -1, 1])], "apart") for y in (first, second)]
            both = self._op("Concat", apart, "pairs", axis=4)
            turned = [self._op("Reshape", [both, self._ints([0, 0, 0, -1])], "turned")]
        else:
            turned = [first, second]
        rest = self._op("Slice", [x, width, self._ints([2**31 - 1]), axis], "rest")
        return self._op("Concat", [*turned, rest], "rotated", axis=3)

    def _mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._op("Mul", [a, b], "product")

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return input_at(self.node, 3), input_at(self.node, 4)

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        found = []
        if self.node.attributes.get_int("causal", 1):
            found.append(self._causal(q, k, self.node.attributes.get_int("local_window_size", -1)))
        bias = input_at(self.node, 10)
        return found if bias is None else [*found, bias]

    def _sinks(self, scores: ir.Value) -> ir.Value | None:
        given = input_at(self.node, 11)
        if given is not None:
            column = self._op("Reshape", [given, self._ints([1, self.heads, 1, 1])], "sink")
        elif self.node.attributes.get_int("smooth_softmax", 0):
            column = self._op("Reshape", [self._number(0.0), self._ints([1, 1, 1, 1])], "sink")
        else:
            return None
        size = self._concat([self._size(scores, [0, 1, 2]), self._ints([1])])
        return self._op("Expand", [column, size], "sinks")
