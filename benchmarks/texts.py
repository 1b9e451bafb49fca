"""Text to calibrate on and to measure on, which are different plays, and what a model of sentences makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.demo.weights import play

CALIBRATION, HELD_OUT = ("lear", "macbeth", "othello"), "hamlet"
WINDOW = 512


def sentences(plays: Sequence[str], count: int, seed: int) -> list[str]:
    """Lines of 30 to 80 characters, drawn without replacement."""
    lines = [s for name in plays for line in play(name).splitlines() if 30 < len(s := line.strip()) < 80]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))[:count]
    return [lines[i] for i in order]


def token_ids(tokenizer: Any, name: str, windows: int) -> Tensor:
    ids: Tensor = tokenizer(play(name), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: windows * WINDOW]


def embedded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over real tokens, normalised: how the model is used."""
    with torch.no_grad():
        states: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(-1).mean())
