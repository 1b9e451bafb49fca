"""More architectures than the main list, tagged "extra": other layouts, position schemes and encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.zoo import heads
from tests.zoo.case import Inputs, ZooCase
from tests.zoo.feeds import HEADS, INNER, LAYERS, POSITIONS, VOCAB, WIDTH, text, tokens
from tests.zoo.hugging_face import DECODER, implementations

SOURCE_AND_TARGET_AXES = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "sequence"},
    "decoder_input_ids": {0: "batch", 1: "target"},
}
MEL_BINS, AUDIO_POSITIONS = 8, 10
WINDOW = 6  # shorter than the tests' sequences, so that it matters


def source_and_target(batch: int, length: int, seed: int) -> Inputs:
    return {**text(batch, length, seed), "decoder_input_ids": tokens(batch, max(2, length - 2), seed + 1)}


def audio_and_target(batch: int, length: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    features: Tensor = torch.randn(batch, MEL_BINS, 2 * AUDIO_POSITIONS, generator=generator)
    return {"input_features": features, "decoder_input_ids": tokens(batch, length, seed + 1)}


def _decoder(
    name: str, family: str, settings: Mapping[str, Any], views: Any, only: tuple[str, ...], **more: Any
) -> list[ZooCase]:
    return implementations(
        name,
        f"{family}ForCausalLM",
        f"{family}Config",
        settings,
        views,
        only=only,
        causal=True,
        tags=("extra",),
        **more,
    )


def decoders() -> list[ZooCase]:
    both, eager = ("sdpa", "eager"), ("eager",)
    separate = heads.separate(HEADS, "k_proj", "v_proj")
    old = {"vocab_size": VOCAB, "hidden_size": WIDTH, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    opt = {
        **old,
        "ffn_dim": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": WIDTH,
    }
    falcon = {
        **old,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "ffn_hidden_size": INNER,
    }
    gemma2 = {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
    return [
        *_decoder("opt", "OPT", opt, separate, both),
        *_decoder("gpt-neox", "GPTNeoX", DECODER, heads.interleaved(HEADS, 1, "query_key_value"), both),
        *_decoder("phi3", "Phi3", DECODER, heads.stacked(HEADS, HEADS, "qkv_proj"), both),
        *_decoder("mistral", "Mistral", {**DECODER, "sliding_window": WINDOW}, separate, both),
        *_decoder("gemma2", "Gemma2", gemma2, separate, eager),
        *_decoder("falcon", "Falcon", falcon, heads.interleaved(2, 2, "query_key_value"), both, kv_heads=2),
        *_decoder(
            "bloom",
            "Bloom",
            {**old, "n_layer": LAYERS, "n_head": HEADS},
            heads.interleaved(HEADS, 1, "query_key_value"),
            eager,
        ),
    ]


def encoder_decoders() -> list[ZooCase]:
    shared: dict[str, Any] = {"causal": True, "sites": 3 * LAYERS, "tags": ("extra", "encoder-decoder")}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    t5 = {
        **special,
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    }
    two_stacks = {
        **special,
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
        "bos_token_id": 1,
    }
    whisper = {
        **two_stacks,
        "num_mel_bins": MEL_BINS,
        "max_source_positions": AUDIO_POSITIONS,
        "max_target_positions": POSITIONS,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    t5_views = heads.separate(HEADS, "SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v")
    separate = heads.separate(HEADS, "k_proj", "v_proj")
    return [
        *implementations(
            "t5",
            "T5ForConditionalGeneration",
            "T5Config",
            t5,
            t5_views,
            inputs=source_and_target,
            axes=SOURCE_AND_TARGET_AXES,
            **shared,
        ),
        *implementations(
            "bart",
            "BartForConditionalGeneration",
            "BartConfig",
            {**two_stacks, "max_position_embeddings": POSITIONS, "forced_eos_token_id": None},
            separate,
            inputs=source_and_target,
            axes=SOURCE_AND_TARGET_AXES,
            **shared,
        ),
        *implementations(
            "whisper",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            whisper,
            separate,
            inputs=audio_and_target,
            axes={"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "target"}},
            **shared,
        ),
    ]
