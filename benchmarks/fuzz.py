"""Broken .onnx files: every one must end in a typed error or in a result, whatever was done to it.

    python -m benchmarks.fuzz [--first SEED] [--count N] [--json F] [--markdown F]

A seed takes one of a few small models, half of them with control flow or a function, and breaks it: in its bytes, or in
its structure (nodes removed, doubled or wired otherwise, absurd attributes, shapes, types and versions, hostile names,
weights that lie elsewhere). It is then inspected and rewritten under a limit on memory. Anything but a typed error is a
fault of ours, and is printed with its seed: `--first SEED --count 1` repeats it.
"""

from __future__ import annotations

import functools
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

import rewriter
from benchmarks import fuzzing
from benchmarks.bodies import KINDS, with_body
from benchmarks.campaign import export
from benchmarks.fuzzing import Found, attempted
from benchmarks.options import parser, seeds
from benchmarks.random_attention import Net, draw

MODELS = (0, 4, 5, 7)
"""Seeds of the architectures whose exports are broken."""

NUMBERS = (-1, 0, 1, 3, 7, 10**12, -(10**12), 2**62)
OPERATORS = ("Identity", "Softmax", "MatMul", "Reshape", "Transpose", "Unknown", "If", "Loop", "Shape", "Gather",
             "Attention", "Split", "Concat", "Expand", "Range", "ConstantOfShape", "Einsum")  # fmt: skip
NAMES = ("", "\x1b[31m", "../../x", "<script>", "{{7*7}}", "x" * 300, "名")
PLACES = ("/etc/passwd", "../x", "weights.bin", "")

Random = random.Random


@functools.cache
def sound(seed: int, body: str | None = None) -> bytes:
    """A sound file's content; `body` is what control flow one of its weights passes through."""
    if body is not None:
        return with_body(sound(seed), body)
    a = draw(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.onnx"
        export(a, Net(a).eval(), path)
        return path.read_bytes()


def broken(seed: int) -> bytes:
    """A file that was broken in one to three ways, always the same for a seed."""
    r = Random(seed)
    content = sound(r.choice(MODELS), r.choice([None, None, None, *KINDS]))
    if r.random() < 0.3:
        return break_bytes(content, r)
    model = onnx.load_from_string(content)
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        r.choice(STRUCTURE)(model, r)
    return bytes(model.SerializeToString())


# ---------------------------------------------------------------------- ways to break a file


def break_bytes(content: bytes, r: Random) -> bytes:
    data = bytearray(content)
    place = r.randrange(len(data) - 400)
    match r.choice(["cut off", "flip", "flip", "flip", "take out", "double"]):
        case "cut off":
            return bytes(data[: place + 1])
        case "flip":
            for _ in range(r.choice([1, 1, 2, 4, 16])):
                data[r.randrange(len(data))] = r.randrange(256)
        case "take out":
            del data[place : place + r.randrange(1, 400)]
        case "double":
            data[place:place] = data[place : place + r.randrange(1, 50)]
    return bytes(data)


def _nodes(model: onnx.ModelProto, r: Random) -> MutableSequence[onnx.NodeProto]:
    """Those of the graph or, if there are any, of a body or a function half the time."""
    inner = [found for part in (model.graph, *model.functions) for found in _bodies(part.node)]
    inner.extend(function.node for function in model.functions)
    inner = [found for found in inner if found]
    return r.choice(inner) if inner and r.random() < 0.5 else model.graph.node


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[MutableSequence[onnx.NodeProto]]:
    for graph in (a.g for node in nodes for a in node.attribute if a.HasField("g")):
        yield graph.node
        yield from _bodies(graph.node)


def _node(model: onnx.ModelProto, r: Random) -> onnx.NodeProto:
    return r.choice(_nodes(model, r))


def remove_node(model: onnx.ModelProto, r: Random) -> None:
    nodes = _nodes(model, r)
    nodes.remove(r.choice(nodes))


def double_node(model: onnx.ModelProto, r: Random) -> None:
    nodes = _nodes(model, r)
    nodes.append(r.choice(nodes))


def wire_otherwise(model: onnx.ModelProto, r: Random) -> None:
    """An input or an output becomes some other node's output: cycles and doubled names."""
    nodes = _nodes(model, r)
    node, other = r.choice(nodes), r.choice(nodes if r.random() < 0.5 else _nodes(model, r)).output[0]
    names = node.input if node.input and r.random() < 0.7 else node.output
    names[r.randrange(len(names))] = other


def take_inputs(model: onnx.ModelProto, r: Random) -> None:
    node = _node(model, r)
    if node.input:
        del node.input[r.randrange(len(node.input)) :]


def change_operator(model: onnx.ModelProto, r: Random) -> None:
    _node(model, r).op_type = r.choice(OPERATORS)


def change_domain(model: onnx.ModelProto, r: Random) -> None:
    _node(model, r).domain = r.choice(["com.microsoft", "unknown", "ai.onnx.ml"])


def change_name(model: onnx.ModelProto, r: Random) -> None:
    _node(model, r).name = r.choice(NAMES)


def change_attribute(model: onnx.ModelProto, r: Random) -> None:
    break_attribute(r.choice([a for node in model.graph.node for a in node.attribute]), r)


def break_attribute(a: onnx.AttributeProto, r: Random) -> None:
    match a.type:
        case onnx.AttributeProto.INT:
            a.i = r.choice(NUMBERS)
        case onnx.AttributeProto.INTS if a.ints:
            a.ints[r.randrange(len(a.ints))] = r.choice(NUMBERS)
        case onnx.AttributeProto.FLOAT:
            a.f = r.choice([float("nan"), float("inf"), 0.0, -1e38])
        case onnx.AttributeProto.STRING:
            a.s = r.choice([b"", b"\xff\xfe", b"x" * 300])
        case onnx.AttributeProto.TENSOR:
            _break_tensor(a.t, r)


def add_attribute(model: onnx.ModelProto, r: Random) -> None:
    value: Any = r.choice([0, -1, 5, "a", [1, 2]])
    _node(model, r).attribute.append(onnx.helper.make_attribute("axis", value))


def change_weight(model: onnx.ModelProto, r: Random) -> None:
    _break_tensor(r.choice(model.graph.initializer), r)


def _break_tensor(tensor: onnx.TensorProto, r: Random) -> None:
    match r.randrange(5):
        case 0 if tensor.dims:
            tensor.dims[r.randrange(len(tensor.dims))] = r.choice(NUMBERS)
        case 1:
            tensor.data_type = r.choice([0, 1, 6, 7, 8, 9, 10, 16, 22, 99])
        case 2:
            tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
        case 3:
            tensor.raw_data = r.randbytes(len(tensor.raw_data))
        case _:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=r.choice(PLACES))


def change_input(model: onnx.ModelProto, r: Random) -> None:
    kind = r.choice(model.graph.input).type.tensor_type
    if r.random() < 0.3:
        kind.elem_type = r.choice([0, 1, 6, 7, 8, 9, 10, 16, 99])
    elif kind.shape.dim:
        size = r.choice(kind.shape.dim)
        size.Clear()
        size.dim_value = r.choice(NUMBERS)


def change_version(model: onnx.ModelProto, r: Random) -> None:
    model.opset_import[0].version = r.choice([0, 1, 7, 9, 12, 18, 99, -1])


STRUCTURE: tuple[Callable[[onnx.ModelProto, Random], None], ...] = (
    remove_node, double_node, wire_otherwise, take_inputs, change_operator, change_domain, change_name,
    change_attribute, add_attribute, change_weight, change_input, change_version,
)  # fmt: skip


# ---------------------------------------------------------------------- what comes of it


def outcome(seed: int, folder: Path) -> Found:
    """What inspecting and rewriting the broken file comes to."""
    path, output = folder / f"{seed}.onnx", folder / f"{seed}.out.onnx"
    path.write_bytes(broken(seed))

    def work() -> None:
        rewriter.inspect(path).to_dict()
        rewriter.optimize(path, "mqa").save(output)

    return attempted(work)


def main(arguments: Sequence[str] | None = None) -> int:
    options = seeds(parser(__doc__, quick=f"{fuzzing.QUICK} seeds", markdown=True), count=1500).parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in MODELS:
        sound(seed)
    return fuzzing.run("fuzz", outcome, options)


if __name__ == "__main__":
    sys.exit(main())
