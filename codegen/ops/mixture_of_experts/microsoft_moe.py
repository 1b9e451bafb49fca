"""Where onnxruntime's own operator `com.microsoft.MoE` computes what a spec says, and how it is called.

It knows no capacity, so it fits where tokens choose and none can find an expert full. Its "gelu" is the approximation
by tanh. Its inputs are tokens [N, hidden], the router's logits [N, experts], and the experts' matrices with their last
two axes swapped: [experts, expert_hidden, hidden] and [experts, hidden, expert_hidden], a bias behind each.
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.spec import Activation, MixtureOfExperts

DOMAIN, OPERATOR = "com.microsoft", "MoE"

ACTIVATIONS = {Activation.RELU: "relu", Activation.GELU_TANH: "gelu", Activation.SILU: "silu"}


def why_not(spec: MixtureOfExperts) -> str | None:
    """Why the operator computes something else, or None if it fits."""
    if not spec.drops_nothing:
        return "it has no capacity: every token gets the experts that it asks for"
    if spec.activation not in ACTIVATIONS:
        return f"it has no activation {spec.activation.value}"
    if spec.gated:
        return "on CPUs it has no third matrix for a gate"
    return None


def attributes(spec: MixtureOfExperts) -> list[ir.Attr]:
    """Raises ValueError where the operator does not fit."""
    if (reason := why_not(spec)) is not None:
        raise ValueError(f"{DOMAIN}.{OPERATOR} does not fit: {reason}")
    return [
        ir.AttrString("activation_type", ACTIVATIONS[spec.activation]),
        ir.AttrInt64("k", spec.selected),
        ir.AttrInt64("normalize_routing_weights", 0),
    ]
