"""The conditional feed-forward block as a model-local ONNX function over standard operators, from opset 12 on.

Routing is that of inference.
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.conditional import ConditionalFeedForward
from codegen.ops.activation.onnx_body import activate
from codegen.ops.conditional_routing.onnx_body import DOMAIN, ConditionalBody, added, routed
from codegen.render import identifier


def function_name(spec: ConditionalFeedForward) -> str:
    """The activation and a hash of the spec, whose numbers stand in the body."""
    return str(identifier("conditional_block", [spec.activation.value], spec))


def function(spec: ConditionalFeedForward, opset: int) -> ir.Function:
    """Inputs x [B, S, hidden] and the parameters of `ConditionalFeedForward.shapes` in order; the output is like x."""
    x = ir.Value(name="x_BSE")
    held = {name: ir.Value(name=name) for name in spec.shapes}
    body = ConditionalBody(x, spec.hidden)
    to = routed(body, spec.router, held["router"], None, "router")
    given = body.op("Gather", [body.flat, to.rows], "given_BME")
    heavy, light = _branch(body, spec, "heavy", given, held), _branch(body, spec, "light", x, held)
    output = added(body, light, heavy, to, spec.hidden)
    graph = ir.Graph([x, *held.values()], [output], nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("dtype", "compute")]
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared)


def _branch(
    body: ConditionalBody, spec: ConditionalFeedForward, name: str, x: ir.Value, held: dict[str, ir.Value]
) -> ir.Value:
    up = body.product(x, held, f"{name}_up")
    if spec.gated:
        gate = activate(body, spec.activation, body.product(x, held, f"{name}_gate"), f"{name}_activated")
        return body.product(body.op("Mul", [gate, up], f"{name}_inner"), held, f"{name}_down")
    return body.product(activate(body, spec.activation, up, f"{name}_activated"), held, f"{name}_down")
