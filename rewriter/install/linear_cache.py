"""A cache layer of fixed size for causal linear attention: the keys of two chunks, and one sum for all before them.

Such a layer takes the place of an empty growing one in transformers' `DynamicCache`, so that `generate` holds no more
than that without being asked to. What it answers is what the growing cache answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from codegen.ops.linear_attention.torch_body import settled
from codegen.spec import LinearAttention
from rewriter.errors import UsageError


class LinearLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [B, N, tokens, D] of the chunk in progress and the one before.

    Attributes:
        sums: [B, N, F, V + 1], float32 or wider: what all earlier chunks add up to; None as long as there are none.
        cumulative_length: tokens that were stored so far.
    """

    is_croppable = False

    def __init__(self, spec: LinearAttention) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spec = spec
        self.sums: Tensor | None = None
        self.cumulative_length = 0

    @property
    def key_positions(self) -> Tensor:
        """[T], where the keys that are held stand in the sequence."""
        assert self.keys is not None
        return torch.arange(self.cumulative_length - self.keys.shape[-2], self.cumulative_length, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All that is held and what is new. Nothing is dropped before `settle`."""
        self.cumulative_length += key_states.shape[-2]
        held: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return held

    def settle(self, sums: Tensor) -> None:
        """`sums` has come to hold those of the keys that no later token is near to: drop them."""
        assert self.keys is not None and self.values is not None
        done = settled(self.spec, self.keys.shape[-2])
        if done:  # as copies: a slice would keep all that it is taken from
            self.sums, self.keys, self.values = (
                sums,
                self.keys[..., done:, :].clone(),
                self.values[..., done:, :].clone(),
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for the whole sequence; of these the attention takes the columns at `key_positions`."""
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far, held or not."""
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length, self.sums = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Raises UsageError: what a sum has taken in cannot come out again."""
        if tokens_to_remove:
            raise UsageError("the state of linear attention cannot be cropped", hint="decode without an assistant")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.sums = None if self.sums is None else self.sums.index_select(0, beam_idx.to(self.sums.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.sums = None if self.sums is None else self.sums.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.sums = None if self.sums is None else self.sums[indices]

    def offload(self) -> None:
        super().offload()  # type: ignore[no-untyped-call]
        self.sums = None if self.sums is None else self.sums.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[no-untyped-call]
        self.sums = None if self.sums is None else self.sums.to(self.device, non_blocking=True)


def claim(cache: Any, index: int | None, spec: LinearAttention) -> None:
    """Put a layer of fixed size into `cache`, where there is a plain and empty one for the attention of this number.

    Nothing is done where the order is not causal, nor to caches that were filled by something else, are of another
    kind, or part of a program being captured: these go on growing.
    """
    layers = cache.layers
    if index is None or not spec.attention.causal or torch.compiler.is_compiling():
        return
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        layers += [DynamicLayer() for _ in range(index + 1 - len(layers))]  # type: ignore[no-untyped-call]
    if index < len(layers) and type(layers[index]) is DynamicLayer and not layers[index].get_seq_length():
        layers[index] = LinearLayer(spec)
