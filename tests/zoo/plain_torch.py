"""Zoo models in plain torch: nanoGPT-style decoders, `nn.MultiheadAttention` users, and models without attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedCausalAttention(nn.Module):
    """Fused QKV projection; causal softmax written out over a mask buffer, or torch's fused attention."""

    def __init__(self, width: int, heads: int, positions: int, fused_kernel: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads = heads
        self.fused_kernel = fused_kernel
        if not fused_kernel:
            mask = torch.tril(torch.ones(positions, positions)).view(1, 1, positions, positions)
            self.register_buffer("bias", mask)
            self.bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        k = k.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        q = q.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        if self.fused_kernel:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :tokens, :tokens] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(batch, tokens, width)
        out: Tensor = self.c_proj(y)
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, positions: int, inner: int, fused_kernel: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = FusedCausalAttention(width, heads, positions, fused_kernel)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class NanoDecoder(nn.Module):
    """``idx [B, T]`` int64 to logits ``[B, T, vocab]``; embedding and output weights tied."""

    def __init__(
        self, vocab: int, width: int, heads: int, layers: int, positions: int, inner: int, fused_kernel: bool
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(positions, width)
        self.h = nn.ModuleList([DecoderBlock(width, heads, positions, inner, fused_kernel) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        position = torch.arange(idx.size(1), device=idx.device)
        x = self.wte(idx) + self.wpe(position)
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


class MultiheadBlock(nn.Module):
    """Pre-norm block around `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int, inner: int, batch_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.mlp = FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(x)
        return out


class MultiheadStack(nn.Module):
    """``x [B, T, width]`` (or ``[T, B, width]``) to the same shape."""

    def __init__(self, width: int, heads: int, inner: int, layers: int, batch_first: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MultiheadBlock(width, heads, inner, batch_first) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` behind a linear layer; ``x [B, T, width]``, optional padding mask (True = ignore)."""

    def __init__(self, width: int, heads: int, inner: int, layers: int, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, inner, batch_first=True, norm_first=norm_first)
        self.embed = nn.Linear(width, width)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.encoder(self.embed(x), src_key_padding_mask=padding)
        return out


class Perceptron(nn.Module):
    """A classifier whose softmax is no attention; ``x [B, T, width]`` to ``[B, T, classes]``."""

    def __init__(self, width: int, inner: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, inner)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.head(x + self.mlp(self.norm(x))), dim=-1)


class ConvNet(nn.Module):
    """``pixels [B, 3, H, W]`` to ``[B, classes]``."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(pixels))))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


class RoutedExperts(nn.Module):
    """Two dense experts mixed by a softmax router: a softmax times values that is no attention."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2)
        self.experts = nn.ModuleList([FeedForward(width, inner) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.router(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return x + (outputs @ weights.unsqueeze(-1)).squeeze(-1)
