"""The mixture of experts by onnxruntime's own operator, `com.microsoft.MoE`, where that computes what a spec says.

It knows no capacity, so it fits where tokens choose and none can find an expert full. It softmaxes logits in the
tokens' dtype, so in half precisions it would route otherwise. Its "gelu" is the approximation by tanh. On CPUs it takes
a gate in one case: SiLU, by its "swiglu", whose rows are gate, up, gate, up … of one matrix.

Its inputs are tokens [N, hidden], the router's logits [N, experts], and the experts' matrices with their last two axes
swapped: [experts, expert_hidden, hidden] (twice as many rows with a gate) and [experts, hidden, expert_hidden], a bias
behind each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from codegen.ops.function_body import FunctionBody
from codegen.render import identifier
from codegen.spec import Activation, MixtureOfExperts

DOMAIN, OPERATOR = "com.microsoft", "MoE"

ACTIVATIONS = {Activation.RELU: "relu", Activation.GELU_TANH: "gelu", Activation.SILU: "silu"}

FUNCTION_DOMAIN = "rewriter.ops"

Arrays = Mapping[str, NDArray[Any]]


def why_not(spec: MixtureOfExperts, dtype: ir.DataType = ir.DataType.FLOAT) -> str | None:
    """Why the operator computes something else on x of this dtype, or None if it fits."""
    if not spec.drops_nothing:
        return "it has no capacity: every token gets the experts that it asks for"
    if dtype != ir.DataType.FLOAT:
        return f"it routes in the dtype of its tokens ({dtype.name.lower()}), not in float32"
    if spec.gated and spec.activation is not Activation.SILU:
        return f"on CPUs its gate is silu's, not {spec.activation.value}'s"
    if spec.activation not in ACTIVATIONS:
        return f"it has no activation {spec.activation.value}"
    return None


def attributes(spec: MixtureOfExperts) -> list[ir.Attr]:
    """Of the operator. Raises ValueError where it does not fit."""
    if (reason := why_not(spec)) is not None:
        raise ValueError(f"{DOMAIN}.{OPERATOR} does not fit: {reason}")
    described = [
        ir.AttrString("activation_type", "swiglu" if spec.gated else ACTIVATIONS[spec.activation]),
        ir.AttrInt64("k", spec.selected),
        ir.AttrInt64("normalize_routing_weights", 0),
    ]
    if spec.gated:  # gate · sigmoid(alpha · gate) · (up + beta), its rows by turns
        swiglu = [ir.AttrFloat32("activation_alpha", 1.0), ir.AttrFloat32("activation_beta", 0.0)]
        described += [*swiglu, ir.AttrInt64("swiglu_fusion", 1)]
    return described


def stored(spec: MixtureOfExperts, parameters: Arrays) -> dict[str, NDArray[Any]]:
    """The parameters of `MixtureOfExperts.shapes` as the function takes them, in order; a gate's lie in `up`'s."""
    held = {name: array.swapaxes(1, 2) if array.ndim == 3 else array for name, array in parameters.items()}
    for name in [n for n in held if n.startswith("gate_")]:
        up = name.replace("gate", "up")
        pair = np.stack([held.pop(name), held[up]], axis=2)
        held[up] = pair.reshape(spec.experts, 2 * spec.expert_hidden, *pair.shape[3:])
    return {name: np.ascontiguousarray(array) for name, array in held.items()}


def function_name(spec: MixtureOfExperts) -> str:
    """As the one of standard operators, told apart from it."""
    return str(identifier("mixture", ["by_moe", spec.activation.value, f"e{spec.experts}"], spec))


def function(spec: MixtureOfExperts, opset: int) -> ir.Function:
    """Inputs x [B, S, H] float32 and what `stored` gives, in order; the output is [B, S, H].

    Raises ValueError where the operator does not fit.
    """
    described, body = attributes(spec), FunctionBody()
    x = ir.Value(name="x_BSH")
    held = {name: ir.Value(name=name) for name in spec.shapes if not name.startswith("gate")}
    flat = body.op("Reshape", [x, body.ints([-1, spec.hidden])], "tokens_NH")
    logits = body.op("MatMul", [flat, held["router_weight"]], "products_NE")
    if spec.router_bias:
        logits = body.op("Add", [logits, held["router_bias"]], "logits_NE")
    experts = [held.get(n) for n in ("up_weight", "up_bias", "down_weight", "down_bias")]
    node = ir.Node(DOMAIN, OPERATOR, [flat, logits, *experts], described, num_outputs=1)
    body.nodes.append(node)
    mixed = node.outputs[0]
    mixed.name = body.unique("mixed_NH")
    if spec.bias:
        mixed = body.op("Add", [mixed, held["bias"]], "shifted_NH")
    output = body.op("Reshape", [mixed, body.op("Shape", [x], "shape")], "output_BSH")
    imports = {"": opset, DOMAIN: 1}
    graph = ir.Graph([x, *held.values()], [output], nodes=body.nodes, opset_imports=imports)
    return ir.Function(FUNCTION_DOMAIN, function_name(spec), graph=graph, attributes=[])
