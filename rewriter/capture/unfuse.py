"""com.microsoft's fused attention operators, written out in standard operators so that matching can read them.

Attention and MultiHeadAttention are written out where their semantics are covered; others stay, and are refused
with a reason. Only operators whose site is going to be rewritten are written out in the model that is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from rewriter.onnx_nodes import NodeWriter

DOMAIN = "com.microsoft"
FUSED = frozenset({"Attention", "MultiHeadAttention"})

# shapes: B batch, S queries, T keys, H heads, D features


def fused_nodes(model: ir.Model) -> list[ir.Node]:
    """Fused attention operators that `unfuse` can write out."""
    return [n for n in model.graph if n.domain == DOMAIN and n.op_type in FUSED and _covered(n)]


def unfuse(model: ir.Model, only: Collection[str] | None = None) -> list[str]:
    """Write fused operators out in place, all or those of these scopes; returns the scopes of those written out.

    Unnamed operators are named first. The written-out softmax is called ``<name>/Softmax``; its scope is `scope(name)`.
    """
    _name_nodes(model)
    done = []
    for node in fused_nodes(model):
        assert node.name is not None
        if only is None or scope(node.name) in only:
            _Writer(model, node).write()
            done.append(scope(node.name))
    return done


def _name_nodes(model: ir.Model) -> None:
    taken = {n.name for n in model.graph}
    for number, node in enumerate(model.graph):
        if not node.name:
            name = f"{node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if len(node.inputs) > position else None


def _covered(node: ir.Node) -> bool:
    """No cache, no rotation inside, one output, and masks whose form is known."""
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return False
    if node.op_type == "Attention":
        mask, rest = _input(node, 3), (_input(node, 4), _input(node, 6))
        if node.attributes.get_int("do_rotary", 0) or _input(node, 1) is None:
            return False
    else:
        mask, rest = _input(node, 4), (_input(node, 6), _input(node, 7))
        operands = [_input(node, i) for i in range(3)]
        if any(v is None or v.shape is None or v.shape.rank() != 3 for v in operands):
            return False
    if any(v is not None for v in rest):
        return False
    return mask is None or _rank(mask) in (1, 2, 3)


def _rank(value: ir.Value) -> int | None:
    """Rank of a mask, declared or told from what makes it; None if unknown."""
    node = value.producer()
    if value.shape is not None:
        return value.shape.rank()
    if node is not None and node.op_type == "EmbedLayerNormalization":
        return 1
    if node is not None and node.op_type in {"Cast", "Identity"} and node.inputs[0] is not None:
        return _rank(node.inputs[0])
    return None


def scope(name: str) -> str:
    """A node's name as matching names what it was written out into."""
    return name.strip("/").replace("/", ".")


class _Writer:
    """Writes one operator out."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.node = model, node
        self.nodes: list[ir.Node] = []
        self.heads = node.attributes["num_heads"].as_int()
        self.dtype = _float_type(node)
        taken = {v.name for n in model.graph for v in n.outputs} | set(model.graph.initializers)
        taken |= {v.name for v in model.graph.inputs} | {n.name for n in model.graph}
        self.writer = NodeWriter(model.graph, {n for n in taken if n})

    def write(self) -> None:
        q, k, v = self._projected() if self.node.op_type == "Attention" else self._biased()
        scores = self._op("MatMul", [self._heads(q, [0, 2, 1, 3]), self._heads(k, [0, 2, 3, 1])], "scores")
        scores = self._op("Mul", [scores, self._scale(q)], "scaled")
        for bias in (self._mask(k), self._causal(q, k), self._given_bias()):
            if bias is not None:
                scores = self._op("Add", [scores, bias], "biased")
        weights = self._op("Softmax", [scores], "weights", axis=-1)
        weights.producer().name = f"{self.node.name}/Softmax"  # type: ignore[union-attr]
        mixed = self._op("MatMul", [weights, self._heads(v, [0, 2, 1, 3])], "mixed")
        turned = self._op("Transpose", [mixed], "turned", perm=[0, 2, 1, 3])
        merged = self._op("Reshape", [turned, self._ints([0, 0, -1])], "merged")
        output = self.node.outputs[0]
        merged.type, merged.shape = output.type, output.shape
        self.model.graph.insert_before(self.node, self.nodes)
        output.replace_all_uses_with(merged, replace_graph_outputs=True)
        self.model.graph.remove(self.node, safe=True)

    def _projected(self) -> list[ir.Value]:
        """Attention holds its own projection: input times [in, q + k + v]."""
        x, weight, bias = self.node.inputs[0], self.node.inputs[1], _input(self.node, 2)
        assert x is not None and weight is not None
        whole = self._op("MatMul", [x, weight], "projection")
        if bias is not None:
            whole = self._op("Add", [whole, bias], "projection_bias")
        sizes = self.node.attributes.get_ints("qkv_hidden_sizes", None)
        if not sizes:
            assert weight.shape is not None
            sizes = [int(weight.shape[-1]) // 3] * 3  # type: ignore[arg-type]
        return self._pieces(whole, sizes, axis=2)

    def _biased(self) -> list[ir.Value]:
        """MultiHeadAttention adds one vector [q + k + v] to three inputs."""
        operands = [v for v in self.node.inputs[:3] if v is not None]
        bias = _input(self.node, 3)
        if bias is None:
            return operands
        sizes = [int(v.shape[-1]) for v in operands]  # type: ignore[index, arg-type]
        parts = self._pieces(bias, sizes, axis=0)
        return [self._op("Add", [v, b], "operand") for v, b in zip(operands, parts, strict=True)]

    def _pieces(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        ends = np.cumsum(sizes)
        return [
            self._op("Slice", [value, *(self._ints([int(n)]) for n in (end - size, end, axis))], "piece")
            for size, end in zip(sizes, ends, strict=True)
        ]

    def _heads(self, value: ir.Value, perm: list[int]) -> ir.Value:
        split = self._op("Reshape", [value, self._ints([0, 0, self.heads, -1])], "split")
        return self._op("Transpose", [split], "heads", perm=perm)

    def _scale(self, q: ir.Value) -> ir.Value:
        scale = self.node.attributes.get_float("scale", 0.0)
        if scale:
            return self._number(scale)
        width = self._op("Gather", [self._op("Shape", [q], "q_shape"), self._ints([2])], "width")
        per_head = self._op("Div", [width, self._ints([self.heads])], "head_dim")
        real = self._op("Cast", [per_head], "head_dim_float", to=int(self.dtype))
        return self._op("Reciprocal", [self._op("Sqrt", [real], "root")], "scale")

    def _mask(self, k: ir.Value) -> ir.Value | None:
        """Raw masks [B, T] and [B, S, T] hold 1 where a key counts; [B] holds how many keys count."""
        mask = _input(self.node, 3 if self.node.op_type == "Attention" else 4)
        if mask is None:
            return None
        rank = _rank(mask)
        if rank == 1:
            keys = self._length(k)
            positions = self._op("Range", [self._int(0), keys, self._int(1)], "positions")
            counts = self._op("Cast", [mask], "counts", to=int(ir.DataType.INT64))
            column = self._op("Reshape", [counts, self._ints([-1, 1])], "counts_column")
            keep = self._op("Less", [positions, column], "keep")
        else:
            keep = self._op("Cast", [mask], "keep", to=int(ir.DataType.BOOL))
        if rank == 3:
            shape = self._op("Shape", [keep], "keep_shape")
            lead, tail = (self._op("Gather", [shape, self._ints(i)], "dims") for i in ([0], [1, 2]))
            wide = self._op("Concat", [lead, self._ints([1]), tail], "wide", axis=0)
        else:
            wide = self._ints([0, 1, 1, -1])
        shaped = self._op("Reshape", [keep, wide], "keep_wide")
        low = self.node.attributes.get_float("mask_filter_value", -10000.0)
        return self._op("Where", [shaped, self._number(0.0), self._number(low)], "mask")

    def _length(self, value: ir.Value) -> ir.Value:
        shape = self._op("Shape", [value], "shape")
        return self._op("Gather", [shape, self._int(1)], "length")

    def _causal(self, q: ir.Value, k: ir.Value) -> ir.Value | None:
        if not self.node.attributes.get_int("unidirectional", 0):
            return None
        queries, keys = self._length(q), self._length(k)
        row = self._op("Range", [self._int(0), queries, self._int(1)], "i")
        column = self._op("Range", [self._int(0), keys, self._int(1)], "j")
        rows = self._op("Reshape", [row, self._ints([-1, 1])], "rows")
        later = self._op("Greater", [column, rows], "later")
        low = float(np.finfo(self.dtype.numpy()).min)
        return self._op("Where", [later, self._number(low), self._number(0.0)], "causal")

    def _given_bias(self) -> ir.Value | None:
        return _input(self.node, 5)

    # ------------------------------------------------------------ pieces

    def _op(self, kind: str, inputs: list[ir.Value], name: str, **attrs: int | list[int]) -> ir.Value:
        return self.writer.op(self.nodes, kind, inputs, f"{self.node.name}/{name}", **attrs)

    def _ints(self, numbers: list[int]) -> ir.Value:
        return self.writer.ints(numbers, f"{self.node.name}/constant")

    def _int(self, number: int) -> ir.Value:
        return self.writer.constant(np.array(number, np.int64), f"{self.node.name}/constant")

    def _number(self, number: float) -> ir.Value:
        return self.writer.scalar(number, self.dtype, f"{self.node.name}/constant")


def _float_type(node: ir.Node) -> ir.DataType:
    values = [node.outputs[0], *node.inputs[:3]]
    found = (v.dtype for v in values if v is not None)
    return next((d for d in found if d is not None and d.is_floating_point()), ir.DataType.FLOAT)
