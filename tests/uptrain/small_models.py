"""Small models that train in seconds, and data with something to learn in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import rewriter

VOCABULARY = 96


def llama(seed: int = 0, layers: int = 2) -> Any:
    """A decoder of 4 heads, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    return _sharpened(LlamaForCausalLM(config).eval())


def bert(seed: int = 0) -> Any:
    """An encoder of 4 heads, in eval mode, with dropout in its config."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return _sharpened(BertModel(config).eval())


def _sharpened(model: Any) -> Any:
    """Larger weights: attention then looks at something, and losing heads costs something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(6.0)
    return model


def student_of(teacher: Any, target: str = "mqa") -> Any:
    return rewriter.optimize(teacher, target, verify=False)


def token_ids(count: int = 6000, seed: int = 0) -> np.ndarray[Any, Any]:
    """A random walk over the vocabulary: the next token is one of three."""
    steps = np.random.default_rng(seed).integers(1, 4, count)
    found: np.ndarray[Any, Any] = (np.cumsum(steps) % VOCABULARY).astype(np.int64)
    return found


def padded_rows(count: int = 120, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 5 to 20 tokens for encoders, as a dataset gives them."""
    generator = np.random.default_rng(seed)
    ids = token_ids(count * 20, seed)
    return [{"input_ids": ids[20 * i : 20 * i + int(generator.integers(5, 21))].tolist()} for i in range(count)]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)
