"""Fourier and Hartley mixing: torch and ONNX bodies against the float64 oracle, over lengths, widths and opsets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codegen.ops.fourier_mixing import torch_body
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
from codegen.ops.fourier_mixing.reference import fourier_mixing as oracle
from codegen.ops.function_body import computed_in
from codegen.spec import FourierMixing
from tests.covering import covering

Array = NDArray[Any]
CLOSE = 2e-6
"""Largest difference in float32, relative to the largest number of the oracle's answer."""

LENGTHS = [1, 2, 3, 7, 12, 16, 31, 36, 96, 97, 127]
"""Odd, even, prime, square and composite."""


@st.composite
def problems(draw: st.DrawFn) -> tuple[FourierMixing, int, int]:
    """(spec, batch, length)"""
    spec = FourierMixing(
        hidden=draw(st.integers(1, 40)),
        hartley=draw(st.booleans()),
        gain=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    return spec, draw(st.integers(1, 3)), draw(st.integers(1, 70))


def operands(spec: FourierMixing, batch: int, length: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found = {"x": rng.standard_normal((batch, length, spec.hidden))}
    found |= {name: rng.standard_normal(spec.hidden) for name in ("gain", "bias") if getattr(spec, name)}
    return {name: a.astype(np.float32) for name, a in found.items()}


def distance(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


# ------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize("hartley", [False, True], ids=["fourier", "hartley"])
def test_the_oracle_is_the_papers_sum(hartley: bool) -> None:
    """Written out: sum over s, d of x[s, d] cos(t), or of x[s, d] (cos(t) + sin(t)), t = 2 pi (k s / S + e d / D)."""
    spec, s, d = FourierMixing(6, hartley=hartley), 5, 6
    x = operands(spec, 1, s)["x"]
    expected = np.zeros((1, s, d))
    for k in range(s):
        for e in range(d):
            turn = 2 * math.pi * (k * np.arange(s)[:, None] / s + e * np.arange(d)[None] / d)
            wave = np.cos(turn) + np.sin(turn) if hartley else np.cos(turn)
            expected[0, k, e] = (x[0] * wave).sum()
    assert distance(oracle(spec, x), expected) < 1e-12


def test_the_hartley_transform_is_its_own_inverse() -> None:
    """The fully two-dimensional one, up to S · D: a property that the Fourier transform's real part lacks."""
    x = operands(FourierMixing(6), 2, 9)["x"]
    for spec, inverse in ((FourierMixing(6, hartley=True), True), (FourierMixing(6), False)):
        twice = oracle(spec, oracle(spec, x)) / (9 * 6)
        assert (distance(twice, x.astype(np.float64)) < 1e-12) is inverse


def test_operands_must_fit_the_spec() -> None:
    x = operands(FourierMixing(6), 1, 4)["x"]
    for spec, more in (
        (FourierMixing(5), {}),
        (FourierMixing(6, gain=True), {}),
        (FourierMixing(6), {"bias": x[0, 0]}),
    ):
        with pytest.raises(ValueError, match=r"contradicts|must be given"):
            oracle(spec, x, **more)
        with pytest.raises(ValueError, match=r"contradicts|must be given"):
            torch_body.fourier_mixing(spec, torch.from_numpy(x), **{k: torch.from_numpy(v) for k, v in more.items()})
    with pytest.raises(ValueError, match="hidden"):
        FourierMixing(0)


# ------------------------------------------------------------------ torch


@given(problem=problems(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_torch_bodies_equal_the_oracle(problem: tuple[FourierMixing, int, int], seed: int) -> None:
    spec, batch, length = problem
    given_ = operands(spec, batch, length, seed)
    expected = oracle(spec, **given_)
    plain = FourierMixing(spec.hidden, hartley=spec.hartley)
    x = torch.from_numpy(given_["x"])
    tensors = {name: torch.from_numpy(array) for name, array in given_.items()}
    whole = torch_body.fourier_mixing(spec, **tensors)
    assert distance(whole.numpy(), expected) < CLOSE
    for body in (torch_body.by_fast_transform, torch_body.by_matrices):
        found = body(plain, x).numpy()
        assert distance(found, oracle(plain, given_["x"])) < CLOSE
        if length > 1 and np.abs(given_["x"]).max() > 0.1:  # the control: one token moved is seen
            moved = x.roll(1, dims=1)
            if not torch.equal(moved, x):
                assert distance(body(plain, moved).numpy(), oracle(plain, given_["x"])) > 1e-3


@pytest.mark.parametrize("hartley", [False, True], ids=["fourier", "hartley"])
def test_gradients_are_those_of_finite_differences(hartley: bool) -> None:
    spec = FourierMixing(5, hartley=hartley, gain=True, bias=True)
    x, gain, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 6, 5), (5,), (5,)))
    assert torch.autograd.gradcheck(lambda *a: torch_body.fourier_mixing(spec, *a), (x, gain, bias))
    assert torch.autograd.gradcheck(lambda a: torch_body.by_matrices(spec, a), (x,))


def test_tables_that_inference_kept_serve_training() -> None:
    spec = FourierMixing(11)
    torch_body._kept_tables.cache_clear()
    with torch.inference_mode():
        torch_body.by_matrices(spec, torch.randn(1, 13, 11))
    x = torch.randn(1, 13, 11, requires_grad=True)
    torch_body.by_matrices(spec, x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precisions_are_computed_wide(dtype: torch.dtype) -> None:
    spec = FourierMixing(24)
    x = torch.from_numpy(operands(spec, 2, 30)["x"]).to(dtype)
    found = torch_body.fourier_mixing(spec, x)
    assert found.dtype == dtype
    expected = torch.from_numpy(oracle(spec, x.float().numpy())).to(dtype)
    assert torch.equal(found, expected) or distance(found.float().numpy(), expected.float().numpy()) < 1e-2


def test_a_captured_graph_has_no_complex_numbers_and_any_length() -> None:
    spec = FourierMixing(12, hartley=True)

    class Mixer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_body.fourier_mixing(spec, x)

    x = torch.from_numpy(operands(spec, 2, 10)["x"])
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Mixer(), (x,), dynamic_shapes=({1: tokens},))
    assert not any(
        n.meta["val"].is_complex() for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)
    )
    for length in (10, 17, 64):
        given_ = operands(spec, 2, length)["x"]
        assert distance(program.module()(torch.from_numpy(given_)).numpy(), oracle(spec, given_)) < CLOSE


# ------------------------------------------------------------------ ONNX


def model(spec: FourierMixing, opset: int, *, sizes: tuple[int, int] | None = None, perturbed: bool = False) -> bytes:
    """One call of the function on x of any size, or of a fixed (batch, length)."""
    dtype = ir.DataType.FLOAT
    batch, tokens = sizes or (None, None)
    tables_ = list(feature_tables(spec, dtype))
    if perturbed:
        tables_[1] = np.ascontiguousarray(np.roll(tables_[1], 1, axis=1))
    names = ["gain"] * spec.gain + ["bias"] * spec.bias
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([batch, tokens, spec.hidden]))
    vectors = [ir.Value(name=n, type=ir.TensorType(dtype), shape=ir.Shape([spec.hidden])) for n in names]
    held = [
        ir.Value(name=f"table{i}", type=ir.TensorType(dtype), shape=ir.Shape(t.shape), const_value=ir.tensor(t))
        for i, t in enumerate(tables_)
    ]
    tables = ir.Node(DOMAIN, tables_name(spec), [x], tables_attributes(dtype), num_outputs=tables_count(spec))
    given_ = [x, *held, *tables.outputs, *vectors]
    node = ir.Node(DOMAIN, function_name(spec), given_, attributes(spec, dtype), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(dtype), ir.Shape([batch, tokens, spec.hidden])
    opsets = {"": opset, DOMAIN: 1}
    graph = ir.Graph([x, *vectors], [output], nodes=[tables, node], name="g", opset_imports=opsets, initializers=held)
    functions = [function(spec, opset), tables_function(spec, opset)]
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=8, functions=functions))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def run(content: bytes, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(("kind", "opset"), covering(("fourier", "hartley"), (12, 13, 17, 18, 21, 23, 24)))
def test_the_function_equals_the_oracle_at_every_opset(opset: int, kind: str) -> None:
    spec = FourierMixing(10, hartley=kind == "hartley", gain=True, bias=True)
    content, wrong = model(spec, opset), model(spec, opset, perturbed=True)
    for length in LENGTHS:
        feeds = operands(spec, 2, length)
        expected = oracle(spec, **feeds)
        assert distance(run(content, feeds), expected) < CLOSE
        assert distance(run(wrong, feeds), expected) > 1e-3  # the control


@given(problem=problems(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_function_equals_the_oracle_at_any_size(problem: tuple[FourierMixing, int, int], seed: int) -> None:
    spec, batch, length = problem
    feeds = operands(spec, batch, length, seed)
    assert distance(run(model(spec, 17), feeds), oracle(spec, **feeds)) < CLOSE


def test_a_long_sequence_keeps_its_precision() -> None:
    spec = FourierMixing(8)
    content = model(spec, 18)
    for length in (4093, 4096):
        feeds = operands(spec, 1, length)
        assert distance(run(content, feeds), oracle(spec, **feeds)) < CLOSE


def test_fixed_sizes_are_folded_into_constants() -> None:
    """Where the file says them, onnxruntime computes no cosine when it runs."""
    spec = FourierMixing(12)
    for sizes, folded in (((2, 48), True), (None, False)):
        assert _computes_cosines(model(spec, 18, sizes=sizes)) is not folded


def _computes_cosines(content: bytes) -> bool:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return any(n.op_type == "Cos" for n in onnx.load(options.optimized_model_filepath).graph.node)


def test_the_portable_evaluator_agrees() -> None:
    from onnx.reference import ReferenceEvaluator

    spec = FourierMixing(6, bias=True)
    feeds = operands(spec, 2, 12)
    found = ReferenceEvaluator(onnx.load_from_string(model(spec, 18))).run(None, feeds)[0]
    assert distance(np.asarray(found), oracle(spec, **feeds)) < CLOSE


def test_names_say_what_the_body_has() -> None:
    assert function_name(FourierMixing(8)) == "FourierMixing"
    assert function_name(FourierMixing(8, hartley=True, gain=True, bias=True)) == "HartleyMixingGainBias"
    assert computed_in(ir.DataType.FLOAT16) == ir.DataType.FLOAT
    assert FourierMixing(8).flops(2, 64) == round(2.5 * 2 * 64 * 8 * 9)
