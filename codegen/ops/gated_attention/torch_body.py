"""A gated attention unit in plain, differentiable torch; its parts serve mixed chunk attention too.

Rows of scores are taken in blocks, each with the keys it can see: causal order then halves the work, and without
gradients never more than a block of scores exists. Hidden keys get minus infinity before the square of the positive
part, which makes them exact zeros after it, so that nothing of a later token reaches an earlier one.

Shape legend: B batch, S tokens, E hidden, F expanded, N base, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.activation.torch_body import activate
from codegen.ops.gated_attention.reference import ROTARY_BASE, check
from codegen.spec import Activation, GatedAttention, MixedChunkAttention, PositionBias

Gated = GatedAttention | MixedChunkAttention
Weights = Mapping[str, Tensor]

ROWS = 512
"""Of scores at once."""


def gated_attention(spec: GatedAttention, x: Tensor, weights: Weights, shown: Tensor | None = None) -> Tensor:
    """[B, S, E] of x [B, S, E], in x's dtype.

    Args:
        weights: by role, as `spec.shapes` has them.
        shown: bool [B, S], False for padding, which no token sees; divisors stay.

    Raises:
        ValueError: if an operand contradicts the spec.
    """
    check(spec, x, weights)
    gate, value, latent = expanded(spec, x, weights)
    query, key = heads(spec, latent, weights)
    mixed = mix(spec, query, key, value, weights, shown)
    return gated(gate, mixed, weights)


def mix(
    spec: GatedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    shown: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """[B, S, F] of queries [B, S, N] at positions from `first` on, and keys and values [B, T, ...] from 0 on."""
    divisor = spec.length or key.shape[1]
    parts = []
    for rows in row_blocks(query):
        start = 0 if rows.start is None else rows.start
        block = query[:, rows]
        reach = first + start + block.shape[1] if spec.causal else key.shape[1]
        bias = score_bias(spec, weights, like=block, rows=block.shape[1], columns=reach, first=first + start)
        scores = kernel(block, key[:, :reach], divisor, bias, None if shown is None else shown[:, :reach])
        parts.append(scores @ wide(value[:, :reach]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def row_blocks(query: Tensor) -> list[slice]:
    """One where a compiler or exporter looks on, which may have no fixed length."""
    if torch.compiler.is_compiling() or query.shape[1] <= ROWS:
        return [slice(None)]
    return [slice(start, start + ROWS) for start in range(0, query.shape[1], ROWS)]


def kernel(query: Tensor, key: Tensor, divisor: int, bias: Tensor | None, shown: Tensor | None = None) -> Tensor:
    """relu(q kᵀ / divisor + bias)² [..., R, T]; bias [R, T], minus infinity where hidden; shown [B, T]."""
    query, key = wide(query), wide(key).transpose(-1, -2)
    scores = _scores(query, key, divisor, bias)
    positive = F.relu(scores, inplace=overwritable(scores))
    squared = positive.square_() if overwritable(scores) else positive.square()
    return squared if shown is None else squared * shown[:, None, :].to(squared.dtype)


def _scores(query: Tensor, key: Tensor, divisor: int, bias: Tensor | None) -> Tensor:
    if bias is None:
        return (query / divisor) @ key
    bias = bias.to(query.dtype)
    if torch.compiler.is_compiling():
        return (query / divisor) @ key + bias
    flat = torch.baddbmm(bias[None], query.flatten(0, -3), key.flatten(0, -3), alpha=1 / divisor)
    return flat.view(*query.shape[:-1], key.shape[-1])


def gated(gate: Tensor, mixed: Tensor, weights: Weights) -> Tensor:
    """[B, S, E]: the output projection of gate times what was mixed, which is overwritten without gradients."""
    mixed = mixed.to(gate.dtype)
    product = mixed.mul_(gate) if overwritable(mixed, gate) else gate * mixed
    return F.linear(product, weights["out_weight"], weights["out_bias"])


def expanded(spec: Gated, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and value [B, S, F], base [B, S, N]."""
    whole = F.linear(x, weights["expand_weight"], weights["expand_bias"])
    kinds: tuple[Activation | None, ...] = (spec.gate, spec.value, spec.latent)
    if len(set(kinds)) == 1:
        in_place = spec.gate is Activation.SILU and overwritable(whole)
        whole = F.silu(whole, inplace=True) if in_place else activated(spec.gate, whole)
        kinds = (None, None, None)
    parts = torch.split(whole, [spec.expanded, spec.expanded, spec.base], dim=-1)
    gate, value, latent = (activated(kind, part) for kind, part in zip(kinds, parts, strict=True))
    return gate, value, latent


def value_and_base(spec: Gated, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The last two of `expanded` alone."""
    rows = slice(spec.expanded, None)
    part = F.linear(x, weights["expand_weight"][rows], weights["expand_bias"][rows])
    value, latent = torch.split(part, [spec.expanded, spec.base], dim=-1)
    return activated(spec.value, value), activated(spec.latent, latent)


def activated(kind: Activation | None, x: Tensor) -> Tensor:
    """Element by element; None leaves x as it is."""
    return x if kind is None else activate(kind, x)


def heads(spec: Gated, latent: Tensor, weights: Weights, first: int = 0) -> list[Tensor]:
    """Each head's scale and offset of the base, rotated by positions from `first` on: [B, S, N] each."""
    found = [torch.addcmul(weights["offset"][h], latent, weights["scale"][h]) for h in range(spec.heads)]
    if not spec.rotary:
        return found
    cos, sin = turns(latent.shape[1], spec.base, latent, first)
    return [rotated(h, cos, sin) for h in found]


def turns(tokens: int, base: int, like: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin [S, N / 2] at positions from `first` on, in like's dtype; angles are float32."""
    half = base // 2
    rates = ROTARY_BASE ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
    positions = torch.arange(first, first + tokens, device=like.device, dtype=torch.float32)
    angles = positions[:, None] * rates
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., S, N] with features (i, i + N / 2) turned."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def score_bias(
    spec: Gated, weights: Weights, *, like: Tensor, rows: int, columns: int, first: int = 0
) -> Tensor | None:
    """[rows, columns] for queries at positions from `first` and keys from 0 on, minus infinity where a causal spec
    hides the key; None for nothing to add."""
    bias = _learned_bias(spec, weights, like, rows, columns, first)
    if not spec.causal:
        return bias
    query = torch.arange(first, first + rows, device=like.device)
    later = torch.arange(columns, device=like.device)[None] > query[:, None]
    if bias is None:
        bias = torch.zeros(rows, columns, dtype=wide_dtype(like.dtype), device=like.device)
    return bias.masked_fill(later, -torch.inf)


def _learned_bias(spec: Gated, weights: Weights, like: Tensor, rows: int, columns: int, first: int) -> Tensor | None:
    if spec.bias is PositionBias.TOEPLITZ:
        query = torch.arange(first, first + rows, device=like.device)
        distance = query[:, None] - torch.arange(columns, device=like.device)
        return weights["distances"][distance.clamp(1 - spec.span, spec.span - 1) + spec.span - 1]
    if spec.bias is PositionBias.ROTARY:
        query, key = weights["query_vector"].expand(rows, -1), weights["key_vector"].expand(columns, -1)
        left = rotated(query, *turns(rows, spec.base, query, first))
        return left @ rotated(key, *turns(columns, spec.base, key)).transpose(0, 1)
    return None


def overwritable(*tensors: Tensor) -> bool:
    """Whether intermediate results may be overwritten: not for gradients, nor in graphs, which others may train."""
    return not (torch.compiler.is_compiling() or any(t.requires_grad for t in tensors))


def wide(x: Tensor) -> Tensor:
    """float16 as float32: squares of small scores would vanish in it."""
    return x.float() if x.dtype is torch.float16 else x


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype is torch.float16 else dtype


# ------------------------------------------------------------ token by token


@dataclass
class GatedState:
    """What a causal unit keeps of the tokens so far: grows with them. `resume` replaces its tensors.

    Attributes:
        keys: [B, T, N], rotated; values: [B, T, F].
    """

    keys: Tensor
    values: Tensor

    @property
    def position(self) -> int:
        return self.keys.shape[1]

    def select(self, rows: Tensor) -> None:
        """Put rows of the batch into another order, repeat or leave out some; in place."""
        if not torch.equal(rows, torch.arange(len(self.keys), device=rows.device)):
            self.keys, self.values = self.keys[rows], self.values[rows]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))


def start(spec: GatedAttention, batch: int, like: Tensor) -> GatedState:
    """Before the first token. Raises ValueError for a spec that is not causal."""
    if not spec.causal:
        raise ValueError("only a causal unit can go on token by token")
    return GatedState(*(like.new_zeros(batch, 0, size) for size in (spec.base, spec.expanded)))


def resume(spec: GatedAttention, x: Tensor, weights: Weights, state: GatedState) -> Tensor:
    """[B, S, E] for the next tokens x [B, S, E]; `state` is then that behind them."""
    check(spec, x, weights)
    first = state.position
    gate, value, latent = expanded(spec, x, weights)
    query, key = heads(spec, latent, weights, first)
    state.keys = torch.cat((state.keys, key), dim=1)
    state.values = torch.cat((state.values, value), dim=1)
    return gated(gate, mix(spec, query, state.keys, state.values, weights, first=first), weights)
