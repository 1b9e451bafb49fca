"""Which tokens of a call are padding, told by the masks that a replaced attention was given.

What stands in an attention's place may heed keys that are hidden from all queries, and no other mask; calls with any
other are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rewriter.install.protocol import Protocol, mask_kind

HIDES = -1e4
"""An additive mask hides a key by this or less."""


def shown_tokens(protocol: Protocol, call: Mapping[str, Any], batch: int, tokens: int) -> Tensor | None:
    """bool [B, S], False for padding; None where the call has no mask.

    Raises TypeError for a mask that is something else, or says more.
    """
    found: Tensor | None = None
    for role, true_keeps in (("mask", protocol.mask_true_keeps), ("key_padding", protocol.padding_true_keeps)):
        given = call.get(role)
        if given is None:
            continue
        kept = _kept(given, true_keeps)
        keys = kept if role == "key_padding" else _by_key(kept, protocol)
        keys = keys.reshape(-1, keys.shape[-1])
        if keys.shape[-1] != tokens or keys.shape[0] not in (1, batch):
            raise TypeError(f"a mask of shape {tuple(given.shape)} does not fit {batch} sequences of {tokens} tokens")
        keys = keys.expand(batch, tokens)
        found = keys if found is None else found & keys
    return found


def _kept(mask: Any, true_keeps: bool) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask of type {type(mask).__name__} is not understood; give a tensor")
    kind = mask_kind(mask)
    if kind == "float":
        return mask > HIDES
    kept = mask != 0
    return kept if kind == "int" or true_keeps else ~kept


def _by_key(kept: Tensor, protocol: Protocol) -> Tensor:
    """[B or 1, T] of a mask of two to four dimensions, which must treat all heads and all queries alike."""
    if kept.dim() == 2 and protocol.flat_mask == "batch":
        return kept
    wide = kept[None] if kept.dim() == 2 else kept
    if wide.dim() == 4:
        wide = _alike(wide, 1)
    if wide.dim() != 3:
        raise TypeError(f"a mask of {kept.dim()} dimensions is not understood")
    return _alike(wide, 1)


def _alike(kept: Tensor, dim: int) -> Tensor:
    """Without the axis `dim`, along which padded rows alone may differ: they may be hidden everything."""
    first = kept.select(dim, 0)
    if kept.shape[dim] == 1 or kept.stride(dim) == 0:
        return first
    seen = kept.any(dim)
    if not torch.compiler.is_compiling():
        same = (kept == seen.unsqueeze(dim)).all(-1)
        if bool((~same & kept.any(-1)).any()):
            raise TypeError(
                "padding can be followed here, and this mask hides more: keys of some queries or heads only"
            )
    return seen
