"""Small ONNX graphs written node by node, as exporters other than torch's write attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
WIDTH, HEADS, DIM = 32, 4, 8
SCALE = float(DIM**-0.5)


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


@dataclass
class Graph:
    """Nodes, initializers and inputs of a graph that is being written; ``x [batch, tokens, 32]`` is its first input."""

    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: dict[str, Array] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.inputs["x"] = self.random.standard_normal((2, 6, WIDTH)).astype(np.float32)

    def op(self, kind: str, *inputs: str | Array | float, domain: str = "", **attributes: Any) -> str:
        """Append a node and give the name of its output."""
        names = [v if isinstance(v, str) else self.constant(v) for v in inputs]
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], domain=domain, **attributes))
        return out

    def constant(self, value: Array | float) -> str:
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def matrix(self, *shape: int) -> Array:
        return self.random.standard_normal(shape) / np.sqrt(shape[0])

    def model(self, output: str, checked: bool = True) -> onnx.ModelProto:
        batch = "batch" if len(self.inputs["x"]) > 1 else 1
        shape: list[str | int | None] = [batch, "tokens", WIDTH]
        graph = helper.make_graph(
            self.nodes,
            "by_hand",
            [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in self.inputs],
            [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, shape)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        if checked:
            onnx.checker.check_model(model)
        return model


@dataclass(frozen=True)
class Weights:
    """A projection's weight by heads, ``[32, 4, 8]``, and bias, ``[4, 8]``."""

    weight: Array
    bias: Array

    @property
    def flat(self) -> tuple[Array, Array]:
        return self.weight.reshape(WIDTH, -1), self.bias.reshape(-1)


def projections(graph: Graph, perturbed: bool) -> tuple[Weights, Weights, Weights]:
    """Query, key and value; heads of the last two are equal in pairs, `perturbed`: all but the last."""
    made = []
    for role in "qkv":
        weight, bias = graph.matrix(WIDTH, HEADS, DIM), 0.2 * graph.random.standard_normal((HEADS, DIM))
        if role != "q":
            weight[:, 1::2], bias[1::2] = weight[:, ::2], bias[::2]
            weight[:, -1] += 0.2 * perturbed
        made.append(Weights(weight, bias))
    return made[0], made[1], made[2]


def finished(graph: Graph, mixed: str) -> str:
    """``[batch, heads, tokens, features]`` through an output projection, added to x."""
    joined = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), ints(0, 0, WIDTH))
    return graph.op("Add", graph.op("MatMul", joined, graph.matrix(WIDTH, WIDTH)), "x")


def attended(graph: Graph, q: str, k: str, v: str) -> str:
    """Softmax attention on ``[batch, heads, tokens, features]``."""
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    return graph.op("MatMul", graph.op("Softmax", graph.op("Mul", scores, SCALE), axis=-1), v)


def by_heads(graph: Graph, flat: str) -> str:
    return graph.op("Transpose", graph.op("Reshape", flat, ints(0, 0, HEADS, DIM)), perm=[0, 2, 1, 3])


Writer = Callable[[Graph, bool], str]
"""Writes an attention into a graph, its twin perturbed or not, and gives the name of the result."""


def run(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, inputs)[0]
    return result
