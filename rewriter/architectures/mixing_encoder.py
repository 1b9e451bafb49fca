"""Encoders whose layers mix tokens with or without attention: what FNet and Sparse Mixer have in common.

As in the code of both papers (f_net and sparse_mixers of google-research): embeddings of words, positions and segments,
a norm, a projection; post-norm layers; heads for masked words and next sentences, the former on the transposed word
embeddings. Ours: biases begin at zero, and dropout behind a mixture of experts falls on what its experts give together.

Shape legend: B batch, S tokens, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from codegen.ops.linear_mixing.torch_body import linear_mixing
from codegen.ops.mixture_of_experts.torch_body import routed
from codegen.spec import LinearMixing, MixtureOfExperts

EPSILON = 1e-12
"""Of all norms."""

SPREAD = 0.02
"""Standard deviation of initial weights."""


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes around the layers.

    Attributes:
        vocabulary: tokens; both papers have 32,000 pieces.
        hidden: width; longest: positions; segments: token types.
        dropout: behind embeddings and feed-forward blocks.
    """

    vocabulary: int = 32_000
    hidden: int = 768
    longest: int = 512
    segments: int = 4
    dropout: float = 0.1


class Pretraining(NamedTuple):
    """What a model answers in pre-training.

    Attributes:
        logits: [B, S, vocabulary], of masked words.
        next_sentence: [B, 2].
        router_loss: to be added to the loss, weighted; 0 without mixtures of experts.
    """

    logits: Tensor
    next_sentence: Tensor
    router_loss: Tensor


class Embeddings(nn.Module):
    """[B, S, E] of token numbers and segments [B, S]."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.longest, sizes.hidden)
        self.segments = nn.Embedding(sizes.segments, sizes.hidden)
        self.norm = nn.LayerNorm(sizes.hidden, eps=EPSILON)
        self.projection = nn.Linear(sizes.hidden, sizes.hidden)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = self.positions.weight[: input_ids.shape[1]]
        total = self.words(input_ids) + positions + self.segments(token_type_ids)
        embedded: Tensor = self.dropout(self.projection(self.norm(total)))
        return embedded


class Attention(nn.Module):
    """Softmax attention to the tokens that `shown` [B, S] does not hide."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropped = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor, shown: Tensor | None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        mask = None
        if shown is not None:  # added, as exporters take a mask of truth values apart into several passes over scores
            hidden = shown[:, None, None, :] == 0
            mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)
        dropped = self.dropped if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output


class Matrices(nn.Module):
    """Linear mixing: one learned matrix over tokens, one over features. There is no mask."""

    def __init__(self, spec: LinearMixing) -> None:
        super().__init__()
        self.spec = spec
        for name, shape in spec.shapes.items():
            self.register_parameter(name, nn.Parameter(SPREAD * torch.randn(shape)))

    def forward(self, x: Tensor, shown: Tensor | None) -> Tensor:
        return linear_mixing(self.spec, x, **dict(self.named_parameters(recurse=False)))


class FeedForward(nn.Module):
    """[B, S, E] and a loss of nothing."""

    def __init__(self, hidden: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.intermediate, self.output = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = functional.gelu(self.intermediate(x), approximate="tanh")
        return self.dropout(self.output(inner)), x.new_zeros(())


class Experts(nn.Module):
    """A mixture of experts in a feed-forward block's place: [B, S, E], and the router's loss.

    Attributes:
        spec: with the capacity for inference; `training_capacity` is that for training.
    """

    def __init__(self, spec: MixtureOfExperts, training_capacity: float, dropout: float) -> None:
        super().__init__()
        self.spec, self.training_spec = spec, replace(spec, capacity_factor=training_capacity)
        self.dropout = nn.Dropout(dropout)
        for name, shape in spec.shapes.items():
            first = torch.zeros(shape) if name.endswith("bias") else SPREAD * torch.randn(shape)
            self.register_parameter(name, nn.Parameter(first))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.training_spec if self.training else self.spec
        found = routed(spec, x, **dict(self.named_parameters(recurse=False)))
        return self.dropout(found.output), found.loss.to(x.dtype)


class Layer(nn.Module):
    """``norm(x + mix(x))``, then ``norm(x + feed_forward(x))``."""

    def __init__(self, hidden: int, mixer: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.mixer, self.feed_forward = mixer, feed_forward
        self.mixing_norm, self.output_norm = (nn.LayerNorm(hidden, eps=EPSILON) for _ in range(2))

    def forward(self, x: Tensor, shown: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.mixing_norm(x + self.mixer(x, shown))
        found, loss = self.feed_forward(x)
        return self.output_norm(x + found), loss


class MixingEncoder(nn.Module):
    """Embeddings and layers."""

    def __init__(self, sizes: EncoderSizes, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.layers = nn.ModuleList(layers)
        self.apply(_begin)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """[B, S, E] of token numbers [B, S]; the mask [B, S], 0 for padding, holds for layers with attention only."""
        return self.encode(input_ids, attention_mask, token_type_ids)[0]

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, and the loss of all routers."""
        x = self.embeddings(input_ids, torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        loss = x.new_zeros(())
        for layer in self.layers:
            x, more = layer(x, attention_mask)
            loss = loss + more
        return x, loss


class PretrainingModel(nn.Module):
    """An encoder with its heads for masked words and next sentences."""

    def __init__(self, encoder: MixingEncoder, sizes: EncoderSizes) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooler, self.next_sentence = nn.Linear(sizes.hidden, sizes.hidden), nn.Linear(sizes.hidden, 2)
        self.transform, self.transform_norm = (
            nn.Linear(sizes.hidden, sizes.hidden),
            nn.LayerNorm(sizes.hidden, eps=EPSILON),
        )
        self.word_bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        for module in (self.pooler, self.next_sentence, self.transform):
            _begin(module)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Pretraining:
        """Token numbers, mask and segments are [B, S]."""
        x, loss = self.encoder.encode(input_ids, attention_mask, token_type_ids)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        words = self.transform_norm(functional.gelu(self.transform(x), approximate="tanh"))
        logits = functional.linear(words, self.encoder.embeddings.words.weight, self.word_bias)
        return Pretraining(logits, self.next_sentence(pooled), loss)


def _begin(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=SPREAD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
