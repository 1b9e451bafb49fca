"""Tensors of a file hold what they declare, and lie in the file or beside it."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from rewriter.capture.onnx_structure import graphs
from rewriter.errors import InvalidModelFile

if TYPE_CHECKING:
    import onnx


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All that a model holds: initializers and attributes, in bodies and functions too."""
    for graph in graphs(proto):
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


def is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


class DataFolder:
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


def require_sound_tensor(tensor: onnx.TensorProto, data: DataFolder | None, model: str) -> None:
    """A tensor must hold as many bytes, or texts, as its shape and type say."""
    if any(dim < 0 for dim in tensor.dims):
        raise InvalidModelFile(f"{model} is damaged: {tensor.name!r} has a negative size", hint="export it again")
    expected = _expected_bytes(tensor, model)
    if is_external(tensor):
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


def _check_external(tensor: onnx.TensorProto, expected: int | None, data: DataFolder, model: str) -> None:
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
