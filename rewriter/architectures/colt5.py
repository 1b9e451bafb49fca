"""CoLT5 from scratch: "Faster Long-Range Transformers with Conditional Computation" (arXiv 2303.09752).

A T5 1.1 encoder and decoder. Encoder layers have light branches for all tokens and heavy ones for those that three
routers choose; the decoder's attention to the encoder shares one head of keys and values. In training routers weigh by
a soft top-k, in inference they choose hard. Ours: routers read the normed state and begin with scores of variance 1;
heavy heads add biases by distance as light ones do, of one table for all layers; there is no dropout, and no cache for
generation.

Shape legend: B batch, S tokens, T tokens of the decoder, E hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from codegen.conditional import ConditionalAttention, ConditionalFeedForward, Router
from codegen.ops.conditional_attention.torch_body import conditional_attention
from codegen.ops.conditional_feed_forward.torch_body import conditional_feed_forward

EPSILON = 1e-6
"""Of all norms."""

BUCKETS, FARTHEST = 32, 128
"""Of biases by distance."""


@dataclass(frozen=True)
class CoLT5Config:
    """Sizes; by default CoLT5-Base.

    Attributes:
        vocabulary: tokens.
        hidden, feed_forward: width, and that inside of feed-forward blocks, from which those of both branches follow.
        layers: of the encoder, and of the decoder.
        heads, head_dim: of attentions; a quarter of the encoder's are light.
        light, heavy: width inside of both branches' feed-forward blocks, over `feed_forward`.
        radius: of light attention.
        routed: which part of the tokens is routed to heavy feed-forward blocks and queries; twice as many are keys.
    """

    vocabulary: int = 32_128
    hidden: int = 768
    feed_forward: int = 2048
    layers: int = 12
    heads: int = 12
    head_dim: int = 64
    light: float = 0.5
    heavy: float = 4.0
    radius: int = 127
    routed: float = 1 / 16

    def __post_init__(self) -> None:
        if self.heads % 4:
            raise ValueError(f"heads={self.heads} have no quarter to be light")
        if not 0 < self.routed <= 0.5:
            raise ValueError(f"routed must be above 0 and at most 0.5, not {self.routed}")

    @property
    def feed_forward_spec(self) -> ConditionalFeedForward:
        """Of each encoder layer."""
        light, heavy = (round(part * self.feed_forward) for part in (self.light, self.heavy))
        return ConditionalFeedForward(self.hidden, light, heavy, Router(self.routed))

    @property
    def attention_spec(self) -> ConditionalAttention:
        """Of each encoder layer."""
        quarter = self.heads // 4
        return ConditionalAttention(
            self.hidden,
            self.head_dim,
            light_heads=quarter,
            heavy_heads=self.heads - quarter,
            queries=Router(self.routed),
            keys=Router(2 * self.routed),
            radius=self.radius,
            buckets=BUCKETS,
            farthest=FARTHEST,
        )


def large() -> CoLT5Config:
    """CoLT5-Large."""
    return CoLT5Config(hidden=1024, feed_forward=2816, layers=24, heads=16)


def extra_large() -> CoLT5Config:
    """CoLT5-XL."""
    return CoLT5Config(hidden=2048, feed_forward=5120, layers=24, heads=32)


class ConditionalLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; parameters are named by role."""

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        self.attention_spec, self.feed_forward_spec = config.attention_spec, config.feed_forward_spec
        self.attention_norm, self.feed_forward_norm = (nn.RMSNorm(config.hidden, eps=EPSILON) for _ in range(2))
        roles = {name: shape for name, shape in self.attention_spec.shapes.items() if name != "distances"}
        self.attention = nn.ParameterDict({name: _first(shape) for name, shape in roles.items()})
        with torch.no_grad():  # scores are not divided by the root of the head's width
            for branch in ("light", "heavy"):
                self.attention[f"{branch}_query_weight"].mul_(config.head_dim**-0.5)
        self.feed_forward = nn.ParameterDict({n: _first(s) for n, s in self.feed_forward_spec.shapes.items()})

    def forward(self, x: Tensor, shown: Tensor | None, distances: Tensor) -> Tensor:
        """[B, S, E] of x [B, S, E], bool [B, S] and biases by distance [buckets, heads]."""
        soft = self.training
        roles = dict(self.attention.items()) | {"distances": distances}
        x = x + conditional_attention(self.attention_spec, self.attention_norm(x), shown, soft=soft, **roles)
        held = dict(self.feed_forward.items())
        return x + conditional_feed_forward(self.feed_forward_spec, self.feed_forward_norm(x), shown, soft=soft, **held)


class CoLT5Encoder(nn.Module):
    """Embeddings, conditional layers and a norm."""

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.hidden)
        self.distances = nn.Parameter(torch.randn(BUCKETS, config.heads) * config.hidden**-0.5)
        self.layers = nn.ModuleList(ConditionalLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=EPSILON)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, S, E] of token numbers [B, S]; the mask [B, S] is 0 for padding, which is never routed."""
        shown = None if attention_mask is None else attention_mask.bool()
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, shown, self.distances)
        found: Tensor = self.norm(x)
        return found


class SharedAttention(nn.Module):
    """Softmax attention of some heads of queries to `kv_heads` heads of keys and values, scores unscaled as in T5."""

    def __init__(self, config: CoLT5Config, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        inner, shared = config.heads * config.head_dim, kv_heads * config.head_dim
        self.query, self.output = _linear(config.hidden, inner), _linear(inner, config.hidden)
        self.key, self.value = (_linear(config.hidden, shared) for _ in range(2))
        with torch.no_grad():
            self.query.weight.mul_(config.head_dim**-0.5)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, E] of x [B, T, E], source [B, S, E] and a bias of scores."""
        q, k, v = (
            projection(given).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, given in ((self.query, x), (self.key, source), (self.value, source))
        )
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        found: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return found


class DecoderLayer(nn.Module):
    """Causal attention, attention to the encoder with one head of keys and values, a gated feed-forward block."""

    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden, eps=EPSILON) for _ in range(3))
        self.attention, self.cross = SharedAttention(config, config.heads), SharedAttention(config, 1)
        self.gate, self.up = (_linear(config.hidden, config.feed_forward) for _ in range(2))
        self.down = _linear(config.feed_forward, config.hidden)

    def forward(self, x: Tensor, encoded: Tensor, before: Tensor, shown: Tensor | None) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, before)
        x = x + self.cross(self.norms[1](x), encoded, shown)
        normed = self.norms[2](x)
        found: Tensor = x + self.down(functional.gelu(self.gate(normed), approximate="tanh") * self.up(normed))
        return found


class CoLT5(nn.Module):
    """Encoder and decoder, the latter's scores of tokens by a matrix of their own."""

    def __init__(self, config: CoLT5Config = CoLT5Config()) -> None:
        super().__init__()
        self.encoder = CoLT5Encoder(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.distances = nn.Parameter(torch.randn(BUCKETS, config.heads) * config.hidden**-0.5)
        self.norm = nn.RMSNorm(config.hidden, eps=EPSILON)
        self.scores = _linear(config.hidden, config.vocabulary)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores [B, T, vocabulary] of the tokens behind those of the decoder [B, T], given the encoder's [B, S]."""
        return self.decode(self.encoder(input_ids, attention_mask), decoder_input_ids, attention_mask)

    def decode(self, encoded: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same, given what the encoder found [B, S, E]."""
        x = self.encoder.words(decoder_input_ids)
        before = self._before(x.shape[1]).to(x.dtype)
        shown = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, encoded, before, shown)
        found: Tensor = self.scores(self.norm(x))
        return found

    def _before(self, tokens: int) -> Tensor:
        """[heads, T, T]: biases by distance, and none of later tokens."""
        at = torch.arange(tokens, device=self.distances.device)
        distance = at[:, None] - at
        bias = self.distances[causal_buckets(distance)].permute(2, 0, 1)
        return bias.masked_fill(distance < 0, float("-inf"))


def causal_buckets(distance: Tensor) -> Tensor:
    """Bucket of query minus key position: half for one distance each, the others for ranges that grow, as in T5."""
    exact = BUCKETS // 2
    far = distance.clamp_min(exact).float() / exact
    steps = (far.log() / torch.log(torch.tensor(FARTHEST / exact)) * exact).long()
    return torch.where(distance < exact, distance.clamp_min(0), (exact + steps).clamp_max(BUCKETS - 1))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear


def _first(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[0] ** -0.5)
