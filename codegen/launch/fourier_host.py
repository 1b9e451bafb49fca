"""Calls a C++ kernel of Fourier mixing on torch tensors of the CPU.

Shape legend: B batch, S tokens, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.errors import NotLegal
from codegen.launch.host import MixingLaunch
from codegen.launch.operands import processor_kernel, require_mixing, run_on_processor
from codegen.ops.fourier_mixing.cpp_kernel import MOST_TOKENS
from codegen.spec import FourierMixing


def launch(spec: FourierMixing, x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The kernel's result, [B, S, D] in x's dtype, with torch's own threads.

    Args:
        x: [B, S, D] on the CPU in float32, float16 or bfloat16; sequences and tokens may lie anywhere.
        gain, bias: [D] where the spec has them, of any dtype; the kernel reads them in single precision.

    Raises:
        NotLegal: the dtype, the length or the processor is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    require_mixing(spec, x, gain, bias)
    if x.shape[1] > MOST_TOKENS:
        raise NotLegal(
            f"more than {MOST_TOKENS} tokens do not fit the kernel's scratch", hint='use kernels="auto" or "off"'
        )
    kernel = processor_kernel(spec, x)
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    if not out.numel():
        return out
    vectors = {name: v.float().contiguous() for name, v in (("gain", gain), ("bias", bias)) if v is not None}
    block = MixingLaunch()
    block.x, block.out = x.data_ptr(), out.data_ptr()
    for name, vector in vectors.items():
        setattr(block, name, vector.data_ptr())
    block.batch, block.tokens = x.shape[:2]
    block.x_stride[:], block.out_stride[:] = x.stride()[:2], out.stride()[:2]
    block.threads = torch.get_num_threads()
    run_on_processor(kernel, block)
    return out
