"""Calls a C++ kernel of routed feed-forward blocks on torch tensors of the CPU.

Shape legend: N tokens, E experts, M places of an expert, H hidden, F inner.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codegen.launch.host import RoutedLaunch
from codegen.launch.operands import processor_kernel, run_on_processor
from codegen.ops.routed_feed_forward.reference import require_fitting
from codegen.routed import RoutedFeedForward


def launch(
    spec: RoutedFeedForward,
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    parameters: Mapping[str, Tensor],
    base: Tensor | None = None,
) -> Tensor:
    """[N, H] of x [N, H], dense, in x's dtype, with torch's own threads; operands as the spec has them.

    Raises:
        NotLegal: the spec, the dtype or the device is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    require_fitting(spec, tuple(x.shape), tuple(rows.shape), tuple(weights.shape), shapes)
    kernel = processor_kernel(spec, x)
    if not rows.numel() or not x.shape[0]:
        return torch.zeros_like(x) if base is None else base.to(x.dtype).clone()
    if int(rows.max()) >= x.shape[0]:
        raise ValueError(f"rows must be tokens below {x.shape[0]}")
    held = {"x": x, "rows": rows.to(torch.int32), "weights": weights.float()}
    for name, p in parameters.items():
        matrix = name.endswith("_weight")
        held[name.removesuffix("_weight") if matrix else name] = p.to(x.dtype) if matrix else p.float()
    if base is not None:
        held["base"] = base.to(x.dtype)
    held = {name: t.detach().contiguous() for name, t in held.items()}
    out = torch.empty(x.shape, dtype=x.dtype)
    block = RoutedLaunch()
    for name, tensor in (*held.items(), ("out", out)):
        setattr(block, name, tensor.data_ptr())
    block.tokens, block.places, block.threads = x.shape[0], rows.shape[1], torch.get_num_threads()
    run_on_processor(kernel, block)
    return out
