"""Routed feed-forward blocks in plain, differentiable torch: tokens are gathered, blocks work as a batch.

Shape legend: N tokens, E experts, M places of an expert, H hidden, F inner.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codegen.ops.activation.torch_body import activate
from codegen.ops.routed_feed_forward.reference import require_fitting
from codegen.routed import RoutedFeedForward


def routed_feed_forward(
    spec: RoutedFeedForward,
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    parameters: Mapping[str, Tensor],
    base: Tensor | None = None,
) -> Tensor:
    """[N, H] of x [N, H], in x's dtype; operands as the spec has them.

    Raises:
        ValueError: if shapes contradict the spec.
    """
    require_fitting(
        spec,
        tuple(x.shape),
        tuple(rows.shape),
        tuple(weights.shape),
        {name: tuple(p.shape) for name, p in parameters.items()},
    )
    out = torch.zeros_like(x) if base is None else base
    if not rows.numel() or not x.shape[0]:
        return out.clone()
    filled = rows.clamp(min=0).long()
    found = _blocks(spec, x[filled], parameters)
    scaled = torch.where(rows >= 0, weights, torch.zeros_like(weights))[..., None].to(x.dtype)
    return out.index_add(0, filled.reshape(-1), (found * scaled).reshape(-1, spec.hidden))


def _blocks(spec: RoutedFeedForward, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """[E, M, H] of x [E, M, H]"""

    def projected(name: str, given: Tensor) -> Tensor:
        weight, bias = parameters[f"{name}_weight"].to(x.dtype), parameters.get(f"{name}_bias")
        return given @ weight if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], given, weight)

    up = projected("up", x)
    inner = activate(spec.activation, projected("gate", x)) * up if spec.gated else activate(spec.activation, up)
    return projected("down", inner)
