"""Runs the generated Triton kernels of routed feed-forward blocks on torch tensors.

Shape legend: N tokens, E experts, M places of an expert, H hidden, F inner.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from codegen.device import DType
from codegen.errors import NotLegal
from codegen.launch import triton_source
from codegen.launch.operands import DTYPES
from codegen.ops.routed_feed_forward import triton_kernel
from codegen.ops.routed_feed_forward.reference import require_fitting
from codegen.routed import RoutedFeedForward


def launch(
    spec: RoutedFeedForward,
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    parameters: Mapping[str, Tensor],
    base: Tensor | None = None,
    *,
    arch: str,
    cut: triton_kernel.Tiling | None = None,
) -> Tensor:
    """[N, H] of x [N, H], dense, in x's dtype; operands as the spec has them, `rows` of any integers.

    Args:
        arch: what tile sizes are for, e.g. "sm_90".
        cut: tile sizes to use instead of `triton_kernel.tiling`'s, for measurements.

    Raises:
        NotLegal: the spec or the dtype is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    dtype = DTYPES.get(x.dtype)
    reason = f"there is no kernel in {x.dtype}" if dtype is None else triton_kernel.legal(spec, dtype)
    if dtype is None or reason is not None:
        raise NotLegal(str(reason), hint='use kernels="auto" or "off"')
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    require_fitting(spec, tuple(x.shape), tuple(rows.shape), tuple(weights.shape), shapes)
    places, tokens = rows.shape[1], x.shape[0]
    out = torch.zeros_like(x) if base is None else base.to(x.dtype).clone(memory_format=torch.contiguous_format)
    if not rows.numel() or not tokens:
        return out
    x, held = x.contiguous(), {name: p.to(x.dtype).contiguous() for name, p in parameters.items()}
    rows, weights = rows.to(torch.int32).contiguous(), weights.float().contiguous()
    cut = triton_kernel.tiling(spec, dtype, arch, places=places) if cut is None else cut
    name, kernels = _load(spec, dtype, arch, cut)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    ups = [held[f"{n}_{kind}"] for kind in ("weight", "bias") for n in ("gate", "up") if f"{n}_{kind}" in held]
    downs = [held[n] for n in ("down_weight", "down_bias") if n in held]
    inner = x.new_empty(spec.experts, places, spec.inner)
    tiles = -(-places // cut.rows)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        up = getattr(kernels, f"{name}_up")[tiles, -(-spec.inner // cut.columns), spec.experts]
        up(x, rows, *ups, inner, places, **options)
        down = getattr(kernels, f"{name}_down")[tiles, -(-spec.hidden // cut.down_columns), spec.experts]
        if spec.once:
            down(inner, rows, weights, *downs, out, places, **options)
            return out
        each = x.new_empty(spec.experts, places, spec.hidden)
        down(inner, rows, weights, *downs, each, places, **options)
        add = getattr(kernels, f"{name}_sum")[-(-tokens // cut.tokens), -(-spec.hidden // cut.wide)]
        add(each, places_of_tokens(rows, tokens), out, base is not None, out, tokens, **options)
    return out


def places_of_tokens(rows: Tensor, tokens: int) -> Tensor:
    """int32 [N, E]: which of all E M places of rows [E, M] a token has with each expert, -1 for none."""
    experts, places = rows.shape
    table = rows.new_full((tokens + 1, experts), -1)  # those of empty places go to a row of their own
    numbers = torch.arange(rows.numel(), dtype=rows.dtype, device=rows.device).reshape(experts, places)
    columns = torch.arange(experts, device=rows.device)[:, None].expand_as(rows)
    table[torch.where(rows < 0, tokens, rows).long(), columns] = numbers
    return table[:tokens]


@functools.lru_cache(maxsize=64)
def _load(spec: RoutedFeedForward, dtype: DType, arch: str, cut: triton_kernel.Tiling) -> tuple[str, ModuleType]:
    """(the kernels' name, the module that holds them)."""
    name = str(triton_kernel.kernel_name(spec, dtype, arch))
    return name, triton_source.kept(name, triton_kernel.source(spec, dtype, arch, cut=cut))
