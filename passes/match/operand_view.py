"""An operand where the anchor reads it: which of its axes are tokens, features and heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array, Value


@dataclass(frozen=True)
class OperandView:
    """An operand where the anchor reads it.

    Attributes:
        value: its name.
        token_axis, feature_axis: which axes are tokens and features.
        heads: set if the feature axis holds this many heads side by side (fused operators with 3-D inputs).
        fold: how many heads the token axis holds one after the other, for each one on the axis before it.
        apart: whether heads lie along the last two leading axes instead of one: groups, and the heads of a group.
        blocks: whether an axis of size 1 beside the heads counts blocks of tokens, of which there is one.
    """

    value: Value
    token_axis: int
    feature_axis: int
    heads: int | None = None
    fold: int = 1
    apart: bool = False
    blocks: bool = False

    def arranged(self, array: Array) -> Array:
        """[lead..., tokens, features] of the recorded value, heads on one axis: those folded or apart are joined."""
        array = np.moveaxis(array, (self.token_axis, self.feature_axis), (-2, -1))
        if self.apart:
            *lead, groups, heads, rows, features = array.shape
            return array.reshape(*lead, groups * heads, rows, features)
        if self.fold == 1:
            return array
        *lead, heads, rows, features = array.shape
        return array.reshape(*lead, heads * self.fold, rows // self.fold, features)
