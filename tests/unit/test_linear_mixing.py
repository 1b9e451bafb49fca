"""Linear, circulant and Toeplitz mixing: torch and ONNX bodies against the float64 oracle, over lengths and opsets."""

from __future__ import annotations

from dataclasses import replace
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

from codegen.ops.linear_mixing import torch_body
from codegen.ops.linear_mixing.onnx_body import DOMAIN, attributes, function, function_name, longest
from codegen.ops.linear_mixing.reference import linear_mixing as oracle
from codegen.ops.linear_mixing.reference import matrix
from codegen.ops.token_mixing import from_json, to_json, token_mixing
from codegen.spec import FourierMixing, LinearMixing, Structure

Array = NDArray[Any]
CLOSE = 3e-6
"""Largest difference in float32, relative to the largest number of the oracle's answer."""

STRUCTURES = [pytest.param(s, id=s.value) for s in Structure]


@st.composite
def problems(draw: st.DrawFn) -> tuple[LinearMixing, int, int]:
    """(spec, batch, length)"""
    tokens = draw(st.integers(1, 40))
    spec = LinearMixing(
        hidden=draw(st.integers(1, 30)),
        tokens=tokens,
        structure=draw(st.sampled_from(Structure)),
        bias=draw(st.booleans()),
    )
    return spec, draw(st.integers(1, 3)), draw(st.one_of(st.just(tokens), st.integers(1, tokens)))


def operands(spec: LinearMixing, batch: int, length: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (batch, length, spec.hidden), **spec.shapes}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tensors(feeds: dict[str, Array], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(dtype) for name, array in feeds.items()}


def distance(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


# ------------------------------------------------------------------ the oracle itself


def test_structures_are_the_usual_ones() -> None:
    """As scipy's circulant(c) and toeplitz(column, row) write them."""
    c = np.array([1, 2, 3])
    assert np.array_equal(matrix(Structure.CIRCULANT, c), [[1, 3, 2], [2, 1, 3], [3, 2, 1]])
    v = np.array([1, 2, 3, 4, 5])
    assert np.array_equal(matrix(Structure.TOEPLITZ, v), [[3, 4, 5], [2, 3, 4], [1, 2, 3]])
    around = np.array([3, 2, 1, 3, 2])
    assert np.array_equal(matrix(Structure.TOEPLITZ, around), matrix(Structure.CIRCULANT, c))


def test_circulant_mixing_is_a_convolution_on_a_circle() -> None:
    spec = LinearMixing(5, 7, Structure.CIRCULANT)
    feeds = operands(spec, 1, 7)
    kernel = np.fft.fft2(np.outer(feeds["sequence"], feeds["features"]))
    expected = np.fft.ifft2(np.fft.fft2(feeds["x"][0]) * kernel).real
    assert distance(oracle(spec, **feeds)[0], expected) < 1e-6


def test_a_shorter_sequence_uses_the_first_rows_and_columns() -> None:
    """Toeplitz mixing of a prefix is that of the sequence with zeros behind it; dense mixing too."""
    for structure in Structure:
        spec = LinearMixing(4, 9, structure)
        feeds = operands(spec, 2, 5)
        padded = np.concatenate([feeds["x"], np.zeros((2, 4, 4), np.float32)], axis=1)
        whole = oracle(spec, **feeds | {"x": padded})
        assert distance(oracle(spec, **feeds), whole[:, :5]) < 1e-12


def test_broken_specs_and_operands_are_refused() -> None:
    for wrong in ({"hidden": 0}, {"tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LinearMixing(**{"hidden": 4, "tokens": 4, **wrong})
    spec = LinearMixing(4, 6, Structure.TOEPLITZ)
    feeds = operands(spec, 1, 6)
    long = operands(LinearMixing(4, 7), 1, 7)["x"]
    for broken, reason in (
        (feeds | {"bias": feeds["x"][0, 0]}, "contradict"),
        (feeds | {"sequence": feeds["sequence"][1:]}, "contradict"),
        (feeds | {"x": feeds["x"][0]}, "contradicts"),
        (feeds | {"x": long}, "7 tokens is longer than the mixing matrix, which has 6"),
    ):
        with pytest.raises(ValueError, match=reason):
            oracle(spec, **broken)
        with pytest.raises(ValueError, match=reason):
            torch_body.linear_mixing(spec, **tensors(broken))


def test_a_spec_survives_json() -> None:
    for spec in (LinearMixing(8, 16, Structure.TOEPLITZ, bias=True), FourierMixing(8, hartley=True)):
        assert from_json(to_json(spec)) == spec
    with pytest.raises(ValueError, match="diagonal"):
        from_json({"hidden": 8, "tokens": 4, "structure": "diagonal", "bias": False})
    x = operands(LinearMixing(8, 4), 1, 4)["x"]
    assert token_mixing(FourierMixing(8), x).shape == x.shape


def test_costs_and_sizes() -> None:
    spec = LinearMixing(8, 16)
    assert spec.flops(2, 10) == 2 * 2 * 10 * 8 * (10 + 8)
    sizes = {s: replace(spec, structure=s, bias=True).shapes for s in Structure}
    assert sizes[Structure.DENSE] == {"sequence": (16, 16), "features": (8, 8), "bias": (8,)}
    assert sizes[Structure.CIRCULANT]["sequence"] == (16,) and sizes[Structure.TOEPLITZ]["features"] == (15,)


# ------------------------------------------------------------------ torch


@given(problem=problems(), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_torch_bodies_equal_the_oracle(problem: tuple[LinearMixing, int, int], seed: int) -> None:
    spec, batch, length = problem
    feeds = operands(spec, batch, length, seed)
    expected = oracle(spec, **feeds)
    given_ = tensors(feeds)
    assert distance(torch_body.linear_mixing(spec, **given_).numpy(), expected) < CLOSE
    bias = given_.pop("bias", torch.zeros(()))
    found = torch_body.by_matrices(spec, **given_) + bias
    assert distance(found.numpy(), expected) < CLOSE
    if spec.structure is Structure.CIRCULANT and length == spec.tokens:
        assert distance((torch_body.by_transform(spec, **given_) + bias).numpy(), expected) < CLOSE
    turned = oracle(spec, **feeds | {"x": np.roll(feeds["x"], 1, axis=1)})
    if distance(turned, expected) > 1e-3:  # the control: one token moved is seen
        assert distance(found.numpy(), turned) > 1e-4


@pytest.mark.parametrize("length", [6, 4])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_are_those_of_finite_differences(structure: Structure, length: int) -> None:
    spec = LinearMixing(3, 6, structure, bias=True)
    feeds = {name: t.requires_grad_() for name, t in tensors(operands(spec, 2, length), torch.float64).items()}

    def call(*given_: torch.Tensor) -> torch.Tensor:
        return torch_body.linear_mixing(spec, **dict(zip(feeds, given_, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(feeds.values()))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_captured_graph_takes_any_length_up_to_the_longest(structure: Structure) -> None:
    spec = LinearMixing(6, 24, structure)
    feeds = operands(spec, 2, 10)
    parameters = {name: t for name, t in tensors(feeds).items() if name != "x"}

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_body.linear_mixing(spec, x, **parameters)

    tokens = torch.export.Dim("tokens", min=2, max=24)
    program = torch.export.export(Block(), (torch.from_numpy(feeds["x"]),), dynamic_shapes=({1: tokens},))
    for length in (10, 17, 24):
        x = operands(spec, 2, length)["x"]
        found = program.module()(torch.from_numpy(x)).detach().numpy()
        assert distance(found, oracle(spec, **feeds | {"x": x})) < CLOSE


# ------------------------------------------------------------------ ONNX


def model(spec: LinearMixing, opset: int, dtype: ir.DataType = ir.DataType.FLOAT) -> bytes:
    """One call of the function, on x of any size; parameters are inputs."""

    def value(name: str, shape: tuple[Any, ...]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    x = value("x", (None, None, spec.hidden))
    held = [value(name, shape) for name, shape in spec.shapes.items()]
    node = ir.Node(DOMAIN, function_name(spec), [x, *held], attributes(spec), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(dtype), ir.Shape([None, None, spec.hidden])
    opsets = {"": opset, DOMAIN: 1}
    graph = ir.Graph([x, *held], [output], nodes=[node], name="g", opset_imports=opsets)
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=8, functions=[function(spec, opset)]))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def run(content: bytes, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 21, 24])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_function_equals_the_oracle_at_every_opset(structure: Structure, opset: int) -> None:
    spec = LinearMixing(10, 33, structure, bias=True)
    content = model(spec, opset)
    for length in (1, 2, 16, 32, 33):
        feeds = operands(spec, 2, length)
        expected = oracle(spec, **feeds)
        assert distance(run(content, feeds), expected) < CLOSE
        moved = feeds | {"sequence": np.roll(feeds["sequence"], 1)}
        assert distance(run(content, moved), expected) > 1e-3  # the control


@given(problem=problems(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_function_equals_the_oracle_at_any_size(problem: tuple[LinearMixing, int, int], seed: int) -> None:
    spec, batch, length = problem
    feeds = operands(spec, batch, length, seed)
    assert distance(run(model(spec, 17), feeds), oracle(spec, **feeds)) < CLOSE


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_file_says_that_a_sequence_is_too_long(structure: Structure) -> None:
    """By an error, for any excess, in which the node that is named after the limit stands."""
    spec = LinearMixing(4, 8, structure)
    content = model(spec, 17)
    for length in (9, 12, 40):
        x = operands(LinearMixing(4, 40), 1, length)["x"]
        with pytest.raises(Exception, match=longest(spec)):
            run(content, operands(spec, 1, 8) | {"x": x})


def test_the_portable_evaluator_agrees() -> None:
    from onnx.reference import ReferenceEvaluator

    for structure in Structure:
        spec = LinearMixing(6, 9, structure, bias=True)
        feeds = operands(spec, 2, 7)
        found = ReferenceEvaluator(onnx.load_from_string(model(spec, 18))).run(None, feeds)[0]
        assert distance(np.asarray(found), oracle(spec, **feeds)) < CLOSE


def test_names_differ_where_specs_do() -> None:
    base = LinearMixing(8, 16)
    others = [replace(base, tokens=32), replace(base, bias=True), replace(base, structure=Structure.TOEPLITZ)]
    assert len({function_name(spec) for spec in (base, *others)}) == 4
    assert function_name(others[1]).startswith("LinearMixingBias_")
