"""Decoders of encoder-decoder models as people export them: one file fills the caches, another goes on with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.zoo.case import ZooCase
from tests.zoo.exports import Exported, Job, cache_argument, cached
from tests.zoo.feeds import HEADS, LAYERS, WIDTH, keep, tokens
from tests.zoo.more_models import AUDIO_POSITIONS

Step = Literal["first", "next"]
HEAD_DIM = WIDTH // HEADS


class FirstStep(nn.Module):
    """Ids, the encoder's output and its mask by position; returns logits, then per layer the four caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
        cache = _empty_cache()
        logits = _decode(self.model, decoder_input_ids, encoder_hidden_states, mask, cache)
        both = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return (logits, *(t for own, cross in both for t in (own.keys, own.values, cross.keys, cross.values)))


class NextStep(nn.Module):
    """Ids, perhaps the encoder's mask, and per layer four caches by position; returns logits and the grown two.

    Keys and values of the cross-attention are read out of their cache: the model's own flag says they are there.
    """

    def __init__(self, model: nn.Module, masked: bool) -> None:
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, decoder_input_ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        mask, past = (rest[:1], rest[1:]) if self.masked else ((), rest)
        cache = _empty_cache()
        for layer in range(LAYERS):
            own_k, own_v, cross_k, cross_v = past[4 * layer : 4 * layer + 4]
            cache.self_attention_cache.update(own_k, own_v, layer)
            cache.cross_attention_cache.update(cross_k, cross_v, layer)
            cache.is_updated[layer] = True
        unread = past[2].new_zeros(past[2].shape[0], past[2].shape[2], WIDTH)
        logits = _decode(self.model, decoder_input_ids, unread, mask, cache)
        return (logits, *(t for own in cache.self_attention_cache.layers for t in (own.keys, own.values)))


def _empty_cache() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _decode(model: nn.Module, ids: Tensor, hidden: Tensor, mask: tuple[Tensor, ...], cache: Any) -> Tensor:
    keywords: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if mask:
        keywords["attention_mask"] = mask[0]
    logits: Tensor = model(decoder_input_ids=ids, encoder_outputs=(hidden,), **keywords).logits
    return logits


def cache_names(prefix: str, kinds: tuple[str, ...] = ("decoder", "encoder")) -> list[str]:
    return [f"{prefix}.{i}.{kind}.{part}" for i in range(LAYERS) for kind in kinds for part in ("key", "value")]


def takes_mask(case: ZooCase) -> bool:
    return "attention_mask" in case.axes


def encoded(case: ZooCase, batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    """The encoder's output, and its mask where the model takes one; audio encoders have one length only."""
    length = length if takes_mask(case) else AUDIO_POSITIONS
    hidden = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (hidden, keep(batch, length)) if takes_mask(case) else (hidden,)


def _caches(batch: int, past: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [past, past, length, length] * LAYERS
    return [torch.randn(batch, HEADS, size, HEAD_DIM, generator=generator) for size in sizes]


def _axes(case: ZooCase) -> Mapping[str, Mapping[int, str]]:
    beyond = {2: "encoder_sequence"} if takes_mask(case) else {}
    hidden = {1: "encoder_sequence"} if takes_mask(case) else {}
    return {
        "encoder_hidden_states": {0: "batch", **hidden},
        "encoder_attention_mask": {0: "batch", 1: "encoder_sequence"},
        **{n: {0: "batch", 2: "past_sequence"} for n in cache_names("past_key_values", ("decoder",))},
        **{n: {0: "batch", **beyond} for n in cache_names("past_key_values", ("encoder",))},
    }


def _first(case: ZooCase) -> Job:
    def arguments(batch: int, length: int, source: int) -> tuple[Tensor, ...]:
        return (tokens(batch, length, 1), *encoded(case, batch, source, 2))

    names = ("decoder_input_ids", "encoder_hidden_states", "encoder_attention_mask")[: 3 if takes_mask(case) else 2]
    axes = {"decoder_input_ids": {0: "batch", 1: "sequence"}, **_axes(case)}
    outputs = ("logits", *cache_names("present"))
    return Job(FirstStep(case.build()).eval(), arguments(2, 5, 9), arguments(3, 4, 8), names, outputs, axes)


def _next(case: ZooCase) -> Job:
    def arguments(batch: int, past: int, source: int) -> tuple[Tensor, ...]:
        hidden, *mask = encoded(case, batch, source, 2)
        return (tokens(batch, 1, 1), *mask, *_caches(batch, past, hidden.shape[1]))

    mask = ("encoder_attention_mask",) if takes_mask(case) else ()
    names = ("decoder_input_ids", *mask, *cache_names("past_key_values"))
    axes = {"decoder_input_ids": {0: "batch"}, **_axes(case)}
    outputs = ("logits", *cache_names("present", ("decoder",)))
    module = NextStep(case.build(), bool(mask)).eval()
    return Job(module, arguments(2, 5, 9), arguments(3, 6, 8), names, outputs, axes)


def exported_decoder(case: ZooCase, exporter: str, step: Step, folder: Path) -> Exported:
    """Export one step of a decoder; raises `ExportSkipped`.

    "first" takes ``decoder_input_ids [batch, sequence]``, ``encoder_hidden_states`` and, unless the source is audio,
    ``encoder_attention_mask``; it returns ``logits`` and ``present.N.decoder|encoder.key|value``. "next" takes one id
    per sequence and ``past_key_values.N.decoder|encoder.key|value [batch, heads, tokens, head_dim]`` instead of the
    encoder's output, and returns the presents of the decoder's own attention only.
    """
    return cached(f"{case.name}-{step}", folder, lambda: (_first if step == "first" else _next)(case), exporter)
