"""Attentions nobody wrote down: random head counts, layouts, biases, norms, rotations, masks and spellings.

`draw(seed)` gives an `Architecture`, `Net` builds it. Key and value parameters can be reached head by head, so that
heads can be made equal (a twin that must survive rewriting) or be averaged (what rewriting must come to).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS, POSITIONS, WINDOW, PAST = 2, 64, 5, 6
ODD = ("mixed", "clamped", "content")


@dataclass(frozen=True)
class Architecture:
    """What one net is made of; every field is a number or a word, so that a case prints in one line.

    Attributes:
        packing: "separate"; "packed" (q, k, v one after another in one projection), "kv" (k and v so), "group" (each
            group's queries, key and value together).
        order: in which a packed projection holds them, e.g. "kqv".
        transposed: weights are [in, out], as in GPT-2.
        q_bias, kv_bias: of projections; k_bias: keys have one where values do (where they are projected apart).
        norm: of q and k over each head's features: "", "layer", "rms" or "l2"; over those of all heads: "all layer" or
            "all rms"; "own rms" is over each head's with numbers of its own.
        rotary: "", "half", "interleaved", or "partial" and "partial interleaved" (on the first half of the features).
        tokens_first: activations are [tokens, batch, features] inside.
        repeat: how K/V heads reach their queries: "interleave", "expand" or "grouped" (never repeated).
        scale_at: "score", "divide", "q", "k", "both" or "none".
        causal: "", "tril", "compare", "window" (the last few keys) or "sdpa" (torch's flag).
        padding: "", "boolean" or "additive", an input.
        bias: "", "table" (learned, by distance and head) or "alibi".
        spelling: "matmul", "einsum", "sdpa" or "bmm" (batch and heads are one axis).
        cross: keys and values come from a second input.
        cached: keys and values of earlier tokens are inputs, and those of all tokens outputs.
        odd: scores that are "clamped" (run, not read), or what must be refused: "mixed" between heads by learned
            weights, or with a bias from hidden states ("content"); "" for none.
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
    order: str
    k_bias: bool
    cached: bool
    odd: str

    @property
    def sizes(self) -> dict[str, int]:
        """Features of each projection."""
        return {"q": self.heads * self.dim, "k": self.kv_heads * self.dim, "v": self.kv_heads * self.value_dim}

    @property
    def parts(self) -> tuple[str, ...]:
        """What each projection holds, in order."""
        return {"separate": ("q", "k", "v"), "kv": ("q", self.order), "group": ("qkv",)}.get(
            self.packing, (self.order,)
        )

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
    drawn = Architecture(
        seed=seed, heads=kv_heads * group, kv_heads=kv_heads, dim=dim, value_dim=value_dim,
        width=r.choice([20, 24, 32, 36]), packing=packing, transposed=r.random() < 0.3, q_bias=r.random() < 0.5,
        kv_bias=r.random() < 0.5, norm=r.choice(["", "", "", "layer", "l2"]), rotary=rotary,
        tokens_first=r.random() < 0.2, 
        repeat=r.choice(["interleave", "expand", "grouped"][: 3 if plain else 2]),
        scale_at=r.choice(["score", "divide", "q", "k", "both", "none"]) if plain else "score",
        softcap=plain and r.random() < 0.15, causal=causal,
        padding="" if causal == "sdpa" else r.choice(["", "", "boolean", "additive"]),
        bias="" if causal == "sdpa" else r.choice(["", "", "", "table", "alibi"]), spelling=spelling,
        sinks=plain and r.random() < 0.1, out_bias=r.random() < 0.5, cross=cross, order="", k_bias=True, cached=False,
        odd="",
    )  # fmt: skip
    return _varied(drawn, random.Random(-1 - seed))


def _varied(a: Architecture, r: random.Random) -> Architecture:
    """What came to be drawn later, by numbers of its own, so that what a seed drew before stays."""
    norm = a.norm
    if r.random() < (0.5 if norm == "layer" else 0.15):
        norm = r.choice(["rms", "all layer", "all rms", "own rms"])
    plain_scores = a.spelling == "matmul" and a.repeat != "grouped"
    return replace(
        a, norm=norm, order={"packed": r.choice(["qkv", "qkv", "kqv", "vqk", "vkq"]), "kv": r.choice(["kv", "vk"])}.get(
            a.packing, ""
        ),
        rotary="partial interleaved" if a.rotary == "partial" and r.random() < 0.5 else a.rotary,
        causal="window" if a.causal in ("tril", "compare") and r.random() < 0.25 else a.causal,
        k_bias=a.packing != "separate" or not a.kv_bias or r.random() < 0.6,
        spelling="bmm" if plain_scores and r.random() < 0.2 else a.spelling,
        cached=not a.cross and not a.tokens_first and a.causal != "sdpa" and r.random() < 0.2,
        odd=r.choice(ODD) if a.spelling != "sdpa" and r.random() < 0.15 else "",
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


class Norm(nn.Module):
    """A norm of [..., heads, dim] by an architecture's word; `gains` are numbers for each head apart, if there are."""

    def __init__(self, kind: str, heads: int, dim: int) -> None:
        super().__init__()
        scope, _, self.kind = kind.rpartition(" ")
        self.over_all, self.heads, self.dim = scope == "all", heads, dim
        shape = {"all": (heads * dim,), "own": (heads, dim)}.get(scope, (dim,))
        self.gain = nn.Parameter(1 + 0.3 * torch.randn(shape))
        self.shift = nn.Parameter(0.3 * torch.randn(shape)) if self.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.over_all:
            x = x.flatten(-2)
        if self.shift is not None:
            found = functional.layer_norm(
                x, (self.heads * self.dim if self.over_all else self.dim,), self.gain, self.shift
            )
        else:
            found = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return _split(found, -1, self.heads, self.dim) if self.over_all else found

    def by_head(self, heads: int) -> Iterator[Tensor]:
        """Views [heads, dim] of what heads have apart."""
        if self.over_all or self.gain.dim() == 2:
            yield from (p.data.view(heads, -1) for p in self.parameters())


class Attention(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.a = a
        self.projections = nn.ModuleDict()
        for part in a.parts:
            bias = {"q": a.q_bias, "k": a.kv_bias and a.k_bias}.get(part, a.kv_bias)
            self.projections[part] = Projection(a.width, sum(a.sizes[x] for x in part), bias, a.transposed)
        self.out = nn.Linear(a.heads * a.value_dim, a.width, bias=a.out_bias)
        if a.norm not in ("", "l2"):
            self.q_norm, self.k_norm = Norm(a.norm, a.heads, a.dim), Norm(a.norm, a.kv_heads, a.dim)
        if a.bias == "table":
            self.table = nn.Parameter(torch.randn(a.heads, 2 * POSITIONS))
        if a.sinks:
            self.sinks = nn.Parameter(torch.randn(a.heads))
        if a.odd == "mixed":
            self.between = nn.Linear(a.heads, a.heads, bias=False)
        elif a.odd == "content":
            self.content = nn.Linear(a.dim, 1)

    # ------------------------------------------------------------ heads

    def head_views(self) -> Iterator[Tensor]:
        """Every key and value parameter as a writable view [kv_heads, features, ...]."""
        a = self.a
        if a.norm not in ("", "l2"):
            yield from self.k_norm.by_head(a.kv_heads)
        for part, projection in self.projections.items():
            assert isinstance(projection, Projection)
            for rows in projection.rows():
                if a.packing == "group":
                    grouped = rows.unflatten(0, (a.kv_heads, a.group + 2, a.dim))
                    yield from (grouped[:, a.group], grouped[:, a.group + 1])
                    continue
                for name, piece in zip(part, rows.split([a.sizes[x] for x in part]), strict=True):
                    if name != "q":
                        yield piece.unflatten(0, (a.kv_heads, -1))

    # ------------------------------------------------------------ forward

    def forward(
        self, x: Tensor, padding: Tensor | None, context: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output, and the keys and values of all tokens, [B, kv_heads, T, features]."""
        a = self.a
        source = x if context is None else context
        if a.tokens_first:
            x, source = x.transpose(0, 1), source.transpose(0, 1)
        q, k, v = self._projected(x, source)
        q, k = self._normed(q, "q_norm"), self._normed(k, "k_norm")
        q, k, v = (self._by_head(t) for t in (q, k, v))
        start = 0 if past is None else past[0].shape[2]
        if a.rotary:
            q, k = _rotated(q, a.rotary, start), _rotated(k, a.rotary, start)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = self._mixed(q, k, v, self._mask(q, k, padding))
        out = out.permute(2, 0, 1, 3) if a.tokens_first else out.transpose(1, 2)
        y: Tensor = self.out(out.flatten(2))
        return y.transpose(0, 1) if a.tokens_first else y, (k, v)

    def _projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[.., .., heads, features] of each."""
        a = self.a
        if a.packing == "group":
            packed = _split(self.projections["qkv"](x), -1, a.kv_heads, a.group + 2, a.dim)
            q, k, v = packed.split([a.group, 1, 1], dim=-2)
            return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)
        found: dict[str, Tensor] = {}
        for part in a.parts:
            projected = self.projections[part](x if "q" in part else source)
            found |= zip(part, projected.split([a.sizes[x] for x in part], dim=-1), strict=True)
        counts = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
        return tuple(_split(found[t], -1, counts[t], -1) for t in "qkv")  # type: ignore[return-value]

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
        before = t - s if a.cached else 0
        rows, columns = torch.arange(s)[:, None] + before, torch.arange(t)[None, :]
        found: Tensor | None = None
        if a.causal in ("tril", "window"):
            if a.causal == "tril":
                seen = torch.ones(s, t, dtype=torch.bool).tril(before)
            else:
                seen = (columns <= rows) & (columns > rows - WINDOW)
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
        scale, keys = a.dim**-0.5, k
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
        if a.spelling == "bmm":
            batch, q, k, v = q.shape[0], q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        einsum = a.spelling == "einsum" and not grouped
        scores = torch.einsum("bhid,bhjd->bhij", q, k) if einsum else q @ k.transpose(-1, -2)
        scores = scores * scale if a.scale_at == "score" else scores / a.dim**0.5 if a.scale_at == "divide" else scores
        if grouped:
            scores = scores.flatten(1, 2)
        if a.spelling == "bmm":
            scores = _split(scores, 0, batch, a.heads)
        if a.odd:
            scores = self._oddly(scores, keys)
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
        if a.spelling == "bmm":
            return _split(weights.flatten(0, 1) @ v, 0, batch, a.heads)
        return torch.einsum("bhij,bhjd->bhid", weights, v) if einsum else weights @ v

    def _oddly(self, scores: Tensor, keys: Tensor) -> Tensor:
        """Scores [B, H, S, T] of keys [B, kv_heads, T, D], as no attention written anew has them."""
        if self.a.odd == "mixed":
            return self.between(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        if self.a.odd == "clamped":
            return scores.clamp(-1.0, 1.0)
        return scores + self._repeated(torch.tanh(self.content(keys))).transpose(-1, -2)

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


def _rotated(x: Tensor, kind: str, start: int) -> Tensor:
    """Rotary embedding of [B, heads, tokens, features], positions from `start`."""
    if kind.startswith("partial"):
        half = x.shape[-1] // 2
        inner = kind.removeprefix("partial").strip() or "half"
        return torch.cat([_rotated(x[..., :half], inner, start), x[..., half:]], dim=-1)
    pairs = x.shape[-1] // 2
    angles = torch.arange(start, start + x.shape[2])[:, None] * 100.0 ** (-torch.arange(pairs) / pairs)[None]
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
        self.norms = nn.ModuleList(nn.LayerNorm(a.width) for _ in range(LAYERS))
        self.attentions = nn.ModuleList(Attention(a) for _ in range(LAYERS))
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(a.width, 2 * a.width), nn.GELU(), nn.Linear(2 * a.width, a.width))
            for _ in range(LAYERS)
        )

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        context: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """With `past`, a key and a value for each layer, those of all tokens come behind the output."""
        present: list[Tensor] = []
        for i, (norm, attention, forward) in enumerate(zip(self.norms, self.attentions, self.forwards, strict=True)):
            before = None if past is None else (past[2 * i], past[2 * i + 1])
            y, cache = attention(norm(x), padding, context, before)
            present += cache
            x = x + y
            x = x + forward(x)
        return x if past is None else (x, *present)

    @torch.no_grad()
    def pool(self, kv_heads: int, *, mean: bool) -> Net:
        """Make the heads of each group equal, in place: their mean, or the first of them."""
        for attention in self.attentions:
            assert isinstance(attention, Attention)
            for view in attention.head_views():
                groups = view.unflatten(0, (kv_heads, -1))
                groups.copy_((groups.mean(1, keepdim=True) if mean else groups[:, :1]).clone().expand_as(groups))
        return self


def inputs(a: Architecture, batch: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """A call of the net by keyword; a third of the keys of the last sequence are padding."""
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {"x": torch.randn(batch, tokens, a.width, generator=generator)}
    before = PAST + seed if a.cached else 0
    keys = tokens + 3 if a.cross else tokens + before
    if a.padding:
        keep = torch.ones(batch, keys, dtype=torch.bool)
        keep[-1, keys - keys // 3 :] = False
        lowest = torch.finfo(torch.float32).min
        given["padding"] = keep if a.padding == "boolean" else torch.zeros(batch, keys).masked_fill(~keep, lowest)
    if a.cross:
        given["context"] = torch.randn(batch, keys, a.width, generator=generator)
    if a.cached:
        sizes = [(batch, a.kv_heads, before, n) for _ in range(LAYERS) for n in (a.dim, a.value_dim)]
        given["past"] = [torch.randn(size, generator=generator) for size in sizes]
    return given
