"""The zoo's sizes and the inputs that its models are fed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.zoo.case import Inputs

WIDTH, INNER, HEADS, LAYERS, VOCAB, POSITIONS = 32, 48, 4, 2, 64, 64
FIRST_PLAIN_TOKEN = 5  # below it live padding and special tokens

TEXT_AXES = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
SEQUENCE_FIRST_AXES = {"x": {0: "sequence", 1: "batch"}}
FEATURE_AXES = {"x": {0: "batch", 1: "sequence"}}


def tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(FIRST_PLAIN_TOKEN, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def keep(batch: int, length: int) -> Tensor:
    """``[batch, length]``, 1 where a token counts: every odd row loses its last third."""
    kept = torch.ones(batch, length, dtype=torch.int64)
    if length > 2:
        kept[1::2, length - length // 3 :] = 0
    return kept


def text(batch: int, length: int, seed: int) -> Inputs:
    return {"input_ids": tokens(batch, length, seed), "attention_mask": keep(batch, length)}


def ids_only(batch: int, length: int, seed: int) -> Inputs:
    return {"idx": tokens(batch, length, seed)}


def features(batch: int, length: int, seed: int) -> Inputs:
    return {"x": torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))}


def features_sequence_first(batch: int, length: int, seed: int) -> Inputs:
    return {"x": torch.randn(length, batch, WIDTH, generator=torch.Generator().manual_seed(seed))}


def padded_features(batch: int, length: int, seed: int) -> Inputs:
    return {**features(batch, length, seed), "padding": keep(batch, length) == 0}


def pixels(name: str, size: int) -> Callable[[int, int, int], Inputs]:
    def inputs(batch: int, length: int, seed: int) -> Inputs:
        return {name: torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))}

    return inputs
