"""Writes the nodes of a model-local ONNX function: every result gets a readable, unique name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def computed_in(dtype: ir.DataType) -> ir.DataType:
    """What sums over a whole sequence and softmaxes are computed in for operands of this dtype: float32 at least."""
    return ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


class FunctionBody:
    """Collects nodes in order. Numbers are Constant nodes, since functions have no initializers."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self._names: dict[str, int] = {}

    def op(self, kind: str, inputs: Sequence[ir.Value], name: str, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        node = ir.Node("", kind, list(inputs), list(attributes), num_outputs=1)
        node.outputs[0].name = self.unique(name)
        self.nodes.append(node)
        return node.outputs[0]

    def unique(self, name: str) -> str:
        """The name, with a number behind it if it has been used."""
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def cast(self, value: ir.Value, attribute: str, name: str) -> ir.Value:
        """In the dtype that an attribute of the function names."""
        return self.op("Cast", [value], name, [ir.RefAttr("to", attribute, ir.AttributeType.INT)])

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, np.int64))
        return self.op("Constant", [], "ints", [ir.AttrTensor("value", tensor)])

    def scalar(self, number: int) -> ir.Value:
        tensor = ir.tensor(np.array(number, np.int64))
        return self.op("Constant", [], "int", [ir.AttrTensor("value", tensor)])

    def take(self, shape: ir.Value, positions: Sequence[int]) -> ir.Value:
        return self.op("Gather", [shape, self.ints(positions)], "dims")

    def concat(self, parts: Sequence[ir.Value], name: str = "sizes") -> ir.Value:
        return self.op("Concat", parts, name, [ir.AttrInt64("axis", 0)])
