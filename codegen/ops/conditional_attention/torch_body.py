"""Conditional attention in plain, differentiable torch: light heads block by block, heavy ones on gathered tokens.

Shape legend: B batch, S tokens = G blocks of C, H heads, D features of a head, E hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_attention.reference import bucket
from codegen.ops.conditional_routing.reference import require_fitting
from codegen.ops.conditional_routing.torch_body import route

Parameters = Mapping[str, Tensor]


def conditional_attention(
    spec: ConditionalAttention,
    x: Tensor,
    shown: Tensor | None = None,
    *,
    soft: bool = False,
    **parameters: Tensor,
) -> Tensor:
    """[B, S, hidden] of x [B, S, hidden] and parameters of `ConditionalAttention.shapes`, in x's dtype.

    Args:
        shown: bool [B, S], False for padding.
        soft: as in training.

    Raises:
        ValueError: if x or a parameter contradicts the spec, or a parameter is given or missing against it.
    """
    require_fitting(spec, tuple(x.shape), {name: tuple(p.shape) for name, p in parameters.items()})
    seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if shown is None else shown
    light = local_attention(spec, x, seen, parameters)
    queries = route(spec.queries, x, parameters["query_router"], seen, soft=soft)
    keys = route(spec.keys, x, parameters["key_router"], seen, soft=soft)
    source = keys.gather(x) * keys.weight[..., None].to(x.dtype)
    query = _projected(spec, "heavy_query", queries.gather(x), parameters)
    key, value = (_projected(spec, f"heavy_{role}", source, parameters) for role in ("key", "value"))
    visible = seen.gather(1, keys.index)[:, None, None, :]
    bias = None
    if spec.buckets:
        bias = _bias(spec, keys.index[:, None, :] - queries.index[:, :, None], parameters["distances"])
        bias = bias[:, spec.light_heads :]
    attended = _attended(spec, query, key, value, visible, bias).transpose(1, 2).flatten(2)
    found = queries.add(light, attended @ parameters["heavy_output_weight"])
    return found + parameters["output_bias"] if spec.output_bias else found


def local_attention(spec: ConditionalAttention, x: Tensor, seen: Tensor, parameters: Parameters) -> Tensor:
    """[B, S, E]: the light branch. Each block of queries meets its own keys and those of both blocks beside it."""
    tokens, block = x.shape[1], spec.block(x.shape[1])
    missing = -tokens % block
    query, key, value = (
        torch.unflatten(
            functional.pad(_projected(spec, f"light_{role}", x, parameters), (0, 0, 0, missing)), 2, (-1, block)
        ).transpose(1, 2)
        for role in ("query", "key", "value")
    )  # each [B, G, H, C, D]
    visible = torch.unflatten(functional.pad(seen, (0, missing)), 1, (-1, block))
    at = torch.arange(block, device=x.device)
    distance = torch.arange(3 * block, device=x.device) - block - at[:, None]  # [C, 3 C]
    near = distance.abs() <= spec.radius
    visible = _beside(visible)[:, :, None, None, :] & near
    bias = _bias(spec, distance, parameters["distances"])[: spec.light_heads] if spec.buckets else None
    attended = _attended(spec, query, _beside(key, 3), _beside(value, 3), visible, bias)
    merged = attended.transpose(2, 3).flatten(3).flatten(1, 2)[:, :tokens]  # [B, S, H D]
    return merged @ parameters["light_output_weight"]


def _beside(blocks: Tensor, dim: int = 2) -> Tensor:
    """Of [B, G, ...], each block between the two beside it, joined along `dim`; zeros, or False, beyond the ends."""
    ends = torch.zeros_like(blocks[:, :1])
    around = torch.cat((ends, blocks, ends), dim=1)
    return torch.cat((around[:, :-2], blocks, around[:, 2:]), dim=dim)


def _projected(spec: ConditionalAttention, name: str, x: Tensor, parameters: Parameters) -> Tensor:
    """[B, H, S, D]"""
    product = x @ parameters[f"{name}_weight"]
    bias = parameters.get(f"{name}_bias")
    product = product if bias is None else product + bias
    return torch.unflatten(product, -1, (-1, spec.head_dim)).transpose(1, 2)


def _attended(
    spec: ConditionalAttention, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None
) -> Tensor:
    """[..., S, D]; a query that sees nothing gets zeros."""
    scores = spec.scale * (query @ key.transpose(-2, -1))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    hidden = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = hidden.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return (weights * visible) @ value


def _bias(spec: ConditionalAttention, distance: Tensor, table: Tensor) -> Tensor:
    """[..., H, S, T] at distances [..., S, T] of a table [buckets, H]."""
    reach = np.arange(-spec.farthest, spec.farthest + 1)
    number = torch.from_numpy(bucket(spec, reach)).to(distance.device)
    found = table[number[distance.clamp(-spec.farthest, spec.farthest) + spec.farthest]]
    return found.movedim(-1, -3)
