"""Linear attention by a generated C++ kernel where one is legal and was measured to be faster, else by torch.

Shape legend: B batch, H query heads, N key/value heads, S queries, T keys, D head_dim, V value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.device import Language, host
from codegen.errors import KernelError, NotLegal
from codegen.launch import linear_host, linear_operator
from codegen.launch.operands import DTYPES
from codegen.ops.linear_attention.torch_body import Parameters, linear_attention
from codegen.registry import select
from codegen.spec import LinearAttention

SMALLEST = 1 << 24
"""Floating-point operations of a call, in whole chunks, below which it is not worth a build. From twice as many on the
kernel was several times as fast as the torch body wherever `python -m benchmarks.kernels` tried."""

THREADS_PER_HEAD = 3
"""A thread computes whole key/value heads; with more threads for each head, torch may catch up."""


def attention(
    spec: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Parameters,
    shown: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> Tensor:
    """[B, H, S, V] in q's dtype; arguments as `torch_body.linear_attention`, which stands in for a kernel with "off",
    where a gradient is wanted, in captured graphs, under autocast, and with "auto" where none was measured.

    Raises:
        NotLegal: a language was asked for by name and has no kernel of this.
        ValueError: operands that contradict the spec.
    """
    if kernels == "triton":
        return linear_operator.attention(spec, q, k, v, parameters, shown)
    if kernels not in ("auto", "off", "cpp"):
        raise NotLegal(f"there is no {kernels} kernel of linear attention", hint='use kernels="auto" or "off"')
    tensors = (q, k, v, *parameters.values())
    plain = (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )
    if kernels == "off" or plain or (kernels == "auto" and not _worthwhile(spec, q, k, v)):
        return linear_attention(spec, q, k, v, parameters, shown)
    try:
        return linear_host.launch(spec, q, k, v, parameters, shown)
    except KernelError:
        if kernels != "auto":
            raise
        return linear_attention(spec, q, k, v, parameters, shown)


def _worthwhile(spec: LinearAttention, q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not q.dtype == k.dtype == v.dtype:
        return False
    enough = q.dtype in DTYPES and spec.flops(q.shape[0], q.shape[2]) >= SMALLEST
    enough &= torch.get_num_threads() <= THREADS_PER_HEAD * q.shape[0] * spec.attention.kv_heads
    return enough and select(spec, host(), DTYPES[q.dtype], Language.CPP) is not None
