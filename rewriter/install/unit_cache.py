"""Cached decoding of gated units behind transformers' caches.

A unit's state is no keys and values, so it is kept on the cache object beside what that holds, by the module that it
belongs to. In its place the cache gets one number for each token: the number of its row in the batch. From that the
cache counts tokens, as models ask it to, and the last of them tells whether rows were repeated or put into another
order since (beams, several answers to one prompt); the state then follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codegen.launch.mixing_op import mix
from codegen.ops.gated_attention import torch_body as quadratic
from codegen.ops.gated_attention.torch_body import GatedState
from codegen.ops.mixed_chunk_attention import torch_body as chunked
from codegen.ops.mixed_chunk_attention.torch_body import ChunkState
from codegen.spec import GatedAttention, GatedUnit

STATES = "gated_unit_states"


@dataclass(frozen=True)
class Step:
    """Tokens that a cache has just been told of.

    Attributes:
        states: of the cache, by the unit that they belong to.
        seen: tokens before these. order: rows of the batch that the present ones were then, [B]; None of none.
        tokens: (B, S).
    """

    states: dict[int, GatedState | ChunkState]
    seen: int
    order: Tensor | None
    tokens: tuple[int, int]


def advanced(mixer: nn.Module, cache: Any, x: Tensor) -> Step:
    """Count the tokens x [B, S, E] in the cache, behind those that are there.

    Raises:
        TypeError: the cache is of a kind that does not grow, was filled by something else, or cut.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # of a decoder that reads an encoder, too
    if not callable(getattr(cache, "update", None)):
        raise TypeError("a gated attention unit needs a cache that grows, as transformers' DynamicCache")
    layer = int(getattr(mixer, "layer_idx", None) or 0)
    states: dict[int, GatedState | ChunkState] = cache.__dict__.setdefault(STATES, {})
    state, seen = states.get(id(mixer)), int(cache.get_seq_length(layer))
    if seen != (0 if state is None else state.position):
        raise TypeError("the cache was cut, or filled by something else than this model's decoding without gradients")
    rows = torch.arange(x.shape[0], dtype=torch.float32, device=x.device)[:, None, None, None]
    tags = rows.expand(-1, 1, x.shape[1], 1)
    held, _ = cache.update(tags, tags, layer)
    if held.shape[2] != seen + x.shape[1]:
        raise TypeError("a gated attention unit needs a cache that grows, as transformers' DynamicCache")
    return Step(states, seen, held[:, 0, seen - 1, 0].long() if seen else None, (x.shape[0], x.shape[1]))


def resumed(unit: nn.Module, spec: GatedUnit, step: Step, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """[B, S, E] for the tokens x [B, S, E] of a step.

    Where gradients are wanted no state is kept, so that the cache cannot be gone on with.

    Raises:
        TypeError: the unit has not seen the tokens before these.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters.values())):
        return mix(spec, x, parameters)
    state = step.states.get(id(unit))
    if step.seen != (0 if state is None else state.position):
        raise TypeError("the cache was cut, or filled by something else than this model's decoding without gradients")
    if state is None:
        state = _start(spec, x)
    elif step.order is not None:
        state.select(step.order)
    step.states[id(unit)] = state
    if isinstance(spec, GatedAttention):
        assert isinstance(state, GatedState)
        return quadratic.resume(spec, x, parameters, state)
    assert isinstance(state, ChunkState)
    return chunked.resume(spec, x, parameters, state)


def _start(spec: GatedUnit, x: Tensor) -> GatedState | ChunkState:
    if isinstance(spec, GatedAttention):
        return quadratic.start(spec, x.shape[0], x)
    return chunked.start(spec, x.shape[0], x)
