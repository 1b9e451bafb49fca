"""Large models for `benchmarks.scale`: written to disk without ever being in memory, holes where zeros will do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh

_PAGE = 4096


@dataclass(frozen=True)
class Stack:
    """A decoder-like stack: attention and a feed-forward block in each layer, float32.

    Attributes:
        hidden, inner: widths; heads: of attention, hidden / heads wide each.
        sparse: feed-forward weights are holes in the data file; attention's are numbers either way.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    sparse: bool = False

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, int]]]:
        h, f = self.hidden, self.inner
        for i in range(self.layers):
            yield from ((f"layers.{i}.{name}", (h, h)) for name in ("q", "k", "v", "o"))
            yield from ((f"layers.{i}.up", (h, f)), (f"layers.{i}.down", (f, h)))

    @property
    def bytes(self) -> int:
        return sum(4 * a * b for _, (a, b) in self.tensors)

    @property
    def largest(self) -> int:
        return max(4 * a * b for _, (a, b) in self.tensors)


def write(stack: Stack, path: Path, *, external: bool = True) -> Path:
    """Write the model, with its data beside it unless it is small."""
    data = path.with_name(f"{path.name}.data")
    initializers = _external(stack, data) if external else _inline(stack)
    small = [
        nh.from_array(np.array([0, 0, stack.heads, stack.hidden // stack.heads], np.int64), "split"),
        nh.from_array(np.array([0, 0, stack.hidden], np.int64), "join"),
        nh.from_array(np.array((stack.hidden // stack.heads) ** -0.5, np.float32), "scale"),
    ]
    shape = ["batch", "tokens", stack.hidden]
    graph = oh.make_graph(
        [node for i in range(stack.layers) for node in _layer(i)],
        "stack",
        [oh.make_tensor_value_info("h0", onnx.TensorProto.FLOAT, shape)],
        [oh.make_tensor_value_info(f"h{stack.layers}", onnx.TensorProto.FLOAT, shape)],
        [*small, *initializers],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def _layer(i: int) -> Iterator[onnx.NodeProto]:
    """23 nodes."""

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        scope = f"/layers.{i}/{output}"
        return oh.make_node(op, inputs, [names.get(output, scope)], name=f"{scope}/{op}", **attributes)

    names = {"end": f"h{i + 1}"}
    x, p = f"h{i}", f"/layers.{i}/"
    for name in "qkv":
        yield node("MatMul", [x, f"layers.{i}.{name}"], name)
        yield node("Reshape", [f"{p}{name}", "split"], f"{name}4")
        yield node("Transpose", [f"{p}{name}4"], f"{name}h", perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3])
    yield node("MatMul", [f"{p}qh", f"{p}kh"], "raw")
    yield node("Mul", [f"{p}raw", "scale"], "scores")
    yield node("Softmax", [f"{p}scores"], "weights", axis=-1)
    yield node("MatMul", [f"{p}weights", f"{p}vh"], "mixed")
    yield node("Transpose", [f"{p}mixed"], "back", perm=[0, 2, 1, 3])
    yield node("Reshape", [f"{p}back", "join"], "joined")
    yield node("MatMul", [f"{p}joined", f"layers.{i}.o"], "out")
    yield node("Add", [x, f"{p}out"], "attended")
    yield node("MatMul", [f"{p}attended", f"layers.{i}.up"], "wide")
    yield node("Relu", [f"{p}wide"], "active")
    yield node("MatMul", [f"{p}active", f"layers.{i}.down"], "narrow")
    yield node("Add", [f"{p}attended", f"{p}narrow"], "end")


NODES_A_LAYER = len(list(_layer(0)))


def _values(name: str, shape: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    seed = np.frombuffer(name.encode().ljust(16)[:16], np.uint32)
    made = np.random.default_rng([*seed.tolist(), len(name)]).standard_normal(shape, np.float32)
    return made * np.float32(0.5 * shape[0] ** -0.5)


def _inline(stack: Stack) -> list[onnx.TensorProto]:
    return [nh.from_array(_values(name, shape), name) for name, shape in stack.tensors]


def _external(stack: Stack, data: Path) -> list[onnx.TensorProto]:
    made, offset = [], 0
    with data.open("wb") as file:
        for name, shape in stack.tensors:
            size = 4 * shape[0] * shape[1]
            if not (stack.sparse and name.endswith(("up", "down"))):
                file.seek(offset)
                file.write(_values(name, shape).tobytes())
            tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
            made.append(tensor)
            offset += -(-size // _PAGE) * _PAGE
        file.truncate(offset)
    return made
