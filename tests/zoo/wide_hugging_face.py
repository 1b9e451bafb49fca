"""Families beyond the extras, tagged "wide": Hugging Face models that lay out, position or mask attention otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.zoo import heads
from tests.zoo.case import HeadViews, Inputs, ZooCase
from tests.zoo.feeds import HEADS, INNER, LAYERS, POSITIONS, VOCAB, WIDTH, pixels
from tests.zoo.hugging_face import DECODER, ENCODER, implementations
from tests.zoo.more_models import SOURCE_AND_TARGET_AXES, WINDOW, source_and_target

BOTH, EAGER, SDPA = ("sdpa", "eager"), ("eager",), ("sdpa",)
IMAGE = {"image_size": 16, "patch_size": 4}
IMAGE_AXES = {"pixel_values": {0: "batch"}}
WINDOWED = ["sliding_attention", "full_attention"]
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
TWO_ROPES = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in WINDOWED}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def waveform(batch: int, length: int, seed: int) -> Inputs:
    """``[batch, 16 * length]`` samples, which become about `length` frames."""
    return {"input_values": torch.randn(batch, 16 * length, generator=torch.Generator().manual_seed(seed))}


def _decoder(
    name: str, family: str, settings: Mapping[str, Any], views: HeadViews, only: tuple[str, ...], **more: Any
) -> list[ZooCase]:
    given: dict[str, Any] = {"causal": True, "tags": ("wide",), **more}
    config = given.pop("config", f"{family}Config")
    return implementations(name, f"{family}ForCausalLM", config, settings, views, only=only, **given)


def _encoder(
    name: str, family: str, settings: Mapping[str, Any], views: HeadViews, only: tuple[str, ...], **more: Any
) -> list[ZooCase]:
    given: dict[str, Any] = {"causal": False, "tags": ("wide",), **more}
    return implementations(name, f"{family}Model", f"{family}Config", settings, views, only=only, **given)


def _refused(cases: list[ZooCase], reason: str, sites: int) -> list[ZooCase]:
    return [replace(case, refusal=reason, refused=sites) for case in cases]


def decoders() -> list[ZooCase]:
    separate, packed = heads.separate(HEADS, "k_proj", "v_proj"), heads.stacked(HEADS, HEADS, "Wqkv")
    by_head = heads.separate(HEADS, "k_proj", "v_proj", "k_norm")
    old = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
    gpt_neo = {
        **SPECIAL,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
    }
    gemma3 = {
        **DECODER,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "layer_types": WINDOWED,
        "rope_parameters": TWO_ROPES,
    }
    gpt_oss = {
        **DECODER,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": WINDOWED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    mpt = {"vocab_size": VOCAB, "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": POSITIONS}
    return [
        *_decoder("gemma3", "Gemma3", gemma3, separate, BOTH, config="Gemma3TextConfig"),
        *_decoder("gpt-oss", "GptOss", gpt_oss, heads.separate(2, "k_proj", "v_proj"), EAGER, kv_heads=2),
        *_decoder("mpt", "Mpt", {**SPECIAL, **mpt}, packed, EAGER),
        *_decoder("gptj", "GPTJ", {**SPECIAL, **old, "rotary_dim": 4}, separate, EAGER),
        *_decoder(
            "codegen",
            "CodeGen",
            {**SPECIAL, **old, "n_ctx": POSITIONS, "rotary_dim": 4},
            heads.interleaved(HEADS, 1, "qkv_proj"),
            EAGER,
        ),
        *_decoder("gpt-neo", "GPTNeo", gpt_neo, separate, EAGER),
        *_decoder("phi", "Phi", {**DECODER, "rope_parameters": PARTIAL}, separate, BOTH),
        *_decoder("stablelm", "StableLm", {**DECODER, "rope_parameters": PARTIAL}, separate, SDPA),
        *_decoder("cohere", "Cohere", DECODER, separate, SDPA),
        *_decoder("hunyuan", "HunYuanDenseV1", {**DECODER, "head_dim": 8}, separate, SDPA),
        *_decoder("olmo", "Olmo", {**DECODER, "clip_qkv": 0.5}, separate, SDPA),
        *_decoder("olmo2", "Olmo2", DECODER, by_head, SDPA),
        *_decoder("cohere-norms", "Cohere", {**DECODER, "use_qk_norm": True}, by_head, SDPA),
        *_decoder(
            "smollm3",
            "SmolLM3",
            {**DECODER, "num_key_value_heads": 2, "no_rope_layer_interval": 3},
            heads.separate(2, "k_proj", "v_proj"),
            SDPA,
            kv_heads=2,
        ),
        *implementations(
            "openai-gpt",
            "OpenAIGPTLMHeadModel",
            "OpenAIGPTConfig",
            {**SPECIAL, **old},
            heads.stacked(HEADS, HEADS, "c_attn"),
            only=EAGER,
            causal=True,
            tags=("wide",),
        ),
    ]


def encoders() -> list[ZooCase]:
    separate = heads.separate(HEADS, "k_proj", "v_proj")
    modernbert = {
        **ENCODER,
        **SPECIAL,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": TWO_ROPES,
    }
    named = heads.separate(HEADS, "key", "value")
    vision: dict[str, Any] = {"inputs": pixels("pixel_values", 16), "axes": IMAGE_AXES}
    wav2vec2 = {
        **ENCODER,
        "conv_dim": (8, 8),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "apply_spec_augment": False,
    }
    return [
        *_encoder("modernbert", "ModernBert", modernbert, heads.stacked(HEADS, HEADS, "Wqkv"), BOTH),
        *_encoder("clip-text", "CLIPText", {**ENCODER, **SPECIAL}, separate, BOTH, causal=True),
        *_encoder("clip-vision", "CLIPVision", {**ENCODER, **IMAGE}, separate, SDPA, **vision),
        *_encoder("siglip", "SiglipVision", {**ENCODER, **IMAGE, "vision_use_head": False}, separate, SDPA, **vision),
        *_encoder(
            "dinov2",
            "Dinov2",
            {**ENCODER, **IMAGE, "mlp_ratio": 2},
            separate,
            SDPA,
            **vision,
        ),
        *_encoder("beit", "Beit", {**ENCODER, **IMAGE, "use_relative_position_bias": True}, separate, SDPA, **vision),
        *_encoder("esm", "Esm", {**ENCODER, **SPECIAL, "position_embedding_type": "rotary"}, named, SDPA),
        *_encoder(
            "wav2vec2",
            "Wav2Vec2",
            wav2vec2,
            separate,
            SDPA,
            inputs=waveform,
            axes={"input_values": {0: "batch", 1: "samples"}},
        ),
    ]


def encoder_decoders() -> list[ZooCase]:
    long_t5 = {
        **SPECIAL,
        "decoder_start_token_id": 0,
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "local_radius": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    }
    names = [f"{block}.{part}" for block in ("LocalSelfAttention", "SelfAttention", "EncDecAttention") for part in "kv"]
    made = implementations(
        "longt5",
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        long_t5,
        heads.separate(HEADS, *names),
        only=EAGER,
        inputs=source_and_target,
        axes=SOURCE_AND_TARGET_AXES,
        sites=3 * LAYERS,
        causal=True,
        tags=("wide", "encoder-decoder"),
    )
    return made


def refused() -> list[ZooCase]:
    deepseek = {
        **DECODER,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    separate, latent = heads.separate(HEADS, "k_proj", "v_proj"), heads.separate(HEADS, "kv_b_proj")
    stablelm = {**DECODER, "rope_parameters": PARTIAL, "qk_layernorm": True}
    return [
        *_refused(_decoder("stablelm-norms", "StableLm", stablelm, separate, SDPA), "normalised by 4 norms", LAYERS),
        *_refused(_decoder("deepseek-v3", "DeepseekV3", deepseek, latent, SDPA), "key: ", LAYERS),
    ]
