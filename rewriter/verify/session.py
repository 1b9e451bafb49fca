"""ONNX Runtime sessions that are reproducible, quiet, and do not copy a model's weights to build one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewriter.install.onnx_write import Placed, skeleton

if TYPE_CHECKING:
    import onnx

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


_LARGE = 2000
"""Nodes from which a session is opened as the graph stands. Where shapes are open, a plan of which buffers serve twice
takes a time that grows with the square of the nodes (1.31: 20 s of 23 for 3,700), and optimising takes longer than the
few runs save."""


def cpu_session(model: ir.Model | Path, *, threads: int = 1) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    A path is opened as any runtime would open it. A model in memory is handed over without its large weights: the
    session maps the file of those that lie in one, and copies the others.
    """
    import onnxruntime as ort

    options = session_options(threads)
    # what is beyond lays out convolutions only, and crashes the process on some float16 files (1.31)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    providers = ["CPUExecutionProvider"]
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=providers)
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of every matrix
    if len(model.graph) >= _LARGE:
        options.enable_mem_reuse = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    keep = [dtype for dtype in ir.DataType if dtype not in _PLAIN]
    proto, placed = skeleton(model, "weights", nested=False, keep=keep)
    idle = {item.name for item in placed if not item.value.uses() and not item.value.is_graph_output()}
    if idle:  # the runtime drops what nothing reads, and then misses the weight that it is handed
        placed = [item for item in placed if item.name not in idle]
        read = [tensor for tensor in proto.graph.initializer if tensor.name not in idle]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(read)
    folder = _refer_to_files(proto, placed)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        placed = [item for item in placed if not _lies_in(item.tensor, folder)]
    arrays = [np.ascontiguousarray(item.tensor.numpy()) for item in placed]
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    if placed:
        options.add_external_initializers([item.name for item in placed], values)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=providers)
    session._rewriter_weights = (arrays, values)  # they must live as long as the session
    return session


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
