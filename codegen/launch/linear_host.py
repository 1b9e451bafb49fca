"""Calls a C++ kernel of linear attention on torch tensors of the CPU.

Shape legend: B batch, H query heads, N key/value heads, S queries, T keys, D head_dim, V value_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.launch.host import LinearLaunch
from codegen.launch.operands import dense, empty_output, processor_kernel, run_on_processor
from codegen.ops.linear_attention.cpp_kernel import MAP_LANES, scales
from codegen.ops.linear_attention.reference import check
from codegen.ops.linear_attention.torch_body import Parameters
from codegen.spec import FeatureMap, LinearAttention


def launch(
    spec: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Parameters,
    shown: Tensor | None = None,
) -> Tensor:
    """The kernel's result, [B, H, S, V] in q's dtype, with torch's own threads; operands as in the torch body.

    Raises:
        NotLegal: the dtype, the device or the spec is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    check(spec, q, k, v, parameters)
    kernel = processor_kernel(spec, q, k, v)
    out = empty_output(q, v)
    if not out.numel():
        return out
    block = LinearLaunch()
    held = {name: dense(x) for name, x in (("q", q), ("k", k), ("v", v))}
    for name, tensor in (*held.items(), ("out", out)):
        setattr(block, name, tensor.data_ptr())
        getattr(block, f"{name}_stride")[:] = tensor.stride()[:3]
    block.batch, block.queries, block.keys = q.shape[0], q.shape[2], k.shape[2]
    held |= {name: x.detach() for name, x in _wide(spec, parameters).items()}
    if shown is not None:
        held["shown"] = shown.to(torch.uint8).expand(q.shape[0], k.shape[2]).contiguous()
        block.shown_stride = held["shown"].stride(0)
    for name in held.keys() - {"q", "k", "v"}:
        setattr(block, name, held[name].data_ptr())
    for name, number in scales(spec).items():
        setattr(block, name, number)
    block.threads = torch.get_num_threads()
    run_on_processor(kernel, block)
    return out


def _wide(spec: LinearAttention, parameters: Parameters) -> dict[str, Tensor]:
    """Parameters as the kernel reads them: gains, and maps transposed and padded, in single precision."""
    found = {"gain": parameters["log_gain"].float().exp().contiguous()}
    if spec.features is FeatureMap.LEARNED:
        pad = -spec.attention.head_dim % MAP_LANES
        for name in ("query_map", "key_map"):
            found[name] = F.pad(parameters[name].float().transpose(-1, -2), (0, pad)).contiguous()
    return found
