"""Linear attention in plain, differentiable torch: near weights chunk by chunk, far ones through sums of kᵀ v.

The sums over chunks before (and behind) a query's near ones are running sums of shifted chunks, not differences, which
would leave roundings of later tokens in earlier results. Beside values each sum carries a one, and so the divisor.

Shape legend: B batch, N key/value heads, R query heads of each, S queries, T keys, D head_dim, V value_dim, F features;
C tokens of a chunk, P chunks of keys, G chunks that queries lie in, W near keys: 2 C, 3 C where not causal.
"""

from __future__ import annotations

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
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        wide = {name: value.to(dtype) for name, value in parameters.items()}
        return _computed(spec, q.to(dtype), k.to(dtype), v.to(dtype), wide, shown).to(q.dtype)


def _computed(
    spec: LinearAttention, q: Tensor, k: Tensor, v: Tensor, parameters: Parameters, shown: Tensor | None
) -> Tensor:
    tokens, first = q.shape[2], k.shape[2] - q.shape[2]
    if tokens == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    chunk, lead = spec.chunk, first % spec.chunk
    at = slice(first // chunk, first // chunk + -(-(lead + tokens) // chunk))  # the chunks that queries lie in
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
    learned = _features(spec, k, parameters, "key_map")
    learned = learned.exp() if spec.features is FeatureMap.FAVOR else learned
    sums = _beyond(spec, _by_chunk(learned, chunk).transpose(-1, -2) @ values, at)
    total = near + (features * gain.exp()) @ sums[:, :, None]
    output, divisor = total[..., :-1], total[..., -1:]
    output = (output / torch.where(divisor > 0, divisor, 1.0)).flatten(3, 4)[..., lead : lead + tokens, :]
    return output.flatten(1, 2)


def _grouped(spec: LinearAttention, x: Tensor) -> Tensor:
    """[B, H, S, ...] as [B, N, R, S, ...]."""
    return torch.unflatten(x, 1, (spec.attention.kv_heads, spec.attention.group))


def _by_chunk(x: Tensor, chunk: int, lead: int = 0) -> Tensor:
    """[..., tokens, features] as [..., chunks, C, features]; zeros stand in `lead` places before and behind the end."""
    padded = F.pad(x, (0, 0, lead, -(lead + x.shape[-2]) % chunk))
    return torch.unflatten(padded, -2, (padded.shape[-2] // chunk, chunk))


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


def _beyond(spec: LinearAttention, each: Tensor, at: slice) -> Tensor:
    """[B, N, G, F, V + 1]: what the chunks beyond the near ones of each chunk of `at` add up to."""
    before = F.pad(each, (0, 0, 0, 0, 2, 0)).cumsum(dim=2)[:, :, at]
    if spec.attention.causal:
        return before
    behind = F.pad(each, (0, 0, 0, 0, 0, 2)).flip(2).cumsum(dim=2).flip(2)
    return before + behind[:, :, at.start + 2 : at.stop + 2]


def _features(spec: LinearAttention, x: Tensor, parameters: Parameters, own: str) -> Tensor:
    """[B, heads, tokens, F] of x [B, heads, tokens, D]; of FAVOR+ the exponents."""
    plain = spec.attention
    x = x * plain.scale**0.5
    if spec.features is FeatureMap.FAVOR:
        directions = parameters["directions"].repeat_interleave(x.shape[1] // plain.kv_heads, dim=0)
        exponents = x @ directions.transpose(-1, -2) - x.square().sum(-1, keepdim=True) / 2
        return exponents - 0.5 * torch.log(x.new_tensor(float(spec.directions)))
    x = x * plain.head_dim**0.25
    if spec.features is FeatureMap.ELU1:
        return F.elu(x) + 1
    turned = x @ parameters[own].transpose(-1, -2)
    return torch.cat((turned.softmax(-1), (-turned).softmax(-1)), dim=-1)
