"""The zero floor: a model whose attentions give nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn


def zeroed(model: nn.Module, suffix: str, layers: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """A copy whose output projections (by the end of their names) give nothing."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if name.endswith(suffix) and layers(name):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return copied
