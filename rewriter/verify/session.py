"""ONNX Runtime sessions that are reproducible, quiet, and do not copy a model's weights to build one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.install.onnx_write import skeleton

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


def cpu_session(model: ir.Model | Path, *, threads: int = 1) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    A path is opened as any runtime would open it. A model in memory is handed over without its large weights, which
    the session reads where they lie (mapped from their file, if they come from one).
    """
    import onnxruntime as ort

    options = session_options(threads)
    # what is beyond lays out convolutions only, and crashes the process on some float16 files (1.31)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    providers = ["CPUExecutionProvider"]
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=providers)
    keep = [dtype for dtype in ir.DataType if dtype not in _PLAIN]
    proto, placed = skeleton(model, "weights", nested=False, keep=keep)
    idle = {item.name for item in placed if not item.value.uses() and not item.value.is_graph_output()}
    if idle:  # the runtime drops what nothing reads, and then misses the weight that it is handed
        placed = [item for item in placed if item.name not in idle]
        read = [tensor for tensor in proto.graph.initializer if tensor.name not in idle]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(read)
    arrays = [np.ascontiguousarray(item.tensor.numpy()) for item in placed]
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    if placed:
        options.add_external_initializers([item.name for item in placed], values)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=providers)
    session._rewriter_weights = (arrays, values)  # they must live as long as the session
    return session
