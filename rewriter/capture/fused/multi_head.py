"""com.microsoft's MultiHeadAttention: operands apart, or packed by heads."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.capture.fused.attention import PackedAttention
from rewriter.capture.fused.reads import mask_obstacle, present, rank
from rewriter.onnx_nodes import input_at


def multi_head_obstacle(node: ir.Node) -> str | None:
    if any(input_at(node, i) is not None for i in (8, 9)):
        return "its cache is a buffer shared with what it returns, or is reordered for beams"
    if present(node, 3):
        return "it returns its scores"
    if input_at(node, 3) is not None and _packed(node):
        return "it adds a bias to packed operands"
    return mask_obstacle(input_at(node, 4))


def _packed(node: ir.Node) -> bool:
    """Queries, keys and values, or keys and values, side by side in one input."""
    return input_at(node, 1) is None or input_at(node, 2) is None


def _operand_rank(node: ir.Node, position: int) -> int:
    """Rank of an operand of MultiHeadAttention: 3 unless a shape says otherwise."""
    value = input_at(node, position)
    return 3 if value is None else (rank(value) or 3)


class MultiHead(PackedAttention):
    """com.microsoft MultiHeadAttention: three operands, or [B, S, H, 3, D], or queries and [B, S, H, 2, D]."""

    def _operands(self) -> list[ir.Value]:
        q, k, v = (input_at(self.node, i) for i in range(3))
        assert q is not None
        if k is None:
            return [self._part(q, i) for i in range(3)]
        if v is None:
            return [self._split(q, self.heads), self._part(k, 0), self._part(k, 1)]
        operands = self._with_bias([q, k, v])
        return [self._split(x, self.heads) if _operand_rank(self.node, i) == 3 else x for i, x in enumerate(operands)]

    def _part(self, packed: ir.Value, number: int) -> ir.Value:
        piece = self._op("Gather", [packed, self._int(number)], "piece", axis=3)
        return self._op("Transpose", [piece], "heads", perm=[0, 2, 1, 3])

    def _with_bias(self, operands: list[ir.Value]) -> list[ir.Value]:
        """One vector [q + k + v] is added to the inputs of three axes; the others hold heads already."""
        bias = input_at(self.node, 3)
        if bias is None:
            return operands
        flat = [v for i, v in enumerate(operands) if _operand_rank(self.node, i) == 3]
        shapes = [v.shape[-1] if v.shape is not None else None for v in flat]
        whole = int(bias.shape[0]) if bias.shape is not None else 0  # type: ignore[arg-type]
        sizes = [s if isinstance(s, int) else whole // 3 for s in shapes]
        parts = self._slices(bias, sizes, axis=0)
        added = [self._op("Add", [v, b], "operand") for v, b in zip(flat, parts, strict=True)]
        return [*added, *operands[len(flat) :]]

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return input_at(self.node, 6), input_at(self.node, 7)

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        return self._masks(q, k, input_at(self.node, 4), input_at(self.node, 5))
