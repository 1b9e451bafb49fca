"""Linear attention on graphics cards as one torch operator, which runs a generated kernel.

The operator is opaque to torch.compile and torch.export; its gradient is that of the torch body, recomputed. Importing
this module defines it as ``rewriter::linear_attention``.

Shape legend: B batch, H query heads, N key/value heads, S queries, T keys, D head_dim, E value_dim, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codegen.device import Language, host
from codegen.errors import NotLegal
from codegen.launch.operands import DTYPES, empty_output
from codegen.launch.recomputed import Operands, gradients
from codegen.launch.torch_op import graphics_card
from codegen.ops.linear_attention.torch_body import linear_attention as body
from codegen.registry import select, why_not
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention

PARAMETERS = ("log_gain", "query_map", "key_map", "directions")
"""Of all feature maps, in the order in which the operator takes them; each map has some."""


def attention(
    spec: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Mapping[str, Tensor],
    shown: Tensor | None = None,
) -> Tensor:
    """[B, H, S, E] in q's dtype; arguments as `torch_body.linear_attention`.

    Raises:
        NotLegal: there is no kernel of this here.
        ValueError: operands that contradict the spec.
    """
    plain = spec.attention
    given = [parameters.get(name) for name in PARAMETERS]
    numbers = (plain.kv_heads, plain.scale, plain.causal, spec.chunk, list(FeatureMap).index(spec.features))
    found: Tensor = _operator(q, k, v, shown, *given, *numbers)
    return found


@torch.library.custom_op("rewriter::linear_attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shown: Tensor | None,
    log_gain: Tensor | None,
    query_map: Tensor | None,
    key_map: Tensor | None,
    directions: Tensor | None,
    kv_heads: int,
    scale: float,
    causal: bool,
    chunk: int,
    features: int,
) -> Tensor:
    spec = _spec(q, v, kv_heads, scale, causal, chunk, features)
    device = graphics_card(q.device)[0] if q.is_cuda else host()
    dtype = DTYPES.get(q.dtype)
    if dtype is None:
        raise NotLegal(f"there is no kernel in {q.dtype}", hint='use kernels="auto" or "off"')
    if select(spec, device, dtype, Language.TRITON) is None:
        raise NotLegal(why_not(spec, device, dtype, Language.TRITON), hint='use kernels="auto" or "off"')
    from codegen.launch import linear_triton

    parameters = _named(log_gain, query_map, key_map, directions)
    return linear_triton.launch(spec, q, k, v, parameters, shown, arch=device.arch)


@_operator.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return empty_output(q, v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    def by_torch(operands: Operands) -> Tensor:
        q, k, v, shown = operands[:4]
        assert q is not None and k is not None and v is not None
        return body(_spec(q, v, *ctx.rest[:5]), q, k, v, _named(*operands[4:]), shown)

    return gradients(ctx, gradient, by_torch)


_operator.register_autograd(_backward, setup_context=_setup)


def _named(*given: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in zip(PARAMETERS, given, strict=True) if t is not None}


def _spec(
    q: Tensor, v: Tensor, kv_heads: int, scale: float, causal: bool, chunk: int, features: int
) -> LinearAttention:
    plain = GroupedQueryAttention(
        q.shape[1], kv_heads, q.shape[3], v.shape[3], scale, causal=causal, masked_rows_are_zero=True
    )
    return LinearAttention(plain, chunk, list(FeatureMap)[features])
