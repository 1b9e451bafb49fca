"""Mixed chunk attention in torch: by generated kernels where they were measured to be faster or are asked for, else by
torch.

Shape legend: B batch, S tokens, E hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codegen.device import Language, host
from codegen.errors import KernelError
from codegen.launch import chunk_host, chunk_operator
from codegen.launch.operands import DTYPES
from codegen.ops.mixed_chunk_attention.torch_body import mixed_chunk_attention
from codegen.registry import select
from codegen.spec import MixedChunkAttention
from codegen.tuning.chunks import faster

LEAST_SLICE = 64
"""Value features that the C++ kernel gives to a thread at least. Its tables were measured on one thread."""


def mix(
    spec: MixedChunkAttention,
    x: Tensor,
    weights: Mapping[str, Tensor],
    shown: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> Tensor:
    """[B, S, E] of x [B, S, E]; arguments as `torch_body.mixed_chunk_attention`.

    The C++ kernels are called outside captured graphs and without gradients, with "auto" where they were measured to be
    faster; Triton's by name alone.

    Raises:
        NotLegal: kernels is "cpp" or "triton", and there is no such kernel of this.
        ValueError: operands that contradict the spec.
    """
    if kernels == "triton":
        return chunk_operator.mixed_chunk_attention(spec, x, weights, shown)
    if kernels == "cpp" and not _captured_or_trained(x, weights):
        return chunk_host.mixed_chunk_attention(spec, x, weights, shown)
    if kernels == "auto" and _worthwhile(spec, x, weights):
        try:
            return chunk_host.mixed_chunk_attention(spec, x, weights, shown)
        except KernelError:  # there is no compiler, or no room for what it makes
            pass
    return mixed_chunk_attention(spec, x, weights, shown)


def _worthwhile(spec: MixedChunkAttention, x: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether the C++ kernels can be called as things are, and were measured to be faster than torch."""
    dtype = DTYPES.get(x.dtype)
    if dtype is None or x.device.type != "cpu" or x.dim() != 3 or _captured_or_trained(x, weights):
        return False
    if torch.is_autocast_enabled("cpu") or any(t.dtype != x.dtype for t in weights.values()):
        return False
    if spec.expanded < LEAST_SLICE * torch.get_num_threads() or torch.onnx.is_in_onnx_export():
        return False
    device = host()
    legal = select(spec, device, dtype, Language.CPP) is not None
    return legal and faster(spec, dtype, device.arch, x.shape[0] * x.shape[1])


def _captured_or_trained(x: Tensor, weights: Mapping[str, Tensor]) -> bool:
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights.values()))
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or gradients
