"""What launchers have in common: dtypes, layouts, checks of operands, and biases and sinks at full size.

Shape legend: B batch, H query heads, KV key/value heads, S queries, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from codegen.device import Device, DType, Language, host
from codegen.errors import NotLegal
from codegen.launch.host import HostKernel, load, thread_pool
from codegen.registry import select, why_not
from codegen.spec import FourierMixing, GroupedQueryAttention

DTYPES = {torch.float32: DType.FLOAT32, torch.float16: DType.FLOAT16, torch.bfloat16: DType.BFLOAT16}

FARTHEST = 2**31 - 1
"""Kernels for graphics cards count elements within one sequence in 32 bits."""


def dense(x: Tensor) -> Tensor:
    """With its last axis dense; heads and tokens may lie anywhere."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, E], laid out as [B, S, H, E]: what an output projection reads next, without a copy."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def wide_bias(bias: Tensor, q: Tensor, keys: int) -> Tensor:
    """[B, H, S, T], nothing copied; boolean, or of q's dtype."""
    typed = bias if bias.dtype == torch.bool else bias.to(q.dtype)
    return typed.expand(*q.shape[:3], keys)


def wide_sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """[B, H, S, n] of q's dtype, nothing copied."""
    return sinks.to(q.dtype).expand(*q.shape[:3], sinks.shape[-1])


def require_fitting(spec: GroupedQueryAttention, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for shapes that contradict the spec."""
    b, t = q.shape[0], k.shape[2]
    if k.shape != (b, spec.kv_heads, t, spec.head_dim) or v.shape != (b, spec.kv_heads, t, spec.value_dim):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit {spec.kv_heads} K/V heads"
        )


def require_mixing(spec: FourierMixing, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> None:
    """Raises ValueError for operands of Fourier mixing that contradict the spec."""
    if x.dim() != 3 or x.shape[2] != spec.hidden or (gain is not None, bias is not None) != (spec.gain, spec.bias):
        raise ValueError(f"operands of shape {tuple(x.shape)} contradict {spec}")


def processor_kernel(spec: Any, *operands: Tensor) -> HostKernel:
    """The C++ kernel of a spec for operands of one dtype on this machine's processor.

    Raises NotLegal: the dtypes, the device or the spec are beyond it.
    """
    dtype, device, hint = operands[0].dtype, operands[0].device.type, 'use kernels="auto" or "off"'
    if any(x.dtype != dtype for x in operands):
        named = ", ".join(dict.fromkeys(str(x.dtype) for x in operands))
        raise NotLegal(f"operands differ in dtype: {named}", hint=hint)
    if device != "cpu" or dtype not in DTYPES:
        raise NotLegal(f"there is no C++ kernel for {dtype} on {device}", hint=hint)
    kernel = _loaded(spec, DTYPES[dtype], host())
    if kernel is None:
        raise NotLegal(why_not(spec, host(), DTYPES[dtype], Language.CPP), hint=hint)
    return kernel


@functools.lru_cache(maxsize=256)
def _loaded(spec: Any, dtype: DType, device: Device) -> HostKernel | None:
    """None where there is no kernel. Kept, since asking for one takes longer than small calls."""
    choice = select(spec, device, dtype, Language.CPP)
    return None if choice is None else load(choice)


def run_on_processor(kernel: HostKernel, block: Any) -> None:
    """A C++ kernel on torch's own threads, with scratch of the size that it asks for."""
    size = kernel.plan(ctypes.byref(block))
    if size:
        workspace = torch.empty(size + 64, dtype=torch.uint8)
        block.workspace = (workspace.data_ptr() + 63) // 64 * 64
    kernel.run(ctypes.byref(block), thread_pool())


def aligned(x: Tensor) -> bool:
    """Whether rows of x can be read 16 bytes at a time: all of them are dense and lie at multiples of 16 bytes."""
    places = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))
    return x.stride(3) == 1 and all(place % 16 == 0 for place in places)


def require_near(*tensors: Tensor) -> None:
    """Raises NotLegal where offsets within a sequence do not fit 32 bits."""
    for x in tensors:
        reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        if reach > FARTHEST:
            raise NotLegal("one sequence's operands reach beyond 2^31 elements", hint='use kernels="off"')
