"""Batches of rows of different lengths, padded on one side."""

from __future__ import annotations

import torch

from tests.zoo.case import Inputs


def padded(inputs: Inputs, lengths: list[int], side: str) -> Inputs:
    """Rows cut to `lengths`, padded with zeros on one side; rows themselves are equal to the unpadded ones."""
    ids = inputs["input_ids"]
    out, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        out[row, where] = ids[row, :length]
        mask[row, where] = 1
    return {"input_ids": out, "attention_mask": mask}
