"""What a parsed model must be before anything reads it: nodes, attributes, names and sizes that make sense."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rewriter.capture.onnx_functions import require_finite_functions
from rewriter.capture.onnx_scopes import require_sound_names
from rewriter.errors import InvalidModelFile, UnsupportedModel

if TYPE_CHECKING:
    import onnx


_CONSTANTS = {"value": 4, "sparse_value": 11, "value_float": 1, "value_floats": 6, "value_int": 2, "value_ints": 7,
              "value_string": 3, "value_strings": 8}  # fmt: skip
"""What a Constant node may hold, with the AttributeProto.AttributeType of each."""


def require_sound_structure(proto: onnx.ModelProto, name: str) -> None:
    """Raises InvalidModelFile if later stages could not count on what a model says of itself."""
    hint = "export the model again"
    if not proto.HasField("graph"):
        raise InvalidModelFile(f"{name} holds no graph", hint=hint)
    if not proto.graph.output:
        raise InvalidModelFile(f"the graph in {name} has no outputs", hint=hint)
    if not proto.opset_import:
        raise InvalidModelFile(f"{name} names no operator set", hint=hint)
    for imported in (*proto.opset_import, *(x for f in proto.functions for x in f.opset_import)):
        if imported.version < 1 and imported.domain in ("", "ai.onnx"):
            raise InvalidModelFile(f"{name} names version {imported.version} of the operator set", hint=hint)
    for text in _names(proto):
        if not isinstance(text, str):  # protobuf hands out bytes where they are no UTF-8
            raise InvalidModelFile(f"{name} holds a name that is no text: {text!r:.60}", hint=hint)
    _check_attributes(proto, name)
    require_finite_functions(proto, name)
    _check_arity(proto, name)
    _check_sizes(proto.graph, name)
    require_sound_names(proto, name)
    for function in proto.functions:
        _check_function(function, name)


def _check_attributes(proto: onnx.ModelProto, name: str) -> None:
    """Attributes say of what type they are: readers take one that does not for empty, and writers raise."""
    nodes = (graph.node for graph in graphs(proto))
    for node in itertools.chain(*nodes, *(function.node for function in proto.functions)):
        for attribute in node.attribute:
            if not attribute.type:
                raise InvalidModelFile(
                    f"{name} is malformed: {attribute.name[:80]!r} of node {node.name[:80]!r} has no type",
                    hint="check it with onnx.checker",
                )


def _check_sizes(graph: onnx.GraphProto, name: str) -> None:
    for given in graph.input:
        if any(size.dim_value < 0 for size in given.type.tensor_type.shape.dim):
            raise InvalidModelFile(
                f"{name} is malformed: its input {given.name[:80]!r} has a negative size",
                hint="give axes of any size a name (dim_param) instead of -1",
            )


def _check_function(function: onnx.FunctionProto, name: str) -> None:
    version = next((x.version for x in function.opset_import if x.domain in ("", "ai.onnx")), None)
    for node in (*function.node, *(node for body in _bodies(function.node) for node in body.node)):
        _check_node(node, version, name)


def require_supported(proto: onnx.ModelProto, name: str) -> None:
    """Raises UnsupportedModel if a part of the model would be lost."""
    if proto.training_info:
        raise UnsupportedModel(f"{name} carries training information", hint="export it for inference")
    if any(graph.sparse_initializer for graph in graphs(proto)):
        raise UnsupportedModel(f"{name} stores weights in sparse form", hint="export it with dense weights")
    nodes = itertools.chain(*(graph.node for graph in graphs(proto)), *(f.node for f in proto.functions))
    if any(a.HasField("sparse_tensor") or a.sparse_tensors for node in nodes for a in node.attribute):
        raise UnsupportedModel(f"{name} holds constants in sparse form", hint="export it with dense ones")


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Every graph of a model: its own, and the bodies of control flow there and in functions."""
    yield proto.graph
    yield from _bodies(proto.graph.node)
    for function in proto.functions:
        yield from _bodies(function.node)


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs that nodes hold, and those that nodes of these hold."""
    todo = list(nodes)
    while todo:
        for attribute in todo.pop().attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield graph
                todo.extend(graph.node)


def _check_arity(proto: onnx.ModelProto, name: str) -> None:
    """Nodes of the standard operators have as many inputs as the standard says: later stages count on it."""
    version = next((x.version for x in proto.opset_import if x.domain in ("", "ai.onnx")), None)
    for graph in (proto.graph, *_bodies(proto.graph.node)):
        for node in graph.node:
            _check_node(node, version, name)


def _check_node(node: onnx.NodeProto, version: int | None, name: str) -> None:
    if version is None or node.domain not in ("", "ai.onnx"):
        return
    most = _arity(node.op_type, version)
    if most is not None and not most[0] <= len(node.input) <= most[1]:
        said = f"{len(node.input)} inputs"
    elif node.op_type == "Constant" and len(node.attribute) != 1:
        said = f"{len(node.attribute)} attributes"
    elif node.op_type == "Constant" and node.attribute[0].type != _CONSTANTS.get(node.attribute[0].name):
        said = f"no value, but {node.attribute[0].name[:80]!r}"
    else:
        return
    raise InvalidModelFile(
        f"{name} is malformed: node {node.name[:80]!r} ({node.op_type[:80]}) has {said}",
        hint="check it with onnx.checker",
    )


@functools.cache
def _arity(op_type: str, version: int) -> tuple[int, int] | None:
    """(fewest, most) inputs of a standard operator; None if this version of the standard has no such operator."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except (onnx.defs.SchemaError, TypeError):  # no such operator, or no such version
        return None
    return schema.min_input, schema.max_input


def _names(proto: onnx.ModelProto) -> Iterator[object]:
    """Every name that something in the model is known by, and what it says of itself."""
    yield from (proto.producer_name, proto.producer_version, proto.domain, proto.graph.name)
    yield from (text for entry in proto.metadata_props for text in (entry.key, entry.value))
    yield proto.doc_string
    for graph in graphs(proto):
        yield from (graph.name, graph.doc_string, *(x.name for x in graph.initializer))
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield from (value.name, value.doc_string)
            yield from (size.dim_param for size in value.type.tensor_type.shape.dim)
        yield from _node_names(graph.node)
    for function in proto.functions:
        yield from (function.name, function.domain, function.doc_string, *function.input, *function.output)
        yield from _node_names(function.node)
    yield from (x.domain for x in proto.opset_import)


def _node_names(nodes: Iterable[onnx.NodeProto]) -> Iterator[object]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, node.doc_string, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name, attribute.doc_string)
