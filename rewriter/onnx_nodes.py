"""New nodes and constants for an ONNX graph, every name unique in it; and what a node reads at a position."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array


class NodeWriter:
    """Writes nodes for one graph; `taken` holds the names that are in use and grows with each new one.

    Nodes are collected in lists and put into the graph by the caller; constants become initializers at once.
    """

    def __init__(self, graph: ir.Graph, taken: set[str]) -> None:
        self.graph, self._taken = graph, taken

    def unique(self, name: str) -> str:
        candidate, number = name, 0
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def op(
        self, nodes: list[ir.Node], kind: str, inputs: list[ir.Value], name: str, **attrs: int | float | list[int]
    ) -> ir.Value:
        """Append a standard operator with one output, which is called `name`."""
        written = [_attribute(k, v) for k, v in attrs.items()]
        unique = self.unique(name)
        node = ir.Node("", kind, inputs, written, num_outputs=1, name=self.unique(f"{name}/{kind}"))
        node.outputs[0].name = unique
        nodes.append(node)
        return node.outputs[0]

    def again(self, nodes: list[ir.Node], node: ir.Node, inputs: list[ir.Value]) -> ir.Value:
        """Append a copy of a standard operator with one output, on other inputs."""
        name = node.outputs[0].name or node.op_type
        copy = ir.Node("", node.op_type, inputs, list(node.attributes.values()), num_outputs=1)
        copy.name, copy.outputs[0].name = self.unique(f"{name}/{node.op_type}"), self.unique(name)
        nodes.append(copy)
        return copy.outputs[0]

    def ints(self, numbers: list[int], name: str) -> ir.Value:
        return self.constant(np.array(numbers, np.int64), name)

    def scalar(self, number: float, dtype: ir.DataType, name: str) -> ir.Value:
        return self.constant(np.array(number).astype(dtype.numpy()), name)

    def constant(self, array: Array, name: str) -> ir.Value:
        unique = self.unique(name)
        tensor = ir.tensor(array, name=unique)
        value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def input_at(node: ir.Node, position: int) -> ir.Value | None:
    """An input; None where an optional one is left out, be it by an empty name or by a shorter list."""
    return node.inputs[position] if len(node.inputs) > position else None


def _attribute(name: str, value: int | float | list[int]) -> ir.Attr:
    if isinstance(value, list):
        return ir.AttrInt64s(name, value)
    return ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)
