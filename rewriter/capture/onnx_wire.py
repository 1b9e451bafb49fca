"""What the bytes of a file must be before protobuf sees them: an ONNX model, whole, and no checkpoint."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rewriter.errors import InvalidModelFile, UsageError
from rewriter.given_path import existing

if TYPE_CHECKING:
    import onnx

PROTOBUF_LIMIT = 2**31 - 1
CHECKPOINTS = frozenset({".safetensors", ".pt", ".pth", ".ckpt", ".bin"})
"""Files that hold weights and no graph."""
_GRAPH_FIELD, _OPSET_FIELD = 7, 8
_LENGTH_DELIMITED = 2
_FIXED_WIDTH = {1: 8, 5: 4}


def parse(path: Path) -> onnx.ModelProto:
    """The message in a file; raises UsageError if it cannot be read, InvalidModelFile if there is none."""
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
