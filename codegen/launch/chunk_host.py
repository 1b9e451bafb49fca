"""Mixed chunk attention on CPUs: projections by torch, what is between them by a C++ kernel.

Long causal sequences go block by block, so that a block's gates and values are still in the cache when they are used.

Shape legend: B batch, S tokens, E hidden, F expanded, N base, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from codegen.launch.host import ChunkLaunch
from codegen.launch.operands import processor_kernel, run_on_processor
from codegen.ops.gated_attention.reference import check
from codegen.ops.gated_attention.torch_body import Weights, expanded, heads
from codegen.ops.mixed_chunk_attention.torch_body import BLOCK, learned_bias
from codegen.spec import MixedChunkAttention

HEADS = ("quadratic_query", "linear_query", "quadratic_key", "linear_key")


def mixed_chunk_attention(
    spec: MixedChunkAttention, x: Tensor, weights: Weights, shown: Tensor | None = None
) -> Tensor:
    """[B, S, E] of x [B, S, E], in x's dtype, without gradients; operands as in `torch_body.mixed_chunk_attention`.

    Raises:
        NotLegal: the dtype, the device or the spec is beyond the kernel.
        ValueError: operands that contradict the spec.
    """
    check(spec, x, weights)
    bias = learned_bias(spec, weights, like=x)
    size = max(BLOCK // spec.chunk, 1) * spec.chunk
    if not spec.causal or x.shape[1] <= size:
        return _at_once(spec, x, weights, bias, shown)
    output, state = torch.empty_like(x), torch.zeros(x.shape[0], spec.base, spec.expanded)
    for first in range(0, x.shape[1], size):
        at = slice(first, first + size)
        hidden = None if shown is None else shown[:, at]
        output[:, at] = _at_once(spec, x[:, at], weights, bias, hidden, state, first)
    return output


def _at_once(
    spec: MixedChunkAttention,
    x: Tensor,
    weights: Weights,
    bias: Tensor | None,
    shown: Tensor | None,
    state: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    gate, value, latent = expanded(spec, x, weights)
    product = launch(spec, gate, value, heads(spec, latent, weights, first), bias, shown, state, first)
    return functional.linear(product, weights["out_weight"], weights["out_bias"])


def launch(
    spec: MixedChunkAttention,
    gate: Tensor,
    value: Tensor,
    heads: Sequence[Tensor],
    bias: Tensor | None,
    shown: Tensor | None,
    state: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """[B, S, F]: the gate times what was mixed, of gate and value [B, S, F] and four heads [B, S, N] of one dtype.

    Args:
        bias: [C, C], added to a chunk's scores.
        shown: bool [B, S], False for tokens that are hidden.
        state: dense float32 [B, N, F], of a causal spec: the sum of kᵀ v over the `first` tokens before, whole chunks;
            it is moved behind these tokens, in place. None for none before.

    Raises NotLegal: the dtype, the device or the spec is beyond the kernel.
    """
    given = dict(zip(("gate", "value", *HEADS), (gate, value, *heads), strict=True))
    kernel = processor_kernel(spec, *given.values())
    held = {name: x if x.stride(2) == 1 else x.contiguous() for name, x in given.items()}
    out = torch.empty(gate.shape, dtype=gate.dtype)
    if not out.numel():
        return out
    block = ChunkLaunch()
    for name, tensor in (*held.items(), ("out", out)):
        setattr(block, name, tensor.data_ptr())
        getattr(block, f"{name}_stride")[:] = tensor.stride()[:2]
    if bias is not None:
        held["bias"] = bias.float().contiguous()
        block.bias = held["bias"].data_ptr()
    if shown is not None:
        held["shown"] = shown.to(torch.uint8).expand(out.shape[:2]).contiguous()
        block.shown = held["shown"].data_ptr()
    if state is not None:
        block.state = state.data_ptr()
    block.batch, block.tokens = out.shape[:2]
    block.before = first // spec.chunk
    block.threads = torch.get_num_threads()
    run_on_processor(kernel, block)
    return out
