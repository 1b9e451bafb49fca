"""ONNX Runtime sessions that are reproducible, quiet, and do not copy a model's weights to build one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewriter.capture.stretches import NODES as STRETCH
from rewriter.capture.stretches import CannotCut, open_stretches
from rewriter.capture.unread import drop_unread
from rewriter.install.onnx_write import Placed, skeleton

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

_PLAIN = (
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8, ir.DataType.UINT8,
    ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32, ir.DataType.UINT32, ir.DataType.INT64,
    ir.DataType.UINT64, ir.DataType.BOOL,
)  # fmt: skip
"""Types that numpy has, so that a runtime can read the array where it lies."""


def session_options(threads: int) -> Any:
    """Sequential execution on `threads` threads that do not spin, with deterministic kernels and no log output."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


_LONG = 2000
"""Nodes, with those of functions that are called, from which a session is opened as the graph stands. Where shapes are
open, a plan of which buffers serve twice takes a time that grows with the square of the nodes (1.31: 20 s of 23 for
3,700), one of where weights lie grows with the square of these (half the time at 50,000 nodes), and optimising takes
longer than the few runs save."""


def cpu_session(model: ir.Model | Path, *, threads: int = 1, long: bool = False) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, or what answers like one.

    A path is opened as any runtime would open it, but for plans and optimisations that `long` graphs do without. A
    model in memory is handed over without its large weights: the session maps the file of those that lie in one, and
    copies the others. If it is very long, it is opened in stretches.
    """
    import onnxruntime as ort

    if isinstance(model, Path):
        options = _cpu_options(threads, long)
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    keep = [dtype for dtype in ir.DataType if dtype not in _PLAIN]
    proto, placed = skeleton(model, "weights", nested=False, keep=keep)
    idle = drop_unread(proto, model)  # a weight that the runtime drops is missed when it is handed over
    placed = [item for item in placed if item.name not in idle]
    folder = _refer_to_files(proto, placed)
    handed = {i.name: i.tensor for i in placed if folder is None or not _lies_in(i.tensor, folder)}
    long = is_long(model)

    def opened(part: onnx.ModelProto) -> ort.InferenceSession:
        return _from_memory(part, handed, folder, _cpu_options(threads, long))

    if len(proto.graph.node) > STRETCH:
        with contextlib.suppress(CannotCut):
            return open_stretches(proto, (), opened)
    return opened(proto)


def _cpu_options(threads: int, long: bool) -> Any:
    import onnxruntime as ort

    options = session_options(threads)
    # what is beyond lays out convolutions only, and crashes the process on some float16 files (1.31)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if long:
        options.enable_mem_pattern = options.enable_mem_reuse = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _from_memory(
    proto: onnx.ModelProto, handed: Mapping[str, ir.TensorProtocol], folder: str | None, options: Any
) -> ort.InferenceSession:
    """`handed` are weights that lie in no data file; those that `proto` names are handed over as arrays."""
    import onnxruntime as ort

    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of every matrix
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    names = [tensor.name for tensor in proto.graph.initializer if tensor.name in handed]
    arrays = [np.ascontiguousarray(handed[name].numpy()) for name in names]
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    if names:
        options.add_external_initializers(names, values)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session._rewriter_weights = (arrays, values)  # they must live as long as the session
    return session


def is_long(model: ir.Model) -> bool:
    """Whether a session had better not plan and optimise, by its weights, and its nodes with functions put in line."""
    sizes: dict[ir.OperatorIdentifier, int] = {}

    def size(key: ir.OperatorIdentifier) -> int:
        if key not in model.functions:
            return 1
        if key not in sizes:
            sizes[key] = sum(size(node.op_identifier()) for node in model.functions[key])
        return sizes[key]

    nodes = sum(size(node.op_identifier()) for node in model.graph)
    return max(nodes, len(model.graph.initializers)) >= _LONG


def _refer_to_files(proto: onnx.ModelProto, placed: Sequence[Placed]) -> str | None:
    """Point initializers that lie in a data file to it; the folder of these files, or None if there are none.

    What is handed over as an array is copied by onnxruntime; what it maps itself is not.
    """
    folders = Counter(str(i.tensor.base_dir) for i in placed if isinstance(i.tensor, ir.ExternalTensor))
    if not folders:
        return None
    folder = folders.most_common(1)[0][0]
    there = {item.name: item.tensor for item in placed if _lies_in(item.tensor, folder)}
    for entry in proto.graph.initializer:
        tensor = there.get(entry.name)
        if isinstance(tensor, ir.ExternalTensor):
            del entry.external_data[:]
            place = (("location", tensor.location), ("offset", tensor.offset or 0), ("length", tensor.nbytes))
            for key, value in place:
                entry.external_data.add(key=key, value=str(value))
    return folder


def _lies_in(tensor: ir.TensorProtocol, folder: str) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and str(tensor.base_dir) == folder
