"""The mixture of experts in plain, differentiable torch: tokens are gathered for each expert, experts work as a batch.

Shape legend: N = G T tokens in G groups, E experts, C capacity, K selected experts, H features, F features inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from codegen.ops.activation.torch_body import activate
from codegen.ops.mixture_of_experts.reference import require_fitting
from codegen.spec import MixtureOfExperts, Routing

BALANCE_WEIGHT, Z_WEIGHT = 0.01, 1e-4
"""What the paper multiplies both losses of the router by."""


@dataclass(frozen=True)
class Routed:
    """What a mixture gives in training.

    Attributes:
        output: [B, S, H], in x's dtype.
        balance, z: scalars in float32 at least, not yet weighted: the load-balancing loss, 0 where experts choose, and
            the router's z-loss; see the oracle.
        left_behind: which part of the tokens no expert worked on.
    """

    output: Tensor
    balance: Tensor
    z: Tensor
    left_behind: Tensor

    @property
    def loss(self) -> Tensor:
        """What is added to a model's loss, with the paper's weights."""
        return BALANCE_WEIGHT * self.balance + Z_WEIGHT * self.z


def mixture_of_experts(spec: MixtureOfExperts, x: Tensor, **parameters: Tensor) -> Tensor:
    """[B, S, H] of x [B, S, H] and parameters of `MixtureOfExperts.shapes`; the output has x's dtype.

    Raises:
        ValueError: if x or a parameter contradicts the spec, or a parameter is given or missing against it.
    """
    return routed(spec, x, **parameters).output


def routed(spec: MixtureOfExperts, x: Tensor, **parameters: Tensor) -> Routed:
    """As `mixture_of_experts`, with the router's losses."""
    grouped, logits = _checked(spec, x, parameters)
    by = _by_experts if spec.routing is Routing.EXPERTS_CHOOSE else _by_tokens
    return _finished(spec, x, logits, by(spec, grouped, logits.softmax(dim=-1), parameters), parameters)


Blocks = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[N, H] of tokens [N, H], rows [E, M] with -1 for empty places, and weights [E, M], as `RoutedFeedForward` has it."""


def routed_through(spec: MixtureOfExperts, x: Tensor, blocks: Blocks, **parameters: Tensor) -> Routed:
    """As `routed`, with what is behind the router computed by `blocks`."""
    grouped, logits = _checked(spec, x, parameters)
    rows, weights, balance, used = placed(spec, grouped, logits.softmax(dim=-1))
    mixed = blocks(grouped.reshape(-1, spec.hidden), rows, weights)
    return _finished(spec, x, logits, (mixed, balance, used), parameters)


def placed(spec: MixtureOfExperts, x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x [G, T, H]: rows [E, G C], -1 where a place stays empty, weights [E, G C], and what `Mixed` has behind."""
    flat = x.shape[0] * x.shape[1]
    if spec.routing is Routing.EXPERTS_CHOOSE:
        rows, weights = _taken(spec, x, probabilities)
        return rows, weights, probabilities.new_zeros(()), _used(rows, flat)
    asked = _asked(spec, x, probabilities)
    rows = _in_places(spec, asked, asked.tokens, -1)
    return rows, _in_places(spec, asked, asked.gates, 0), asked.balance, asked.kept.any(dim=2)


def unguarded(spec: MixtureOfExperts, x: Tensor, parameters: dict[str, Tensor], *, groups: int) -> Tensor:
    """`mixture_of_experts` in so many groups, with shapes unchecked: what is written into graphs."""
    grouped = x.reshape(groups, -1, spec.hidden)
    logits = _logits(spec, grouped, parameters)
    by = _by_experts if spec.routing is Routing.EXPERTS_CHOOSE else _by_tokens
    return _finished(spec, x, logits, by(spec, grouped, logits.softmax(dim=-1), parameters), parameters).output


def _checked(spec: MixtureOfExperts, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Groups of tokens [G, T, H], and logits [G, T, E] in float32 at least."""
    require_fitting(spec, tuple(x.shape), {name: tuple(p.shape) for name, p in parameters.items()})
    grouped = x.reshape(spec.groups(x.shape[0] * x.shape[1]), -1, spec.hidden)
    return grouped, _logits(spec, grouped, parameters)


def _logits(spec: MixtureOfExperts, grouped: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    wide = grouped if grouped.dtype == torch.float64 else grouped.float()
    logits = wide @ parameters["router_weight"].to(wide.dtype)
    return logits + parameters["router_bias"].to(wide.dtype) if spec.router_bias else logits


def _finished(spec: MixtureOfExperts, x: Tensor, logits: Tensor, found: Mixed, parameters: dict[str, Tensor]) -> Routed:
    mixed, balance, used = found
    if spec.bias:
        mixed = mixed + parameters["bias"].to(x.dtype)
    z = logits.logsumexp(dim=-1).square().mean()
    return Routed(mixed.reshape(x.shape), balance, z, 1 - used.to(logits.dtype).mean())


Mixed = tuple[Tensor, Tensor, Tensor]
"""Tokens [N, H] without the common bias, the load-balancing loss, and [N] whether a token was routed anywhere."""


def _by_experts(spec: MixtureOfExperts, x: Tensor, probabilities: Tensor, parameters: dict[str, Tensor]) -> Mixed:
    """Each expert takes its C most probable tokens of each group."""
    rows, gates = _taken(spec, x, probabilities)
    flat = x.reshape(-1, spec.hidden)
    weighted = _experts(spec, flat[rows], parameters) * gates[..., None].to(x.dtype)
    mixed = torch.zeros_like(flat).index_put((rows,), weighted, accumulate=True)
    return mixed, probabilities.new_zeros(()), _used(rows, flat.shape[0])


def _taken(spec: MixtureOfExperts, x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """[E, G C]: tokens that experts take, and their probabilities."""
    groups, tokens, _ = x.shape
    gates, index = _best(probabilities.permute(2, 0, 1), _capacity(spec, tokens))  # [E, G, C]
    rows = _side_by_side(index + tokens * torch.arange(groups, device=x.device)[:, None])
    return rows, _side_by_side(gates)


def _used(rows: Tensor, tokens: int) -> Tensor:
    """bool [N]: whether a token stands in any of these rows."""
    ones = torch.ones_like(rows, dtype=torch.bool)
    return rows.new_zeros(tokens, dtype=torch.bool).index_put((rows,), ones)


def _by_tokens(spec: MixtureOfExperts, x: Tensor, probabilities: Tensor, parameters: dict[str, Tensor]) -> Mixed:
    """Each token goes to its K most probable experts as long as they have room."""
    asked = _asked(spec, x, probabilities)
    rows = _in_places(spec, asked, asked.tokens, 0)  # the first token where there is room left
    worked = _experts(spec, x.reshape(-1, spec.hidden)[rows], parameters)
    answers = worked[asked.choices, asked.column]  # without room, to another token
    weighted = answers * asked.gates[..., None].to(x.dtype)
    none = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(asked.kept[..., None], weighted, none).sum(dim=2), asked.balance, asked.kept.any(dim=2)


@dataclass(frozen=True)
class _Asked:
    """What tokens asked for. Attributes, [G, T, K] each:
    choices, gates: experts, best first, and their probabilities.
    column, kept: places among the G C of an expert, 0 without room, and whether there was room.
    tokens: the number of the token itself.

    block: places of an expert, G C; balance: the load-balancing loss.
    """

    choices: Tensor
    gates: Tensor
    column: Tensor
    kept: Tensor
    tokens: Tensor
    block: Any
    balance: Tensor


def _asked(spec: MixtureOfExperts, x: Tensor, probabilities: Tensor) -> _Asked:
    groups, tokens, _ = x.shape
    capacity = _capacity(spec, tokens)
    gates, choices = _best(probabilities, spec.selected)  # [G, T, K]
    asked = functional.one_hot(choices, spec.experts).sum(dim=2).to(probabilities.dtype)  # [G, T, E]
    balance = spec.experts * (asked.mean(dim=1) * probabilities.mean(dim=1)).sum(dim=-1).mean()
    place = _places(spec, gates[..., 0], choices)  # [G, T, K]
    kept = place < capacity
    column = torch.where(kept, place + capacity * torch.arange(groups, device=x.device)[:, None, None], 0)
    token = torch.arange(groups * tokens, device=x.device).reshape(groups, tokens, 1).expand_as(choices)
    return _Asked(choices, gates, column, kept, token, groups * capacity, balance)


def _in_places(spec: MixtureOfExperts, asked: _Asked, values: Tensor, empty: int) -> Tensor:
    """[E, G C]: of values [G, T, K] the one that each place of an expert is for; `empty` where there is room left.

    Choices that found no room are written behind the end, each to a place of its own, and cut off.
    """
    choices, block = asked.choices, asked.block
    spare = spec.experts * block + torch.arange(choices.numel(), device=choices.device).reshape(choices.shape)
    places = torch.where(asked.kept, choices * block + asked.column, spare)
    found = values.new_full((spec.experts * block + choices.numel(),), empty)
    found = found.scatter(0, places.reshape(-1), values.reshape(-1))
    return found[: spec.experts * block].reshape(spec.experts, block)


def _side_by_side(groups: Tensor) -> Tensor:
    """[E, G C] of [E, G, C], by no reshape: captures would ask how G and C divide each other."""
    return torch.cat(groups.unbind(1), dim=1)


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest along the last axis and where they stand, in order; of equal ones the lower index comes first."""
    if torch.onnx.is_in_onnx_export():  # whose TopK is so by definition, and which has no stable sort
        found = values.topk(count, dim=-1)
        return found.values, found.indices
    ordered, index = values.sort(dim=-1, descending=True, stable=True)
    first = torch.arange(count, device=values.device)  # not a slice: captures would ask whether there are as many
    return ordered.index_select(-1, first), index.index_select(-1, first)


def _capacity(spec: MixtureOfExperts, group: Any) -> Any:
    """`MixtureOfExperts.capacity`; of a symbolic size too, which a graph capture must not compare with numbers."""
    if isinstance(group, int):
        return spec.capacity(group)
    wanted = torch.sym_max(round(spec.capacity_factor * group / spec.experts), spec.min_capacity)  # type: ignore[no-untyped-call]
    return torch.sym_min(wanted, group)  # type: ignore[no-untyped-call]


def _places(spec: MixtureOfExperts, best: Tensor, choices: Tensor) -> Tensor:
    """[G, T, K]: how many choices of the same expert are served before; `best` [G, T] says who comes first."""
    order = _best(best, best.shape[1])[1]
    index = order[..., None].expand_as(choices)
    ranked = choices.gather(1, index).transpose(1, 2)  # [G, K, T]: all first choices, then all second ones
    counted = functional.one_hot(ranked.flatten(1), spec.experts)
    before = ((counted.cumsum(dim=1) - 1) * counted).sum(dim=-1).reshape(ranked.shape).transpose(1, 2)
    return torch.zeros_like(choices).scatter(1, index, before)


def _experts(spec: MixtureOfExperts, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """[E, n, H] of x [E, n, H], as a batch; in files one by one, since onnxruntime prepares single matrices only."""
    held = {n: p.to(x.dtype) for n, p in parameters.items() if n.startswith(("gate_", "up_", "down_"))}
    if not torch.onnx.is_in_onnx_export():
        return _worked(spec, x, {n: p[:, None] if n.endswith("bias") else p for n, p in held.items()})
    return torch.stack([_worked(spec, x[e], {n: p[e] for n, p in held.items()}) for e in range(spec.experts)])


def _worked(spec: MixtureOfExperts, x: Tensor, held: dict[str, Tensor]) -> Tensor:
    """Of all experts, or of one: [E, n, H] or [n, H]."""

    def projected(name: str, given: Tensor) -> Tensor:
        weight, bias = held[f"{name}_weight"], held.get(f"{name}_bias")
        if bias is None:
            return given @ weight
        return (torch.baddbmm if given.dim() == 3 else torch.addmm)(bias, given, weight)

    up = projected("up", x)
    inner = activate(spec.activation, projected("gate", x)) * up if spec.gated else activate(spec.activation, up)
    return projected("down", inner)
