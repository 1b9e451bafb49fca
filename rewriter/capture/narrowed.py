"""A Hugging Face architecture with all its layers and heads and hardly any width: it is matched instead of the model.

Which weights hold the key/value heads, and in which order, does not depend on how wide a head is. So the same code that
rewrites a model can rewrite this one, whatever the size of the checkpoint that it stands for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rewriter.errors import UnsupportedModel, first_line

HEAD = 8
"""Width of a head; rotations need an even part of it."""

_WIDTHS = {
    "vocab_size": 96,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

HINT = "rewrite it on a machine with more memory, with --not-streamed"


def narrowed_config(config: Any) -> Any:
    """A copy of the config with narrow heads, a narrow feed-forward block and a small vocabulary.

    Raises UnsupportedModel if it does not say how many heads there are.
    """
    narrow = copy.deepcopy(config)
    text = narrow.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(text, "hidden_size", None), int):
        raise UnsupportedModel("the config does not say how many heads there are", hint=HINT)
    text.hidden_size = heads * HEAD
    if getattr(text, "head_dim", None) is not None:
        text.head_dim = HEAD
    for name, width in _WIDTHS.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(width, getattr(text, name)))
    for holder in (narrow, text, getattr(narrow, "generation_config", None)):
        for name in _IDS:
            if getattr(holder, name, None) is not None:
                setattr(holder, name, 0)
    return narrow


def narrowed(model_class: Any, config: Any) -> nn.Module:
    """The narrow model, in float32 with random weights that are the same every time, in eval mode.

    Raises UnsupportedModel if the architecture does not take narrow sizes.
    """
    narrow = narrowed_config(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = model_class._from_config(narrow, dtype=torch.float32)
    except Exception as error:  # each architecture checks its config in its own way
        raise UnsupportedModel(
            f"the architecture cannot be looked at apart from its weights: {first_line(error)}", hint=HINT
        ) from error
    return model.eval()
