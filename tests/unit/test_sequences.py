"""Sequences of tensors in files: each way to take a tensor out of one denotes what onnxruntime computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.dataflow import Flow
from passes.forms import Opaque
from passes.provenance import Tracer
from rewriter.capture import onnx_file, onnx_load

BATCH, TOKENS, WIDTH, FEATURES = 2, 3, 5, 12


class Graph:
    """x [B, T, WIDTH] to y [B, T, FEATURES], and what `body` makes of y, into a softmax."""

    def __init__(self, body: Callable[[Graph], str]) -> None:
        self.nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        weight = np.random.default_rng(0).standard_normal((WIDTH, FEATURES)).astype(np.float32)
        self.constants = [numpy_helper.from_array(weight, "w")]
        self.value = body(self)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attrs: int) -> list[str]:
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attrs))
        return names

    def number(self, numbers: int | list[int]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def at(self, sequence: str, position: int) -> str:
        return self.op("SequenceAt", sequence, self.number(position))[0]

    def flow(self) -> Flow:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, TOKENS, WIDTH])]
        inputs.append(helper.make_tensor_value_info("where", TensorProto.INT64, []))
        outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
        nodes = [*self.nodes, helper.make_node("Softmax", [self.value], ["out"])]
        graph = helper.make_graph(nodes, "g", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx_file.capture(onnx_load.from_proto(model)).flow


def sized(g: Graph) -> str:
    return g.at(g.op("SplitToSequence", "y", g.number([2, 6, 4]), axis=2)[0], 1)


def even(g: Graph) -> str:
    """The last piece is smaller, and taken from the end."""
    return g.at(g.op("SplitToSequence", "y", g.number(5), axis=-1)[0], -1)


def single(g: Graph) -> str:
    return g.at(g.op("SplitToSequence", "y", axis=1)[0], 2)


def unbound(g: Graph) -> str:
    apart = g.op("Reshape", "y", g.number([BATCH, TOKENS, 3, 4]))[0]
    return g.at(g.op("SplitToSequence", apart, axis=2, keepdims=0)[0], 1)


def halves(g: Graph) -> list[str]:
    return g.op("Split", "y", outputs=2, axis=2)


def listed(g: Graph) -> str:
    return g.at(g.op("SequenceConstruct", *halves(g))[0], 1)


def grown(g: Graph) -> list[str]:
    first, second = halves(g)
    sequence = g.op("SequenceInsert", g.op("SequenceEmpty")[0], first)[0]
    return g.op("SequenceInsert", sequence, second, g.number(0))


def inserted(g: Graph) -> str:
    return g.at(grown(g)[0], 0)


def joined(g: Graph) -> str:
    return g.op("ConcatFromSequence", grown(g)[0], axis=1)[0]


def stacked(g: Graph) -> str:
    return g.op("ConcatFromSequence", g.op("SequenceConstruct", *halves(g))[0], axis=-1, new_axis=1)[0]


@pytest.mark.parametrize("body", [sized, even, single, unbound, listed, inserted, joined, stacked])
def test_what_is_taken_out_of_a_sequence_is_known_element_by_element(body: Callable[[Graph], str]) -> None:
    graph = Graph(body)
    flow = graph.flow()
    tracer = Tracer(flow)
    form = tracer.trace(graph.value)
    assert form.plain
    np.testing.assert_allclose(form.evaluate(flow, tracer.sources), flow.value(graph.value), rtol=1e-6)
    makers = {"SplitToSequence", "SequenceConstruct", "SequenceInsert", "SequenceEmpty"}
    assert not makers & {n.op for n in flow.nodes}, "what makes a sequence counts as read by nothing"
    numbers = flow.value(graph.value)
    assert len(np.unique(numbers)) == numbers.size, "a wrong element must show"


def by_data(g: Graph) -> str:
    return g.op("SequenceAt", g.op("SplitToSequence", "y", axis=1)[0], "where")[0]


def erased(g: Graph) -> str:
    return g.at(g.op("SequenceErase", g.op("SplitToSequence", "y", axis=1)[0], g.number(0))[0], 0)


@pytest.mark.parametrize("body", [by_data, erased])
def test_what_is_not_known_beforehand_is_opaque(body: Callable[[Graph], str]) -> None:
    graph = Graph(body)
    with pytest.raises(Opaque, match="operator SequenceAt between projection and score is not understood"):
        Tracer(graph.flow()).trace(graph.value)
