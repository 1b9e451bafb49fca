"""Mixed chunk attention in plain, differentiable torch: in parallel over chunks, and on from any token.

Sums over preceding chunks are running sums of chunks shifted by one, not sums less the chunk itself, which would leave
roundings of later tokens in earlier results. Without gradients long sequences go block by block, so that gates, values
and states of a block are all that exists beside input and output.

Shape legend: B batch, S tokens = G chunks of C, E hidden, F expanded, N base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.gated_attention.reference import check
from codegen.ops.gated_attention.torch_body import (
    Weights,
    expanded,
    gated,
    heads,
    kernel,
    score_bias,
    value_and_base,
    wide,
)
from codegen.spec import MixedChunkAttention

BLOCK = 1024
"""Tokens of a block, rounded down to whole chunks, at least one."""

HALVED = 64
"""Tokens of a causal chunk from which on its halves are taken one by one, where there are no gradients."""

MANY = 16
"""Blocks up to which bidirectional sequences are taken at once, since blocks project values twice."""


def mixed_chunk_attention(
    spec: MixedChunkAttention, x: Tensor, weights: Weights, shown: Tensor | None = None
) -> Tensor:
    """[B, S, E] of x [B, S, E], in x's dtype; operands as in `gated_attention`.

    Raises ValueError if an operand contradicts the spec.
    """
    check(spec, x, weights)
    size = max(BLOCK // spec.chunk, 1) * spec.chunk
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.shape[1] <= size * (1 if spec.causal else MANY):
        return _parallel(spec, x, weights, shown)
    return (_causal_blocks if spec.causal else _blocks)(spec, x, weights, shown, size)


def _parallel(spec: MixedChunkAttention, x: Tensor, weights: Weights, shown: Tensor | None) -> Tensor:
    if spec.causal:
        return causal_chunks(spec, x, weights, shown)[0]
    gate, value, latent = expanded(spec, x, weights)
    quad_query, lin_query, quad_key, lin_key = heads(spec, latent, weights)
    total = products(hide(lin_key, shown), value) / x.shape[1]
    mixed = within_chunks(spec, quad_query, quad_key, value, weights, shown)
    return gated(gate, torch.baddbmm(mixed, wide(lin_query), total), weights)


def causal_chunks(
    spec: MixedChunkAttention,
    x: Tensor,
    weights: Weights,
    shown: Tensor | None = None,
    before: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, S, E] of tokens from the beginning of a chunk on, and what `before` is behind them.

    Args:
        before: [B, N, F], the sum of kᵀ v over all `first` tokens before; None for none. What is returned holds that
            of complete chunks and of the last, even if it is a part.
        first: position of the first token, a multiple of the chunk.
    """
    tokens = x.shape[1]
    gate, value, latent = expanded(spec, x, weights)
    quad_query, lin_query, quad_key, lin_key = heads(spec, latent, weights, first)
    within = _within_chunks(spec, quad_query, quad_key, value, weights, shown)
    shifted, after = running_sums(spec, hide(lin_key, shown), value, before)
    mixed = plus_product(within, by_chunk(spec, lin_query) / divisors(spec, shifted, first), shifted)
    return gated(gate, by_token(mixed, tokens), weights), after


def within_chunks(
    spec: MixedChunkAttention, query: Tensor, key: Tensor, value: Tensor, weights: Weights, shown: Tensor | None = None
) -> Tensor:
    """[B, S, F]: each chunk by itself; a padded last chunk's keys have values of zero."""
    return by_token(_within_chunks(spec, query, key, value, weights, shown), query.shape[1])


def _within_chunks(
    spec: MixedChunkAttention, query: Tensor, key: Tensor, value: Tensor, weights: Weights, shown: Tensor | None
) -> Tensor:
    """[B, G, C, F]"""
    query, key, value = by_chunk(spec, query), by_chunk(spec, key), by_chunk(spec, hide(value, shown))
    size = query.shape[2]
    if size >= HALVED and not (torch.compiler.is_compiling() or torch.is_grad_enabled()) and spec.causal:
        return _by_halves(spec, query, key, value, weights)
    bias = score_bias(spec, weights, like=query, rows=size, columns=size)
    return kernel(query, key, spec.chunk, bias) @ value


def _by_halves(spec: MixedChunkAttention, query: Tensor, key: Tensor, value: Tensor, weights: Weights) -> Tensor:
    """The earlier half of each chunk, with no later key at hand, then the later half: three quarters of the work."""
    mixed = torch.empty_like(value)
    size = query.shape[2]
    for first, reach in ((0, size // 2), (size // 2, size)):
        rows = slice(first, reach)
        bias = score_bias(spec, weights, like=query, rows=reach - first, columns=reach, first=first)
        scores = kernel(query[:, :, rows], key[:, :, :reach], spec.chunk, bias).flatten(0, 1)
        torch.bmm(scores, value[:, :, :reach].flatten(0, 1), out=mixed[:, :, rows].flatten(0, 1))
    return mixed


def learned_bias(spec: MixedChunkAttention, weights: Weights, *, like: Tensor) -> Tensor | None:
    """[C, C]: what is added to the scores of a chunk, whatever the order; None for nothing."""
    return score_bias(replace(spec, causal=False), weights, like=like, rows=spec.chunk, columns=spec.chunk)


def plus_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x + left @ right, [B, G, C, F], in one pass where there is no exporter to doubt the reshape."""
    if torch.compiler.is_compiling():
        return x + left @ right
    return torch.baddbmm(x.flatten(0, 1), left.flatten(0, 1), right.flatten(0, 1)).view_as(x)


def running_sums(spec: MixedChunkAttention, key: Tensor, value: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """([B, G, N, F] the sum of kᵀ v over the chunks before each, [B, N, F] over all)."""
    key, value = by_chunk(spec, key), by_chunk(spec, value)
    each = (key.transpose(2, 3) @ value).to(torch.promote_types(key.dtype, torch.float32))
    start = torch.zeros_like(each[:, 0]) if before is None else before
    if torch.compiler.is_compiling():
        captured = torch.cat((start[:, None], each), dim=1).cumsum(dim=1)
        return captured[:, :-1].to(key.dtype), captured[:, -1]
    sums = [start]  # one by one: torch's cumsum goes along chunks number by number, in ten times the time
    for part in each.unbind(1):
        sums.append(sums[-1] + part)
    return torch.stack(sums[:-1], dim=1).to(key.dtype), sums[-1]


def divisors(spec: MixedChunkAttention, sums: Tensor, first: int) -> Tensor:
    """[G, 1, 1]: what each chunk's sum [B, G, N, F] is divided by."""
    preceding = torch.arange(sums.shape[1], device=sums.device, dtype=sums.dtype) + first // spec.chunk
    preceding = preceding.clamp_min(1) if spec.averaged else torch.ones_like(preceding)
    return (preceding * spec.chunk)[:, None, None]


def products(key: Tensor, value: Tensor) -> Tensor:
    """[B, N, F]: the sum of kᵀ v over all tokens."""
    return wide(key).transpose(1, 2) @ wide(value)


def by_chunk(spec: MixedChunkAttention, x: Tensor) -> Tensor:
    """[B, G, C, ...] of [B, S, ...], zeros behind the last token; what one chunk holds stays as short as it is."""
    if torch.compiler.is_exporting():
        return _gathered(spec, wide(x))
    if not torch.compiler.is_compiling() and 0 < x.shape[1] < spec.chunk:
        return wide(x)[:, None]
    missing = -x.shape[1] % spec.chunk
    return torch.unflatten(wide(F.pad(x, (0, 0, 0, missing)) if missing else x), 1, (-1, spec.chunk))


def _gathered(spec: MixedChunkAttention, x: Tensor) -> Tensor:
    """The same by an index, with two chunks at least: exporters doubt reshapes, and take a size of one for fixed."""
    chunks = torch.arange(x.shape[1] // spec.chunk + 2, device=x.device)
    place = chunks[:, None] * spec.chunk + torch.arange(spec.chunk, device=x.device)
    return F.pad(x, (0, 0, 0, 1))[:, place.clamp(max=x.shape[1])]


def by_token(x: Tensor, tokens: int) -> Tensor:
    """[B, S, ...] of [B, G, C, ...]."""
    whole = x.flatten(1, 2)
    if torch.compiler.is_exporting():  # a slice would be checked against a length that exporters cannot bound
        return F.pad(whole, (0, 0, 0, tokens - whole.shape[1]))
    return whole[:, :tokens]


def hide(x: Tensor, shown: Tensor | None) -> Tensor:
    """Zeros where [B, S] is False."""
    return x if shown is None else x * shown[..., None].to(x.dtype)


# ------------------------------------------------------------ long sequences, without gradients


def _causal_blocks(spec: MixedChunkAttention, x: Tensor, weights: Weights, shown: Tensor | None, size: int) -> Tensor:
    output, before = torch.empty_like(x), None
    for first in range(0, x.shape[1], size):
        at = slice(first, first + size)
        output[:, at], before = causal_chunks(spec, x[:, at], weights, _part(shown, at), before, first)
    return output


def _blocks(spec: MixedChunkAttention, x: Tensor, weights: Weights, shown: Tensor | None, size: int) -> Tensor:
    """Twice over the sequence: what all keys and values add up to must be known before the first output."""
    places = [slice(first, first + size) for first in range(0, x.shape[1], size)]
    total: Tensor | None = None
    for at in places:
        value, latent = value_and_base(spec, x[:, at], weights)
        key = heads(spec, latent, weights, at.start)[3]
        part = products(hide(key, _part(shown, at)), value) / x.shape[1]
        total = part if total is None else total + part
    assert total is not None
    output = torch.empty_like(x)
    for at in places:
        gate, value, latent = expanded(spec, x[:, at], weights)
        quad_query, lin_query, quad_key, _ = heads(spec, latent, weights, at.start)
        mixed = within_chunks(spec, quad_query, quad_key, value, weights, _part(shown, at))
        output[:, at] = gated(gate, torch.baddbmm(mixed, wide(lin_query), total), weights)
    return output


def _part(shown: Tensor | None, at: slice) -> Tensor | None:
    return None if shown is None else shown[:, at]


# ------------------------------------------------------------ token by token


@dataclass
class ChunkState:
    """What a causal unit keeps of the tokens so far: of one size, whatever their number. `resume` changes it in place.

    Attributes:
        position: tokens so far.
        before: [B, N, F], kᵀ v summed over complete chunks; current: over the chunk in progress.
        keys: [B, C, N], quadratic keys of the chunk in progress; values: [B, C, F].
    """

    position: int
    before: Tensor
    current: Tensor
    keys: Tensor
    values: Tensor

    def select(self, rows: Tensor) -> None:
        """Put rows of the batch into another order, repeat or leave out some; in place."""
        if not torch.equal(rows, torch.arange(len(self.keys), device=rows.device)):
            self.before, self.current = self.before[rows], self.current[rows]
            self.keys, self.values = self.keys[rows], self.values[rows]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.before, self.current, self.keys, self.values))


def start(spec: MixedChunkAttention, batch: int, like: Tensor) -> ChunkState:
    """Before the first token. Raises ValueError for a spec that is not causal."""
    if not spec.causal:
        raise ValueError("only a causal unit can go on token by token")
    sums = torch.promote_types(like.dtype, torch.float32)
    before, current = (like.new_zeros(batch, spec.base, spec.expanded, dtype=sums) for _ in range(2))
    keys, values = (like.new_zeros(batch, spec.chunk, size) for size in (spec.base, spec.expanded))
    return ChunkState(0, before, current, keys, values)


@torch.no_grad()
def resume(spec: MixedChunkAttention, x: Tensor, weights: Weights, state: ChunkState) -> Tensor:
    """[B, S, E] for the next tokens x [B, S, E]; `state` is then that behind them. Without gradients."""
    check(spec, x, weights)
    outputs, done = [], 0
    while done < x.shape[1]:
        inside, left = state.position % spec.chunk, x.shape[1] - done
        if inside == 0 and left >= spec.chunk:
            take = min(left, max(BLOCK, spec.chunk)) // spec.chunk * spec.chunk
            piece = x[:, done : done + take]
            output, state.before = causal_chunks(spec, piece, weights, before=state.before, first=state.position)
            state.position += take
        else:
            take = min(left, spec.chunk - inside)
            output = _within(spec, x[:, done : done + take], weights, state)
        outputs.append(output)
        done += take
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _within(spec: MixedChunkAttention, x: Tensor, weights: Weights, state: ChunkState) -> Tensor:
    """Tokens that do not go beyond the chunk in progress."""
    inside = state.position % spec.chunk
    end = inside + x.shape[1]
    gate, value, latent = expanded(spec, x, weights)
    quad_query, lin_query, quad_key, lin_key = heads(spec, latent, weights, state.position)
    state.keys[:, inside:end], state.values[:, inside:end] = quad_key, value
    bias = score_bias(spec, weights, like=quad_query, rows=x.shape[1], columns=end, first=inside)
    scores = kernel(quad_query, state.keys[:, :end], spec.chunk, bias)
    divisor = spec.chunk * (max(state.position // spec.chunk, 1) if spec.averaged else 1)
    query = wide(lin_query)
    mixed = torch.baddbmm(scores @ wide(state.values[:, :end]), query, state.before.to(query.dtype), alpha=1 / divisor)
    state.current += products(lin_key, value)
    state.position += x.shape[1]
    if end == spec.chunk:
        state.before += state.current
        state.current.zero_()
    return gated(gate, mixed, weights)
