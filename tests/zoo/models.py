"""The registry: every zoo case by name, the main list first, then the extras."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.zoo import by_hand, heads, more_models, plain_torch, wide_hugging_face, wide_torch
from tests.zoo.case import HeadViews, Inputs, ZooCase, main_output
from tests.zoo.feeds import (
    FEATURE_AXES,
    HEADS,
    INNER,
    LAYERS,
    POSITIONS,
    SEQUENCE_FIRST_AXES,
    VOCAB,
    WIDTH,
    features,
    features_sequence_first,
    ids_only,
    padded_features,
    pixels,
)
from tests.zoo.hugging_face import DECODER, ENCODER, implementations
from tests.zoo.randomize import randomize

__all__ = ["EXTRA", "MAIN", "WIDE", "ZOO", "Inputs", "ZooCase", "cases", "main_output"]


# ------------------------------------------------------------------ the main list


def _encoders() -> list[ZooCase]:
    query_key_value = heads.separate(HEADS, "self.key", "self.value")
    distil = {"vocab_size": VOCAB, "dim": WIDTH, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS}
    return [
        *implementations("bert", "BertModel", "BertConfig", ENCODER, query_key_value, causal=False),
        *implementations("roberta", "RobertaModel", "RobertaConfig", ENCODER, query_key_value, causal=False),
        *implementations(
            "distilbert",
            "DistilBertModel",
            "DistilBertConfig",
            {**distil, "max_position_embeddings": POSITIONS},
            heads.separate(HEADS, "k_lin", "v_lin"),
            causal=False,
        ),
        *implementations(
            "vit",
            "ViTModel",
            "ViTConfig",
            {**ENCODER, "image_size": 16, "patch_size": 4},
            heads.separate(HEADS, "k_proj", "v_proj"),
            inputs=pixels("pixel_values", 16),
            axes={"pixel_values": {0: "batch"}},
            causal=False,
        ),
    ]


def _decoders() -> list[ZooCase]:
    gpt2 = {
        "vocab_size": VOCAB,
        "n_embd": WIDTH,
        "n_inner": INNER,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = {**DECODER, "num_key_value_heads": 2}
    return [
        *implementations(
            "gpt2", "GPT2LMHeadModel", "GPT2Config", gpt2, heads.stacked(HEADS, HEADS, "c_attn"), causal=True
        ),
        *implementations(
            "llama",
            "LlamaForCausalLM",
            "LlamaConfig",
            DECODER,
            heads.separate(HEADS, "k_proj", "v_proj"),
            causal=True,
        ),
        *implementations(
            "llama-gqa",
            "LlamaForCausalLM",
            "LlamaConfig",
            grouped,
            heads.separate(2, "k_proj", "v_proj"),
            kv_heads=2,
            causal=True,
        ),
        *implementations(
            "qwen3",
            "Qwen3ForCausalLM",
            "Qwen3Config",
            {**DECODER, "head_dim": 16},
            heads.separate(HEADS, "k_proj", "v_proj"),
            causal=True,
        ),
    ]


def _plain_torch() -> list[ZooCase]:
    def case(
        name: str,
        make: Callable[[], nn.Module],
        inputs: Callable[[int, int, int], Inputs],
        views: HeadViews,
        axes: Mapping[str, Mapping[int, str]],
        causal: bool,
    ) -> ZooCase:
        return ZooCase(
            name,
            lambda: randomize(make()),
            inputs,
            views,
            HEADS,
            HEADS,
            LAYERS,
            causal,
            axes,
            tags=frozenset({"torch"}),
        )

    def decoder(fused_kernel: bool) -> Callable[[], nn.Module]:
        return lambda: plain_torch.NanoDecoder(VOCAB, WIDTH, HEADS, LAYERS, POSITIONS, INNER, fused_kernel)

    def multihead(batch_first: bool) -> Callable[[], nn.Module]:
        return lambda: plain_torch.MultiheadStack(WIDTH, HEADS, INNER, LAYERS, batch_first)

    def encoder(norm_first: bool) -> Callable[[], nn.Module]:
        return lambda: plain_torch.TorchEncoder(WIDTH, HEADS, INNER, LAYERS, norm_first)

    idx = {"idx": {0: "batch", 1: "sequence"}}
    fused, packed = heads.stacked(HEADS, HEADS, "c_attn"), heads.in_projection(HEADS)
    padded = {**FEATURE_AXES, "padding": {0: "batch", 1: "sequence"}}
    return [
        case("nanogpt-softmax", decoder(False), ids_only, fused, idx, True),
        case("nanogpt-sdpa", decoder(True), ids_only, fused, idx, True),
        case("mha-batch-first", multihead(True), features, packed, FEATURE_AXES, False),
        case("mha-sequence-first", multihead(False), features_sequence_first, packed, SEQUENCE_FIRST_AXES, False),
        case("torch-encoder", encoder(False), features, packed, FEATURE_AXES, False),
        case("torch-encoder-padded", encoder(True), padded_features, packed, padded, False),
    ]


def _without_attention() -> list[ZooCase]:
    def case(
        name: str, make: Callable[[], nn.Module], inputs: Callable[[int, int, int], Inputs], axes: Mapping[str, Any]
    ) -> ZooCase:
        return ZooCase(
            name,
            lambda: randomize(make()),
            inputs,
            heads.nothing(),
            0,
            0,
            0,
            False,
            axes,
            tags=frozenset({"torch", "none"}),
        )

    return [
        case("mlp", lambda: plain_torch.Perceptron(WIDTH, INNER, 5), features, FEATURE_AXES),
        case("conv", lambda: plain_torch.ConvNet(8, 5), pixels("pixels", 16), {"pixels": {0: "batch"}}),
        case("router", lambda: plain_torch.RoutedExperts(WIDTH, INNER), features, FEATURE_AXES),
    ]


def _refused() -> list[ZooCase]:
    settings = {
        **ENCODER,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "max_relative_positions": -1,
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
    }
    return implementations(
        "deberta",
        "DebertaV2Model",
        "DebertaV2Config",
        settings,
        heads.separate(HEADS, "key_proj", "value_proj"),
        only=("eager",),
        causal=False,
        tags=("refuse",),
    )


MAIN: dict[str, ZooCase] = {
    case.name: case for case in [*_encoders(), *_decoders(), *_plain_torch(), *_without_attention(), *_refused()]
}
"""What the library must handle (or refuse) today."""

EXTRA: dict[str, ZooCase] = {case.name: case for case in [*more_models.decoders(), *more_models.encoder_decoders()]}
"""More architectures, tagged "extra"."""

WIDE: dict[str, ZooCase] = {
    case.name: case
    for case in [
        *wide_hugging_face.encoders(),
        *wide_hugging_face.decoders(),
        *wide_hugging_face.encoder_decoders(),
        *wide_hugging_face.refused(),
        *wide_torch.plain(),
        *by_hand.by_hand(),
    ]
}
"""Families beyond those, tagged "wide", each with what must be refused and why."""

ZOO: dict[str, ZooCase] = {**MAIN, **EXTRA, **WIDE}

ORDINARY = ("extra", "wide", "none", "refuse")


def cases(*, having: str | None = None, without: tuple[str, ...] = ORDINARY) -> list[ZooCase]:
    """The cases that carry tag `having` (all, if None) and none of the tags in `without`."""
    chosen = (c for c in ZOO.values() if having is None or having in c.tags)
    return [c for c in chosen if not c.tags & set(without)]
