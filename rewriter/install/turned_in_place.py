"""Queries and output projections that follow merged heads, where an attention's forward is kept.

Both keep their shapes, so new numbers go where the old ones are stored. That they are stored where they are thought to
be, and that nothing in between minds heads that are turned, is proved on the original first: its heads are turned,
queries and output projection turned with them, and it must answer as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from passes.dataflow import Array, Flow, Value
from passes.site import AttentionSite, Operand
from passes.targets.grouped_query import as_tensors
from passes.targets.replacement import Replacement
from passes.weights.group import Blocks
from passes.weights.merge import Merged
from passes.weights.projection import site_weights
from rewriter.errors import UnsupportedModel
from rewriter.install.repeated_projection import joined, parted
from rewriter.install.stored_heads import HINT, is_parameter, parameter_at, parts_of, place_of
from rewriter.install.stored_weight import Location, locate, parameter_of

OUTPUT = "the output projection's {} is computed, not stored"


@dataclass(frozen=True)
class Written:
    """New numbers [columns, ...] for some of the columns that are stored in one place."""

    place: Location
    numbers: Array

    def agrees(self, other: Written) -> bool:
        """Whether both say the same of the same columns."""
        mine, theirs = self.place.positions.reshape(-1), other.place.positions.reshape(-1)
        same = self.place.axes == other.place.axes and np.array_equal(mine, theirs)
        return same and np.array_equal(self.numbers, other.numbers)

    def meets(self, other: Written) -> bool:
        """Whether both change the same columns, or may."""
        apart = np.intersect1d(self.place.positions, other.place.positions).size == 0
        return self.place.axes != other.place.axes or not apart


Writes = Mapping[str, Sequence[Written]]
"""By the parameter's key."""


def followed(model: nn.Module, flow: Flow, replacements: Iterable[Replacement]) -> Writes:
    """What is to be written for queries and output projections; raises UnsupportedModel if they lie nowhere."""
    found: dict[str, list[Written]] = {}
    for r in replacements:
        _add(found, _of_operand(model, flow, "q", "query", r.site.q, r.tensors))
        _add(found, _of_output(model, flow, r.site, r.tensors))
    return found


def filled(old: Tensor, writes: Sequence[Written]) -> Tensor:
    """A stored tensor with these numbers in it."""
    new = old.detach()
    for written in writes:
        axes = written.place.axes
        sizes = [new.shape[axis] for axis in axes]
        columns = joined(new, axes).clone()
        where = torch.from_numpy(np.ascontiguousarray(written.place.positions.reshape(-1))).to(new.device)
        numbers = torch.from_numpy(np.ascontiguousarray(written.numbers)).to(dtype=new.dtype, device=new.device)
        columns[where] = numbers.view(-1, *columns.shape[1:])
        new = parted(columns, axes, sizes)
    return new.contiguous()


def put(model: nn.Module, writes: Writes) -> Callable[[], None]:
    """Write in place; what undoes it. Raises UnsupportedModel, the model unchanged."""
    held = [(parameter_at(model, key), several) for key, several in writes.items()]
    for (parameter, several), key in zip(held, writes, strict=True):
        for w in several:
            if int(np.prod([parameter.shape[axis] for axis in w.place.axes])) != w.place.features:
                raise UnsupportedModel(f"it shares {key} with a module that was rewritten by itself", hint=HINT)
    before = [(parameter, parameter.detach().clone()) for parameter, _ in held]
    with torch.no_grad():
        for parameter, several in held:
            parameter.copy_(filled(parameter, several))

    def undo() -> None:
        with torch.no_grad():
            for parameter, content in before:
                parameter.copy_(content)

    return undo


def turned_originals(model: nn.Module, flow: Flow, replacements: Iterable[Replacement]) -> Writes:
    """The original's heads, those of each replacement turned as far as it combines features within them, with queries
    and output projection to match: another way to write the same attention.

    Turns are made of swaps, signs and powers of two, which cost no precision in any dtype.
    """
    found: dict[str, list[Written]] = {}
    for r in replacements:
        tensors = _turned(flow, r)
        for role, name, operand in (("q", "query", r.site.q), ("k", "key", r.site.k), ("v", "value", r.site.v)):
            _add(found, _of_operand(model, flow, role, name, operand, tensors))
        _add(found, _of_output(model, flow, r.site, tensors))
    return found


def _turned(flow: Flow, replacement: Replacement) -> Mapping[str, Array]:
    site, weights = replacement.site, site_weights(flow, replacement.site)
    random = np.random.default_rng(0)  # alike at sites that share their weights
    q, k, v, out = weights.q.copy(), weights.k.copy(), weights.v.copy(), weights.out
    for head in range(site.kv_heads):
        readers = [h for h, read in enumerate(site.group) if read == head]
        if "keys" in replacement.combined:
            turn, back = _turn(site.head_dim, None if site.k.rotary is None else site.k.rotary.partner, random)
            k[head], q[readers] = turn @ k[head], back.T @ q[readers]
        if "values" in replacement.combined and out is not None:
            turn, back = _turn(site.value_dim, None, random)
            v[head] = turn @ v[head]
            out = out.copy()
            out[readers] = out[readers] @ back
    made = Merged(replace(weights, q=q, k=k, v=v, out=out), tuple(range(site.heads)), 0.0, 0.0)
    left = {"q_": "keys", "out_": "values"}
    return {
        role: array
        for role, array in as_tensors(flow, site, made).items()
        if not any(role.startswith(start) and what not in replacement.combined for start, what in left.items())
    }


def _turn(dim: int, partner: tuple[int, ...] | None, random: np.random.Generator) -> tuple[Array, Array]:
    """A matrix [dim, dim] that the rotation of these partners does not mind, and its inverse."""
    blocks = Blocks.of(dim, partner)
    turn, back = np.zeros((dim, dim)), np.zeros((dim, dim))
    for place, feature in zip(blocks.free, random.permutation(blocks.free), strict=True):
        factor = random.choice([-1.0, 1.0]) * 2.0 ** random.integers(-1, 2)
        turn[place, feature], back[feature, place] = factor, 1 / factor
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    for pair in blocks.pairs:
        by, factor = np.linalg.matrix_power(quarter, int(random.integers(1, 4))), 2.0 ** random.integers(-1, 2)
        turn[np.ix_(pair, pair)], back[np.ix_(pair, pair)] = by * factor, by.T / factor
    return turn, back


def _add(found: dict[str, list[Written]], more: Iterable[Written]) -> None:
    for written in more:
        held = found.setdefault(written.place.key, [])
        if any(written.agrees(other) for other in held):
            continue
        if any(written.meets(other) for other in held):
            raise UnsupportedModel(f"several attentions would change {written.place.key}, each otherwise", hint=HINT)
        held.append(written)


def _of_operand(
    model: nn.Module, flow: Flow, role: str, name: str, operand: Operand, tensors: Mapping[str, Array]
) -> list[Written]:
    found: list[Written] = []
    for part, value, along, where in parts_of(flow, operand):
        numbers = tensors.get(f"{role}_{part}")
        if numbers is None or value is None:
            continue
        place = place_of(flow, operand, value, along, where)
        if place is None or not is_parameter(model, place.key):
            if part == "bias" and np.array_equal(flow.value(value).reshape(-1)[where].reshape(-1), numbers):
                continue  # zeros stay zeros
            raise UnsupportedModel(f"its {name} {part} is computed, not stored", hint=HINT)
        found.append(Written(place, numbers))
    return found


def _of_output(model: nn.Module, flow: Flow, site: AttentionSite, tensors: Mapping[str, Array]) -> list[Written]:
    out, found = site.out, []
    for part, value in () if out is None else (("weight", out.weight), ("bias", out.bias)):
        numbers = tensors.get(f"out_{part}")
        if numbers is None or value is None or out is None:
            continue
        place = _whole(flow, value)
        if place is None or not is_parameter(model, place.key):
            raise UnsupportedModel(OUTPUT.format(part), hint=HINT)
        numbers = out.stored(numbers, flow.shape(value)) if part == "weight" else numbers
        found.append(Written(place, np.ascontiguousarray(numbers).reshape(-1)))
    return found


def _whole(flow: Flow, value: Value) -> Location | None:
    """Where all elements of a value are stored."""
    weight, shape = parameter_of(flow, value), flow.shape(value)
    if weight is None or weight.shape != shape:
        return locate(flow, value, ())
    count = int(np.prod(shape))
    return Location(weight.name, tuple(range(len(shape))), count, np.arange(count))
