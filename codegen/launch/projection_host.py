"""Calls a C++ kernel of a linear layer with its activation on torch tensors of the CPU.

Shape legend: B batch, S tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.device import host
from codegen.launch.host import ProjectionLaunch
from codegen.launch.operands import processor_kernel, run_on_processor
from codegen.ops.projection.reference import require_fitting
from codegen.projection import Projection

FASTER_ON = ("avx2",)
"""Instruction sets on which the kernel was measured to be faster than torch's product, in float32: on one thread of an
AMD EPYC. With AVX-512 it was not measured."""


def worthwhile(x: Tensor) -> bool:
    """Whether the kernel is there for x's dtype and was measured to be faster than torch's product."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and host().arch in FASTER_ON


def launch(
    spec: Projection, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The kernel's result, [B, S, O], with torch's own threads.

    Args:
        x: [B, S, I] in float32; sequences and tokens may lie anywhere.
        weight: [O, I]; bias: [O], None for none.
        out: [B, S, O] to write to, whose tokens are dense; None for a new one.

    Raises:
        NotLegal: the dtype, the spec or the processor is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    require_fitting(spec, tuple(x.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape))
    kernel = processor_kernel(spec, x, weight, *([] if bias is None else [bias]))
    out = x.new_empty(*x.shape[:2], spec.outputs) if out is None else out
    fits = out.shape == (*x.shape[:2], spec.outputs) and out.dtype == x.dtype
    if not fits or (out.numel() and spec.outputs > 1 and out.stride(2) != 1):
        raise ValueError(f"out {tuple(out.shape)} does not fit {spec}")
    if not out.numel():
        return out
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight))
    bias = None if bias is None else bias.contiguous()
    block = ProjectionLaunch()
    block.x, block.weight, block.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    block.bias = None if bias is None else bias.data_ptr()
    block.batch, block.tokens = x.shape[:2]
    block.weight_stride = weight.stride(0)
    block.x_stride[:], block.out_stride[:] = x.stride()[:2], out.stride()[:2]
    block.threads = torch.get_num_threads()
    run_on_processor(kernel, block)
    return out
