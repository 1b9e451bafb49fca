"""Mixed chunk attention on CPUs: what is between the projections by a C++ kernel, these by another one where that was
measured to be faster than torch.

Long causal sequences go block by block, so that a block's gates and values are still in the cache when they are used.

Shape legend: B batch, S tokens, E hidden, F expanded, N base, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from codegen.activation import Activation
from codegen.launch import projection_host
from codegen.launch.host import ChunkLaunch
from codegen.launch.operands import processor_kernel, run_on_processor
from codegen.ops.gated_attention.reference import check
from codegen.ops.gated_attention.torch_body import Weights, activated, expanded, heads
from codegen.ops.mixed_chunk_attention.torch_body import BLOCK, learned_bias
from codegen.projection import Projection
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
    output, rooms = torch.empty_like(x), _Rooms(spec, x, min(size, x.shape[1]) if spec.causal else x.shape[1])
    if not spec.causal or x.shape[1] <= size:
        _into(output, spec, x, weights, bias, shown, rooms)
        return output
    state = torch.zeros(x.shape[0], spec.base, spec.expanded)
    for first in range(0, x.shape[1], size):
        at = slice(first, first + size)
        hidden = None if shown is None else shown[:, at]
        _into(output[:, at], spec, x[:, at], weights, bias, hidden, rooms, state, first)
    return output


class _Rooms:
    """Memory for what lies between both projections of a block, for one block after the other: memory that is new costs
    a page fault for every page."""

    def __init__(self, spec: MixedChunkAttention, x: Tensor, tokens: int) -> None:
        held = projection_host.worthwhile(x)
        self._whole = x.new_empty(x.shape[0], tokens, 2 * spec.expanded + spec.base) if held else None
        self._product = x.new_empty(x.shape[0], tokens, spec.expanded)

    def whole(self, tokens: int) -> Tensor | None:
        """[B, S, 2 F + N]; None where torch takes memory of its own."""
        return None if self._whole is None else self._whole[:, :tokens]

    def product(self, tokens: int) -> Tensor:
        """[B, S, F]"""
        return self._product[:, :tokens]


def _into(
    output: Tensor,
    spec: MixedChunkAttention,
    x: Tensor,
    weights: Weights,
    bias: Tensor | None,
    shown: Tensor | None,
    rooms: _Rooms,
    state: Tensor | None = None,
    first: int = 0,
) -> None:
    gate, value, latent = _expanded(spec, x, weights, rooms.whole(x.shape[1]))
    out = rooms.product(x.shape[1])
    product = launch(spec, gate, value, heads(spec, latent, weights, first), bias, shown, state, first, out=out)
    weight, added = weights["out_weight"], weights["out_bias"]
    if projection_host.worthwhile(product):
        projection_host.launch(Projection(spec.expanded, spec.hidden), product, weight, added, out=output)
    else:
        output[:] = functional.linear(product, weight, added)


def _expanded(
    spec: MixedChunkAttention, x: Tensor, weights: Weights, whole: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `expanded`, in `whole`; one activation of all is part of the product."""
    if whole is None:
        return expanded(spec, x, weights)
    kinds: tuple[Activation | None, ...] = (spec.gate, spec.value, spec.latent)
    if len(set(kinds)) == 1:
        kinds = (None, None, None)
    layer = Projection(spec.hidden, 2 * spec.expanded + spec.base, None if any(kinds) else spec.gate)
    projection_host.launch(layer, x, weights["expand_weight"], weights["expand_bias"], out=whole)
    parts = torch.split(whole, [spec.expanded, spec.expanded, spec.base], dim=-1)
    gate, value, latent = (activated(kind, part) for kind, part in zip(kinds, parts, strict=True))
    return gate, value, latent


def launch(
    spec: MixedChunkAttention,
    gate: Tensor,
    value: Tensor,
    heads: Sequence[Tensor],
    bias: Tensor | None,
    shown: Tensor | None,
    state: Tensor | None = None,
    first: int = 0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """[B, S, F]: the gate times what was mixed, of gate and value [B, S, F] and four heads [B, S, N] of one dtype.

    Args:
        bias: [C, C], added to a chunk's scores.
        shown: bool [B, S], False for tokens that are hidden.
        state: dense float32 [B, N, F], of a causal spec: the sum of kᵀ v over the `first` tokens before, whole chunks;
            it is moved behind these tokens, in place. None for none before.
        out: [B, S, F] of the same dtype to write to, whose tokens are dense; None for a new one.

    Raises NotLegal: the dtype, the device or the spec is beyond the kernel.
    """
    given = dict(zip(("gate", "value", *HEADS), (gate, value, *heads), strict=True))
    kernel = processor_kernel(spec, *given.values())
    held = {name: x if x.stride(2) == 1 else x.contiguous() for name, x in given.items()}
    out = torch.empty(gate.shape, dtype=gate.dtype) if out is None else out
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
