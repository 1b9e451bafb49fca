"""Fourier mixing by a generated kernel where one is legal and was measured to be faster, else by torch.

Shape legend: B batch, S tokens, D features, J = S // 2 + 1, H = D // 2 + 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from codegen.device import DType, Language, host
from codegen.errors import KernelError, NotLegal
from codegen.launch import fourier_cuda, fourier_host, triton_source
from codegen.launch.operands import DTYPES, require_mixing
from codegen.launch.torch_op import graphics_card
from codegen.ops.fourier_mixing import cuda_kernel, triton_kernel
from codegen.ops.fourier_mixing.torch_body import fourier_mixing
from codegen.ops.fourier_mixing.triton_kernel import Tiling, padded
from codegen.registry import select
from codegen.spec import FourierMixing

FASTER_ON: Mapping[str, Language] = {"sm_90": Language.CUDA}
"""By arch, the kernel that `python -m benchmarks.gpu` found faster than torch's transform at every size it tries: on an
H200 the one in CUDA C++ takes a third to a quarter of torch's time. The Triton kernel takes 0.8 to 1.6 times as long as
torch."""

BUILT_FOR = 64
"""The CUDA C++ kernel is built for each length; "auto" takes it at multiples of this only, so that few are built."""

SMALLEST = 1 << 16
"""Numbers from which the C++ kernel was faster than torch's transform wherever `python -m benchmarks.kernels` tried."""


def mix(
    spec: FourierMixing, x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None, *, kernels: str = "auto"
) -> Tensor:
    """[B, S, D] of x [B, S, D]; arguments as `torch_body.fourier_mixing`, which stands in for a kernel with "off",
    where a gradient is wanted, in captured graphs, under autocast, and with "auto" where none was measured.

    Raises:
        NotLegal: kernels is "cpp", "triton" or "cuda", and there is no such kernel of this.
        ValueError: operands that contradict the spec.
    """
    language = _worthwhile(spec, x) if kernels == "auto" else None if kernels == "off" else Language(kernels)
    if (
        language is None
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or _wants_gradient(x, gain, bias)
    ):
        return fourier_mixing(spec, x, gain, bias)
    try:
        if language is Language.CPP:
            return fourier_host.launch(spec, x, gain, bias)
        by = fourier_cuda.launch if language is Language.CUDA else launch
        return by(spec, x, gain, bias, arch=graphics_card(x.device)[0].arch if x.is_cuda else "")
    except KernelError:
        if kernels != "auto":
            raise
        return fourier_mixing(spec, x, gain, bias)


def _worthwhile(spec: FourierMixing, x: Tensor) -> Language | None:
    """The language of the kernel that was measured to be faster than torch, None without one."""
    dtype = DTYPES.get(x.dtype)
    if dtype is None or torch.is_autocast_enabled(x.device.type):
        return None
    if x.device.type == "cpu":
        wide = x.numel() >= SMALLEST and select(spec, host(), dtype, Language.CPP) is not None
        return Language.CPP if wide else None
    return _measured(x, graphics_card(x.device)[0].arch, dtype) if x.is_cuda else None


def _measured(x: Tensor, arch: str, dtype: DType) -> Language | None:
    if FASTER_ON.get(arch) is Language.CUDA:
        regular = x.shape[1] % BUILT_FOR == 0 and cuda_kernel.legal_tokens(x.shape[1]) is None
        return Language.CUDA if regular and dtype in cuda_kernel.DTYPES else None
    return FASTER_ON.get(arch) if dtype in triton_kernel.DTYPES else None


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def launch(
    spec: FourierMixing,
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    arch: str,
    cut: Tiling | None = None,
) -> Tensor:
    """The kernel's result, [B, S, D].

    Args:
        arch: of the card, e.g. "sm_90"; "" for none, which is an error unless Triton interprets.
        cut: tile sizes to use instead of the default, for measurements.

    Raises:
        NotLegal: the spec, the dtype, the length or the device is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    require_mixing(spec, x, gain, bias)
    dtype = DTYPES.get(x.dtype)
    reason = f"there is no kernel in {x.dtype}" if dtype is None else triton_kernel.legal(spec, dtype)
    if x.shape[1] > triton_kernel.MOST_TOKENS:
        reason = f"more than {triton_kernel.MOST_TOKENS} tokens are left to the fast transform"
    if dtype is None or reason is not None or not arch:
        raise NotLegal(reason or "the kernel needs a graphics card", hint='use kernels="auto" or "off"')
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    cut = cut or triton_kernel.tiling(arch)
    kernels, name = _load(spec, dtype, arch, cut)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    b, s, _ = x.shape
    middle = s // 2 + 1
    grid = (math.ceil(middle / cut.rows), math.ceil(spec.half / cut.columns), b)
    even, odd = (x.new_empty(b, middle, padded(spec.half)) for _ in range(2))
    features = _table(spec.hidden, spec.hidden, spec.half, x.dtype, x.device)
    tokens = _table(s, middle, middle, x.dtype, x.device)
    vectors = [v.to(x.dtype).contiguous() for v in (gain, bias) if v is not None]
    getattr(kernels, f"{name}_features")[grid](x, *x.stride()[:2], *features, even, odd, s, middle, **options)
    getattr(kernels, f"{name}_tokens")[grid](even, odd, *tokens, *vectors, out, s, middle, padded(middle), **options)
    return out


@functools.lru_cache(maxsize=32)
def _table(size: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / size for i < rows, j < columns, rows padded with zeros; worked out in float64."""
    turns = torch.arange(rows)[:, None] * torch.arange(columns) % size
    angles = turns.double() * (2 * math.pi / size)
    pad = (0, padded(columns) - columns)
    made = [torch.nn.functional.pad(f, pad).to(device, dtype) for f in (angles.cos(), angles.sin())]
    return made[0], made[1]


@functools.lru_cache(maxsize=64)
def _load(spec: FourierMixing, dtype: DType, arch: str, cut: Tiling) -> tuple[ModuleType, str]:
    text = triton_kernel.source(spec, dtype, arch, cut=cut)
    name = str(triton_kernel.kernel_name(spec, dtype, arch))
    return triton_source.kept(name, text), name
