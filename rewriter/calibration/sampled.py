"""Calibration text that a language model writes itself, for when there is no other, or none of many kinds.

What merges keep is what the calibration text asks for, and text of one kind asks for little. A model's own text is of
all kinds that it was trained on: sequences begin with a token drawn at random and go on as the model goes on (as
LLM-QAT, arXiv 2305.17888, makes its data), at temperature 1 and from all of its vocabulary, so that what is rare stays
in it. A sequence is several short pieces one behind the other, as texts are packed for pre-training: of as many tokens,
more beginnings make more kinds of text, and cost less to write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.calibration.batches import SAMPLED, WINDOW
from rewriter.errors import UnsupportedModel
from rewriter.module_modes import evaluating

SEQUENCES = 16
PIECE = 128
"""Tokens that are written behind one beginning."""
_TOGETHER = 64
"""Pieces that are written at the same time."""


def sampled_text(model: torch.nn.Module, *, sequences: int = SEQUENCES, length: int = WINDOW, seed: int = 0) -> Tensor:
    """int64 [sequences, length]: token ids of a causal language model's own text, on the model's device.

    Args:
        model: of transformers, with `generate`; put in eval mode meanwhile. Nobody else sees other random numbers.
        length: tokens of a sequence, in pieces of at most `PIECE`; fewer where the model has fewer positions.

    Raises:
        UnsupportedModel: the model does not generate text by itself.
    """
    config = _config(model)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    device = next(model.parameters()).device
    cards = [device] if device.type == "cuda" else []
    pieces = -(-length // PIECE)
    size = -(-length // pieces)
    with evaluating(model), torch.random.fork_rng(devices=cards), torch.no_grad():
        torch.manual_seed(seed)
        count = sequences * pieces
        parts = [
            _written(model, config, min(_TOGETHER, count - start), size, device) for start in range(0, count, _TOGETHER)
        ]
    return torch.cat(parts).reshape(sequences, pieces * size)[:, :length]


def _written(model: Any, config: Any, rows: int, length: int, device: torch.device) -> Tensor:
    """[rows, length]; ends of text are not taken, so that every sequence has its length."""
    from transformers import GenerationConfig

    first = torch.randint(int(config.vocab_size), (rows, 1), device=device)
    if length == 1:
        return first
    end = getattr(config, "eos_token_id", None)
    how = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1,
        eos_token_id=end, pad_token_id=end[0] if isinstance(end, list) else end,
    )  # fmt: skip
    found: Tensor = model.generate(first, attention_mask=torch.ones_like(first), generation_config=how)
    return found


def _config(model: torch.nn.Module) -> Any:
    """Of the text that it writes."""
    config: Any = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    if config is None or can is None or not can() or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"a {type(model).__name__} does not write text by itself, which {SAMPLED!r} asks for",
            hint="give token ids or texts, e.g. in a file",
        )
    return config.get_text_config()
