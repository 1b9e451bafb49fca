"""com.microsoft's Attention, which projects itself."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.capture.fused.reads import mask_obstacle, present
from rewriter.capture.fused.writer import Writer
from rewriter.onnx_nodes import input_at


def attention_obstacle(node: ir.Node) -> str | None:
    if input_at(node, 4) is not None or present(node, 1):
        return "keys and values share one cache tensor; export with a cache for each"
    if input_at(node, 1) is None:
        return "it holds no projection"
    if node.attributes.get_int("do_rotary", 0):
        return "it rotates queries and keys itself"
    return mask_obstacle(input_at(node, 3))


class PackedAttention(Writer):
    """com.microsoft Attention holds its own projection: input times [in, q + k + v]."""

    def _operands(self) -> list[ir.Value]:
        x, weight, bias = self.node.inputs[0], self.node.inputs[1], input_at(self.node, 2)
        assert x is not None and weight is not None
        whole = self._op("MatMul", [x, weight], "projection")
        if bias is not None:
            whole = self._op("Add", [whole, bias], "projection_bias")
        sizes = self.node.attributes.get_ints("qkv_hidden_sizes", None)
        if not sizes:
            assert weight.shape is not None
            sizes = [int(weight.shape[-1]) // 3] * 3  # type: ignore[arg-type]
        return [self._split(piece, self.heads) for piece in self._slices(whole, sizes, axis=2)]

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        return self._masks(q, k, input_at(self.node, 3), input_at(self.node, 5))

    def _masks(self, q: ir.Value, k: ir.Value, mask: ir.Value | None, bias: ir.Value | None) -> list[ir.Value]:
        found = [] if mask is None else [self._padding(mask, k)]
        if self.node.attributes.get_int("unidirectional", 0):
            found.append(self._causal(q, k))
        return found if bias is None else [*found, bias]
