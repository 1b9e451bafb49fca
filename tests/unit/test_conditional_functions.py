"""Conditional computation as ONNX functions: in onnxruntime, at old and new opsets, against the float64 oracles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from codegen.conditional import ConditionalAttention, ConditionalFeedForward, Router
from codegen.ops.conditional_attention import onnx_body as attention
from codegen.ops.conditional_attention.reference import conditional_attention
from codegen.ops.conditional_feed_forward import onnx_body as block
from codegen.ops.conditional_feed_forward.reference import conditional_feed_forward
from codegen.ops.conditional_routing.onnx_body import DOMAIN, attributes, stored_as
from codegen.spec import Activation

BLOCK = ConditionalFeedForward(12, 6, 20, Router(1 / 4), Activation.SILU, up_bias=True, down_bias=True)
ATTENTION = ConditionalAttention(
    12, 4, 1, 3, queries=Router(1 / 4), keys=Router(1 / 2), radius=3, buckets=8, farthest=6, bias=True, output_bias=True
)
Conditional = ConditionalFeedForward | ConditionalAttention


def model(spec: Conditional, opset: int, *, masked: bool, dtype: ir.DataType = ir.DataType.FLOAT) -> bytes:
    """One call of the function, on x of any size; parameters are inputs."""

    def value(name: str, shape: tuple[Any, ...], kind: ir.DataType) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))

    if isinstance(spec, ConditionalAttention):
        function = attention.function(spec, opset, masked=masked)
    else:
        function = block.function(spec, opset)
    given = [value("x", (None, None, spec.hidden), dtype)]
    given += [value("mask", (None, None), ir.DataType.BOOL)] if masked else []
    given += [value(name, shape, stored_as(name, dtype)) for name, shape in spec.shapes.items()]
    node = ir.Node(DOMAIN, function.name, given, attributes(dtype), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(dtype), ir.Shape([None, None, spec.hidden])
    graph = ir.Graph(given, [output], nodes=[node], name="g", opset_imports={"": opset, DOMAIN: 1})
    proto = ir.to_proto(ir.Model(graph, ir_version=8, functions=[function]))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def session(content: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def expected(spec: Conditional, feeds: dict[str, Any], shown: Any) -> Any:
    held = {name: feeds[name] for name in spec.shapes}
    if isinstance(spec, ConditionalAttention):
        return conditional_attention(spec, feeds["x"], shown, soft=False, **held)
    return conditional_feed_forward(spec, feeds["x"], soft=False, **held)


@pytest.mark.parametrize("opset", [12, 17, 21])
@pytest.mark.parametrize(
    ("spec", "masked"),
    [
        pytest.param(BLOCK, False, id="block"),
        pytest.param(replace(BLOCK, gated=False, up_bias=False, down_bias=False), False, id="plain-block"),
        pytest.param(ATTENTION, True, id="attention-padded"),
        pytest.param(replace(ATTENTION, buckets=0, bias=False, output_bias=False, radius=0), False, id="attention"),
    ],
)
def test_the_function_is_the_oracle(spec: Conditional, masked: bool, opset: int) -> None:
    run = session(model(spec, opset, masked=masked))
    random = np.random.default_rng(opset)
    for tokens in (1, 7, 16, 24):
        feeds = {name: random.normal(size=shape).astype(np.float32) * 0.5 for name, shape in spec.shapes.items()}
        feeds["x"] = random.normal(size=(2, tokens, spec.hidden)).astype(np.float32)
        shown = np.arange(tokens) < np.array([[tokens], [(tokens + 2) // 3]])
        given = feeds | ({"mask": shown} if masked else {})
        found = run.run(None, given)[0]
        wanted = expected(spec, feeds, shown if masked else None)
        limit = 1e-5 * np.abs(wanted).max()
        assert np.abs(found - wanted).max() < limit, tokens
        if tokens > 7:  # controls: a parameter, and the mask
            changed = feeds | {name: -feeds[name] for name in feeds if name.endswith("router")}
            assert np.abs(expected(spec, changed, shown if masked else None) - found).max() > 100 * limit
            assert not masked or np.abs(expected(spec, feeds, None) - found).max() > 100 * limit


def test_one_mask_serves_all_sequences() -> None:
    run = session(model(ATTENTION, 17, masked=True))
    random = np.random.default_rng(0)
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in ATTENTION.shapes.items()}
    feeds["x"] = random.normal(size=(2, 9, 12)).astype(np.float32)
    one = (np.arange(9) < 6)[None]
    whole = run.run(None, feeds | {"mask": np.repeat(one, 2, axis=0)})[0]
    assert np.array_equal(run.run(None, feeds | {"mask": one})[0], whole)
    assert not np.array_equal(run.run(None, feeds | {"mask": np.ones((1, 9), bool)})[0], whole)


def test_halves_are_computed_in_halves_but_for_routers_and_softmaxes() -> None:
    for spec, masked in ((BLOCK, False), (ATTENTION, False)):
        run = session(model(spec, 17, masked=masked, dtype=ir.DataType.FLOAT16))
        random = np.random.default_rng(5)
        feeds = {name: random.normal(size=shape) * 0.3 for name, shape in spec.shapes.items()}
        feeds["x"] = random.normal(size=(2, 12, 12)).astype(np.float16)
        typed = {n: a if n == "x" else a.astype(stored_as(n, ir.DataType.FLOAT16).numpy()) for n, a in feeds.items()}
        found = run.run(None, typed)[0]
        wanted = expected(spec, typed, None)
        assert found.dtype == np.float16 and np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()
        assert np.abs(found - wanted).max() > 1e-5 * np.abs(wanted).max()  # the control: they are halves
