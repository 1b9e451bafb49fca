"""The ONNX function of grouped-query attention against the float64 oracle, over specs, sizes and opsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codegen.ops.grouped_query_attention.onnx_body import DOMAIN, attributes, function, function_name
from codegen.ops.grouped_query_attention.reference import grouped_query_attention
from codegen.spec import GroupedQueryAttention

Array = NDArray[Any]


@st.composite
def specs(draw: st.DrawFn) -> GroupedQueryAttention:
    kv_heads = draw(st.integers(1, 4))
    return GroupedQueryAttention(
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 3, 8])),
        value_dim=draw(st.sampled_from([1, 5, 8])),
        scale=draw(st.sampled_from([0.25, 1.0, 0.7])),
        causal=draw(st.booleans()),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 2.0])),
        masked_rows_are_zero=draw(st.booleans()),
        sinks=draw(st.booleans()),
    )


def model(spec: GroupedQueryAttention, opset: int) -> bytes:
    """One call of the function, inputs of any size."""
    names = ["q", "k", "v"] + ["bias"] * spec.bias + ["sinks"] * spec.sinks
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * 4)) for n in names]
    node = ir.Node(DOMAIN, function_name(spec), inputs, attributes(spec, ir.DataType.FLOAT), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * 4)
    graph = ir.Graph(inputs, [output], nodes=[node], name="g", opset_imports={"": opset, DOMAIN: 1})
    whole = ir.Model(graph, ir_version=8, functions=[function(spec, opset)])
    proto = ir.serde.serialize_model(whole)
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def operands(spec: GroupedQueryAttention, batch: int, queries: int, keys: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    feeds = {
        "q": rng.standard_normal((batch, spec.heads, queries, spec.head_dim)),
        "k": rng.standard_normal((batch, spec.kv_heads, keys, spec.head_dim)),
        "v": rng.standard_normal((batch, spec.kv_heads, keys, spec.value_dim)),
    }
    if spec.bias:
        bias = rng.standard_normal((batch, 1, queries, keys))
        if spec.masked_rows_are_zero and not spec.sinks:
            bias[0, :, 0] = -np.inf  # a row that sees nothing
        feeds["bias"] = bias
    if spec.sinks:
        feeds["sinks"] = np.broadcast_to(rng.standard_normal((1, spec.heads, 1, 1)), (batch, spec.heads, queries, 1))
    return {n: np.ascontiguousarray(a, dtype=np.float32) for n, a in feeds.items()}


def run(spec: GroupedQueryAttention, opset: int, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model(spec, opset), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def oracle(spec: GroupedQueryAttention, feeds: dict[str, Array]) -> Array:
    return grouped_query_attention(spec, feeds["q"], feeds["k"], feeds["v"], feeds.get("bias"), feeds.get("sinks"))


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(0, 99))
def test_the_function_is_the_oracle(
    spec: GroupedQueryAttention, batch: int, queries: int, more: int, seed: int
) -> None:
    feeds = operands(spec, batch, queries, queries + more, seed)
    np.testing.assert_allclose(run(spec, 18, feeds), oracle(spec, feeds), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("opset", [12, 13, 15, 17, 21, 23, 24])
def test_every_opset_gives_the_same(opset: int) -> None:
    spec = GroupedQueryAttention(
        8, 2, 4, 4, 0.5, causal=True, bias=True, softcap=5.0, masked_rows_are_zero=True, sinks=True
    )
    feeds = operands(spec, 2, 5, 7, 0)
    np.testing.assert_allclose(run(spec, opset, feeds), oracle(spec, feeds), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("scale", {"scale": 0.6}),
        ("causal", {"causal": False}),
        ("softcap", {"softcap": 4.0}),
        ("group", {"kv_heads": 1}),
    ],
)
def test_every_field_counts(name: str, other: dict[str, Any]) -> None:
    """Control: an oracle with one field changed is not what the function computes."""
    spec = GroupedQueryAttention(8, 2, 4, 4, 0.5, causal=True, softcap=5.0)
    feeds = operands(spec, 2, 5, 7, 0)
    changed = GroupedQueryAttention(**{**vars(spec), **other})
    wrong = {**feeds, "k": feeds["k"][:, : changed.kv_heads], "v": feeds["v"][:, : changed.kv_heads]}
    assert np.abs(run(spec, 18, feeds) - oracle(changed, wrong)).max() > 1e-2, name
