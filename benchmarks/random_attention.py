"""Attentions nobody wrote down: random head counts, layouts, biases, norms, rotations, masks and spellings.

`draw(seed)` gives an `Architecture`, `Net` builds it. Key and value parameters can be reached head by head, so that
heads can be made equal (a twin that must survive rewriting) or be averaged (what rewriting must come to).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

POSITIONS = 64


@dataclass(frozen=True)
class Architecture:
    """What one net is made of; every field is a number or a word, so that a case prints in one line.

    Attributes:
        packing: "separate"; "packed" (q, k, v one after another in one projection), "kv" (k and v so), "group" (each
            group's queries, key and value together).
        transposed: weights are [in, out], as in GPT-2.
        norm: of q and k over each head's features: "", "layer" or "l2".
        rotary: "", "half", "interleaved" or "partial" (half, on the first half of the features).
        tokens_first: activations are [tokens, batch, features] inside.
        repeat: how K/V heads reach their queries: "interleave", "expand" or "grouped" (never repeated).
        scale_at: "score", "divide", "q", "k", "both" or "none".
        causal: "", "tril", "compare" or "sdpa" (torch's flag); padding: "", "boolean" or "additive", an input.
        bias: "", "table" (learned, by distance and head) or "alibi".
        spelling: "matmul", "einsum" or "sdpa".
        cross: keys and values come from a second input.
    """

    seed: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    width: int
    packing: str
    transposed: bool
    q_bias: bool
    kv_bias: bool
    norm: str
    rotary: str
    tokens_first: bool
    repeat: str
    scale_at: str
    softcap: bool
    causal: str
    padding: str
    bias: str
    spelling: str
    sinks: bool
    out_bias: bool
    cross: bool

    def __str__(self) -> str:
        words = [f"{f.name}={v}" for f in fields(self) if (v := getattr(self, f.name)) not in ("", False)]
        return ", ".join(words)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def pooled_counts(self) -> list[int]:
        """K/V head counts below the present one that it can be pooled to."""
        return [n for n in range(1, self.kv_heads) if self.kv_heads % n == 0]


def draw(seed: int) -> Architecture:
    """The architecture of a seed, always the same."""
    r = random.Random(seed)
    kv_heads, group = r.choice([2, 2, 3, 4, 4, 6]), r.choice([1, 1, 2, 3])
    rotary = r.choice(["", "", "half", "interleaved", "partial"])
    dim = r.choice([4, 8, 12, 16]) if rotary else r.choice([3, 4, 5, 8, 16])
    cross = r.random() < 0.2
    spelling = r.choice(["matmul", "matmul", "einsum", "sdpa"])
    packing = r.choice(["separate", "kv"] if cross else ["separate", "separate", "packed", "kv", "group"])
    value_dim = dim if packing == "group" or r.random() < 0.8 else dim + r.choice([1, 2, 4])
    plain = spelling != "sdpa"
    causal = "" if cross else r.choice(["", "tril", "compare", "tril" if plain else "sdpa"])
    return Architecture(
        seed=seed, heads=kv_heads * group, kv_heads=kv_heads, dim=dim, value_dim=value_dim,
        width=r.choice([20, 24, 32, 36]), packing=packing, transposed=r.random() < 0.3, q_bias=r.random() < 0.5,
        kv_bias=r.random() < 0.5, norm=r.choice(["", "", "", "layer", "l2"]), rotary=rotary,
        tokens_first=r.random() < 0.2, 
        repeat=r.choice(["interleave", "expand", "grouped"][: 3 if plain else 2]),
        scale_at=r.choice(["score", "divide", "q", "k", "both", "none"]) if plain else "score",
        softcap=plain and r.random() < 0.15, causal=causal,
        padding="" if causal == "sdpa" else r.choice(["", "", "boolean", "additive"]),
        bias="" if causal == "sdpa" else r.choice(["", "", "", "table", "alibi"]), spelling=spelling,
        sinks=plain and r.random() < 0.1, out_bias=r.random() < 0.5, cross=cross,
    )  # fmt: skip


class Projection(nn.Module):
    """A linear map, stored either way round."""

    def __init__(self, width: int, features: int, bias: bool, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn(width, features) if transposed else torch.randn(features, width))
        self.weight.data /= math.sqrt(width)
        self.bias = nn.Parameter(torch.randn(features) * 0.5) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.transposed:
            return functional.linear(x, self.weight, self.bias)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def rows(self) -> list[Tensor]:
        """Weight [features, width] and bias [features], as views that can be written through."""
        weight = self.weight.data.t() if self.transposed else self.weight.data
        return [weight] if self.bias is None else [weight, self.bias.data]


class Attention(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.a = a
        sizes = {"q": a.heads * a.dim, "k": a.kv_heads * a.dim, "v": a.kv_heads * a.value_dim}
        parts = {"separate": ("q", "k", "v"), "packed": ("qkv",), "kv": ("q", "kv"), "group": ("qkv",)}[a.packing]
        self.projections = nn.ModuleDict()
        for part in parts:
            bias = a.q_bias if part == "q" else a.kv_bias
            self.projections[part] = Projection(a.width, sum(sizes[x] for x in part), bias, a.transposed)
        self.out = nn.Linear(a.heads * a.value_dim, a.width, bias=a.out_bias)
        if a.norm == "layer":
            self.q_norm, self.k_norm = nn.LayerNorm(a.dim), nn.LayerNorm(a.dim)
        if a.bias == "table":
            self.table = nn.Parameter(torch.randn(a.heads, 2 * POSITIONS))
        if a.sinks:
            self.sinks = nn.Parameter(torch.randn(a.heads))
        for parameter in self.parameters():
            if parameter.dim() == 1 and parameter.numel() == a.dim:
                parameter.data += 0.3 * torch.randn_like(parameter)

    # ------------------------------------------------------------ heads

    def head_views(self) -> Iterator[Tensor]:
        """Every key and value parameter as a writable view [kv_heads, features, ...]."""
        a = self.a
        sizes = {"q": a.heads * a.dim, "k": a.kv_heads * a.dim, "v": a.kv_heads * a.value_dim}
        for part, projection in self.projections.items():
            assert isinstance(projection, Projection)
            for rows in projection.rows():
                if a.packing == "group":
                    grouped = rows.unflatten(0, (a.kv_heads, a.group + 2, a.dim))
                    yield from (grouped[:, a.group], grouped[:, a.group + 1])
                    continue
                for name, piece in zip(part, rows.split([sizes[x] for x in part]), strict=True):
                    if name != "q":
                        yield piece.unflatten(0, (a.kv_heads, -1))

    # ------------------------------------------------------------ forward

    def forward(self, x: Tensor, padding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        a = self.a
        source = x if context is None else context
        if a.tokens_first:
            x, source = x.transpose(0, 1), source.transpose(0, 1)
        q, k, v = (self._by_head(t) for t in self._projected(x, source))
        q, k = self._normed(q, "q_norm"), self._normed(k, "k_norm")
        if a.rotary:
            q, k = _rotated(q, a.rotary), _rotated(k, a.rotary)
        out = self._mixed(q, k, v, self._mask(q, k, padding))
        out = out.permute(2, 0, 1, 3) if a.tokens_first else out.transpose(1, 2)
        y: Tensor = self.out(out.flatten(2))
        return y.transpose(0, 1) if a.tokens_first else y

    def _projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[.., .., heads, features] of each."""
        a = self.a
        if a.packing == "group":
            packed = _split(self.projections["qkv"](x), -1, a.kv_heads, a.group + 2, a.dim)
            q, k, v = packed.split([a.group, 1, 1], dim=-2)
            return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)
        sizes = [a.heads * a.dim, a.kv_heads * a.dim, a.kv_heads * a.value_dim]
        if a.packing == "packed":
            q, k, v = self.projections["qkv"](x).split(sizes, dim=-1)
        elif a.packing == "kv":
            q = self.projections["q"](x)
            k, v = self.projections["kv"](source).split(sizes[1:], dim=-1)
        else:
            q, k, v = self.projections["q"](x), self.projections["k"](source), self.projections["v"](source)
        counts = (a.heads, a.kv_heads, a.kv_heads)
        return tuple(_split(t, -1, n, -1) for t, n in zip((q, k, v), counts, strict=True))  # type: ignore[return-value]

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, heads, tokens, features]."""
        return x.permute(1, 2, 0, 3) if self.a.tokens_first else x.transpose(1, 2)

    def _normed(self, x: Tensor, name: str) -> Tensor:
        if self.a.norm == "l2":
            return functional.normalize(x, dim=-1)
        return x if not self.a.norm else getattr(self, name)(x)  # type: ignore[no-any-return]

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor | None:
        """Added to the scores: [B or 1, H or 1, S, T]."""
        a, s, t = self.a, q.shape[2], k.shape[2]
        rows, columns = torch.arange(s)[:, None], torch.arange(t)[None, :]
        found: Tensor | None = None
        if a.causal == "tril":
            seen = torch.ones(s, t, dtype=torch.bool).tril()
            found = torch.zeros(s, t).masked_fill(~seen, float("-inf"))[None, None]
        elif a.causal == "compare":
            found = torch.where(columns <= rows, 0.0, torch.finfo(torch.float32).min)[None, None]
        if a.bias == "table":
            table = self.table[:, columns - rows + POSITIONS][None]
            found = table if found is None else found + table
        elif a.bias == "alibi":
            slopes = 2.0 ** (-8.0 * (torch.arange(a.heads) + 1) / a.heads)
            alibi = (slopes[:, None, None] * (columns - rows).abs()[None]).neg()[None]
            found = alibi if found is None else found + alibi
        if padding is None:
            return found
        if a.padding == "boolean":
            padding = torch.zeros(padding.shape).masked_fill(~padding, torch.finfo(torch.float32).min)
        padding = padding[:, None, None, :]
        return padding if found is None else found + padding

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        a = self.a
        scale = a.dim**-0.5
        if a.spelling == "sdpa":
            k, v = self._repeated(k), self._repeated(v)
            return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=a.causal == "sdpa")
        q = q * {"q": scale, "both": scale**0.5}.get(a.scale_at, 1.0)
        k = k * {"k": scale, "both": scale**0.5}.get(a.scale_at, 1.0)
        grouped = a.repeat == "grouped"
        if grouped:
            q, k, v = _split(q, 1, a.kv_heads, a.group), k[:, :, None], v[:, :, None]
        else:
            k, v = self._repeated(k), self._repeated(v)
        einsum = a.spelling == "einsum" and not grouped
        scores = torch.einsum("bhid,bhjd->bhij", q, k) if einsum else q @ k.transpose(-1, -2)
        scores = scores * scale if a.scale_at == "score" else scores / a.dim**0.5 if a.scale_at == "divide" else scores
        if grouped:
            scores = scores.flatten(1, 2)
        if a.softcap:
            scores = 3.0 * torch.tanh(scores / 3.0)
        if mask is not None:
            scores = scores + mask
        if a.sinks:
            sinks = self.sinks[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        if grouped:
            return (_split(weights, 1, a.kv_heads, a.group) @ v).flatten(1, 2)
        return torch.einsum("bhij,bhjd->bhid", weights, v) if einsum else weights @ v

    def _repeated(self, x: Tensor) -> Tensor:
        a = self.a
        if a.group == 1:
            return x
        if a.repeat == "interleave":
            return x.repeat_interleave(a.group, dim=1)
        return x[:, :, None].expand(-1, -1, a.group, -1, -1).flatten(1, 2)


def _split(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """One axis as several; unlike Tensor.unflatten, exporters that trace keep the other axes open."""
    axis %= x.dim()
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def _rotated(x: Tensor, kind: str) -> Tensor:
    """Rotary embedding of [B, heads, tokens, features], positions from 0."""
    if kind == "partial":
        half = x.shape[-1] // 2
        return torch.cat([_rotated(x[..., :half], "half"), x[..., half:]], dim=-1)
    pairs = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * 100.0 ** (-torch.arange(pairs) / pairs)[None]
    cos, sin = angles.cos(), angles.sin()
    if kind == "interleaved":
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    first, second = x[..., :pairs], x[..., pairs:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Net(nn.Module):
    """Two residual layers of one architecture, each an attention and a feed-forward; [B, S, width] to the same."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        torch.manual_seed(a.seed)
        self.norms = nn.ModuleList(nn.LayerNorm(a.width) for _ in range(2))
        self.attentions = nn.ModuleList(Attention(a) for _ in range(2))
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(a.width, 2 * a.width), nn.GELU(), nn.Linear(2 * a.width, a.width)) for _ in range(2)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        for norm, attention, forward in zip(self.norms, self.attentions, self.forwards, strict=True):
            x = x + attention(norm(x), padding, context)
            x = x + forward(x)
        return x

    @torch.no_grad()
    def pool(self, kv_heads: int, *, mean: bool) -> Net:
        """Make the heads of each group equal, in place: their mean, or the first of them."""
        for attention in self.attentions:
            assert isinstance(attention, Attention)
            for view in attention.head_views():
                groups = view.unflatten(0, (kv_heads, -1))
                groups.copy_((groups.mean(1, keepdim=True) if mean else groups[:, :1]).clone().expand_as(groups))
        return self


def inputs(a: Architecture, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """A call of the net by keyword; a third of the keys of the last sequence are padding."""
    generator = torch.Generator().manual_seed(seed)
    given = {"x": torch.randn(batch, tokens, a.width, generator=generator)}
    keys = tokens + 3 if a.cross else tokens
    if a.padding:
        keep = torch.ones(batch, keys, dtype=torch.bool)
        keep[-1, keys - keys // 3 :] = False
        lowest = torch.finfo(torch.float32).min
        given["padding"] = keep if a.padding == "boolean" else torch.zeros(batch, keys).masked_fill(~keep, lowest)
    if a.cross:
        given["context"] = torch.randn(batch, keys, a.width, generator=generator)
    return given
