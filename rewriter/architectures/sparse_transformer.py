"""Sparse Transformers from scratch: "Generating Long Sequences with Sparse Transformers" (arXiv 1904.10509).

Causal models of bytes or pixels whose queries see part of the keys: blocks and what sums them up (`SparseFixed`, for
text) or the last tokens and every l-th one (`SparseStrided`, for data with rows of l). As in the paper: norms before
the parts of a layer, GELU as ``x * sigmoid(1.702 x)``, learned embeddings of a position's coordinates (row, column,
channel), initial weights of standard deviation ``0.125 / sqrt(fan in)``, those that end in the residual stream smaller
by ``sqrt(2 layers)``, output projection zero. The published configurations are `ENWIK8`, `CIFAR10` and `IMAGENET64`.

Shape legend: B batch, S tokens, T tokens so far, E hidden, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codegen.ops.grouped_query_attention.torch_body import grouped_query_attention
from codegen.spec import GroupedQueryAttention
from passes.targets.sparse import SparseFixed, SparseStrided

SPREAD = 0.125
"""Standard deviation of an initial weight, times the root of its fan in."""

TEXT_PATTERN = SparseFixed(128, 32)

Cache = tuple[Tensor, Tensor]
"""Keys and values [B, H, T, head size] of one layer."""


@dataclass(frozen=True)
class SparseTransformerConfig:
    """Sizes; by default the paper's model of enwik8.

    Attributes:
        vocabulary: values of a token.
        hidden, layers, heads: width and depth. query_width: of all heads' queries, and of their keys.
        feed_forward: width inside feed-forward blocks.
        coordinates: how a position is counted, slowest first, e.g. (rows, columns, channels): the longest sequence has
            as many tokens as their product.
        attention: the pattern; ``form="alternating"`` gives its two parts to layers in turn.
        dropout: of what attention and feed-forward add.
    """

    vocabulary: int = 256
    hidden: int = 512
    layers: int = 30
    heads: int = 8
    query_width: int = 512
    feed_forward: int = 2048
    coordinates: tuple[int, ...] = (96, 128)
    attention: SparseFixed | SparseStrided = TEXT_PATTERN
    dropout: float = 0.4

    def __post_init__(self) -> None:
        for name in ("hidden", "query_width"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"heads={self.heads} does not divide {name}={getattr(self, name)}")
        if not self.coordinates or min(self.coordinates) < 1:
            raise ValueError(f"coordinates must be positive sizes, not {self.coordinates}")

    @property
    def length(self) -> int:
        """Of the longest sequence, in tokens."""
        return math.prod(self.coordinates)

    def spec(self, layer: int) -> GroupedQueryAttention:
        """Of one layer's attention, counted from 0."""
        query, value = self.query_width // self.heads, self.hidden // self.heads
        pattern = self.attention.sights(self.heads, layer, causal=True)
        return GroupedQueryAttention(
            self.heads, self.heads, query, value, query**-0.5, causal=True, pattern=pattern, masked_rows_are_zero=True
        )


ENWIK8 = SparseTransformerConfig()
"""95 million parameters, 12,288 bytes."""
CIFAR10 = SparseTransformerConfig(
    hidden=256, layers=128, heads=2, query_width=128, feed_forward=512, coordinates=(32, 32, 3),
    attention=SparseStrided(96, "alternating"), dropout=0.25,
)  # fmt: skip
"""59 million parameters, 3,072 bytes. The stride is ours: a row of an image."""
IMAGENET64 = SparseTransformerConfig(
    layers=48, heads=16, coordinates=(64, 64, 3), attention=SparseStrided(128, "alternating"), dropout=0.01
)
"""152 million parameters, 12,288 bytes."""


class SparseAttention(nn.Module):
    """Attention of `spec` between projections."""

    def __init__(self, spec: GroupedQueryAttention, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.query = nn.Linear(hidden, spec.heads * spec.head_dim)
        self.key = nn.Linear(hidden, spec.heads * spec.head_dim)
        self.value = nn.Linear(hidden, spec.heads * spec.value_dim)
        self.out = nn.Linear(spec.heads * spec.value_dim, hidden)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """([B, S, E], keys and values so far) of x [B, S, E], the tokens behind those of `cache`."""
        parts = (self.query(x), self.key(x), self.value(x))
        query, key, value = (part.unflatten(-1, (self.spec.heads, -1)).transpose(1, 2) for part in parts)
        if cache is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(cache, (key, value), strict=True))
        mixed = grouped_query_attention(self.spec, query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2)), (key, value)


class SparseLayer(nn.Module):
    """``h + a + b``, where a is attention of norm(h) and b the feed-forward of norm(h + a)."""

    def __init__(self, config: SparseTransformerConfig, number: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.attention = SparseAttention(config.spec(number), config.hidden)
        self.up = nn.Linear(config.hidden, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        added, cache = self.attention(self.first(x), cache)
        x = x + self.dropout(added)
        inner = self.up(self.second(x))
        return x + self.dropout(self.down(inner * torch.sigmoid(1.702 * inner))), cache


class SparseTransformer(nn.Module):
    """Ids [B, S] to scores of the next ones [B, S, vocabulary]."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = nn.ModuleList(nn.Embedding(size, config.hidden) for size in config.coordinates)
        self.layers = nn.ModuleList(SparseLayer(config, number) for number in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.output = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=SPREAD / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.layers:
            assert isinstance(layer, SparseLayer)
            for module in (layer.attention.out, layer.down):
                module.weight.data.div_(math.sqrt(2 * config.layers))
        nn.init.normal_(self.embedding.weight, std=SPREAD / math.sqrt(config.hidden))
        for position in self.positions:
            assert isinstance(position, nn.Embedding)
            nn.init.normal_(position.weight, std=SPREAD / math.sqrt(config.hidden * len(self.positions)))
        nn.init.zeros_(self.output.weight)

    def forward(self, input_ids: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Raises ValueError for more tokens than `SparseTransformerConfig.length`."""
        return self.step(input_ids, caches)[0]

    def step(self, input_ids: Tensor, caches: Sequence[Cache] | None = None) -> tuple[Tensor, list[Cache]]:
        """Scores, and the caches to go on with: `input_ids` are the tokens behind those that `caches` hold."""
        past = 0 if caches is None else caches[0][0].shape[2]
        if past + input_ids.shape[1] > self.config.length:
            raise ValueError(f"{past + input_ids.shape[1]} tokens, but positions end at {self.config.length}")
        x = self.embedding(input_ids) + self._placed(torch.arange(input_ids.shape[1], device=input_ids.device) + past)
        after = []
        for number, layer in enumerate(self.layers):
            x, cache = layer(x, None if caches is None else caches[number])
            after.append(cache)
        return self.output(self.norm(x)), after

    def _placed(self, positions: Tensor) -> Tensor:
        """[S, E]: the sum of what stands for each coordinate."""
        found: Tensor | float = 0.0
        for table in reversed(self.positions):
            assert isinstance(table, nn.Embedding)
            found = found + table(positions % table.num_embeddings)
            positions = positions // table.num_embeddings
        assert isinstance(found, Tensor)
        return found

    @torch.no_grad()
    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        """Ids [B, S + new_tokens]: the likeliest token each time."""
        scores, caches = self.step(input_ids)
        found = [input_ids]
        for _ in range(new_tokens):
            found.append(scores[:, -1].argmax(dim=-1, keepdim=True))
            if len(found) <= new_tokens:
                scores, caches = self.step(found[-1], caches)
        return torch.cat(found, dim=1)


def parameters(config: SparseTransformerConfig) -> int:
    """Of a model of these sizes, which is not made."""
    with torch.device("meta"):
        return sum(p.numel() for p in SparseTransformer(config).parameters())
