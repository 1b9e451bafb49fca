"""Operands that are run instead of read: which are, that replay holds them to their columns, and what is offered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.match.attention import find_attention
from passes.replay import TOLERANCES, replay
from rewriter.capture.torch_export import capture
from tests.match.test_reasons import GatheredKeys, PooledByIndex, PooledQueries, Projects, ScaledLate, Summed


class SharedPool(Projects):
    """Two heads of keys are repeated, and pooled after that."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(self.q.in_features, self.q.out_features // 2) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, *(t.repeat_interleave(2, 1).unflatten(2, (-1, 2)).amax(3) for t in (k, v))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class PooledAcross(Projects):
    """Every key is the largest over the heads before it, too."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ k.cummax(1).values.transpose(-2, -1)).softmax(-1) @ v)


def _x() -> Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        (PooledQueries, "q"),
        (PooledByIndex, "q"),
        (Summed, "kv"),
        (ScaledLate, "q"),
        (GatheredKeys, "kv"),
        (SharedPool, "kv"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_treats_heads_by_themselves_and_alike_is_a_site_held_to_its_columns(
    kind: type[Projects], roles: str
) -> None:
    flow = capture(kind().eval(), (_x(),), {}).flow
    matches = find_attention(flow)
    (site,) = matches.sites
    operands = {"q": site.q, "k": site.k, "v": site.v}
    assert "".join(r for r, o in operands.items() if o.headwise) == roles
    assert site.kv_heads == (2 if kind is SharedPool else 4)
    proof = matches.evidence[site.name]
    assert replay(flow, proof.path, proof.q, proof.k, proof.v).worst < TOLERANCES[flow.dtype]
    for turn in (1, 8):  # the next column, and the next head's
        traced = getattr(proof, roles[-1])
        columns = np.roll(traced.operand.columns, turn).reshape(traced.operand.columns.shape)
        moved = replace(traced, operand=replace(traced.operand, columns=columns))
        again = replay(flow, proof.path, **{**{r: getattr(proof, r) for r in "qkv"}, roles[-1]: moved})
        assert again.worst > 100 * TOLERANCES[flow.dtype]


def test_what_mixes_heads_is_none() -> None:
    seen = rewriter.inspect(PooledAcross().eval(), example_inputs=(_x(),))
    assert not seen.sites and len(seen.refusals) == 1


def test_nothing_but_fewer_heads_is_offered_or_done_to_it() -> None:
    module = nn.Sequential(Summed().eval())
    (names,) = rewriter.inspect(module, example_inputs=(_x(),)).targets.values()
    assert names == ("mqa", "gqa2")
    for target in ("linear", "fnet", "gau", "dha", "window"):
        with pytest.raises(rewriter.RewriteError, match=r"only gqaN|tokens are pooled"):
            rewriter.optimize(module, target, example_inputs=(_x(),))
    found = rewriter.optimize(module, "gqa2", example_inputs=(_x(),), calibration=[(_x(),)] * 2)
    assert torch.isfinite(found(_x())).all()
