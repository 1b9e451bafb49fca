"""Routed feed-forward blocks as one torch operator that runs a generated kernel.

The operator is opaque to torch.compile and torch.export; its gradient is that of the torch body, recomputed. Importing
this module defines it as ``rewriter::routed_feed_forward``.

Shape legend: N tokens, E experts, M places of an expert, H hidden, F inner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codegen.activation import Activation
from codegen.device import Language, host
from codegen.errors import NotLegal
from codegen.launch import routed_host
from codegen.launch.operands import DTYPES
from codegen.launch.recomputed import Operands, gradients
from codegen.launch.torch_op import graphics_card
from codegen.ops.routed_feed_forward import torch_body
from codegen.registry import select, why_not
from codegen.routed import MATRICES, VECTORS, RoutedFeedForward

PARAMETERS = (*MATRICES, *VECTORS)
"""Of all specs, in the order in which the operator takes them; each spec has some."""


def routed_feed_forward(
    spec: RoutedFeedForward,
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    parameters: Mapping[str, Tensor],
    base: Tensor | None = None,
    *,
    language: Language,
) -> Tensor:
    """[N, H] of x [N, H], in x's dtype; operands as the spec has them.

    Raises:
        NotLegal: there is no kernel of this here.
        ValueError: operands that contradict the spec.
    """
    given = [parameters.get(name) for name in PARAMETERS]
    numbers = (list(Activation).index(spec.activation), spec.once, language.value)
    found: Tensor = _operator(x, rows, weights, base, *given, *numbers)
    return found


@torch.library.custom_op("rewriter::routed_feed_forward", mutates_args=())
def _operator(
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    base: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    once: bool,
    language: str,
) -> Tensor:
    parameters = _named(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    spec = _spec(parameters, activation, once)
    device, dtype = graphics_card(x.device)[0] if x.is_cuda else host(), DTYPES.get(x.dtype)
    if dtype is None:
        raise NotLegal(f"there is no kernel in {x.dtype}", hint='use kernels="auto" or "off"')
    if select(spec, device, dtype, Language(language)) is None:
        raise NotLegal(why_not(spec, device, dtype, Language(language)), hint='use kernels="auto" or "off"')
    if device.kind == "cpu":
        return routed_host.launch(spec, x, rows, weights, parameters, base)
    from codegen.launch import routed_triton

    return routed_triton.launch(spec, x, rows, weights, parameters, base, arch=device.arch)


@_operator.register_fake
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.rest = inputs[10:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(ctx, gradient, lambda operands: by_torch(operands, *ctx.rest[:2]))


_operator.register_autograd(_backward, setup_context=_setup)


def by_torch(operands: Operands, activation: int, once: bool) -> Tensor:
    """[N, H]: what the kernel computes of the operator's tensors, in differentiable torch."""
    x, rows, weights, base = operands[:4]
    assert x is not None and rows is not None and weights is not None
    parameters = _named(*operands[4:])
    return torch_body.routed_feed_forward(_spec(parameters, activation, once), x, rows, weights, parameters, base)


def _named(*given: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in zip(PARAMETERS, given, strict=True) if t is not None}


def _spec(parameters: Mapping[str, Tensor], activation: int, once: bool) -> RoutedFeedForward:
    experts, hidden, inner = parameters["up_weight"].shape
    return RoutedFeedForward(
        hidden,
        inner,
        experts,
        list(Activation)[activation],
        gated="gate_weight" in parameters,
        up_bias="up_bias" in parameters,
        down_bias="down_bias" in parameters,
        once=once,
    )
