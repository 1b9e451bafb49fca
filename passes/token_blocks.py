"""Tokens that are parted into blocks between a projection and its heads: each block is a sequence of its own."""

from __future__ import annotations

from math import prod

from passes.dataflow import Flow, Value
from passes.site import Operand

PARTED = (
    "tokens are parted into blocks between the {} projection and its heads, so a new projection of whole sequences "
    "has other heads; part them before they are projected"
)


def parted_behind(flow: Flow, operand: Operand, projected: Value) -> bool:
    """Whether the stem counts other sequences than `projected` [batch, tokens, in] (or [tokens, batch, in])."""
    if "s" not in operand.stem_axes:
        return False
    *lead, _ = flow.shape(projected)
    tokens = flow.shape(operand.stem)[operand.stem_axes.index("s")]
    return len(lead) == 2 and prod(lead) != tokens * lead[0 if operand.batch_first else 1]
