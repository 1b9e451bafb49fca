"""The learning rate of each step, and which of the two phases it belongs to; pure functions of the step."""

from __future__ import annotations

import math

from rewriter.uptrain.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """Of step 0, 1, … `total` - 1: a straight line up to the peak, then half a cosine down towards 0."""
    warm = math.ceil(recipe.warmup * total)
    if step < warm:
        return recipe.learning_rate * (step + 1) / (warm + 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def layer_steps(recipe: Recipe, total: int) -> int:
    """Steps of the first phase."""
    return round(recipe.layer_phase * total)
