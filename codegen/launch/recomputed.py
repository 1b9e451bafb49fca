"""Gradients of operators that run kernels: those of the torch body, which is computed once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Operands = list[Tensor | None]


def gradients(ctx: Any, gradient: Tensor, body: Callable[[Operands], Tensor]) -> tuple[Tensor | None, ...]:
    """One for each argument of the operator: the tensors that `ctx` saved, and those in ``ctx.rest``, which get none.

    Args:
        body: the result in differentiable torch, of the saved tensors.
    """
    tensors: Operands = [None if t is None else t.detach() for t in ctx.saved_tensors]
    wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[i]]
    leaves = [t.requires_grad_() for i in wanted if (t := tensors[i]) is not None]
    with torch.enable_grad():
        found: Sequence[Tensor | None] = torch.autograd.grad(body(tensors), leaves, gradient)
    by_place = dict(zip(wanted, found, strict=True))
    return (*(by_place.get(i) for i in range(len(tensors))), *(None for _ in ctx.rest))
