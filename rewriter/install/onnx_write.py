"""Writes an .onnx file atomically and in bounded memory, with or without a data file beside it.

Everything is first written under a temporary name and renamed at the end, so that whoever opens the output finds
the old model or the new one, whole. A model and its data file are two files: the new data gets a name that no model
in the folder uses, and becomes the model's data in the moment in which the model file is replaced.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import onnx_ir as ir

from rewriter import progress
from rewriter.copy_bytes import copy_range
from rewriter.drafts import draft_path, drafts_of, new_token, require_place, sweep, sync_folder, writing
from rewriter.errors import UnsupportedModel, UsageError

if TYPE_CHECKING:
    import onnx

ExternalData = Literal["auto", "always", "never"]

SINGLE_FILE_LIMIT = 1_800_000_000
"""Weight bytes from which "auto" writes a data file; a protobuf ends at 2 GiB."""

_PROTOBUF_LIMIT = 2**31 - 1
_INLINE_BYTES = 1024
"""Smaller tensors stay in the model file: readers need shapes and axes there."""
_ALIGN_FROM, _PAGE, _WORD = 1 << 16, 4096, 64
_SCANNED_BYTES = 1 << 28


def save(model: ir.Model, path: str | Path, *, external_data: ExternalData = "auto") -> None:
    """Write `model` to `path`; with a data file, that is ``<path>.data`` unless a model already uses this name.

    "auto" writes a data file if the weights exceed 1.8 GB or if some of the model's tensors come from one.
    `path` may be the file that the model was loaded from; tensors that lived in a data file that this call removes
    are then re-pointed to the new one. An interrupted call leaves the old output as it was.

    Raises:
        UsageError: the folder does not exist, `path` is a folder, or cannot be written.
        CannotWrite: the disk is full.
        UnsupportedModel: "never" was asked for and one protobuf cannot hold the model.
    """
    target = _Target.at(Path(path))
    wants_file = _wants_data_file(model, external_data)
    with writing(target.path):
        try:
            target.clean_stale()
            target.temporary_model.touch(exist_ok=False)  # tells others at work on the same output that we are, too
            if wants_file:
                _save_pair(model, target)
            else:
                _save_single(model, target)
        finally:
            target.drop_temporaries()


def clean_up(path: Path) -> None:
    """Remove what killed calls of `save` left beside `path`. Raises UsageError where nothing can be written."""
    _Target.at(path).clean_stale()


def _wants_data_file(model: ir.Model, external_data: ExternalData) -> bool:
    tensors = [tensor for _, tensor in _initializers(model)]
    total = sum(tensor.nbytes for tensor in tensors if tensor.dtype != ir.DataType.STRING)
    if external_data == "never":
        if total > _PROTOBUF_LIMIT - (64 << 20):
            raise UnsupportedModel(
                f"{total:,} bytes of weights do not fit into one .onnx file", hint="use --external-data auto"
            )
        return False
    if external_data == "always":
        return True
    return total > SINGLE_FILE_LIMIT or any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)


def _initializers(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value


# --- skeleton: the model without its large tensors -----------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A tensor that the skeleton only points to, and where its bytes go."""

    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int

    @property
    def name(self) -> str:
        return self.value.name or ""


def skeleton(
    model: ir.Model, location: str, *, nested: bool = True, keep: Iterable[ir.DataType] = ()
) -> tuple[onnx.ModelProto, list[Placed]]:
    """`model` as a proto whose large initializers are external references into `location`, and those tensors.

    `model` is the same afterwards. With ``nested=False`` initializers of subgraphs are embedded; dtypes in `keep` too.
    """
    kept = frozenset(keep) | {ir.DataType.STRING}
    top = model.graph
    swapped: list[tuple[ir.Value, ir.TensorProtocol]] = []
    placed: list[Placed] = []
    offset, shared = 0, dict[tuple[str, int, int], int]()
    try:
        for value, tensor in list(_initializers(model)):
            outside = tensor.dtype not in kept and tensor.nbytes >= _INLINE_BYTES and (nested or value.graph is top)
            swapped.append((value, tensor))
            if not outside:
                value.const_value = _in_memory(tensor)
                continue
            step = _PAGE if tensor.nbytes >= _ALIGN_FROM else _WORD
            offset = -(-offset // step) * step
            place = shared.setdefault(_stretch(tensor, offset), offset)
            placed.append(Placed(value, tensor, place))
            value.const_value = _reference(tensor, location, place, "")
            if place == offset:
                offset += tensor.nbytes
        with _inline_attributes(model):
            return ir.to_proto(model), placed
    finally:
        for value, tensor in swapped:
            value.const_value = tensor


def _stretch(tensor: ir.TensorProtocol, offset: int) -> tuple[str, int, int]:
    """Where a tensor's bytes come from: what is one stretch of one file stays one; others are told by `offset`."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.path), tensor.offset or 0, tensor.nbytes
    return "", offset, tensor.nbytes


def _reference(tensor: ir.TensorProtocol, location: str, offset: int, folder: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "",
        doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props), base_dir=folder,
    )  # fmt: skip


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


@contextlib.contextmanager
def _inline_attributes(model: ir.Model) -> Iterator[None]:
    """Tensors of Constant nodes that live in a data file are embedded while this is open."""
    swapped: list[tuple[ir.Node, ir.Attr]] = []
    try:
        for graph in model.graphs():
            for node in graph:
                for attribute in list(node.attributes.values()):
                    if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                        swapped.append((node, attribute))
                        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _in_memory(attribute.value))
        yield
    finally:
        for node, attribute in swapped:
            node.attributes[attribute.name] = attribute


# --- one file ------------------------------------------------------------------------------------


def _save_single(model: ir.Model, target: _Target) -> None:
    proto, placed = skeleton(model, "-", nested=False)
    if proto.ByteSize() + sum(p.tensor.nbytes for p in placed) > _PROTOBUF_LIMIT:
        raise UnsupportedModel("the model does not fit into one .onnx file", hint="use --external-data auto")
    with target.open_model() as file:
        _write_embedded(proto, placed, file)
    _publish(model, target, [], None)


def _write_embedded(proto: onnx.ModelProto, placed: list[Placed], file: IO[bytes]) -> None:
    """Stream the model with the bytes of `placed` in place of the references: no second copy is made in memory."""
    large = {item.name: item.tensor for item in placed}
    records: list[tuple[bytes, ir.TensorProtocol | None]] = []
    for entry in proto.graph.initializer:
        tensor = large.get(entry.name)
        if tensor is None:
            records.append((entry.SerializeToString(), None))
            continue
        entry.ClearField("external_data")
        entry.ClearField("data_location")
        opening = b"\x4a" + _varint(tensor.nbytes)  # field 9: raw_data
        records.append((entry.SerializeToString() + opening, tensor))
    del proto.graph.initializer[:]
    head = proto.graph.SerializeToString()
    proto.ClearField("graph")
    sizes = [len(record) + (0 if tensor is None else tensor.nbytes) for record, tensor in records]
    total = len(head) + sum(1 + len(_varint(size)) + size for size in sizes)
    file.write(proto.SerializeToString() + b"\x3a" + _varint(total) + head)  # field 7: graph
    with progress.task("writing", sum(sizes), "B") as advance:
        for (record, tensor), size in zip(records, sizes, strict=True):
            file.write(b"\x2a" + _varint(size) + record)  # field 5: initializer
            if tensor is not None:
                _write_tensor(tensor, file)
            advance(file.tell())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _write_tensor(tensor: ir.TensorProtocol, file: IO[bytes]) -> None:
    start = file.tell()
    if isinstance(tensor, ir.ExternalTensor):
        with open(tensor.path, "rb") as source:
            copy_range(source, tensor.offset or 0, tensor.nbytes, file)
    else:
        file.write(tensor.tobytes())
    if file.tell() - start != tensor.nbytes:
        raise RuntimeError(f"{tensor.name!r} wrote {file.tell() - start} bytes instead of {tensor.nbytes}")


# --- a model and its data ------------------------------------------------------------------------


def _save_pair(model: ir.Model, target: _Target) -> None:
    name = target.free_data_name()
    proto, placed = skeleton(model, name)
    with target.open_model() as file:
        file.write(proto.SerializeToString())
    size = max((item.offset + item.tensor.nbytes for item in placed), default=0)
    with target.open_data() as file, progress.task("writing", size, "B") as advance:
        for item in placed:
            if item.offset < file.tell():
                continue  # shares what is written already
            file.write(bytes(item.offset - file.tell()))
            _write_tensor(item.tensor, file)
            advance(file.tell())
    _publish(model, target, placed, name if placed else None)


def _publish(model: ir.Model, target: _Target, placed: list[Placed], data_name: str | None) -> None:
    """Rename into place, then drop data files that only the old output used."""
    if data_name is not None:
        os.replace(target.temporary_data, target.folder / data_name)
    target.copy_mode()
    replaced = target.data_of_the_old_output()
    target.note_to_remove(replaced)
    os.replace(target.temporary_model, target.path)
    sync_folder(target.folder)
    doomed = {target.folder / name for name in target.unused_data_files(replaced)}
    _rebind(model, target, placed, data_name, {os.path.realpath(file) for file in doomed})
    for file in doomed:
        file.unlink(missing_ok=True)


def _rebind(model: ir.Model, target: _Target, placed: list[Placed], data_name: str | None, doomed: set[str]) -> None:
    """Bind tensors of `model` in a file that was replaced or will go to the new data, or to a mapping that lives on."""
    if data_name is not None:
        gone = doomed | {os.path.realpath(target.folder / data_name)}
        for item in placed:
            if isinstance(item.tensor, ir.ExternalTensor) and os.path.realpath(item.tensor.path) in gone:
                item.value.const_value = _reference(item.tensor, data_name, item.offset, str(target.folder))
    for value, tensor in list(_initializers(model)):
        if isinstance(tensor, ir.ExternalTensor) and os.path.realpath(tensor.path) in doomed:
            value.const_value = _in_memory(tensor)


# --- names and temporaries -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """The output, and the names that one call of `save` uses on the way there.

    See `rewriter.drafts` for how a later call can tell what a killed one left behind.
    """

    path: Path
    folder: Path
    token: str

    @staticmethod
    def at(path: Path) -> _Target:
        folder = path.absolute().parent
        if not os.path.isdir(folder):
            raise UsageError(f"the output folder {folder} does not exist", hint="create it first")
        require_place(path)
        if path.is_dir():
            raise UsageError(f"{path} is a folder", hint="name the output file, e.g. out.onnx")
        if not os.access(folder, os.W_OK):
            raise UsageError(f"the output folder {folder} is not writable", hint="check its permissions")
        return _Target(path.absolute(), folder, new_token())

    @property
    def temporary_model(self) -> Path:
        return draft_path(self.path, self.token)

    @property
    def temporary_data(self) -> Path:
        return draft_path(self.path, self.token, "data")

    @contextlib.contextmanager
    def open_model(self) -> Iterator[IO[bytes]]:
        with self._open(self.temporary_model) as file:
            yield file

    @contextlib.contextmanager
    def open_data(self) -> Iterator[IO[bytes]]:
        with self._open(self.temporary_data) as file:
            yield file

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[IO[bytes]]:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def copy_mode(self) -> None:
        """The new output keeps the permissions of the old one."""
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(self.path, self.temporary_model)

    def drop_temporaries(self) -> None:
        for path in (self.temporary_model, self.temporary_data, self._note):
            path.unlink(missing_ok=True)

    def clean_stale(self) -> None:
        """Remove what killed calls for the same output left: temporaries, and data that no model came to use."""
        usual = self._usual_data_name
        drafts = [draft for draft in drafts_of(self.path) if draft.kind != "data" and _mentions(draft.path, usual)]
        abandoned = {usual} if drafts and all(draft.is_stale for draft in drafts) else ()
        sweep(self.path)
        for name in self.unused_data_files(abandoned):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def _note(self) -> Path:
        return draft_path(self.path, self.token, "note")

    def note_to_remove(self, names: Iterable[str]) -> None:
        """What goes when the new output is there: who finds the note of a killed call knows whose data they were."""
        self._note.write_text("\n".join(names))

    def data_of_the_old_output(self) -> set[str]:
        return {name for name in self._own_data_files() if _mentions(self.path, name)}

    def unused_data_files(self, candidates: Collection[str]) -> list[str]:
        """Data files of this output that no model points to and no running process is about to use.

        The usual name is a name that anybody may have given to a file, so it takes `candidates` to hold it.
        """
        coming = {f"{self.path.name}.{draft.token}.data" for draft in drafts_of(self.path) if not draft.is_stale}
        own = {name for name in self._own_data_files() if name != self._usual_data_name or name in candidates}
        return [name for name in own - coming if not self.is_mentioned(name)]

    @property
    def _usual_data_name(self) -> str:
        return f"{self.path.name}.data"

    def free_data_name(self) -> str:
        """``<output>.data``, or a name of this call's own where such a file is: a model elsewhere may need it."""
        usual = self._usual_data_name
        others = any(draft.token != self.token for draft in drafts_of(self.path))
        return f"{self.path.name}.{self.token}.data" if others or os.path.lexists(self.folder / usual) else usual

    def _own_data_files(self) -> set[str]:
        pattern = re.compile(rf"{re.escape(self.path.name)}(\.[0-9a-f]{{8}})?\.data")
        return {file.name for file in self.folder.iterdir() if pattern.fullmatch(file.name)}

    def is_mentioned(self, data_name: str) -> bool:
        """True if some model file in the folder, or a copy like model.onnx.bak, may point to `data_name`."""
        files = {file for file in self.folder.iterdir() if _may_be_model(file)} | {self.path}
        return any(_mentions(file, data_name, unread=True) for file in files)


def _may_be_model(file: Path) -> bool:
    return file.suffix in {".onnx", ".pb", ".ort"} or (".onnx" in file.name and file.suffix not in {".data", ".tmp"})


def _mentions(file: Path, name: str, *, unread: bool = False) -> bool:
    """True if the bytes of `name` stand in `file`; `unread` is what is said of files too large to look through."""
    if not file.is_file() or not (size := file.stat().st_size):
        return False
    if size > _SCANNED_BYTES:
        return unread
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(os.fsencode(name)) >= 0
