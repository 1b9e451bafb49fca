"""Files that hypothesis builds: valid ones are read, nearly valid ones refused, and nothing else comes of either.

The same ones in each run; without `derandomize` others, which is how they were looked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewriter
from rewriter.errors import InvalidModelFile, RewriteError

SIDE, FLOAT = 4, onnx.TensorProto.FLOAT
OPERATORS = {"MatMul": 2, "Add": 2, "Mul": 2, "Sub": 2, "Softmax": 1, "Transpose": 1, "Relu": 1, "Identity": 1}
"""All of which make a square matrix of square matrices."""
NAMES = st.one_of(
    st.sampled_from(["x y", "a/b.c", "../up", "\x1b[31m", "ключ", "長" * 300, "<b>", "{{ 7 }}", "%s", "'"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
)


def value(name: str) -> onnx.ValueInfoProto:
    return oh.make_tensor_value_info(name, FLOAT, [SIDE, SIDE])


@st.composite
def sound(draw: st.DrawFn) -> onnx.ModelProto:
    """A graph of matrices, with a weight, and perhaps with branches and a function."""
    names = draw(st.lists(NAMES, min_size=8, max_size=14, unique=True))
    x, weight, chosen, *rest = names
    known, nodes = [x, weight], []
    for number, name in enumerate(rest):
        kind = draw(st.sampled_from([*OPERATORS, "If", "f"]))
        reads = [draw(st.sampled_from(known)) for _ in range(OPERATORS.get(kind, 1))]
        if kind == "If":
            bodies = [
                oh.make_graph([oh.make_node(op, reads, ["inside"])], "branch", [], [value("inside")])
                for op in ("Relu", "Identity")
            ]
            node = oh.make_node("If", [chosen], [name], then_branch=bodies[0], else_branch=bodies[1])
        else:
            node = oh.make_node(kind, reads, [name], name=f"n{number}", domain="own" if kind == "f" else "")
        nodes.append(node)
        known.append(name)
    stored = [nh.from_array(np.eye(SIDE, dtype=np.float32), weight), nh.from_array(np.array(True), chosen)]
    graph = oh.make_graph(nodes, "g", [value(x)], [value(rest[-1])], stored)
    inside = [oh.make_node("Relu", ["a"], ["b"])]
    function = oh.make_function("own", "f", ["a"], ["b"], inside, [oh.make_opsetid("", 18)])
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid("own", 1)]
    return oh.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)


def _dangling(m: onnx.ModelProto, at: int) -> None:
    node = m.graph.node[at % len(m.graph.node)]
    node.input[0] = "nowhere\x1b"


def _twice(m: onnx.ModelProto, at: int) -> None:
    m.graph.node[at % len(m.graph.node)].output[0] = m.graph.input[0].name


def _cyclic(m: onnx.ModelProto, at: int) -> None:
    m.graph.node[0].op_type, m.graph.node[0].domain = "Add", ""
    del m.graph.node[0].attribute[:]
    m.graph.node[0].input[:] = [m.graph.node[-1].output[0], m.graph.node[-1].output[0]]
    m.graph.node[-1].op_type, m.graph.node[-1].domain = "Relu", ""
    del m.graph.node[-1].attribute[:]
    m.graph.node[-1].input[:] = [m.graph.node[0].output[0]]


def _in_a_body(m: onnx.ModelProto, at: int) -> None:
    body = oh.make_graph([oh.make_node("Relu", ["nowhere"], ["inside"])], "b", [], [value("inside")])
    chosen = m.graph.initializer[1].name
    m.graph.node.append(oh.make_node("If", [chosen], ["more"], then_branch=body, else_branch=body))


def _negative(m: onnx.ModelProto, at: int) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[at % 2].dim_value = -1 - at


def _short(m: onnx.ModelProto, at: int) -> None:
    m.graph.initializer[0].raw_data = m.graph.initializer[0].raw_data[: at % 64]


def _typeless(m: onnx.ModelProto, at: int) -> None:
    m.graph.initializer[0].data_type = 99 + at


BREAKS: list[Callable[[onnx.ModelProto, int], None]] = [
    _dangling, _twice, _cyclic, _in_a_body, _negative, _short, _typeless,
]  # fmt: skip


def inspected(model: onnx.ModelProto) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return rewriter.inspect(path)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(sound())
def test_sound_files_are_read(model: onnx.ModelProto) -> None:
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # sound, it says
    assert "sites" in inspected(model).to_dict()


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(sound(), st.sampled_from(BREAKS), st.integers(0, 63))
def test_broken_files_are_refused_as_such(model: onnx.ModelProto, how: Callable[..., None], at: int) -> None:
    how(model, at)
    with pytest.raises(InvalidModelFile) as error:
        inspected(model)
    assert error.value.hint and error.value.exit_code == 3


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(sound(), st.data())
def test_bytes_that_change_end_in_nothing_else(model: onnx.ModelProto, data: st.DataObject) -> None:
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        try:
            rewriter.inspect(path)
        except RewriteError as error:
            assert error.hint
