"""Runs the CUDA C++ kernels of Fourier mixing: over features, then over tokens.

Shape legend: B batch, S tokens, D features, H = D // 2 + 1.
"""

from __future__ import annotations

import contextlib
import functools
from ctypes import c_int, c_longlong, c_void_p

import torch
from torch import Tensor

from codegen.device import DType
from codegen.errors import NotLegal
from codegen.launch.cuda_binary import Load, on_card
from codegen.launch.cuda_driver import Argument, Kernel
from codegen.launch.operands import DTYPES, require_mixing
from codegen.ops.fourier_mixing import cuda_kernel
from codegen.ops.fourier_mixing.cuda_kernel import Cut, Plan
from codegen.spec import FourierMixing


def launch(
    spec: FourierMixing,
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    arch: str,
    cut: Cut | None = None,
    load: Load = on_card,
) -> Tensor:
    """The kernels' result, [B, S, D] in x's dtype. A kernel is built for each length that is met.

    Args:
        arch: of the card, e.g. "sm_90".
        cut: how to cut the work instead of the default, for measurements.
        load: what makes kernels out of a source.

    Raises:
        NotLegal: the spec, the dtype or the length is beyond the kernel.
        NoCompiler, CompilationFailed: it cannot be built.
        ValueError: operands that contradict the spec.
    """
    require_mixing(spec, x, gain, bias)
    dtype = DTYPES.get(x.dtype)
    reason = f"there is no kernel in {x.dtype}" if dtype is None else cuda_kernel.legal(spec, dtype)
    reason = reason or (cuda_kernel.legal_tokens(x.shape[1]) if x.numel() else None)
    if dtype is None or reason is not None or not arch:
        raise NotLegal(reason or "the kernel needs a graphics card", hint='use kernels="auto" or "off"')
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    b, s, _ = x.shape
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        plan, kernels = _kernels(spec, dtype, arch, s, cut, load, x.device)
        middle = torch.empty((b * s, plan.width), dtype=torch.int32, device=x.device)
        vectors = [v.to(x.dtype).contiguous() for v in (gain, bias) if v is not None]
        given = (c_void_p(x.data_ptr()), c_longlong(x.stride(0)), c_longlong(x.stride(1)))
        between = c_void_p(middle.data_ptr())
        kernels["_features"]((b * plan.rest, 1, 1), plan.feature_block, plan.feature_shared, (*given, between))
        groups = b * plan.cut.bundle
        grid = (-(-groups * spec.half // plan.cut.columns), 1, 1)
        if not plan.in_registers:
            grid = (groups, -(-spec.half // plan.cut.columns), 1)
        made: tuple[Argument, ...] = (
            between,
            *(c_void_p(v.data_ptr()) for v in vectors),
            c_void_p(out.data_ptr()),
            c_int(groups),
        )
        kernels["_tokens"](grid, plan.token_block, plan.token_shared, made, early=plan.cut.early)
    return out


@functools.lru_cache(maxsize=256)
def _kernels(
    spec: FourierMixing, dtype: DType, arch: str, tokens: int, cut: Cut | None, load: Load, device: torch.device
) -> tuple[Plan, dict[str, Kernel]]:
    """Loaded for one device; another one's context has kernels of its own."""
    plan = cuda_kernel.plan(spec, tokens, arch, cut)
    name = str(cuda_kernel.kernel_name(spec, dtype, arch, tokens=tokens))
    text = cuda_kernel.source(spec, dtype, arch, tokens=tokens, cut=cut)
    return plan, load(name, text, arch, {"_features": plan.feature_shared, "_tokens": plan.token_shared})
