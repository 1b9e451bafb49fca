"""Mixed chunk attention on graphics cards: projections by torch, what is between them as one torch operator.

The operator is opaque to torch.compile and torch.export; its gradient is that of torch, recomputed. Importing this
module defines it as ``rewriter::mixed_chunks``.

Shape legend: B batch, S tokens, E hidden, F expanded, N base, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.device import Language, host
from codegen.errors import NotLegal
from codegen.launch.operands import DTYPES
from codegen.launch.recomputed import gradients
from codegen.launch.torch_op import graphics_card
from codegen.ops.gated_attention.reference import check
from codegen.ops.gated_attention.torch_body import Weights, expanded, kernel, wide
from codegen.ops.gated_attention.torch_body import heads as heads_of
from codegen.ops.mixed_chunk_attention.torch_body import (
    by_chunk,
    by_token,
    divisors,
    hide,
    learned_bias,
    products,
    running_sums,
)
from codegen.registry import select, why_not
from codegen.spec import MixedChunkAttention, PositionBias


def mixed_chunk_attention(
    spec: MixedChunkAttention, x: Tensor, weights: Weights, shown: Tensor | None = None
) -> Tensor:
    """[B, S, E] of x [B, S, E], in x's dtype; arguments as `torch_body.mixed_chunk_attention`.

    Raises:
        NotLegal: there is no kernel of this here.
        ValueError: operands that contradict the spec.
    """
    check(spec, x, weights)
    gate, value, latent = expanded(spec, x, weights)
    bias = learned_bias(spec, weights, like=latent)
    numbers = (spec.chunk, spec.causal, spec.averaged)
    product: Tensor = _operator(gate, value, *heads_of(spec, latent, weights), bias, shown, *numbers)
    return F.linear(product, weights["out_weight"], weights["out_bias"])


@torch.library.custom_op("rewriter::mixed_chunks", mutates_args=())
def _operator(
    gate: Tensor,
    value: Tensor,
    quadratic_query: Tensor,
    linear_query: Tensor,
    quadratic_key: Tensor,
    linear_key: Tensor,
    bias: Tensor | None,
    shown: Tensor | None,
    chunk: int,
    causal: bool,
    averaged: bool,
) -> Tensor:
    spec = _spec(gate, quadratic_key, bias, chunk, causal, averaged)
    device, dtype = graphics_card(gate.device)[0] if gate.is_cuda else host(), DTYPES.get(gate.dtype)
    if dtype is None or select(spec, device, dtype, Language.TRITON) is None:
        reason = (
            f"there is no kernel in {gate.dtype}" if dtype is None else why_not(spec, device, dtype, Language.TRITON)
        )
        raise NotLegal(reason, hint='use kernels="auto" or "off"')
    from codegen.launch import chunk_triton

    heads = (quadratic_query, linear_query, quadratic_key, linear_key)
    return chunk_triton.launch(spec, gate, value, heads, bias, shown, arch=device.arch)


@_operator.register_fake
def _fake(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(ctx, gradient, lambda operands: by_torch(operands, *ctx.rest))


_operator.register_autograd(_backward, setup_context=_setup)


def by_torch(operands: list[Tensor | None], chunk: int, causal: bool, averaged: bool) -> Tensor:
    """[B, S, F]: what the kernel computes of the operator's tensors, in differentiable torch."""
    gate, value, quadratic_query, linear_query, quadratic_key, linear_key = (t for t in operands[:6] if t is not None)
    bias, shown = operands[6:]
    spec = _spec(gate, quadratic_key, bias, chunk, causal, averaged)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=gate.device).triu(1)
    added = wide(gate.new_zeros(chunk, chunk) if bias is None else bias)
    added = added.masked_fill(later, -torch.inf) if causal else added
    scores = kernel(by_chunk(spec, quadratic_query), by_chunk(spec, quadratic_key), chunk, added)
    mixed = scores @ by_chunk(spec, hide(value, shown))
    key = hide(linear_key, shown)
    if causal:
        before, _ = running_sums(spec, key, value, None)
        mixed = mixed + by_chunk(spec, linear_query) / divisors(spec, before, 0) @ before
        return gate * by_token(mixed, gate.shape[1]).to(gate.dtype)
    between = wide(linear_query) @ (products(key, value) / gate.shape[1])
    return gate * (by_token(mixed, gate.shape[1]) + between).to(gate.dtype)


def _spec(
    gate: Tensor, key: Tensor, bias: Tensor | None, chunk: int, causal: bool, averaged: bool
) -> MixedChunkAttention:
    """As far as the kernel cares: not what the projections are, nor where the bias comes from."""
    kind = PositionBias.NONE if bias is None else PositionBias.TOEPLITZ
    width, base = gate.shape[2], key.shape[2]
    return MixedChunkAttention(
        1, width, base, chunk, causal=causal, averaged=averaged, bias=kind, span=chunk, rotary=False
    )
