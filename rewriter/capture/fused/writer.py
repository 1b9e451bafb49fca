"""Writes a fused operator out: what all of them have alike.

Shapes: B batch, S queries, P cached tokens, T keys, H heads, N key/value heads, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rewriter.capture.fused.reads import float_type, is_read, rank, sliding
from rewriter.capture.fused.written_out import WrittenOut
from rewriter.onnx_nodes import NodeWriter


class Writer:
    """Writes one operator out; operators differ in their operands, caches and in what is added to scores."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.node = model, node
        self.nodes: list[ir.Node] = []
        self.heads, self.kv_heads = self._head_counts()
        self.dtype = float_type(node)
        taken = {v.name for n in model.graph for v in n.outputs} | set(model.graph.initializers)
        taken |= {v.name for v in model.graph.inputs} | {n.name for n in model.graph}
        self.writer = NodeWriter(model.graph, {n for n in taken if n})

    # --- what operators differ in

    def _head_counts(self) -> tuple[int, int]:
        heads = self.node.attributes["num_heads"].as_int()
        return heads, heads

    def _operands(self) -> list[ir.Value]:
        """q [B, H, S, D], k [B, N, S, D], v [B, N, S, D]."""
        raise NotImplementedError

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return None, None

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        """What is added to the scores [B, H, S, T]."""
        raise NotImplementedError

    def _sinks(self, scores: ir.Value) -> ir.Value | None:
        """Columns that take part in the softmax, [B, H, S, 1]."""
        return None

    # --- the common core

    def write(self) -> WrittenOut:
        before = set(self.model.graph.initializers)
        q, k, v = self._operands()
        k, v = (self._grown(x, past) for x, past in zip((k, v), self._pasts(), strict=True))
        scores = self._op("MatMul", [q, self._turned(self._repeated(k))], "scores")
        scores = self._op("Mul", [scores, self._scale(q)], "scaled")
        if softcap := self.node.attributes.get_float("softcap", 0.0):
            cap = self._number(softcap)
            bent = self._op("Tanh", [self._op("Div", [scores, cap], "uncapped")], "bent")
            scores = self._op("Mul", [bent, cap], "capped")
        for bias in self._added(q, k):
            scores = self._op("Add", [scores, bias], "biased")
        mixed = self._op("MatMul", [self._weights(scores, k), self._repeated(v)], "mixed")
        return self._replace([self._merged(mixed), self._kept(k), self._kept(v)], before)

    def _kept(self, grown: ir.Value) -> ir.Value:
        """The cache as it is returned."""
        window = sliding(self.node)
        ends = [self._ints([n]) for n in (-window, 2**31 - 1, 2)] if window else []
        return self._op("Slice", [grown, *ends], "kept") if window else grown

    def _weights(self, scores: ir.Value, k: ir.Value) -> ir.Value:
        sinks = self._sinks(scores)
        if sinks is not None:
            scores = self._op("Concat", [scores, sinks], "with_sinks", axis=-1)
        weights = self._op("Softmax", [scores], "weights", axis=-1)
        weights.producer().name = f"{self.node.name}/Softmax"  # type: ignore[union-attr]
        if sinks is None:
            return weights
        ends = [self._ints([0]), self._size(k, [2]), self._ints([3])]
        return self._op("Slice", [weights, *ends], "key_weights")

    def _merged(self, mixed: ir.Value) -> ir.Value:
        """[B, H, S, D] as the operator returns it."""
        turned = self._op("Transpose", [mixed], "turned", perm=[0, 2, 1, 3])
        return self._op("Reshape", [turned, self._ints([0, 0, -1])], "merged")

    def _replace(self, results: list[ir.Value], before: set[str]) -> WrittenOut:
        """Give the operator's outputs, under their names, from these values."""
        inputs, names = tuple(self.node.inputs), tuple(
            (o.name or "") if is_read(o) else "" for o in self.node.outputs
        )  # fmt: skip
        self.model.graph.insert_before(self.node, self.nodes)
        for output, result in zip(self.node.outputs, results, strict=False):
            if is_read(output):
                result.type, result.shape = output.type, output.shape
                output.replace_all_uses_with(result, replace_graph_outputs=True)
                output.name, result.name = None, output.name
        self.model.graph.remove(self.node, safe=True)
        added = frozenset(set(self.model.graph.initializers) - before)
        return WrittenOut(self.node, inputs, names, added)

    def _grown(self, new: ir.Value, past: ir.Value | None) -> ir.Value:
        return new if past is None else self._op("Concat", [past, new], "grown", axis=2)

    def _repeated(self, value: ir.Value) -> ir.Value:
        """[B, N, T, D] as [B, H, T, D]."""
        if self.kv_heads == self.heads:
            return value
        group = self.heads // self.kv_heads
        shape = self._op("Shape", [value], "kv_shape")
        batch, rest = (self._op("Gather", [shape, self._ints(i)], "kv_dims") for i in ([0], [2, 3]))
        apart = self._concat([batch, self._ints([self.kv_heads, 1]), rest])
        wide = self._concat([batch, self._ints([self.kv_heads, group]), rest])
        whole = self._concat([batch, self._ints([self.heads]), rest])
        spread = self._op("Expand", [self._op("Reshape", [value, apart], "kv_apart"), wide], "kv_wide")
        return self._op("Reshape", [spread, whole], "repeated")

    def _turned(self, k: ir.Value) -> ir.Value:
        return self._op("Transpose", [k], "k_turned", perm=[0, 1, 3, 2])

    def _scale(self, q: ir.Value) -> ir.Value:
        scale = self.node.attributes.get_float("scale", 0.0)
        if scale:
            return self._number(scale)
        real = self._op("Cast", [self._size(q, [3])], "head_dim", to=int(self.dtype))
        return self._op("Reciprocal", [self._op("Sqrt", [real], "root")], "scale")

    # --- pieces

    def _split(self, value: ir.Value, heads: int) -> ir.Value:
        """[B, S, heads * D] as [B, heads, S, D]."""
        split = self._op("Reshape", [value, self._ints([0, 0, heads, -1])], "split")
        return self._op("Transpose", [split], "heads", perm=[0, 2, 1, 3])

    def _slices(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        ends = np.cumsum(sizes)
        return [
            self._op("Slice", [value, *(self._ints([int(n)]) for n in (end - size, end, axis))], "piece")
            for size, end in zip(sizes, ends, strict=True)
        ]

    def _later(self, q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(last visible key of each query [S, 1], keys [1, T]); queries are the last of the keys."""
        queries, keys = (self._op("Gather", [self._op("Shape", [x], "shape"), self._int(2)], "length") for x in (q, k))
        row = self._op("Range", [self._op("Sub", [keys, queries], "offset"), keys, self._int(1)], "i")
        column = self._op("Range", [self._int(0), keys, self._int(1)], "j")
        return (
            self._op("Reshape", [row, self._ints([-1, 1])], "rows"),
            self._op("Reshape", [column, self._ints([1, -1])], "columns"),
        )

    def _causal(self, q: ir.Value, k: ir.Value, window: int = -1) -> ir.Value:
        rows, columns = self._later(q, k)
        hidden = self._op("Greater", [columns, rows], "later")
        if window > 0:
            first = self._op("Sub", [rows, self._int(window - 1)], "first")
            hidden = self._op("Or", [hidden, self._op("Less", [columns, first], "earlier")], "outside")
        return self._op("Where", [hidden, self._lowest(), self._number(0.0)], "causal")

    def _padding(self, mask: ir.Value, k: ir.Value) -> ir.Value:
        """Raw masks [B, T] and [B, S, T] hold 1 where a key counts; [B] holds how many keys count."""
        axes = rank(mask)
        if axes == 1:
            positions = self._op(
                "Range", [self._int(0), self._op("Gather", [self._op("Shape", [k], "shape"), self._int(2)], "keys"),
                          self._int(1)], "positions"
            )  # fmt: skip
            counts = self._op("Cast", [mask], "counts", to=int(ir.DataType.INT64))
            keep = self._op(
                "Less", [positions, self._op("Reshape", [counts, self._ints([-1, 1])], "counts_column")], "keep"
            )
        else:
            keep = self._op("Cast", [mask], "keep", to=int(ir.DataType.BOOL))
        if axes == 3:
            shape = self._op("Shape", [keep], "keep_shape")
            lead, tail = (self._op("Gather", [shape, self._ints(i)], "dims") for i in ([0], [1, 2]))
            wide = self._concat([lead, self._ints([1]), tail])
        else:
            wide = self._ints([0, 1, 1, -1])
        shaped = self._op("Reshape", [keep, wide], "keep_wide")
        low = self.node.attributes.get_float("mask_filter_value", -10000.0)
        return self._op("Where", [shaped, self._number(0.0), self._number(low)], "mask")

    def _size(self, value: ir.Value, axes: list[int]) -> ir.Value:
        return self._op("Gather", [self._op("Shape", [value], "shape"), self._ints(axes)], "size")

    def _concat(self, parts: list[ir.Value]) -> ir.Value:
        return self._op("Concat", parts, "full_shape", axis=0)

    def _lowest(self) -> ir.Value:
        return self._number(float(self.dtype.min))

    def _op(self, kind: str, inputs: list[ir.Value], name: str, **attrs: int | list[int]) -> ir.Value:
        return self.writer.op(self.nodes, kind, inputs, f"{self.node.name}/{name}", **attrs)

    def _ints(self, numbers: list[int]) -> ir.Value:
        return self.writer.ints(numbers, f"{self.node.name}/constant")

    def _int(self, number: int) -> ir.Value:
        return self.writer.constant(np.array(number, np.int64), f"{self.node.name}/constant")

    def _number(self, number: float) -> ir.Value:
        return self.writer.scalar(number, self.dtype, f"{self.node.name}/constant")
