"""onnxruntime as this library opens it: on the CPU, with one thread, from memory; what is recorded is an output."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from passes.dataflow import Array
from rewriter.capture.bounded_run import run_within, time_limit
from rewriter.capture.exact_integers import with_unsigned_weights
from rewriter.capture.memory_limit import too_much
from rewriter.capture.stretches import NODES as STRETCH
from rewriter.capture.stretches import Stretches, open_stretches
from rewriter.capture.unread import drop_unread
from rewriter.errors import UnsupportedModel, first_line


class RecordingSession:
    """The model in onnxruntime, optimisation off, with extra outputs; in one session, or in stretches if it is long."""

    def __init__(self, model: ir.Model, extra: Sequence[str]) -> None:
        self.model, self.extra = model, extra
        self.time_limit = time_limit(model)

    @cached_property
    def _opened(self) -> ort.InferenceSession | Stretches:
        proto = ir.serde.serialize_model(self.model)
        drop_unread(proto, self.model)
        with_unsigned_weights(proto)
        present = {o.name for o in proto.graph.output}
        wanted = [n for n in self.extra if n not in present]
        opened = partial(open_session, folder=data_folder(self.model), optimise=False)
        if len(proto.graph.node) > STRETCH:
            with contextlib.suppress(Exception):  # opened as a whole, it says what is wrong with it
                return open_stretches(proto, wanted, opened)
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted)
        try:
            return opened(proto)
        except Exception as error:  # onnxruntime raises unrelated types
            raise too_much(error) or cannot(f"open the model: {first_line(error)}") from error

    @cached_property
    def types(self) -> dict[str, str]:
        """onnxruntime's name of each output's type."""
        return {o.name: str(o.type) for o in self._opened.get_outputs()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = list(self.types)
        arrays = run_within(self.time_limit, self._opened, names, feeds)
        out = {n: widened(a) for n, a in zip(names, arrays, strict=True) if isinstance(a, np.ndarray)}
        return {**out, **{n: widened(a) for n, a in feeds.items()}}


def open_session(proto: onnx.ModelProto, folder: str | None, *, optimise: bool) -> ort.InferenceSession:
    """A CPU session from memory; external data is looked for in `folder`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        # both plans are made in a time that grows with the square of the graph (1.31), and serve few runs
        options.enable_mem_pattern = options.enable_mem_reuse = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of every matrix
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def cannot(what: str) -> UnsupportedModel:
    return UnsupportedModel(f"onnxruntime cannot {what}", hint="check that the file runs in onnxruntime")


def data_folder(model: ir.Model) -> str | None:
    """Where the model's external data lies; None if it has none."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            return str(value.const_value.base_dir)
    return None


def widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array
