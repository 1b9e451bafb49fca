"""What a value is if it is constant, read without leaving a trace.

`onnx_ir.convenience.get_const_tensor` writes the value's name into the tensor of a Constant node: the file, and the
proto that a caller handed in, would come out changed in places that no rewrite touched.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node; None for anything else."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if len(node.attributes) != 1:  # a function's, of which a call left the attribute out
        return None
    held = node.attributes.get("value")
    if held is not None and not held.is_ref():
        return held.value if held.type == ir.AttributeType.TENSOR else None  # as_tensor() checks a protocol, slowly
    return ir.convenience.get_const_tensor(value)  # numbers: a fresh tensor is made of them


def stored_tensor(value: ir.Value) -> ir.TensorProtocol:
    """`constant_tensor` of a value that is known to be constant."""
    tensor = constant_tensor(value)
    assert tensor is not None
    return tensor


def stored_numbers(value: ir.Value) -> Array:
    """The numbers of a value that is known to be constant, float32."""
    return stored_tensor(value).numpy().astype(np.float32)


def weight_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """As `constant_tensor`, also where exporters let equal weights be one initializer behind an Identity."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return constant_tensor(value)


def weight_numbers(value: ir.Value) -> Array:
    """The numbers of a value of which `weight_tensor` finds a tensor, float32."""
    tensor = weight_tensor(value)
    assert tensor is not None
    return tensor.numpy().astype(np.float32)


def drop_unread(graph: ir.Graph, constants: Iterable[ir.Value]) -> tuple[str, ...]:
    """Take those constants that nothing reads any more out of the graph; names of initializers."""
    gone: list[str] = []
    for value in constants:
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is not None:  # a Constant, or an Identity of an initializer
            above = [v for v in node.inputs if v is not None]
            graph.remove(node, safe=True)
            gone += drop_unread(graph, above)
        elif value.is_initializer() and graph.initializers.pop(value.name or "", None) is not None:
            gone.append(value.name or "")
    return tuple(gone)
