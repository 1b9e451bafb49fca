"""Models that draw random numbers: two runs of one file differ, so that nothing can be read off or compared."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.capture.input_roles import constant_array
from rewriter.errors import UnsupportedModel
from rewriter.onnx_nodes import input_at

_DRAWS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


def require_no_draws(model: ir.Model) -> None:
    """Raises UnsupportedModel where an output depends on random numbers: dropout that goes on, noise, samples."""
    for node in _live_nodes(model):
        if node.domain in {"", "ai.onnx"} and (node.op_type in _DRAWS or _drops(node)):
            name = f"{node.name!r} ({node.op_type})" if node.name else node.op_type
            raise UnsupportedModel(
                f"it draws random numbers at {name}, so that no two runs are alike",
                hint="export it for inference, after model.eval(); noise that it needs can be made an input",
            )


def _drops(node: ir.Node) -> bool:
    """Whether a Dropout (opset 12 and up) is in training mode, and drops any."""
    if node.op_type != "Dropout":
        return False
    ratio, training = (None if v is None else constant_array(v) for v in (input_at(node, 1), input_at(node, 2)))
    return bool(training is not None and training.any() and not (ratio is not None and not ratio.any()))


def _live_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes that an output depends on, in order."""
    live: set[ir.Node] = set()
    todo = [node for value in model.graph.outputs if (node := value.producer()) is not None]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(p for v in node.inputs if v is not None and (p := v.producer()) is not None)
    return [node for node in model.graph if node in live]
