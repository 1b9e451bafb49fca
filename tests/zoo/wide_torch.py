"""Families beyond the extras in plain torch and x-transformers: complex rotation, a packed permute, a decoder stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import heads
from tests.zoo.case import HeadViews, Inputs, ZooCase
from tests.zoo.feeds import FEATURE_AXES, HEADS, INNER, LAYERS, POSITIONS, VOCAB, WIDTH, features, pixels, tokens
from tests.zoo.plain_torch import FeedForward
from tests.zoo.randomize import randomize


class ComplexRotaryAttention(nn.Module):
    """Grouped causal attention that rotates neighbouring features as complex numbers and repeats K and V."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width // heads * kv_heads, bias=False)
        self.wv = nn.Linear(width, width // heads * kv_heads, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = _rotated(self.wq(x).view(batch, length, self.heads, -1), rotation)
        k = _rotated(self.wk(x).view(batch, length, self.kv_heads, -1), rotation)
        v = self.wv(x).view(batch, length, self.kv_heads, -1)
        k, v = (_repeated(t, self.heads // self.kv_heads) for t in (k, v))
        scores = torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)) / q.shape[-1] ** 0.5 + mask
        mixed = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(v), v.transpose(1, 2))
        out: Tensor = self.wo(mixed.transpose(1, 2).contiguous().view(batch, length, -1))
        return out


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation[None, :, None]).flatten(3).type_as(x)


def _repeated(x: Tensor, times: int) -> Tensor:
    batch, length, kv_heads, dim = x.shape
    return x[:, :, :, None, :].expand(batch, length, kv_heads, times, dim).reshape(batch, length, -1, dim)


class ComplexRotaryDecoder(nn.Module):
    """``tokens [B, T]`` int64 to logits ``[B, T, vocab]``."""

    def __init__(self, vocab: int, width: int, heads: int, kv_heads: int, layers: int, positions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(layers)])
        self.attentions = nn.ModuleList([ComplexRotaryAttention(width, heads, kv_heads) for _ in range(layers)])
        self.output = nn.Linear(width, vocab, bias=False)
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, width // heads, 2).float() / (width // heads))
        angles = torch.outer(torch.arange(positions).float(), frequencies)
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.rotation: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf")), diagonal=1)
        x = self.embedding(tokens)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), self.rotation[:length], mask)
        out: Tensor = self.output(x)
        return out


class PackedAttention(nn.Module):
    """One projection whose output is permuted and unbound into q, k and v; per-head norms if `norm`."""

    def __init__(self, width: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.dim) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.dim) if norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.fused = not norm

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * self.dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class PatchEncoder(nn.Module):
    """``pixels [B, 3, H, W]`` to ``[B, 1 + patches, width]``: strided convolution, class token, blocks."""

    def __init__(self, width: int, heads: int, inner: int, layers: int, norm: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 17, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers)])
        self.attentions = nn.ModuleList([PackedAttention(width, heads, norm) for _ in range(layers)])
        self.mlps = nn.ModuleList([FeedForward(width, inner) for _ in range(layers)])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        out: Tensor = x
        return out


class LateBiasAttention(nn.Module):
    """A packed projection without a bias; vectors are added behind the split, to keys as one vector for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(heads, 1, self.dim))
        self.proj = nn.Linear(width, width)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = self._by_head(q + self.q_bias), self._by_head(k) + self.k_bias, self._by_head(v + self.v_bias)
        mixed = (q @ k.transpose(-2, -1) * self.dim**-0.5).softmax(dim=-1) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class LateBiasStack(nn.Module):
    """``x [B, T, width]`` to the same shape."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers)])
        self.attentions = nn.ModuleList([LateBiasAttention(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return x


class TorchDecoder(nn.Module):
    """`nn.TransformerDecoder`, causal; ``x [B, T, width]`` and ``memory [B, S, width]`` to ``[B, T, width]``."""

    def __init__(self, width: int, heads: int, inner: int, layers: int) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, heads, inner, batch_first=True), layers)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), diagonal=1)
        out: Tensor = self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return out


def _x_transformer(**options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from loguru import logger

        logger.disable("x_transformers")  # it warns of what small models do
        from x_transformers import Decoder, TransformerWrapper

        stack = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=8, ff_mult=2, **options)
        model: nn.Module = TransformerWrapper(num_tokens=VOCAB, max_seq_len=POSITIONS, attn_layers=stack)
        return model

    return make


def memory_and_target(batch: int, length: int, seed: int) -> Inputs:
    memory = features(batch, length + 2, seed + 1)["x"]
    return {**features(batch, length, seed), "memory": memory}


def token_ids(name: str) -> Callable[[int, int, int], Inputs]:
    return lambda batch, length, seed: {name: tokens(batch, length, seed)}


def plain() -> list[ZooCase]:
    def case(
        name: str,
        make: Callable[[], nn.Module],
        inputs: Callable[[int, int, int], Inputs],
        views: HeadViews,
        axes: Mapping[str, Mapping[int, str]],
        causal: bool,
        *,
        kv_heads: int = HEADS,
        sites: int = LAYERS,
        tags: tuple[str, ...] = (),
    ) -> ZooCase:
        return ZooCase(
            name,
            lambda: randomize(make()),
            inputs,
            views,
            HEADS,
            kv_heads,
            sites,
            causal,
            axes,
            tags=frozenset({"torch", "wide", *tags}),
        )

    def patches(norm: bool) -> Callable[[], nn.Module]:
        return lambda: PatchEncoder(WIDTH, HEADS, INNER, LAYERS, norm)

    image, sequence = {"pixels": {0: "batch"}}, {0: "batch", 1: "sequence"}
    packed, separate = heads.stacked(HEADS, HEADS, "qkv"), heads.separate(HEADS, "to_k", "to_v")
    x_axes = {"x": sequence}
    return [
        case(
            "complex-rotary",
            lambda: ComplexRotaryDecoder(VOCAB, WIDTH, HEADS, 2, LAYERS, POSITIONS),
            token_ids("tokens"),
            heads.separate(2, "wk", "wv"),
            {"tokens": sequence},
            True,
            kv_heads=2,
        ),
        case("packed-permute", patches(False), pixels("pixels", 16), packed, image, False),
        case("packed-permute-norm", patches(True), pixels("pixels", 16), packed, image, False),
        case(
            "late-bias",
            lambda: LateBiasStack(WIDTH, HEADS, LAYERS),
            features,
            heads.joined(packed, heads.vectors(HEADS, "k_bias", "v_bias")),
            FEATURE_AXES,
            False,
        ),
        case(
            "torch-decoder",
            lambda: TorchDecoder(WIDTH, HEADS, INNER, LAYERS),
            memory_and_target,
            heads.in_projection(HEADS),
            {**FEATURE_AXES, "memory": {0: "batch", 1: "source"}},
            True,
            sites=2 * LAYERS,
            tags=("encoder-decoder",),
        ),
        case("x-rotary", _x_transformer(rotary_pos_emb=True), token_ids("x"), separate, x_axes, True),
        case(
            "x-rotary-sdpa",
            _x_transformer(rotary_pos_emb=True, attn_flash=True),
            token_ids("x"),
            separate,
            x_axes,
            True,
        ),
        case(
            "x-alibi",
            _x_transformer(alibi_pos_bias=True, alibi_num_heads=HEADS),
            token_ids("x"),
            separate,
            x_axes,
            True,
        ),
    ]
