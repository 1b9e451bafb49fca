"""Einsums whose scores end in other axes than queries and keys: read, rewritten, left alone where refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewriter
from tests.match.test_conventions import (
    DIM,
    EXACT,
    HEADS,
    MOVED,
    TOKENS,
    Attends,
    _through_graph,
    _through_module,
    _tie,
)
from tests.zoo.randomize import randomize


class HeadsLast(Attends):
    """``nlhd,nshd->nlsh``, a mask, a softmax over s, and what is dropped for show."""

    equations, axis = ("nlhd,nshd->nlsh", "nlsh,nshd->nlhd"), 2

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = self.laid(torch.einsum(self.equations[0], *map(self.laid, (q, k))) * DIM**-0.5)
        later = torch.ones(TOKENS, TOKENS).triu(1).bool()[..., None]
        weights = scores.masked_fill(later if self.axis == 2 else later[..., None], -1e9).softmax(self.axis)
        return self.laid(torch.einsum(self.equations[1], weights, self.laid(v))).transpose(1, 2)

    def laid(self, x: Tensor) -> Tensor:
        return x


class TokensFirst(HeadsLast):
    """``ibhd,jbhd->ijbh``: sequences and heads behind tokens."""

    equations, axis = ("ibhd,jbhd->ijbh", "ijbh,jbhd->ibhd"), 1

    def laid(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if x.shape[2:] == (HEADS, DIM) else x


@pytest.mark.parametrize("kind", [HeadsLast, TokensFirst])
@torch.no_grad()
def test_a_twin_is_rewritten_without_loss_and_another_is_not(kind: type[HeadsLast]) -> None:
    for perturbed in (False, True):
        module = kind()
        randomize(module)
        _tie(module.shared(), perturbed=perturbed)
        (site,) = rewriter.inspect(module, example_inputs=(torch.randn(2, TOKENS, 32),)).sites
        assert site.causal and not site.cross
        errors = [_through_module(module), _through_graph(module)]
        assert min(errors) > MOVED if perturbed else max(errors) < EXACT


class Both(nn.Module):
    """One that is rewritten, and one whose query heads are mixed, so that it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = HeadsLast(), HeadsLast()
        for part in (self.first, self.second):
            randomize(part)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
            for p in (self.second.query, self.second.key, self.second.value)
        )
        return self.first(x) + self.second.weigh(torch.maximum(q, q.flip(1)), k, v).transpose(1, 2).flatten(2)


def test_scores_of_what_is_refused_stay_in_their_order_in_a_graph() -> None:
    program = torch.export.export(Both(), (torch.randn(2, TOKENS, 32),))
    done = rewriter.optimize(program, "gqa2")
    assert len(done.rewrite_report.sites) == len(done.rewrite_report.refused) == 1
    written = [str(n.args[0]) for n in done.graph.nodes if "einsum" in str(n.target)]
    assert written == list(HeadsLast.equations)
