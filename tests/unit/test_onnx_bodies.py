"""What control-flow nodes read from outside, at any depth: what an input reaches is no constant."""

from __future__ import annotations

import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from rewriter.capture.constant_values import ConstantValues
from rewriter.capture.onnx_bodies import everything_read, read_in_bodies


def _branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    outputs = [oh.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)]
    return oh.make_graph(nodes, name, [], outputs)


def _nested(read: str) -> ir.Model:
    """``y = if c: (if c: -read)``, with a stored `c` and a stored `w` beside the input `x`."""
    inner = [_branch(f"inner_{i}", [oh.make_node("Neg", [read], [f"n{i}"])]) for i in range(2)]
    turn = oh.make_node("If", ["c"], ["m"], then_branch=inner[0], else_branch=inner[1])
    outer = [_branch("then", [turn]), _branch("else", [oh.make_node("Neg", ["w"], ["o"])])]
    node = oh.make_node("If", ["c"], ["y"], then_branch=outer[0], else_branch=outer[1])
    shape = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2]), oh.make_empty_tensor_value_info("y")
    stored = [
        oh.make_tensor("c", onnx.TensorProto.BOOL, [], [True]),
        oh.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0]),
    ]
    graph = oh.make_graph([node], "nested", [shape[0]], [shape[1]], stored)
    return ir.serde.deserialize_model(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8))


def test_bodies_in_bodies_are_read() -> None:
    node = _nested("x").graph.node(0)
    assert sorted(read_in_bodies(node, ())) == ["c", "w", "x"], "not what the bodies compute themselves"
    assert sorted(read_in_bodies(node, ("c",))) == ["w", "x"]
    assert sorted(everything_read(node)) == ["c", "c", "w", "x"]


def test_what_an_input_reaches_within_a_body_is_no_constant() -> None:
    with pytest.raises(KeyError):
        ConstantValues(_nested("x"), {}, {}).value("y")


def test_the_control_without_an_input_it_is_one() -> None:
    assert ConstantValues(_nested("w"), {}, {}).value("y").tolist() == [-1.0, -2.0]
