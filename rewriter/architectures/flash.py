"""FLASH and FLASH-Quad from scratch: "Transformer Quality in Linear Time" (arXiv 2202.10447).

A model is a stack of gated attention units, two for each layer of a Transformer, with norm before and residual around.
FLASH mixes by chunks and takes linear time; FLASH-Quad attends to everything. As in the paper's code: ScaleNorm in
causal language models and LayerNorm in masked ones; positions by a scaled sinusoid added to the embeddings, by rotation
of queries and keys, and by a bias of scores, with a number for each distance below 512 tokens and a product of rotated
vectors from there on. Ours: embedding and output projection share their matrix, a norm stands before the latter, and
biases of distances begin positive.

Shape legend: B batch, S tokens, E hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codegen.launch import chunk_op
from codegen.ops.gated_attention import torch_body as quadratic
from codegen.ops.gated_attention.reference import ROTARY_BASE
from codegen.ops.gated_attention.torch_body import GatedState
from codegen.ops.mixed_chunk_attention import torch_body as chunked
from codegen.ops.mixed_chunk_attention.torch_body import ChunkState
from codegen.spec import GatedAttention, MixedChunkAttention, PositionBias

State = GatedState | ChunkState
EPSILON = 1e-5
SPREAD = 0.02
"""The paper's standard deviation of initial weights, scales included; offsets begin at zero, biases of distances above
it."""

SHORT = 512
"""Reach of scores from which on their bias is a product of rotated vectors."""


@dataclass(frozen=True)
class FlashConfig:
    """Sizes; by default the paper's base model as FLASH, causal.

    Attributes:
        vocabulary: tokens; the paper's are 32,000 pieces.
        hidden, layers, expanded, base: width, number of units, width of gate and value, of queries and keys.
        chunk: of mixed chunk attention; None for FLASH-Quad.
        length: tokens that FLASH-Quad is trained at, by which it divides its scores, whatever the length at hand.
        causal: a causal language model with ScaleNorm; else a masked one with LayerNorm.
        projections: standard deviation of the units' initial projections; None for one over the root of their inputs.
            The paper's suits its width. What a unit gives is a product of three projections of its input, so that in a
            narrow model it begins as next to nothing, of which nothing is learned for long.
    """

    vocabulary: int = 32_000
    hidden: int = 768
    layers: int = 24
    expanded: int = 1536
    base: int = 128
    chunk: int | None = 256
    length: int = 1024
    causal: bool = True
    projections: float | None = SPREAD

    @property
    def spec(self) -> GatedAttention | MixedChunkAttention:
        """Of every unit."""
        reach = self.chunk or self.length
        bias = PositionBias.TOEPLITZ if reach < SHORT else PositionBias.ROTARY
        sizes = (self.hidden, self.expanded, self.base)
        if self.chunk is None:
            return GatedAttention(*sizes, length=self.length, causal=self.causal, bias=bias, span=reach)
        return MixedChunkAttention(*sizes, chunk=self.chunk, causal=self.causal, bias=bias, span=reach)


class ScaleNorm(nn.Module):
    """x over its root mean square, times one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        return x * (torch.rsqrt(square / x.shape[-1] + EPSILON) * self.scale)


class ScaledSinusoid(nn.Module):
    """Sines, then cosines, of positions, times one learned number that begins at 1 / √hidden."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.scale = nn.Parameter(torch.full((1,), hidden**-0.5))

    def forward(self, tokens: int, first: int = 0) -> Tensor:
        """[S, E] at positions from `first` on."""
        device, half = self.scale.device, self.hidden // 2
        rates = ROTARY_BASE ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.arange(first, first + tokens, device=device, dtype=torch.float32)[:, None] * rates
        waves = torch.cat((angles.sin(), angles.cos(), angles.new_zeros(tokens, self.hidden - 2 * half)), dim=1)
        return waves.to(self.scale.dtype) * self.scale


class GatedAttentionUnit(nn.Module):
    """x + unit(norm(x)); the unit is what `spec` says, its parameters are named by role."""

    def __init__(
        self, spec: GatedAttention | MixedChunkAttention, norm: nn.Module, projections: float | None = SPREAD
    ) -> None:
        """`projections` as in `FlashConfig`."""
        super().__init__()
        self.spec, self.norm, self.projections = spec, norm, projections
        for role, shape in spec.shapes.items():
            self.register_parameter(role, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for role in self.spec.shapes:
            parameter: nn.Parameter = getattr(self, role)
            if role in ("expand_bias", "offset", "out_bias"):
                nn.init.zeros_(parameter)
            elif role in ("expand_weight", "out_weight"):
                nn.init.normal_(parameter, std=self.projections or parameter.shape[1] ** -0.5)
            else:
                nn.init.normal_(parameter, std=SPREAD)
            if role == "distances":  # below zero a distance would get no gradient while scores are small
                nn.init.trunc_normal_(parameter, mean=SPREAD, std=SPREAD, a=SPREAD / 10, b=4 * SPREAD)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return {role: getattr(self, role) for role in self.spec.shapes}

    def forward(self, x: Tensor, shown: Tensor | None = None, state: State | None = None) -> Tensor:
        """[B, S, E] of x [B, S, E].

        Args:
            shown: bool [B, S], False for padding.
            state: from `start`; x are then the tokens behind it, and it is moved behind them. Padding is not possible.
        """
        return x + self._mixed(self.norm(x), shown, state)

    def _mixed(self, x: Tensor, shown: Tensor | None, state: State | None) -> Tensor:
        if isinstance(self.spec, GatedAttention):
            if isinstance(state, GatedState):
                return quadratic.resume(self.spec, x, self.weights, state)
            return quadratic.gated_attention(self.spec, x, self.weights, shown)
        if isinstance(state, ChunkState):
            return chunked.resume(self.spec, x, self.weights, state)
        return chunk_op.mix(self.spec, x, self.weights, shown)

    def start(self, batch: int) -> State:
        """Before the first token; raises ValueError for a unit that is not causal."""
        like = self.weights["expand_weight"]
        if isinstance(self.spec, GatedAttention):
            return quadratic.start(self.spec, batch, like)
        return chunked.start(self.spec, batch, like)

    def extra_repr(self) -> str:
        return repr(self.spec)


class Flash(nn.Module):
    """Token ids to scores of tokens: of the next ones (causal), or of those that were masked."""

    def __init__(self, config: FlashConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.position = ScaledSinusoid(config.hidden)
        self.layers = nn.ModuleList(self._unit() for _ in range(config.layers))
        self.norm = self._norm()
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        nn.init.normal_(self.embedding.weight, std=SPREAD)

    def _unit(self) -> GatedAttentionUnit:
        return GatedAttentionUnit(self.config.spec, self._norm(), self.config.projections)

    def _norm(self) -> nn.Module:
        return ScaleNorm() if self.config.causal else nn.LayerNorm(self.config.hidden, eps=EPSILON)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, states: Sequence[State] | None = None
    ) -> Tensor:
        """Scores [B, S, vocabulary] of ids [B, S].

        Args:
            attention_mask: [B, S], 0 for padding.
            states: from `start`; the ids are then those behind them, and they are moved behind these.
        """
        first = 0 if states is None else states[0].position
        x = self.embedding(input_ids) + self.position(input_ids.shape[1], first)
        shown = None if attention_mask is None else attention_mask.bool()
        for number, layer in enumerate(self.layers):
            x = layer(x, shown, None if states is None else states[number])
        return nn.functional.linear(self.norm(x), self.embedding.weight, self.bias)

    def start(self, batch: int = 1) -> list[State]:
        """A state for each unit, before the first token; raises ValueError for a model that is not causal."""
        return [layer.start(batch) for layer in self.layers if isinstance(layer, GatedAttentionUnit)]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, new_tokens: int, *, states: list[State] | None = None) -> Tensor:
        """Ids [B, S + new_tokens]: the likeliest token each time. With `states`, `input_ids` are those behind them."""
        states = self.start(input_ids.shape[0]) if states is None else states
        found, given = [input_ids], input_ids
        for _ in range(new_tokens):
            given = self(given, states=states)[:, -1].argmax(dim=-1, keepdim=True)
            found.append(given)
        return torch.cat(found, dim=1)
