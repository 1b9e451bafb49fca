"""The library of onnxruntime operators replaces a file's functions, computes the same, and names what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from codegen.device import Device, DType, Isa, host
from codegen.errors import NotLegal
from codegen.launch.ort_op import build, source
from codegen.ops.grouped_query_attention.onnx_body import DOMAIN, attributes, function_name
from codegen.ops.grouped_query_attention.onnx_tiles import functions
from codegen.ops.grouped_query_attention.reference import grouped_query_attention
from codegen.registry import Choice
from codegen.sight import Sight
from codegen.spec import GroupedQueryAttention
from tests.kernels.ort_sessions import operators_run, profiled_session
from tests.kernels.problems import choice, here

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

Array = NDArray[Any]

CAUSAL = GroupedQueryAttention(8, 2, 16, 16, 0.25, causal=True)
OTHER_HEADS = replace(CAUSAL, heads=4)
EVERYTHING = GroupedQueryAttention(
    8, 2, 4, 6, 0.5, causal=True, bias=True, softcap=5.0, masked_rows_are_zero=True, sinks=True
)
SPECS = (CAUSAL, OTHER_HEADS, EVERYTHING)

WINDOW = replace(CAUSAL, pattern=(Sight(reach=9, sinks=2, ordered=True),))
OTHER_WINDOW = replace(CAUSAL, pattern=(Sight(reach=7, sinks=2, ordered=True),))
BY_HEAD = replace(
    CAUSAL, bias=True, pattern=tuple(Sight(block=8, period=8, first=f, last=f + 2, ordered=True) for f in (4, 6))
)
SPARSE = (WINDOW, OTHER_WINDOW, BY_HEAD)


@pytest.fixture(scope="module")
def library(kernel_cache: Path) -> Path:
    return build([choice(s, DType.FLOAT32) for s in SPECS] + [choice(CAUSAL, DType.FLOAT16)]).path


@pytest.fixture(scope="module")
def sparse_library(kernel_cache: Path) -> Path:
    return build([choice(s, DType.FLOAT32) for s in SPARSE]).path


def _model(spec: GroupedQueryAttention, dtype: ir.DataType) -> bytes:
    made = functions(spec, 18)
    names = ["q", "k", "v"] + ["bias"] * spec.bias + ["sinks"] * spec.sinks
    inputs = [ir.Value(name=n, type=ir.TensorType(dtype), shape=ir.Shape([None] * 4)) for n in names]
    node = ir.Node(DOMAIN, made[0].name, inputs, attributes(spec, dtype), num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(dtype)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], name="g", opset_imports={"": 18, DOMAIN: 1})
    model = ir.Model(graph, ir_version=8, functions=made)
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _session(spec: GroupedQueryAttention, library: Path | None, folder: Path, dtype: Any = ir.DataType.FLOAT) -> Any:
    return profiled_session(_model(spec, dtype), library, folder)


def _feeds(spec: GroupedQueryAttention, queries: int, keys: int, dtype: Any = np.float32) -> dict[str, Array]:
    random = np.random.default_rng(queries + keys)
    shapes: dict[str, Sequence[int]] = {
        "q": (2, spec.heads, queries, spec.head_dim),
        "k": (2, spec.kv_heads, keys, spec.head_dim),
        "v": (2, spec.kv_heads, keys, spec.value_dim),
    }
    if spec.bias:
        shapes["bias"] = (1, 1, queries, keys)
    if spec.sinks:
        shapes["sinks"] = (2, spec.heads, queries, 1)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _oracle(spec: GroupedQueryAttention, feeds: dict[str, Array]) -> Array:
    return grouped_query_attention(spec, feeds["q"], feeds["k"], feeds["v"], feeds.get("bias"), feeds.get("sinks"))


@pytest.mark.parametrize("spec", SPECS, ids=function_name)
def test_with_the_library_the_kernel_runs_and_without_it_the_function(
    spec: GroupedQueryAttention, library: Path, tmp_path: Path
) -> None:
    plain, fast = _session(spec, None, tmp_path), _session(spec, library, tmp_path)
    for queries, keys in ((1, 1), (5, 7), (1, 3000), (100, 150)):
        feeds = _feeds(spec, queries, keys)
        right = _oracle(spec, feeds)
        for session in (plain, fast):
            np.testing.assert_allclose(session.run(None, feeds)[0], right, rtol=2e-5, atol=3e-6)
        wrong = {**feeds, "v": feeds["v"] * 1.001}  # control
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(fast.run(None, wrong)[0], right, rtol=2e-5, atol=3e-6)
    assert operators_run(fast) == {function_name(spec)}
    assert "MatMul" in operators_run(plain)


@pytest.mark.parametrize("spec", SPARSE, ids=["window", "other window", "by head"])
def test_sparse_patterns_are_told_apart_by_their_numbers(
    spec: GroupedQueryAttention, sparse_library: Path, tmp_path: Path
) -> None:
    session = _session(spec, sparse_library, tmp_path)
    for queries, keys in ((1, 1), (5, 7), (1, 300), (150, 150)):
        feeds = _feeds(spec, queries, keys)
        found = session.run(None, feeds)[0]
        np.testing.assert_allclose(found, _oracle(spec, feeds), rtol=2e-5, atol=3e-6)
    other = OTHER_WINDOW if spec is WINDOW else replace(spec, pattern=WINDOW.pattern)
    assert np.abs(found - _oracle(other, feeds)).max() > 1e-2  # the control
    (name,) = operators_run(session)
    assert name.startswith(function_name(spec)), "one operator, under the name of the function that chooses"


def test_a_pattern_that_the_library_lacks_is_said(sparse_library: Path, tmp_path: Path) -> None:
    (sight,) = WINDOW.pattern
    with pytest.raises(Exception, match=r"in this pattern.*rewriter kernels"):
        _session(replace(WINDOW, pattern=(replace(sight, reach=8),)), sparse_library, tmp_path)
    with pytest.raises(Exception, match=r"in this pattern.*rewriter kernels"):
        _session(replace(BY_HEAD, pattern=(*BY_HEAD.pattern, *BY_HEAD.pattern)), sparse_library, tmp_path)


def test_half_precision(library: Path, tmp_path: Path) -> None:
    session = _session(CAUSAL, library, tmp_path, ir.DataType.FLOAT16)
    feeds = _feeds(CAUSAL, 5, 40, np.float16)
    found = session.run(None, feeds)[0]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float64), _oracle(CAUSAL, feeds), rtol=2e-3, atol=2e-3)


def test_no_rows_no_keys(library: Path, tmp_path: Path) -> None:
    session = _session(EVERYTHING, library, tmp_path)
    assert session.run(None, _feeds(EVERYTHING, 0, 4))[0].shape == (2, 8, 0, 6)
    assert (session.run(None, _feeds(EVERYTHING, 2, 0))[0] == 0).all()


@pytest.mark.parametrize(
    ("change", "when"), [({"heads": 16}, "made"), ({"scale": 0.3}, "made"), ({"head_dim": 24}, "run")]
)
def test_what_the_library_lacks_is_said(change: dict[str, Any], when: str, library: Path, tmp_path: Path) -> None:
    spec = replace(CAUSAL, **change)
    if when == "made":
        with pytest.raises(Exception, match="rewriter kernels"):
            _session(spec, library, tmp_path)
        return
    session = _session(spec, library, tmp_path)
    with pytest.raises(Exception, match="rewriter kernels"):
        session.run(None, _feeds(spec, 3, 3))


def test_operands_that_contradict_the_attributes_are_an_error(library: Path, tmp_path: Path) -> None:
    session = _session(EVERYTHING, library, tmp_path)
    feeds = _feeds(EVERYTHING, 3, 5)
    with pytest.raises(Exception, match="contradict"):
        session.run(None, {**feeds, "v": feeds["v"][:, :, :4]})
    with pytest.raises(Exception, match="broadcast"):
        session.run(None, {**feeds, "bias": feeds["bias"][..., :4]})


def test_two_sessions_share_one_registration(library: Path, tmp_path: Path) -> None:
    sessions = [_session(spec, library, tmp_path) for spec in (CAUSAL, OTHER_HEADS, CAUSAL)]
    feeds = _feeds(CAUSAL, 4, 4)
    np.testing.assert_array_equal(sessions[0].run(None, feeds)[0], sessions[2].run(None, feeds)[0])


def test_one_library_is_for_one_processor() -> None:
    made = choice(CAUSAL, DType.FLOAT32)
    other = next(isa for isa in Isa if isa.value != host().arch)
    with pytest.raises(NotLegal, match="one instruction set"):
        build([made, replace(made, device=Device("cpu", other.value))])
    with pytest.raises(NotLegal):
        source([])


def test_the_source_names_each_kernel_and_operator() -> None:
    choices: list[Choice] = [choice(s, DType.FLOAT32) for s in SPECS]
    text = source(choices)
    assert all(text.count(f"{c.name}_work") == 2 for c in choices)
    assert text.count("make_op(") == 3, "the operators, and the function that makes them"
