"""Control flow in sound files: a weight that passes through a body, or through a function that has one."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.parser

_BRANCH = "b () => (float[A, B] made) { n = Neg (matrix) made = Neg (n) }"
_NODES = {
    "If": f"through = If <then_branch = {_BRANCH}, else_branch = {_BRANCH}> (go)",
    "Loop": "through = Loop <body = b (int64 i, bool on, float[A, B] x) => (bool on_out, float[A, B] x_out) "
            "{ on_out = Identity (on) n = Neg (x) x_out = Neg (n) }> (rounds, go, matrix)",
    "Scan": "through = Scan <num_scan_inputs = 1, body = b (float[B] row) => (float[B] out) "
            "{ n = Neg (row) out = Neg (n) }> (matrix)",
    "function": "through = bodies.Passed (matrix, go)",
}  # fmt: skip
KINDS = tuple(_NODES)

_FUNCTION = """
<domain: "bodies", opset_import: ["": {version}]>
Passed (matrix, go) => (through) {{ {body} }}
"""


def with_body(content: bytes, kind: str) -> bytes:
    """A file like this one whose first matrix passes through a body of this kind, unchanged."""
    model = onnx.load_from_string(content)
    name = next(node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")).input[1]
    for node in model.graph.node:
        node.input[:] = ["through" if read == name else read for read in node.input]
    made = [onnx.helper.make_node("Identity", [name], ["matrix"]), *map(onnx.parser.parse_node, _lines(kind))]
    for place, node in enumerate(made):
        model.graph.node.insert(place, node)
    if kind == "function":
        text = _FUNCTION.format(version=model.opset_import[0].version, body=_NODES["If"])
        model.functions.append(onnx.parser.parse_function(text))
        model.opset_import.append(onnx.helper.make_opsetid("bodies", 1))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _lines(kind: str) -> Iterator[str]:
    yield "go = Constant <value = bool {1}> ()"
    if kind == "Loop":
        yield "rounds = Constant <value = int64 {1}> ()"
    yield _NODES[kind]
