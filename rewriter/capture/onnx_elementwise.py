"""Single ONNX nodes run by onnxruntime: what activations are made of has no numpy copy here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from passes.dataflow import Array

_IR_VERSION = 10  # any that knows the file's operator sets will do


def single_node(node: ir.Node) -> Callable[[Sequence[Array | None]], tuple[Array, ...]]:
    """Runs one node on other inputs than the recorded ones; half floats are computed in float32.

    What it returns raises NotImplementedError where onnxruntime does not run the node on such inputs.
    """

    def evaluate(arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        given = [None if a is None else _plain(np.asarray(a)) for a in arrays]
        proto = ir.serde.serialize_node(node)
        del proto.input[:], proto.output[:], proto.metadata_props[:]
        proto.name = ""
        proto.input.extend("" if a is None else f"x{i}" for i, a in enumerate(given))
        proto.output.extend(f"y{i}" if i == 0 or not _may_omit(node) else "" for i in range(len(node.outputs)))
        types = tuple((i, a.dtype.str, a.ndim) for i, a in enumerate(given) if a is not None)
        try:
            opsets: Mapping[str, int] = node.graph.opset_imports if node.graph is not None else {}
            session = _session(proto.SerializeToString(), types, tuple(opsets.items()))
            return tuple(session.run(None, {f"x{i}": a for i, a in enumerate(given) if a is not None}))
        except Exception as error:  # onnxruntime raises unrelated types
            raise NotImplementedError(f"onnxruntime does not run {node.op_type} by itself") from error

    return evaluate


def _may_omit(node: ir.Node) -> bool:
    """Whether outputs behind the first one may be left out."""
    return node.op_type != "TopK"


def _plain(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype in (np.float16, np.float64) else array


@lru_cache(maxsize=128)
def _session(
    node: bytes, types: tuple[tuple[int, str, int], ...], opsets: tuple[tuple[str, int], ...]
) -> ort.InferenceSession:
    made = onnx.NodeProto.FromString(node)
    inputs = [
        onnx.helper.make_tensor_value_info(
            f"x{i}", onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None] * rank
        )
        for i, dtype, rank in types
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in made.output if name]
    graph = onnx.helper.make_graph([made], "node", inputs, outputs)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets], ir_version=_IR_VERSION
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
