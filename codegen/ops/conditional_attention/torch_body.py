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
    return unguarded(spec, x, shown, parameters, soft=soft)


def numbers_of(spec: ConditionalAttention) -> Tensor:
    """int64 [2 farthest + 1]: the bucket of each distance from -farthest up."""
    return torch.from_numpy(bucket(spec, np.arange(-spec.farthest, spec.farthest + 1)))


def unguarded(
    spec: ConditionalAttention,
    x: Tensor,
    shown: Tensor | None,
    parameters: Parameters,
    *,
    soft: bool = False,
    numbers: Tensor | None = None,
) -> Tensor:
    """`conditional_attention`, with shapes unchecked: what is written into graphs, with `numbers_of` as an operand."""
    seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if shown is None else shown
    light = local_attention(spec, x, seen, parameters, numbers)
    queries = route(spec.queries, x, parameters["query_router"], seen, soft=soft)
    keys = route(spec.keys, x, parameters["key_router"], seen, soft=soft)
    source = keys.gather(x) * keys.weight[..., None].to(x.dtype)
    query = _projected(spec, "heavy_query", queries.gather(x), parameters)
    key, value = (_projected(spec, f"heavy_{role}", source, parameters) for role in ("key", "value"))
    visible = seen.gather(1, keys.index)[:, None, None, :]
    bias = None
    if spec.buckets:
        bias = _bias(spec, keys.index[:, None, :] - queries.index[:, :, None], parameters["distances"], numbers)
        bias = bias[:, spec.light_heads :]
    attended = _attended(spec, query, key, value, visible, bias).transpose(1, 2).flatten(2)
    found = queries.add(light, attended @ parameters["heavy_output_weight"])
    return found + parameters["output_bias"] if spec.output_bias else found


def local_attention(
    spec: ConditionalAttention, x: Tensor, seen: Tensor, parameters: Parameters, numbers: Tensor | None = None
) -> Tensor:
    """[B, S, E]: the light branch. Each block of queries meets its own keys and those of both blocks beside it."""
    tokens = x.shape[1]
    block = spec.radius + 1 if torch.compiler.is_exporting() else spec.block(tokens)
    query, key, value = (
        _by_block(_projected(spec, f"light_{role}", x, parameters), block).transpose(1, 2)
        for role in ("query", "key", "value")
    )  # each [B, G, H, C, D]
    visible = _by_block(seen[..., None], block)[..., 0]
    at = torch.arange(block, device=x.device)
    distance = torch.arange(3 * block, device=x.device) - block - at[:, None]  # [C, 3 C]
    near = distance.abs() <= spec.radius
    visible = _beside(visible)[:, :, None, None, :] & near
    bias = None
    if spec.buckets:
        bias = _bias(spec, distance, parameters["distances"], numbers)[: spec.light_heads]
    attended = _attended(spec, query, _beside(key, 3), _beside(value, 3), visible, bias)
    merged = attended.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, G C, H D]
    return _first(merged, tokens) @ parameters["light_output_weight"]


def _by_block(x: Tensor, block: int) -> Tensor:
    """[..., S, D] as [..., G, C, D], with zeros, or False, behind the end."""
    tokens = x.shape[-2]
    if not torch.compiler.is_exporting():
        return torch.unflatten(functional.pad(x, (0, 0, 0, -tokens % block)), -2, (-1, block))
    # by an index, with two blocks more: exporters doubt reshapes to sizes that they cannot bound, and fix a size of 1
    count = tokens // block + 2
    numbers = torch.arange(count, device=x.device)[:, None] * block + torch.arange(block, device=x.device)
    return functional.pad(x, (0, 0, 0, 1))[..., numbers.clamp(max=tokens), :]


def _first(x: Tensor, tokens: int) -> Tensor:
    """[B, tokens, F] of [B, G C, F]."""
    if torch.compiler.is_exporting():  # a slice would be checked against a length that exporters cannot bound
        return x.index_select(1, torch.arange(tokens, device=x.device))
    return x[:, :tokens]


def _beside(blocks: Tensor, dim: int = 2) -> Tensor:
    """Of [B, G, ...], each block between the two beside it, joined along `dim`; zeros, or False, beyond the ends."""
    ends, count = torch.zeros_like(blocks[:, :1]), blocks.shape[1]
    around = torch.cat((ends, blocks, ends), dim=1)
    return torch.cat((around[:, :count], blocks, around[:, 2 : 2 + count]), dim=dim)


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


def _bias(spec: ConditionalAttention, distance: Tensor, table: Tensor, numbers: Tensor | None) -> Tensor:
    """[..., H, S, T] at distances [..., S, T] of a table [buckets, H]; `numbers` as of `numbers_of`."""
    number = (numbers_of(spec) if numbers is None else numbers).to(distance.device)
    found = table[number[distance.clamp(-spec.farthest, spec.farthest) + spec.farthest]]
    return found.movedim(-1, -3)
