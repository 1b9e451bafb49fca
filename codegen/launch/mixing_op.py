"""Mixing of tokens in torch, whatever the spec: where a kernel was measured to be faster by that, else by torch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from codegen.conditional import ConditionalAttention
from codegen.launch import chunk_op, fourier_op
from codegen.ops.conditional_attention.torch_body import conditional_attention
from codegen.ops.gated_attention.torch_body import gated_attention
from codegen.ops.linear_mixing.torch_body import linear_mixing
from codegen.spec import GatedAttention, LinearMixing, MixedChunkAttention, TokenMixing


def mix(
    spec: TokenMixing,
    x: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    kernels: str = "auto",
    shown: Tensor | None = None,
    soft: bool = False,
) -> Tensor:
    """[B, S, hidden] of x [B, S, hidden] and the spec's parameters, in x's dtype; for `kernels` see `fourier_op.mix`.

    Linear mixing is two matrix products, which no kernel of ours does better than torch; gated attention has none
    either. Conditional attention has none, and alone heeds `shown` (bool [B, S], False for padding) and `soft` (routing
    as in training).

    Raises:
        NotLegal: kernels is "cpp", "triton" or "cuda", and the spec is one of Fourier mixing that has no such kernel,
            or "cpp", and it is one of mixed chunk attention beyond it.
        ValueError: operands that contradict the spec.
    """
    if isinstance(spec, ConditionalAttention):
        return conditional_attention(spec, x, shown, soft=soft, **parameters)
    if isinstance(spec, LinearMixing):
        return linear_mixing(spec, x, **parameters)
    if isinstance(spec, GatedAttention):
        return gated_attention(spec, x, parameters)
    if isinstance(spec, MixedChunkAttention):
        return chunk_op.mix(spec, x, parameters, kernels=kernels)
    return fourier_op.mix(spec, x, **parameters, kernels=kernels)
