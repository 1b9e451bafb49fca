"""Zoo cases from Hugging Face model classes and small configs, one per attention implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.zoo.case import HeadViews, Inputs, ZooCase
from tests.zoo.feeds import HEADS, INNER, LAYERS, POSITIONS, TEXT_AXES, VOCAB, WIDTH, text
from tests.zoo.randomize import randomize

ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
DECODER: dict[str, Any] = {
    **ENCODER,
    "num_key_value_heads": HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _builder(model: str, config: str, implementation: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        module = getattr(transformers, model)._from_config(made, attn_implementation=implementation)
        assert isinstance(module, nn.Module)
        return randomize(module)

    return build


def implementations(
    name: str,
    model: str,
    config: str,
    settings: Mapping[str, Any],
    views: HeadViews,
    *,
    only: tuple[str, ...] = ("sdpa", "eager"),
    inputs: Callable[[int, int, int], Inputs] = text,
    axes: Mapping[str, Mapping[int, str]] = TEXT_AXES,
    kv_heads: int = HEADS,
    sites: int = LAYERS,
    causal: bool,
    tags: tuple[str, ...] = (),
) -> list[ZooCase]:
    """One case per attention implementation (`only` those) of a Hugging Face model, named ``name-implementation``."""
    return [
        ZooCase(
            name=f"{name}-{implementation}",
            build=_builder(model, config, implementation, settings),
            inputs=inputs,
            head_views=views,
            heads=HEADS,
            kv_heads=kv_heads,
            sites=sites,
            causal=causal,
            axes=axes,
            tags=frozenset({"hf", implementation, *tags}),
        )
        for implementation in only
    ]
