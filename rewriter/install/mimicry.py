"""What surrounding code may read off an attention module, on the module that stands in its place."""

from __future__ import annotations

from torch import nn


def mimic_attributes(replacement: nn.Module, original: nn.Module) -> None:
    """Take over the plain attributes of the original that the replacement does not have."""
    for name, value in vars(original).items():
        if isinstance(value, bool | int | float | str) and not name.startswith("_") and not hasattr(replacement, name):
            setattr(replacement, name, value)
    if hasattr(original, "_qkv_same_embed_dim"):  # torch's encoder layer then takes its plain path
        for name, value in (("_qkv_same_embed_dim", False), ("in_proj_weight", None), ("in_proj_bias", None)):
            setattr(replacement, name, value)
