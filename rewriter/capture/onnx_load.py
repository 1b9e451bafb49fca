"""Opens an .onnx file safely: nothing is trusted, weights stay on disk until somebody reads them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import mmap
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import onnx_ir as ir

from rewriter.capture.memory_limit import grant
from rewriter.capture.onnx_functions import require_finite_functions
from rewriter.capture.onnx_scopes import require_sound_names
from rewriter.errors import InvalidModelFile, UnsupportedModel, UsageError
from rewriter.given_path import existing

if TYPE_CHECKING:
    import onnx

PROTOBUF_LIMIT = 2**31 - 1
CHECKPOINTS = frozenset({".safetensors", ".pt", ".pth", ".ckpt", ".bin"})
"""Files that hold weights and no graph."""
_GRAPH_FIELD, _OPSET_FIELD = 7, 8
_LENGTH_DELIMITED = 2
_FIXED_WIDTH = {1: 8, 5: 4}
_CONSTANTS = {"value": 4, "sparse_value": 11, "value_float": 1, "value_floats": 6, "value_int": 2, "value_ints": 7,
              "value_string": 3, "value_strings": 8}  # fmt: skip
"""What a Constant node may hold, with the AttributeProto.AttributeType of each."""


def load(path: str | Path) -> ir.Model:
    """Open an .onnx file; external weights are mapped, not read.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        InvalidModelFile: the file is empty, cut off, no ONNX model, or its external data is missing, too short,
            or lies outside the model's folder.
        UnsupportedModel: the file uses a part of ONNX that would be lost (sparse initializers, training info).
    """
    path = Path(path)
    proto = _parse(path)
    _check_structure(proto, path.name)
    _check_supported(proto, path.name)
    data = _DataFolder(path)
    for tensor in _tensors(proto):
        _check_tensor(tensor, data, path.name)
    data.require_apart(path.name)
    grant(data.taken)
    model = _deserialize(proto, path.name)
    ir.external_data.set_base_dir(model.graph, data.folder)
    _follow_links(model, data)
    return model


def _follow_links(model: ir.Model, data: _DataFolder) -> None:
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
    _check_structure(proto, "the model")
    _check_supported(proto, "the model")
    for tensor in _tensors(proto):
        if _is_external(tensor):
            raise UnsupportedModel(
                f"the weights of {tensor.name!r} are in an external file",
                hint="pass the path of the .onnx file, or load it with its external data",
            )
        _check_tensor(tensor, None, "the model")
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


# --- the protobuf --------------------------------------------------------------------------------


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    _check_file(path)
    proto = onnx.ModelProto()
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as content,
        ):
            proto.ParseFromString(content)
    except DecodeError as error:
        raise InvalidModelFile(f"{path.name} is damaged: {error}", hint="export or download the model again") from error
    return proto


def _check_file(path: Path) -> None:
    if not existing(path).is_file():
        raise UsageError(f"{path} is no file", hint="give the path of an .onnx file")
    try:
        with path.open("rb") as file:
            _check_wire_format(file, path)
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read", hint="check the file's permissions") from error


def _check_wire_format(file: IO[bytes], path: Path) -> None:
    """Walk over the top-level fields without reading them; they must end where the file ends."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise InvalidModelFile(f"{path.name} is empty", hint="export or download the model again")
    if size > PROTOBUF_LIMIT:
        raise InvalidModelFile(f"{path.name} is larger than the 2 GB of one protobuf", hint="export with external data")
    fields: set[int] = set()
    while file.tell() < size:
        tag = _varint(file)
        if tag is None or not tag >> 3 or not _skip_field(file, tag & 7):
            raise _not_onnx(path, fields)
        fields.add(tag >> 3)
        if file.tell() > size:
            raise (
                InvalidModelFile(
                    f"{path.name} is cut off: {file.tell() - size:,} bytes are missing",
                    hint="export or download the model again",
                )
                if fields & {_GRAPH_FIELD}
                else _not_onnx(path, fields)
            )
    if _GRAPH_FIELD not in fields:
        raise _not_onnx(path, fields)


def _skip_field(file: IO[bytes], wire_type: int) -> bool:
    if wire_type == 0:
        return _varint(file) is not None
    length = _varint(file) if wire_type == _LENGTH_DELIMITED else _FIXED_WIDTH.get(wire_type)
    if length is None or length > PROTOBUF_LIMIT:
        return False
    file.seek(length, os.SEEK_CUR)
    return True


def _varint(file: IO[bytes]) -> int | None:
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def _not_onnx(path: Path, fields: set[int]) -> InvalidModelFile:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return InvalidModelFile(f"{path.name} is a Git LFS pointer, not the model", hint="run: git lfs pull")
    if path.suffix in CHECKPOINTS:
        hint = "give the Hugging Face folder it lies in, or the module in Python; pickled weights are never loaded"
        return InvalidModelFile(f"{path.name} holds weights without a model", hint=hint)
    if 1 in fields or 2 in fields:
        return InvalidModelFile(f"{path.name} is cut off or holds no graph", hint="export or download the model again")
    return InvalidModelFile(f"{path.name} is no ONNX model", hint="give a file that an ONNX exporter wrote")


def _check_structure(proto: onnx.ModelProto, name: str) -> None:
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
    graphs = (graph.node for graph in _graphs(proto))
    for node in itertools.chain(*graphs, *(function.node for function in proto.functions)):
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


def _check_supported(proto: onnx.ModelProto, name: str) -> None:
    if proto.training_info:
        raise UnsupportedModel(f"{name} carries training information", hint="export it for inference")
    if any(graph.sparse_initializer for graph in _graphs(proto)):
        raise UnsupportedModel(f"{name} stores weights in sparse form", hint="export it with dense weights")
    nodes = itertools.chain(*(graph.node for graph in _graphs(proto)), *(f.node for f in proto.functions))
    if any(a.HasField("sparse_tensor") or a.sparse_tensors for node in nodes for a in node.attribute):
        raise UnsupportedModel(f"{name} holds constants in sparse form", hint="export it with dense ones")


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


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
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
    for graph in _graphs(proto):
        yield from (x.name for x in (*graph.input, *graph.output, *graph.initializer, *graph.value_info))
        yield from _node_names(graph.node)
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
        yield from _node_names(function.node)
    yield from (x.domain for x in proto.opset_import)


def _node_names(nodes: Iterable[onnx.NodeProto]) -> Iterator[object]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


# --- tensors -------------------------------------------------------------------------------------


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(proto):
        yield from graph.initializer
        yield from _attribute_tensors(graph.node)
    for function in proto.functions:
        yield from _attribute_tensors(function.node)


def _attribute_tensors(nodes: object) -> Iterator[onnx.TensorProto]:
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


class _DataFolder:
    """Where a model's external data may lie: the folder of the file, or of the file that a link leads to.

    A download cache links both the model and its data to one folder of blobs; that stays allowed.
    """

    def __init__(self, model: Path) -> None:
        self.folder = str(model.absolute().parent)
        self._allowed = {os.path.realpath(self.folder), os.path.dirname(os.path.realpath(model))}
        self._sizes: dict[str, int] = {}
        self._stretches: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)

    def take(self, location: str, offset: int, length: int, tensor: str) -> None:
        """Note what a tensor takes of a file."""
        if length:
            self._stretches[os.path.realpath(os.path.join(self.folder, location))][offset, length] = tensor

    def require_apart(self, model: str) -> None:
        """Tensors may share a stretch of a file, but not overlap otherwise: written out, they could fill any disk."""
        for stretches in self._stretches.values():
            end, last = 0, ""
            for (offset, length), tensor in sorted(stretches.items()):
                if offset < end:
                    raise InvalidModelFile(
                        f"{model} is damaged: {last[:80]!r} and {tensor[:80]!r} overlap in their data file",
                        hint="export it again",
                    )
                end, last = offset + length, tensor

    @property
    def taken(self) -> int:
        """Bytes of the files that tensors take."""
        return sum(length for stretches in self._stretches.values() for _, length in stretches)

    def holds(self, path: str) -> bool:
        """True if `path` leads to a file in the folder of the model as it was named."""
        return _inside(os.path.realpath(path), os.path.realpath(self.folder))

    def size(self, location: str, tensor: str, model: str) -> int:
        """Bytes in the data file at `location`, which was checked."""
        if location not in self._sizes:
            self._sizes[location] = self._check(location, tensor, model)
        return self._sizes[location]

    def _check(self, location: str, tensor: str, model: str) -> int:
        outside = InvalidModelFile(
            f"{model} is unsafe: the data of {tensor!r} lies outside the model's folder ({location!r})",
            hint="put the data file beside the model and correct its location",
        )
        parts = location.replace("\\", "/").split("/")
        if os.path.isabs(location) or location[1:2] == ":" or ".." in parts or location.startswith("*/"):
            raise outside
        full = os.path.join(self.folder, location)
        real = os.path.realpath(full)
        if not any(_inside(real, allowed) for allowed in self._allowed):
            raise outside
        if not os.path.isfile(real):
            raise InvalidModelFile(
                f"the data file {location!r} of {model} is missing", hint="put it beside the .onnx file"
            )
        if os.stat(real).st_nlink > 1:
            raise InvalidModelFile(
                f"the data file {location!r} of {model} is a hard link", hint="replace it by a copy of its own"
            )
        return os.stat(real).st_size


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _check_tensor(tensor: onnx.TensorProto, data: _DataFolder | None, model: str) -> None:
    """A tensor must hold as many bytes, or texts, as its shape and type say."""
    if any(dim < 0 for dim in tensor.dims):
        raise InvalidModelFile(f"{model} is damaged: {tensor.name!r} has a negative size", hint="export it again")
    expected = _expected_bytes(tensor, model)
    if _is_external(tensor):
        if data is not None:
            _check_external(tensor, expected, data, model)
        return
    if expected is None:
        if len(tensor.string_data) != math.prod(tensor.dims):
            raise InvalidModelFile(
                f"{model} is damaged: {tensor.name!r} holds {len(tensor.string_data):,} texts of another number",
                hint="export or download the model again",
            )
        return
    held = len(tensor.raw_data) if tensor.HasField("raw_data") else _listed_bytes(tensor, expected)
    if held != expected:
        raise InvalidModelFile(
            f"{model} is damaged: {tensor.name!r} holds {held:,} bytes instead of {expected:,}",
            hint="export or download the model again",
        )


def _listed_bytes(tensor: onnx.TensorProto, expected: int) -> int:
    """Bytes of a tensor whose elements are listed one by one; packed types may be listed packed."""
    import onnx

    entries = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    dtype = ir.DataType(tensor.data_type)
    if dtype.bitwidth < 8 and entries == expected:
        return expected
    parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
    return (entries * dtype.bitwidth // parts + 7) // 8


def _check_external(tensor: onnx.TensorProto, expected: int | None, data: _DataFolder, model: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    damaged = InvalidModelFile(
        f"{model} is damaged: the place of {tensor.name!r} in its data file makes no sense", hint="export it again"
    )
    location = entries.get("location", "")
    if not location or "\0" in location:
        raise damaged
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or expected or 0)
    except ValueError as error:
        raise damaged from error
    if offset < 0 or length < 0 or (expected is not None and length != expected):
        raise damaged
    data.take(location, offset, length, tensor.name)
    missing = offset + length - data.size(location, tensor.name, model)
    if missing > 0:
        raise InvalidModelFile(
            f"the data file {location!r} of {model} is cut off: {missing:,} bytes of {tensor.name!r} are missing",
            hint="copy or download it again",
        )


def _expected_bytes(tensor: onnx.TensorProto, model: str) -> int | None:
    """Bytes that the elements take, packed; None for strings."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise InvalidModelFile(
            f"{model} is damaged: {tensor.name!r} has the unknown type {tensor.data_type}", hint="export it again"
        ) from error
    if dtype == ir.DataType.UNDEFINED:
        raise InvalidModelFile(f"{model} is damaged: {tensor.name!r} has no type", hint="export it again")
    if dtype == ir.DataType.STRING:
        return None
    count = 1
    for dim in tensor.dims:
        count *= dim
    return (count * dtype.bitwidth + 7) // 8
