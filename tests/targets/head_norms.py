"""Attentions whose norms treat heads apart, by hand: over all heads at once, or by head with gains for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, DIM, WIDTH = 4, 8, 32


class Written(nn.Module):
    """A root mean square over the last axis, written out, times a weight of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Scaled(nn.Module):
    """Each head's features at unit length, times the square root of their number, then times a gain of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HEADS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * DIM**0.5 * self.weight


NORMS = {
    "rms-written": lambda: Written(WIDTH),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "layer": lambda: nn.LayerNorm(WIDTH),
    "without-gain": lambda: nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False),
    "by-head": lambda: Written(HEADS, DIM),
    "by-head-scaled": Scaled,
}


class Normed(nn.Module):
    """Self-attention whose queries and keys go through a norm of `kind`; `packed` projects all three at once."""

    def __init__(self, kind: str, packed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_head, self.packed = kind.startswith("by-head"), packed
        if packed:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = NORMS[kind](), NORMS[kind]()
        with torch.no_grad():
            for parameter in (*self.q_norm.parameters(), *self.k_norm.parameters()):
                parameter.add_(0.5 * torch.randn(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (HEADS, DIM)) for y in (q, k, v))
        if self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    """One attention inside a model, as a module can be replaced only there."""

    def __init__(self, kind: str, packed: bool = False) -> None:
        super().__init__()
        self.attention = Normed(kind, packed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x)
        return out


def tie(model: Model, kv_heads: int) -> None:
    """Make heads of keys and values, and what the keys' norm multiplies them by, equal within groups."""
    attention = model.attention
    rows = [attention.qkv] if attention.packed else [attention.k_proj, attention.v_proj]
    with torch.no_grad():
        for layer in rows:
            for parameter in layer.parameters():
                for part in parameter.split(WIDTH)[1 if attention.packed else 0 :]:
                    _tie(part, kv_heads)
        for parameter in attention.k_norm.parameters():
            _tie(parameter.view(WIDTH), kv_heads)


def _tie(rows: Tensor, kv_heads: int) -> None:
    groups = rows.view(kv_heads, HEADS // kv_heads, DIM, *rows.shape[1:])
    groups.copy_(groups[:, :1].clone().expand_as(groups))
