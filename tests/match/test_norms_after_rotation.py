"""Norms of what was rotated before: read, replayed and rewritten like those in front of a rotation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.match.attention import find_attention
from passes.match.operands import Traced
from passes.replay import TOLERANCES, replay
from rewriter.capture import torch_export
from tests.targets.lossless_twin import distance

WIDTH, HEADS, DIM = 32, 4, 8


class _Normed(nn.Module):
    """Causal self-attention whose queries and keys are rotated, then normalised, then perhaps rotated again."""

    def __init__(self, *, interleaved: bool, gains: bool, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.interleaved, self.again = interleaved, again
        self.gain = nn.Parameter(1 + 0.3 * torch.randn(DIM)) if gains else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._normed(q), self._normed(k)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.as_tensor(x + self.o_proj(mixed.transpose(1, 2).flatten(2)))

    def _normed(self, x: Tensor) -> Tensor:
        turned = self._turned(x)
        out = turned * torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + 1e-6)
        out = out if self.gain is None else out * self.gain
        return self._turned(out) if self.again else out

    def _turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] / 3.0 ** torch.arange(DIM // 2)
        if self.interleaved:
            cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
            partner = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
            partner = torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        return x * cos + partner * sin

    def tie(self) -> None:
        """Heads 0 and 1, and 2 and 3, become equal."""
        with torch.no_grad():
            for parameter in (*self.k_proj.parameters(), *self.v_proj.parameters()):
                pairs = torch.unflatten(parameter, 0, (2, 2, DIM))
                pairs.copy_(pairs[:, :1].clone().expand_as(pairs))


KINDS = [
    pytest.param(False, False, id="half"),
    pytest.param(True, False, id="interleaved"),
    pytest.param(False, True, id="half-with-gains"),
]


def _x(length: int = 6) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("interleaved", "gains"), KINDS)
def test_it_is_a_site_with_its_rotation_and_its_norm(interleaved: bool, gains: bool) -> None:
    flow = torch_export.capture(_Normed(interleaved=interleaved, gains=gains).eval(), (_x(),), {}).flow
    matches = find_attention(flow)
    (site,) = matches.sites
    for operand in (site.q, site.k):
        assert operand.rotary is not None
        assert operand.rotary.kind == ("interleaved" if interleaved else "half")
        assert operand.norm is not None
        assert operand.norm.kind == "rms" and operand.norm.per_head
    assert site.qk_norm and site.causal

    evidence = matches.evidence[site.name]
    limit = TOLERANCES[flow.dtype]

    def error(q: Traced) -> float:
        return replay(flow, evidence.path, q, evidence.k, evidence.v).q

    assert error(evidence.q) < limit
    own, other = evidence.q.tokens.turned or (None, None)
    assert own is not None and other is not None
    backwards = replace(evidence.q, tokens=replace(evidence.q.tokens, turned=(own, -other)))
    assert error(backwards) > 100 * limit
    longer = replace(evidence.q, tokens=replace(evidence.q.tokens, own=1.1 * evidence.q.tokens.own))
    assert error(longer) > 100 * limit


@pytest.mark.parametrize(("interleaved", "gains"), KINDS)
def test_a_twin_is_rewritten_without_loss_and_another_is_not(interleaved: bool, gains: bool) -> None:
    module = _Normed(interleaved=interleaved, gains=gains).eval()
    lossy = rewriter.optimize(module, "gqa2", example_inputs=(_x(),))
    with torch.no_grad():
        assert distance(lossy(_x(9)), module(_x(9))) > 1e-3
    module.tie()
    program = torch.export.export(module, (_x(),), strict=False)
    new = rewriter.optimize(program, "gqa2").module()
    with torch.no_grad():
        assert distance(new(_x()), module(_x())) < 1e-5
        assert distance(rewriter.optimize(module, "gqa2", example_inputs=(_x(),))(_x(9)), module(_x(9))) < 1e-5


def test_what_is_rotated_before_and_after_is_run_as_it_is() -> None:
    module = _Normed(interleaved=False, gains=False, again=True).eval()
    (site,) = find_attention(torch_export.capture(module, (_x(),), {}).flow).sites
    assert site.q.headwise and site.k.headwise and not site.v.headwise and site.stays
