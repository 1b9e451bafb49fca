"""Routing in plain, differentiable torch: which tokens a heavy branch is given, and their weights.

Shape legend: B batch, S tokens, M routed tokens, E features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from codegen.conditional import Router

LEAST = -1e30
"""Stands for minus infinity, without making differences undefined."""


@dataclass(frozen=True)
class Routed:
    """Attributes:
    index: int64 [B, M], each sequence's routed tokens, of the highest score first.
    weight: [B, M], in float32 at least; 0 for padding, which is here only where nothing else is left.
    """

    index: Tensor
    weight: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """[B, M, E] of x [B, S, E]."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def add(self, x: Tensor, found: Tensor) -> Tensor:
        """x [B, S, E], and weight · found [B, M, E] where it belongs."""
        weighted = found * self.weight[..., None].to(found.dtype)
        return x.scatter_add(1, self.index[..., None].expand_as(weighted), weighted)


def route(router: Router, x: Tensor, u: Tensor, shown: Tensor | None = None, *, soft: bool = False) -> Routed:
    """Tokens of x [B, S, E] by their scores ``x · u``.

    Args:
        shown: bool [B, S], False for padding.
        soft: as in training: weights have gradients, and more tokens are routed.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return chosen(router, x.to(wide) @ u.to(wide), shown, soft=soft)


def chosen(router: Router, scores: Tensor, shown: Tensor | None = None, *, soft: bool = False) -> Routed:
    """The same of scores [B, S]."""
    ranked = scores if shown is None else scores.masked_fill(~shown, LEAST)
    index = _highest(ranked.detach(), _kept(router, scores.shape[-1], soft=soft))
    if soft:
        return Routed(index, soft_top_k(router, scores, shown).gather(1, index))
    weight = torch.ones_like(scores) if shown is None else shown.to(scores.dtype)
    return Routed(index, weight.gather(1, index).detach())


def _kept(router: Router, tokens: Any, *, soft: bool) -> Any:
    """`Router.kept`; of a symbolic size too, which a graph capture must not compare with numbers."""
    if isinstance(tokens, int) or soft:
        return router.kept(tokens, soft=soft)
    wanted = torch.sym_max(round(router.fraction * tokens), 1)  # type: ignore[no-untyped-call]
    return torch.sym_min(wanted, tokens)  # type: ignore[no-untyped-call]


def _highest(scores: Tensor, count: Any) -> Tensor:
    """[B, count]: where the highest stand, in order; of equal ones the lower index comes first."""
    if torch.onnx.is_in_onnx_export():  # whose TopK is so by definition, and which has no stable sort
        return scores.topk(count, dim=-1).indices
    index = scores.sort(dim=-1, descending=True, stable=True).indices
    # not a slice: captures would ask whether there are as many
    return index.index_select(-1, torch.arange(count, device=scores.device))


def soft_top_k(router: Router, scores: Tensor, shown: Tensor | None = None) -> Tensor:
    """[B, S] of scores [B, S], with gradients through all iterations; see the oracle."""
    budget, epsilon = math.log(router.budget(scores.shape[-1])), router.epsilon
    b = -scores
    for _ in range(router.iterations):
        exponents = (scores + b) / epsilon
        if shown is not None:
            exponents = exponents.masked_fill(~shown, LEAST)
        a = epsilon * (budget - exponents.logsumexp(dim=-1, keepdim=True))
        b = -functional.relu(scores + a)
    found = ((scores + a + b) / epsilon).exp()
    return found if shown is None else found.masked_fill(~shown, 0)
