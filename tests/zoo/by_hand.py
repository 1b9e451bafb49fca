"""Attention written by hand, tagged "wide": softmaxes in parts, values first, a packed sequence, windows, images,
groups of query heads on an axis of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import heads
from tests.zoo.case import Inputs, ZooCase
from tests.zoo.feeds import FEATURE_AXES, HEADS, LAYERS, WIDTH, features
from tests.zoo.randomize import randomize

SIDE, TEXT_WIDTH = 8, 24


class Separate(nn.Module):
    """Four linear layers, and how `[B, T, width]` becomes heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.dim = heads, width // heads

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.dim)).transpose(1, 2)


class SoftmaxInParts(Separate):
    """A softmax as exponentials over their sum, or as the exponential of its logarithm."""

    def __init__(self, width: int, heads: int, through_logarithm: bool) -> None:
        super().__init__(width, heads)
        self.through_logarithm = through_logarithm

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.by_head(p(x)) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * self.dim**-0.5
        if self.through_logarithm:
            weights = F.log_softmax(scores, dim=-1).exp()
        else:
            raised = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            weights = raised / raised.sum(dim=-1, keepdim=True)
        out: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return out


class ValuesFirst(Separate):
    """Features before tokens: values times turned weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).transpose(1, 2).unflatten(1, (self.heads, self.dim)) for p in (self.q, self.k, self.v))
        weights = (q.transpose(-2, -1) @ k * self.dim**-0.5).softmax(dim=-1)
        out: Tensor = self.o((v @ weights.transpose(-2, -1)).flatten(1, 2).transpose(1, 2))
        return out


class TalkingHeads(Separate):
    """Scores are mixed between heads before the softmax (arXiv 2003.02436)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.mix = nn.Linear(heads, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.by_head(p(x)) for p in (self.q, self.k, self.v))
        scores = self.mix((q @ k.transpose(-2, -1) * self.dim**-0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.o((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return out


class TwoStreams(nn.Module):
    """The first three tokens have a projection of their own, and all attend to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.rest, self.o = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.first(x[:, :3]).chunk(3, -1), self.rest(x[:, 3:]).chunk(3, -1), strict=True)
        q, k, v = (torch.cat(both, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for both in parts)
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class PackedSequence(nn.Module):
    """Images of one batch packed into one sequence ``[N, width]``; tokens of one image see each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        image = (torch.arange(x.shape[0])[:, None] >= ends[None]).sum(1)
        seen = (image[:, None] == image[None])[None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out: Tensor = x + self.proj(mixed[0].transpose(0, 1).flatten(1))
        return out


class WindowAttention(nn.Module):
    """Attention inside windows of 4 x 4, with a table of biases by relative position; ``image [B, width, H, W]``."""

    index: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.table = nn.Parameter(torch.zeros(49, heads))
        rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
        apart = [p[:, None] - p[None] + 3 for p in (rows, columns)]
        self.register_buffer("index", apart[0] * 7 + apart[1])

    def forward(self, image: Tensor) -> Tensor:
        batch, width, height, length = image.shape
        cut = image.permute(0, 2, 3, 1).view(batch, height // 4, 4, length // 4, 4, width)
        tokens = cut.transpose(2, 3).reshape(-1, 16, width)
        q, k, v = self.qkv(tokens).reshape(-1, 16, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1) + bias[None]
        mixed = self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, 16, width))
        back = (
            mixed.view(batch, height // 4, length // 4, 4, 4, width)
            .transpose(2, 3)
            .reshape((batch, height, length, width))
        )
        out: Tensor = image + back.permute(0, 3, 1, 2)
        return out


class ImageAttendsText(nn.Module):
    """An image ``[B, width, H, W]`` attends to a text ``[B, T, 24]``, heads folded into the batch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads, self.dim = nn.GroupNorm(4, width), heads, width // heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(TEXT_WIDTH, width, bias=False) for _ in range(2))
        self.to_out = nn.Linear(width, width)

    def _folded(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.heads, self.dim).permute(0, 2, 1, 3).reshape(-1, x.shape[1], self.dim)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = self.norm(image).flatten(2).transpose(1, 2)
        q, k, v = (self._folded(y) for y in (self.to_q(x), self.to_k(text), self.to_v(text)))
        weights = (torch.einsum("b i d, b j d -> b i j", q, k) * self.dim**-0.5).softmax(dim=-1)
        mixed = torch.einsum("b i j, b j d -> b i d", weights, v).reshape(len(image), self.heads, -1, self.dim)
        out: Tensor = image + self.to_out(mixed.permute(0, 2, 1, 3).flatten(2)).transpose(1, 2).reshape(image.shape)
        return out


class QueriesByGroup(nn.Module):
    """Keys that are never repeated: queries ``[B, T, groups, heads of a group, features]``, a bias for each head."""

    def __init__(self, width: int, heads: int, groups: int, through_einsum: bool) -> None:
        super().__init__()
        self.groups, self.dim, self.through_einsum = groups, width // heads, through_einsum
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, groups * self.dim) for _ in range(2))
        self.slopes = nn.Parameter(torch.zeros(groups, heads // groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.groups, -1, self.dim)
        k, v = (p(x).view(batch, length, self.groups, self.dim) for p in (self.k, self.v))
        place = torch.arange(length)
        distance = place[:, None] - place[None]
        bias = (self.slopes * distance).masked_fill(distance < 0, float("-inf"))
        if self.through_einsum:
            scores = torch.einsum("bskgd,btkd->bkgst", q, k) * self.dim**-0.5 + bias
            mixed = torch.einsum("bkgst,btkd->bskgd", scores.softmax(dim=-1), v)
        else:
            scores = q.permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 3, 1)[:, :, None] * self.dim**-0.5 + bias
            mixed = (scores.softmax(dim=-1) @ v.transpose(1, 2)[:, :, None]).permute(0, 3, 1, 2, 4)
        out: Tensor = self.o(mixed.reshape(batch, length, -1))
        return out


class Stack(nn.Module):
    """Pre-norm residual attentions on ``x [B, T, width]``."""

    def __init__(self, attentions: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in attentions])
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return x


def packed_images(batch: int, length: int, seed: int) -> Inputs:
    x = torch.randn(batch * length, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "ends": length * torch.arange(1, batch + 1)}


def image(batch: int, length: int, seed: int) -> Inputs:
    return {"image": torch.randn(batch, WIDTH, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))}


def image_and_text(batch: int, length: int, seed: int) -> Inputs:
    text = torch.randn(batch, length, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    return {**image(batch, length, seed), "text": text}


def by_hand() -> list[ZooCase]:
    streams = heads.joined(*(heads.stacked(HEADS, HEADS, part) for part in ("first", "rest")))

    def stacked(
        name: str, make: Callable[[int], nn.Module], refusal: str = "", kv_heads: int = HEADS, causal: bool = False
    ) -> ZooCase:
        return ZooCase(
            name,
            lambda: randomize(Stack([make(layer) for layer in range(LAYERS)])),
            features,
            streams if name == "two-streams" else heads.separate(kv_heads, "k", "v"),
            HEADS,
            kv_heads,
            LAYERS,
            causal,
            FEATURE_AXES,
            tags=frozenset({"torch", "wide"}),
            refused=LAYERS if refusal else 0,
            refusal=refusal,
        )

    packed, separate = heads.stacked(HEADS, HEADS, "qkv"), heads.separate(HEADS, "to_k", "to_v")
    wide = frozenset({"torch", "wide"})
    return [
        stacked("softmax-in-parts", lambda layer: SoftmaxInParts(WIDTH, HEADS, layer > 0)),
        stacked("values-first", lambda _: ValuesFirst(WIDTH, HEADS)),
        stacked("talking-heads", lambda _: TalkingHeads(WIDTH, HEADS), "mixed between heads"),
        stacked("two-streams", lambda _: TwoStreams(WIDTH, HEADS)),
        stacked(
            "queries-by-group", lambda layer: QueriesByGroup(WIDTH, HEADS, 2, layer > 0), kv_heads=2, causal=True
        ),
        ZooCase(
            "packed-sequence", lambda: randomize(PackedSequence(WIDTH, HEADS)), packed_images, packed, HEADS, HEADS, 1,
            False, {"x": {0: "tokens"}, "ends": {0: "images"}}, tags=wide,
        ),
        ZooCase(
            "windows", lambda: randomize(WindowAttention(WIDTH, HEADS)), image, packed, HEADS, HEADS, 1,
            False, {"image": {0: "batch"}}, tags=wide,
        ),
        ZooCase(
            "image-attends-text", lambda: randomize(ImageAttendsText(WIDTH, HEADS)), image_and_text, separate, HEADS,
            HEADS, 1, False, {"image": {0: "batch"}, "text": {0: "batch", 1: "tokens"}}, tags=wide | {"cross"},
        ),
    ]  # fmt: skip
