"""The ONNX function of linear attention against the float64 oracle: any length, order, features, opset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from codegen.ops.linear_attention import reference
from codegen.ops.linear_attention.onnx_body import DOMAIN, attributes, function, function_name, stored
from codegen.spec import FeatureMap, LinearAttention
from tests.unit.test_linear_attention import CHUNK, FEATURES, ORDERS, operands, spec_of

Array = NDArray[Any]


def session(
    spec: LinearAttention, drawn: dict[str, Array], opset: int, shown: bool, dtype: Any = np.float32, **gains: float
) -> ort.InferenceSession:
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    plain = spec.attention
    sizes = {"q": (plain.heads, plain.head_dim), "k": (plain.kv_heads, plain.head_dim)}
    sizes["v"] = (plain.kv_heads, plain.value_dim)
    inputs = [
        ir.Value(name=n, type=ir.TensorType(kind), shape=ir.Shape(["B", h, "S" if n == "q" else "T", d]))
        for n, (h, d) in sizes.items()
    ]
    if shown:
        inputs.append(ir.Value(name="shown", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(["B", "T"])))
    held = []
    for name, array in stored(spec, drawn, kind).items():
        tensor = ir.tensor(array, name=name)
        held.append(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor))
    order = [*inputs[:3], *held, *inputs[3:]]
    node = ir.Node(DOMAIN, function_name(spec, shown), order, attributes(spec, kind, **gains), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type = "out", ir.TensorType(kind)
    output.shape = ir.Shape(["B", plain.heads, "S", plain.value_dim])
    graph = ir.Graph(inputs, [output], nodes=[node], initializers=held, name="g", opset_imports={"": opset, DOMAIN: 1})
    proto = ir.to_proto(ir.Model(graph, ir_version=8, functions=[function(spec, opset, shown)]))
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def cast(given: list[Array], dtype: Any = np.float32) -> dict[str, Array]:
    return {n: a.astype(dtype) for n, a in zip("qkv", given, strict=True)}


@pytest.mark.parametrize("causal", ORDERS)
@pytest.mark.parametrize("features", FEATURES)
def test_the_function_is_the_oracle(features: FeatureMap, causal: bool) -> None:
    """Of every length, for all queries and for the last ones, with shared heads and hidden keys."""
    for kv_heads in (1, 4):
        spec = spec_of(features, causal, kv_heads)
        _, drawn = operands(spec, 1, 1)
        plain, hiding = (session(spec, drawn, 17, shown) for shown in (False, True))
        for keys in (1, 4, 5, 8, 9, 23, 40):
            for queries in sorted({keys, keys // 3 or 1, 1}):
                given, _ = operands(spec, queries, keys)
                shown = np.random.default_rng(1).random((2, keys)) < 0.7
                for ready, hidden in ((plain, None), (hiding, shown)):
                    feeds = cast(given) | ({} if hidden is None else {"shown": hidden})
                    expected = reference.linear_attention(spec, *given, drawn, hidden)
                    np.testing.assert_allclose(ready.run(None, feeds)[0], expected, rtol=2e-4, atol=2e-5)
    other = reference.linear_attention(replace(spec, chunk=CHUNK + 1), *given, drawn, hidden)  # the control
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 21, 23, 24])
def test_every_opset_gives_the_same(opset: int) -> None:
    for features in FeatureMap:
        for causal in (True, False):
            spec = spec_of(features, causal)
            given, drawn = operands(spec, 21, 21)
            found = session(spec, drawn, opset, False).run(None, cast(given))[0]
            expected = reference.linear_attention(spec, *given, drawn)
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_what_is_multiplied_in_already_is_taken_out() -> None:
    spec = spec_of()
    given, drawn = operands(spec, 21, 21)
    expected = reference.linear_attention(spec, *given, drawn)
    scaled = cast([given[0] * 0.5, given[1] * 3.0, given[2]])
    for gains, same in (({"query_gain": 0.5, "key_gain": 3.0}, True), ({"query_gain": 0.5}, False)):
        apart = np.abs(session(spec, drawn, 17, False, **gains).run(None, scaled)[0] - expected).max()
        assert apart < 2e-5 if same else apart > 1e-2


@pytest.mark.parametrize("dtype", [pytest.param(np.float16, id="float16"), pytest.param(np.float64, id="float64")])
def test_other_precisions(dtype: Any) -> None:
    """Between half-precision operands and result all is float32."""
    spec = spec_of()
    given, drawn = operands(spec, 21, 21)
    rounded = [a.astype(dtype).astype(np.float64) for a in given]
    found = session(spec, drawn, 17, False, dtype).run(None, cast(given, dtype))[0]
    assert found.dtype == dtype
    limit = 1e-3 if dtype is np.float16 else 1e-6
    np.testing.assert_allclose(found, reference.linear_attention(spec, *rounded, drawn), atol=limit)


def test_later_tokens_leave_no_trace() -> None:
    for features in FeatureMap:
        for causal in (True, False):
            spec = spec_of(features, causal)
            given, drawn = operands(spec, 30, 30)
            ready = session(spec, drawn, 17, False)
            before = ready.run(None, cast(given))[0]
            changed = [a.copy() for a in given]
            for array in changed:
                array[:, :, 21] += 5
            after = ready.run(None, cast(changed))[0]
            assert np.array_equal(after[:, :, :21], before[:, :, :21]) == causal
            assert not np.array_equal(after[:, :, 21:], before[:, :, 21:])
