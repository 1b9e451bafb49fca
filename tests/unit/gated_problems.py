"""Small problems of gated attention and mixed chunk attention, and one-call files of their ONNX functions, run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from codegen.ops.gated_attention import onnx_body as unit_onnx
from codegen.ops.mixed_chunk_attention import onnx_body as chunk_onnx
from codegen.spec import Activation, GatedAttention, MixedChunkAttention, PositionBias

Array = NDArray[Any]
Gated = GatedAttention | MixedChunkAttention


@st.composite
def specs(draw: st.DrawFn, *, chunked: bool, causal: bool | None = None) -> Gated:
    common: dict[str, Any] = {
        "hidden": draw(st.integers(1, 7)),
        "expanded": draw(st.integers(1, 9)),
        "base": 2 * draw(st.integers(1, 4)),
        "causal": draw(st.booleans()) if causal is None else causal,
        "bias": draw(st.sampled_from(PositionBias)),
        "span": draw(st.integers(1, 12)),
        "rotary": draw(st.booleans()),
        **{part: draw(st.sampled_from([None, *Activation])) for part in ("gate", "value", "latent")},
    }
    if chunked:
        return MixedChunkAttention(**common, chunk=draw(st.integers(1, 9)), averaged=draw(st.booleans()))
    fixed = common["causal"] or draw(st.booleans())
    return GatedAttention(**common, length=draw(st.integers(1, 20)) if fixed else None)


def weights_of(spec: Gated, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    sizes = {"scale": 2.0, "offset": 2.0}  # scores that matter
    return {
        role: (rng.standard_normal(shape) * sizes.get(role, 0.5)).astype(np.float32)
        for role, shape in spec.shapes.items()
    }


def hidden_of(spec: Gated, batch: int, tokens: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, tokens, spec.hidden)).astype(np.float32)


def tensors(weights: dict[str, Array], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {role: torch.from_numpy(array).to(dtype) for role, array in weights.items()}


def distance(found: Array, expected: Array) -> float:
    """Of the largest number expected."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-6))


def model(spec: Gated, weights: dict[str, Array], opset: int, dtype: ir.DataType = ir.DataType.FLOAT) -> bytes:
    """One call of the function on x of any size; weights are initializers."""
    mixed = isinstance(spec, MixedChunkAttention)
    body: Any = chunk_onnx if mixed else unit_onnx
    made = body.functions(spec, opset) if mixed else [body.function(spec, opset)]
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([None, None, spec.hidden]))
    stored = {role: ir.tensor(array) for role, array in unit_onnx.stored(spec, weights, dtype).items()}
    held = [
        ir.Value(name=role, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        for role, tensor in stored.items()
    ]
    node = ir.Node(unit_onnx.DOMAIN, body.function_name(spec), [x, *held], body.attributes(spec, dtype), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(dtype), ir.Shape([None, None, spec.hidden])
    opsets = {"": opset, unit_onnx.DOMAIN: 1}
    graph = ir.Graph([x], [output], nodes=[node], name="g", opset_imports=opsets, initializers=held)
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=8, functions=made))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def opened(content: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(file: bytes | ort.InferenceSession, x: Array) -> Array:
    """The output of a file of `model`, or of one that is `opened` already."""
    session = opened(file) if isinstance(file, bytes) else file
    return np.asarray(session.run(None, {"x": x})[0])
