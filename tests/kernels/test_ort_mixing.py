"""Fourier mixing in the library of onnxruntime operators: beside attention, and in a whole rewritten file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from codegen.device import DType
from codegen.launch.ort_op import build, source
from codegen.ops.fourier_mixing.onnx_body import (
    DOMAIN,
    attributes,
    feature_tables,
    function,
    function_name,
    tables_attributes,
    tables_count,
    tables_function,
    tables_name,
)
from codegen.ops.fourier_mixing.reference import fourier_mixing
from codegen.spec import FourierMixing
from tests.kernels.ort_sessions import operators_run, profiled_session
from tests.kernels.problems import CAUSAL, choice, here

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

Array = NDArray[Any]
PLAIN = FourierMixing(24)
FITTED = replace(PLAIN, gain=True, bias=True)
HARTLEY = FourierMixing(24, hartley=True, bias=True)
SPECS = (PLAIN, FITTED, HARTLEY)


@pytest.fixture(scope="module")
def library(kernel_cache: Path) -> Path:
    kernels = [choice(s, DType.FLOAT32) for s in (*SPECS, CAUSAL)] + [choice(FITTED, DType.FLOAT16)]
    return build(kernels).path


def _model(spec: FourierMixing, dtype: ir.DataType) -> bytes:
    """x, gain and bias to y, through both functions as a rewritten file has them."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([None, None, None]))
    wide = ir.TensorType(ir.DataType.FLOAT)
    vectors = [ir.Value(name=n, type=wide, shape=ir.Shape([None])) for n in ("gain", "bias") if getattr(spec, n)]
    tables = [
        ir.Value(name=f"t{i}", type=wide, shape=ir.Shape(table.shape), const_value=ir.tensor(table))
        for i, table in enumerate(feature_tables(spec, dtype))
    ]
    lengths = ir.Node(DOMAIN, tables_name(spec), [x], tables_attributes(dtype), num_outputs=tables_count(spec))
    inputs = [x, *tables, *lengths.outputs, *vectors]
    node = ir.Node(DOMAIN, function_name(spec), inputs, attributes(spec, dtype), num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(dtype)
    graph = ir.Graph(
        [x, *vectors], node.outputs, nodes=[lengths, node], initializers=tables, name="g",
        opset_imports={"": 18, DOMAIN: 1},
    )  # fmt: skip
    model = ir.Model(graph, ir_version=8, functions=[function(spec, 18), tables_function(spec, 18)])
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _session(spec: FourierMixing, library: Path | None, folder: Path, dtype: Any = ir.DataType.FLOAT) -> Any:
    return profiled_session(_model(spec, dtype), library, folder)


def _feeds(spec: FourierMixing, batch: int, tokens: int, dtype: Any = np.float32) -> dict[str, Array]:
    random = np.random.default_rng(tokens)
    feeds = {"x": random.standard_normal((batch, tokens, spec.hidden)).astype(dtype)}
    vectors = {n: random.standard_normal(spec.hidden).astype(np.float32) for n in ("gain", "bias")}
    return feeds | {name: vector for name, vector in vectors.items() if getattr(spec, name)}


def _oracle(spec: FourierMixing, feeds: dict[str, Array]) -> Array:
    return fourier_mixing(spec, feeds["x"], feeds.get("gain"), feeds.get("bias"))


@pytest.mark.parametrize("spec", SPECS, ids=function_name)
def test_with_the_library_the_kernel_runs_and_without_it_the_function(
    spec: FourierMixing, library: Path, tmp_path: Path
) -> None:
    plain, fast = _session(spec, None, tmp_path), _session(spec, library, tmp_path)
    for batch, tokens in ((1, 1), (3, 7), (1, 60), (5, 33)):
        feeds = _feeds(spec, batch, tokens)
        right = _oracle(spec, feeds)
        for session in (plain, fast):
            np.testing.assert_allclose(session.run(None, feeds)[0], right, rtol=1e-4, atol=2e-4)
        wrong = {**feeds, "x": feeds["x"][:, ::-1] + 0.01}  # control
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(fast.run(None, wrong)[0], right, rtol=1e-4, atol=2e-4)
    assert function_name(spec) in operators_run(fast)
    assert function_name(spec) not in operators_run(plain)


def test_half_precision_and_no_tokens(library: Path, tmp_path: Path) -> None:
    session = _session(FITTED, library, tmp_path, ir.DataType.FLOAT16)
    feeds = _feeds(FITTED, 2, 40, np.float16)
    found = session.run(None, feeds)[0]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float64), _oracle(FITTED, feeds), rtol=2e-3, atol=2e-2)
    assert session.run(None, {**feeds, "x": feeds["x"][:0]})[0].shape == (0, 40, 24)


def test_what_the_library_lacks_is_said(library: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rewriter kernels"):
        _session(replace(PLAIN, hidden=26), library, tmp_path)
    session = _session(FITTED, library, tmp_path)
    with pytest.raises(Exception, match="contradict"):
        session.run(None, {**_feeds(FITTED, 2, 8), "gain": np.ones(23, np.float32)})


def test_the_source_holds_what_is_needed_and_no_more() -> None:
    text = source([choice(PLAIN, DType.FLOAT32)])
    assert "namespace mixing" in text and "namespace attention" not in text
    assert "namespace mixing" not in source([choice(CAUSAL, DType.FLOAT32)])
