"""A key/value cache of bounded size for models whose attentions see a window and some first tokens, or are linear.

Keys that no later query sees are dropped, and the others keep the positions and the rotation that they were stored
with: so what a model answers is what it answers with a cache that holds everything (unlike StreamingLLM,
arXiv 2309.17453, which gives tokens new positions inside its cache to run beyond the length of training).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from codegen.sight import Pattern, Sight
from rewriter.errors import UsageError
from rewriter.install.linear_cache import LinearLayer
from rewriter.install.torch_module import mixers


def bounded_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for ``past_key_values`` of a Hugging Face decoder, or of its ``generate``.

    Layers rewritten to `window` hold their first tokens and the last ``w - 1``, those rewritten to `linear` two chunks
    and a sum (as they do in transformers' own cache); all others hold everything, or what the model's config says. It
    takes any number of tokens at a time and goes through beam search; it cannot be cropped.

    Raises UsageError if no layer of the model sees a causal window or is linear and causal.
    """
    config: Any = getattr(model, "config", None)
    cache = DynamicCache(config=config) if config is not None else DynamicCache()
    sizes = {m.layer_index: found for m in mixers(model).values() if (found := _size(m.spec.pattern)) is not None}
    bounded = {index: size for index, size in sizes.items() if index is not None}
    terms = {m.layer_index: m.linear_term.spec for m in mixers(model).values() if m.linear_term is not None}
    linear = {index: spec for index, spec in terms.items() if index is not None and spec.attention.causal}
    if not bounded and not linear:
        raise UsageError(
            "no attention of the model sees a causal window or is linear, so that none can do without its first keys",
            hint='rewrite it with target="window" or target="linear" first',
        )
    plain: Any = DynamicLayer
    cache.layers += [plain() for _ in range(max([*bounded, *linear]) + 1 - len(cache.layers))]
    for index, (reach, sinks) in bounded.items():
        cache.layers[index] = BoundedLayer(reach, sinks)
    for index, spec in linear.items():
        cache.layers[index] = LinearLayer(spec)
    return cache


def _size(pattern: Pattern) -> tuple[int, int] | None:
    """(nearest keys, first keys) that queries see at most; None where they see others."""
    plain = all(s == Sight(reach=s.reach, sinks=s.sinks, ordered=True) for s in pattern)
    return (max(s.reach for s in pattern), max(s.sinks for s in pattern)) if pattern and plain else None


class BoundedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [B, N, tokens, D] of one attention: the first `sinks` tokens, and the last ``reach - 1``.

    Attributes:
        cumulative_length: tokens that were stored so far.
        key_positions: [T], where the keys that the last `update` returned stand in the sequence.
    """

    is_croppable = False

    def __init__(self, reach: int, sinks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reach, self.sinks = reach, sinks
        self.cumulative_length = 0
        self.key_positions: Tensor | None = None
        self._held = torch.empty(0, dtype=torch.long)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All that is held and what is new; afterwards what no later query sees is dropped."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._held = torch.empty(0, dtype=torch.long, device=key_states.device)
        assert self.keys is not None and self.values is not None
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        start, self.cumulative_length = self.cumulative_length, self.cumulative_length + key_states.shape[-2]
        fresh = torch.arange(start, self.cumulative_length, device=keys.device)
        self.key_positions = torch.cat([self._held, fresh])
        self.keys, self.values, self._held = (self._left(x, axis) for x, axis in ((keys, -2), (values, -2),
                                                                                 (self.key_positions, 0)))  # fmt: skip
        return keys, values

    def _left(self, x: Tensor, axis: int) -> Tensor:
        size, last = x.shape[axis], self.reach - 1
        if size <= self.sinks + last:
            return x
        return torch.cat([x.narrow(axis, 0, self.sinks), x.narrow(axis, size - last, last)], dim=axis)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for the whole sequence; of these the attention takes the columns at `key_positions`."""
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far, held or not."""
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length, self.key_positions = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Raises UsageError: what was dropped cannot come back."""
        if tokens_to_remove:
            raise UsageError("a bounded cache cannot be cropped", hint="use the model's own cache")
