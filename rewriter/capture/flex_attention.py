"""torch's flex_attention, whose scores and masks are functions of the caller's, written out in plain operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx

OPERATOR = torch.ops.higher_order.flex_attention
UNREAD = (
    "its flex_attention is not read (its log-sum-exp is used, or its functions of scores are no plain arithmetic); "
    "call scaled_dot_product_attention with a mask where that is the same"
)


def operands(fx: FxNode) -> list[Any]:
    """Arguments that hold tensors: queries, keys, values, and what the functions of scores and masks read."""
    return [*fx.args[:3], *_others(fx.args)]


def written_out(fx: FxNode, args: Sequence[Any], result: Sequence[Any]) -> GraphModule | None:
    """A graph of `operands` that gives the attention's output ``[B, heads, S, D]``; None if it would not.

    `args` are the call's arguments, `result` is what the operator gave for them, which the graph must give, too.
    """
    if any(user.args[1] != 0 and user.users for user in fx.users):
        return None
    given = [*args[:3], *_others(args)]
    try:
        made = make_fx(_attention(args), pre_dispatch=True, tracing_mode="real")(*given)
        same = torch.allclose(made(*given).float(), result[0].float(), rtol=1e-3, atol=1e-5)
    except Exception:  # whatever a caller's function raises when it is given all positions at once
        return None
    assert isinstance(made, GraphModule)
    return made if same else None


def _attention(args: Sequence[Any]) -> Callable[..., Tensor]:
    """The functions are of single scores and positions; given all of them, what they compute broadcasts."""
    (query, key, _, of_scores, (*_, of_masks), scale), read_by_scores = args[:6], len(args[7])
    places = [_along(axis, size) for axis, size in enumerate((*query.shape[:3], key.shape[2]))]
    group = query.shape[1] // key.shape[1]
    masked = not bool(of_masks(*places, *args[8]).all())

    def attend(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
        if group > 1:
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        scores = of_scores(q @ k.transpose(-2, -1) * scale, *places, *others[:read_by_scores])
        if masked:
            scores = torch.where(of_masks(*places, *others[read_by_scores:]), scores, -torch.inf)
        mixed: Tensor = scores.softmax(-1) @ v
        return mixed

    return attend


def _along(axis: int, size: int) -> Tensor:
    shape = [1, 1, 1, 1]
    shape[axis] = size
    return torch.arange(size).view(shape)


def _others(args: Sequence[Any]) -> tuple[Any, ...]:
    return (*args[7], *args[8])
