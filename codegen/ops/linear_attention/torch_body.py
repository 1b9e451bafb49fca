"""Linear attention in plain, differentiable torch: near weights chunk by chunk, far ones through sums of kᵀ v.

The sums over chunks before (and behind) a query's near ones are running sums of shifted chunks, not differences, which
would leave roundings of later tokens in earlier results. Beside values each sum carries a one, and so the divisor.
Token by token (`resume`) such a sum stands for all keys but those of two chunks.

Shape legend: B batch, N key/value heads, R query heads of each, S queries, T keys, D head_dim, V value_dim, F features;
C tokens of a chunk, P chunks of keys, G chunks that queries lie in, W near keys: 2 C, 3 C where not causal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.linear_attention.reference import check
from codegen.spec import FeatureMap, LinearAttention

Parameters = Mapping[str, Tensor]


def linear_attention(
    spec: LinearAttention, q: Tensor, k: Tensor, v: Tensor, parameters: Parameters, shown: Tensor | None = None
) -> Tensor:
    """[B, H, S, V] in q's dtype, of q [B, H, S, D], k [B, N, T, D], v [B, N, T, V]; at least in float32 inside.

    `parameters` are those of the spec's `shapes`; keys are hidden where `shown` [B, T] is False.

    Raises ValueError if an operand contradicts the spec.
    """
    check(spec, q, k, v, parameters)
    with torch.autocast(q.device.type, enabled=False):
        return unguarded(spec, q, k, v, parameters, shown)


def unguarded(
    spec: LinearAttention, q: Tensor, k: Tensor, v: Tensor, parameters: Parameters, shown: Tensor | None = None
) -> Tensor:
    """`linear_attention`, with shapes unchecked and autocast as it is: what is written into graphs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = {name: value.to(dtype) for name, value in parameters.items()}
    return _computed(spec, q.to(dtype), k.to(dtype), v.to(dtype), wide, shown)[0].to(q.dtype)


def resume(
    spec: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Parameters,
    before: Tensor | None = None,
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, after): what `linear_attention` gives where the first keys of a sequence are known by a sum alone.

    Args:
        q, k, v, shown: as there, of the keys that are not in `before`; these begin with a chunk.
        before: [B, N, F, V + 1], float32 or wider: the sum over all chunks before k; None for none.

    `after` is `before` and the first `settled(spec, T)` keys of k, which later calls then leave out.

    Raises ValueError if an operand contradicts the spec, or the spec is not causal.
    """
    check(spec, q, k, v, parameters)
    if not spec.attention.causal:
        raise ValueError("only a causal attention can go on token by token")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        wide = {name: value.to(dtype) for name, value in parameters.items()}
        start = q.new_zeros(q.shape[0], *k.shape[1:2], spec.width, v.shape[3] + 1, dtype=dtype)
        start = start if before is None else before.to(dtype)
        output, after = _computed(spec, q.to(dtype), k.to(dtype), v.to(dtype), wide, shown, start)
    assert after is not None
    return output.to(q.dtype), after


def settled(spec: LinearAttention, tokens: int) -> int:
    """Of the first `tokens` of a sequence, those that are far from all that follow."""
    return max(tokens // spec.chunk - 1, 0) * spec.chunk


def _computed(
    spec: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Parameters,
    shown: Tensor | None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output, and with `start`, the sum over what was before k, that sum over all that is settled."""
    tokens, first = q.shape[2], k.shape[2] - q.shape[2]
    if tokens == 0 and start is None:
        return q.new_zeros(*q.shape[:3], v.shape[3]), None
    chunk, lead = spec.chunk, first % spec.chunk
    at = slice(first // chunk, first // chunk + _chunks(lead + tokens, chunk))  # the chunks that queries lie in
    ones = k.new_ones(*k.shape[:3], 1)
    hidden = ones if shown is None else shown[:, None, :, None].to(k.dtype).expand_as(ones)
    values = _by_chunk(torch.cat((v, ones), dim=-1) * hidden, chunk)
    keys, visible = _by_chunk(k, chunk), _by_chunk(hidden, chunk)
    query = _by_chunk(_grouped(spec, q), chunk, lead)
    scores = query @ _near(spec, keys, at)[:, :, None].transpose(-1, -2) * spec.attention.scale
    sees = (_near(spec, visible, at)[:, :, None, ..., 0] > 0)[..., None, :] & _order(spec, q.device)
    scores = scores.masked_fill(~sees, -torch.inf)
    greatest = scores.amax(-1, keepdim=True)
    greatest = greatest.masked_fill(greatest == -torch.inf, 0.0)
    features = _by_chunk(_grouped(spec, _features(spec, q, parameters, "query_map")), chunk, lead)
    gain = parameters["log_gain"].view(1, spec.attention.kv_heads, -1, 1, 1, 1)
    if spec.features is FeatureMap.FAVOR:  # features are exponents still
        greatest = torch.maximum(greatest, features.amax(-1, keepdim=True))
        features = (features - greatest).exp()
    near = (scores - greatest).exp() @ _near(spec, values, at)[:, :, None]
    sums = _beyond(spec, k, values, parameters, at, start)
    total = near + (features * gain.exp()) @ sums[:, :, at][:, :, None]
    output, divisor = total[..., :-1], total[..., -1:]
    output = _by_token(output / torch.where(divisor > 0, divisor, 1.0), lead, tokens)
    after = None if start is None else sums[:, :, settled(spec, k.shape[2]) // chunk + 1].clone()
    return output.flatten(1, 2), after


def _grouped(spec: LinearAttention, x: Tensor) -> Tensor:
    """[B, H, S, ...] as [B, N, R, S, ...]."""
    return torch.unflatten(x, 1, (spec.attention.kv_heads, spec.attention.group))


def _chunks(tokens: int, chunk: int) -> int:
    """How many chunks hold so many tokens; in programs that are exported more, since a size of one would be fixed."""
    return tokens // chunk + 2 if torch.compiler.is_exporting() else -(-tokens // chunk)


def _by_chunk(x: Tensor, chunk: int, lead: int = 0) -> Tensor:
    """[..., tokens, features] as [..., chunks, C, features]; zeros stand in `lead` places before and behind the end."""
    count = _chunks(lead + x.shape[-2], chunk)
    if torch.compiler.is_exporting():  # by an index: exporters doubt reshapes to sizes that they cannot bound
        numbers = torch.arange(count, device=x.device)[:, None] * chunk + torch.arange(chunk, device=x.device) - lead
        numbers = torch.where(numbers < 0, x.shape[-2], numbers).clamp(max=x.shape[-2])
        return F.pad(x, (0, 0, 0, 1))[..., numbers, :]
    return torch.unflatten(F.pad(x, (0, 0, lead, count * chunk - lead - x.shape[-2])), -2, (count, chunk))


def _by_token(x: Tensor, lead: int, tokens: int) -> Tensor:
    """[..., tokens, features] of [..., chunks, C, features], without the places of `_by_chunk`."""
    whole = x.flatten(-3, -2)
    if torch.compiler.is_exporting():  # a slice would be checked against a length that exporters cannot bound
        return whole[..., torch.arange(tokens, device=x.device) + lead, :]
    return whole[..., lead : lead + tokens, :]


def _near(spec: LinearAttention, x: Tensor, at: slice) -> Tensor:
    """[B, N, G, W, ...] of [B, N, P, C, ...]: each chunk of `at` with its neighbours, zeros where there is none."""
    padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    places = (0, 1) if spec.attention.causal else (0, 1, 2)
    return torch.cat([padded[:, :, at.start + n : at.stop + n] for n in places], dim=3)


def _order(spec: LinearAttention, device: torch.device) -> Tensor:
    """[C, W]: which near keys the order lets a query of the chunk see."""
    rows = torch.arange(spec.chunk, device=device)[:, None] + spec.chunk
    columns = torch.arange(spec.chunk * (2 if spec.attention.causal else 3), device=device)
    return columns <= rows if spec.attention.causal else torch.ones_like(columns <= rows)


def _beyond(
    spec: LinearAttention, k: Tensor, values: Tensor, parameters: Parameters, at: slice, start: Tensor | None
) -> Tensor:
    """[B, N, .., F, V + 1]: for each chunk, at least up to those of `at`, the sum over all beyond its near ones.

    With `start`, the sum over what was before k, for one more chunk where `settled` needs that.
    """
    chunks = values.shape[2]
    if spec.attention.causal and not torch.compiler.is_exporting():  # of the last chunks nothing is beyond
        chunks = max(at.stop - 2, 0) if start is None else settled(spec, k.shape[2]) // spec.chunk
        k, values = k[:, :, : chunks * spec.chunk], values[:, :, :chunks]
    learned = _features(spec, k, parameters, "key_map")
    learned = learned.exp() if spec.features is FeatureMap.FAVOR else learned
    each = _by_chunk(learned, spec.chunk).transpose(-1, -2) @ values
    before = F.pad(each, (0, 0, 0, 0, 2, 0))
    if start is not None:
        before = torch.cat((start[:, :, None], before[:, :, 1:]), dim=2)
    before = before.cumsum(dim=2)
    if spec.attention.causal:
        return before
    behind = F.pad(each, (0, 0, 0, 0, 0, 2)).flip(2).cumsum(dim=2).flip(2)
    return before[:, :, :chunks] + behind[:, :, 2:]


def _features(spec: LinearAttention, x: Tensor, parameters: Parameters, own: str) -> Tensor:
    """[B, heads, tokens, F] of x [B, heads, tokens, D]; of FAVOR+ the exponents."""
    plain = spec.attention
    x = x * plain.scale**0.5
    if spec.features is FeatureMap.FAVOR:
        directions = parameters["directions"].repeat_interleave(x.shape[1] // plain.kv_heads, dim=0)
        exponents = x @ directions.transpose(-1, -2) - x.square().sum(-1, keepdim=True) / 2
        return exponents - 0.5 * math.log(spec.directions)
    x = x * plain.head_dim**0.25
    if spec.features is FeatureMap.ELU1:
        return F.elu(x) + 1
    turned = x @ parameters[own].transpose(-1, -2)
    return torch.cat((turned.softmax(-1), (-turned).softmax(-1)), dim=-1)
