"""Perplexity of a causal language model over a long text, in independent windows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rewriter.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


def perplexity(model: nn.Module, token_ids: Tensor, context: int = 512) -> float:
    """exp of the mean negative log-likelihood over windows of `context` tokens that do not overlap.

    A window's first token has no context and is not scored; a last window of one token is left out. Losses are
    summed in float64, so that the result does not depend on how the windows are grouped.

    Args:
        model: returns an object with ``logits [B, T, vocab]`` for ``input_ids``; put in eval mode by the caller.
        token_ids: int64, ``[N]`` or ``[1, N]``.
        context: tokens in a window.

    Raises:
        UsageError: fewer than two tokens, or a context below two.
    """
    import torch

    ids = token_ids.reshape(-1)
    if ids.numel() < 2 or context < 2:
        raise UsageError("perplexity needs at least two tokens", hint="give a longer text or context")
    total, count = 0.0, 0
    with torch.no_grad():
        for window in torch.split(ids, context):
            if window.numel() > 1:
                total += _negative_log_likelihood(model, window)
                count += window.numel() - 1
    return math.exp(total / count)


def _negative_log_likelihood(model: nn.Module, window: Tensor) -> float:
    """Sum over a window's tokens but the first, float64."""
    import torch

    result: Any = model(input_ids=window[None], use_cache=False)
    scores = torch.log_softmax(result.logits[0, :-1].double(), dim=-1)
    return -float(scores.gather(1, window[1:, None]).sum())
