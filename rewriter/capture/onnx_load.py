"""Opens an .onnx file safely: nothing is trusted, weights stay on disk until somebody reads them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from rewriter.capture.memory_limit import grant
from rewriter.capture.onnx_structure import require_sound_structure, require_supported
from rewriter.capture.onnx_tensors import DataFolder, is_external, require_sound_tensor, tensors
from rewriter.capture.onnx_wire import PROTOBUF_LIMIT, parse
from rewriter.errors import InvalidModelFile, UnsupportedModel

if TYPE_CHECKING:
    import onnx


def load(path: str | Path) -> ir.Model:
    """Open an .onnx file; external weights are mapped, not read.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        InvalidModelFile: the file is empty, cut off, no ONNX model, or its external data is missing, too short,
            or lies outside the model's folder.
        UnsupportedModel: the file uses a part of ONNX that would be lost (sparse initializers, training info).
    """
    path = Path(path)
    proto = parse(path)
    require_sound_structure(proto, path.name)
    require_supported(proto, path.name)
    data = DataFolder(path)
    for tensor in tensors(proto):
        require_sound_tensor(tensor, data, path.name)
    data.require_apart(path.name)
    grant(data.taken)
    model = _deserialize(proto, path.name)
    ir.external_data.set_base_dir(model.graph, data.folder)
    _follow_links(model, data)
    return model


def _follow_links(model: ir.Model, data: DataFolder) -> None:
    """Name the file itself where a link leads out of the folder to an allowed place; readers accept no such link."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and not data.holds(tensor.path):
                folder, name = os.path.split(os.path.realpath(tensor.path))
                value.const_value = ir.ExternalTensor(
                    name, tensor.offset, tensor.length, tensor.dtype,
                    shape=tensor.shape, name=tensor.name, base_dir=folder,
                )  # fmt: skip


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """An `onnx_ir.Model` that shares the tensors of `proto`.

    Raises:
        InvalidModelFile: the proto holds no model, or a tensor does not hold what it declares.
        UnsupportedModel: its weights are in external files that were not loaded, so that nobody knows where.
    """
    require_sound_structure(proto, "the model")
    require_supported(proto, "the model")
    for tensor in tensors(proto):
        if is_external(tensor):
            raise UnsupportedModel(
                f"the weights of {tensor.name!r} are in an external file",
                hint="pass the path of the .onnx file, or load it with its external data",
            )
        require_sound_tensor(tensor, None, "the model")
    return _deserialize(proto, "the model")


def copy_of(model: ir.Model) -> ir.Model:
    """A model of its own that shares the weights, external ones included, with `model`."""
    with _reader_kept_quiet():
        copied = ir.from_proto(ir.serde.serialize_model(model))
    for name, value in model.graph.initializers.items():
        copied.graph.initializers[name].const_value = value.const_value
    return copied


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """A self-contained `onnx.ModelProto`: external weights are read in.

    Raises:
        UnsupportedModel: the model is larger than the 2 GB that one proto can hold.
    """
    values = [v for graph in model.graphs() for v in graph.initializers.values() if v.const_value is not None]
    held = [v.const_value for v in values if v.const_value is not None]
    if sum(t.nbytes for t in held if t.dtype != ir.DataType.STRING) > PROTOBUF_LIMIT:
        raise UnsupportedModel("the model is larger than 2 GB", hint="save it to a path, with external data")
    kept = [v.const_value for v in values]
    try:
        for value in values:
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name, dtype=tensor.dtype)
        return ir.to_proto(model)
    finally:
        for value, tensor in zip(values, kept, strict=True):
            value.const_value = tensor


def _deserialize(proto: onnx.ModelProto, name: str) -> ir.Model:
    try:
        with _reader_kept_quiet():
            model = ir.from_proto(proto)
        parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        for part in parts:
            if not _in_order(part, set()):
                part.sort()
        return model
    except Exception as error:  # onnx_ir raises whatever its parts raise on malformed graphs
        cause = error
        while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise InvalidModelFile(f"{name} is malformed: {cause}", hint="check it with onnx.checker") from error


@contextlib.contextmanager
def _reader_kept_quiet() -> Iterator[None]:
    """What onnx_ir warns of is an error here, and its warnings hold names as they stand in the file."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _in_order(nodes: Iterable[ir.Node], made: set[ir.Node]) -> bool:
    """Whether nodes, those of bodies too, stand behind what they read: converters append some at the end, which
    runtimes put right silently, and later stages go by the order. `made` are nodes before these, and grows by them."""
    for node in nodes:
        makers = (value.producer() for value in node.inputs if value is not None)
        if any(maker is not None and maker not in made for maker in makers):
            return False
        for attribute in node.attributes.values():
            bodies = {ir.AttributeType.GRAPH: (attribute.value,), ir.AttributeType.GRAPHS: attribute.value}
            if not all(_in_order(body, made) for body in bodies.get(attribute.type, ())):
                return False
        made.add(node)
    return True
