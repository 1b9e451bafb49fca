"""Candidate → layout → activation → replay: every feed-forward block ends as a site or as a refusal.

Which column of which projection feeds which hidden feature is told by running the layout operators on indices; what the
activation is, by running the other nodes between the projections on chosen numbers. A description must then reproduce
the block's recorded output from its recorded input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from passes.contents import Contents
from passes.dataflow import Array, Flow, Node, Value
from passes.feed_forward_site import Activation, FeedForwardSite, HiddenInput
from passes.match.feed_forward_activation import Reading, Readings
from passes.match.feed_forward_blocks import Block, blocks, mixtures
from passes.match.feed_forward_inside import Inside
from passes.match.linear_map import linear_map
from passes.match.names import common_scope, exporter_scope, layer_of
from passes.match.roundings import executed, operand_roundings
from passes.match.verdicts import NotUnderstood, Unrelated
from passes.nonlinearities import NONLINEARITIES
from passes.replay import TOLERANCES, relative
from passes.site import Projection, Refusal


@dataclass(frozen=True)
class FeedForwards:
    """Everything found in one flow, in execution order."""

    sites: tuple[FeedForwardSite, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def find_feed_forward(flow: Flow, taken: Iterable[str] = ()) -> FeedForwards:
    """Match every feed-forward block of a program and verify each by replay.

    Args:
        flow: a recording that holds `feed_forward_blocks.recorded_values`.
        taken: names of attentions; a block inside whose scope one lies is not named after that scope alone.
    """
    names = _Names(flow, frozenset(taken))
    readings = Readings(Contents(flow))
    sites: list[FeedForwardSite] = []
    refusals: dict[tuple[str, str], Refusal] = {}

    def refuse(name: str, layer: int, reason: str, anchor: int, owner: str) -> None:
        refusals.setdefault((owner or name, reason), Refusal(name, layer, reason, anchor, owner))

    for block in blocks(flow):
        name, layer, owner = names.of(block)
        try:
            sites.append(_match(flow, block, readings, name, layer, owner))
        except Unrelated:
            continue
        except NotUnderstood as reason:
            refuse(name, layer, str(reason), block.down, owner)
        except (ArithmeticError, LookupError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            refuse(name, layer, f"matching it failed: {type(error).__name__}: {first}", block.down, owner)
    for node in mixtures(flow):
        name = node.owner or exporter_scope(node.name) or f"mixture_of_experts.{node.index}"
        refuse(name, layer_of(name, 0), "it is a mixture of experts already", node.index, node.owner)
    alone, shared = _without_shared(flow, sites)
    for site in shared:
        refuse(site.name, site.layer, "a weight of it is read by something else too", site.anchor, site.owner)
    return FeedForwards(tuple(alone), tuple(sorted(refusals.values(), key=lambda r: r.anchor)))


def confirm_feed_forward(first: FeedForwards, second: FeedForwards) -> FeedForwards:
    """`first` without sites that `second`, the same program recorded at another size, does not describe alike."""
    others = {s.anchor: s for s in second.sites}
    sites: list[FeedForwardSite] = []
    refusals = list(first.refusals)
    for site in first.sites:
        other = others.get(site.anchor)
        if other is None or not _alike(site, other):
            reason = "its description differs from one size to another"
            refusals.append(Refusal(site.name, site.layer, reason, site.anchor, site.owner))
        else:
            sites.append(replace(site, replay_error=max(site.replay_error, other.replay_error)))
    return FeedForwards(tuple(sites), tuple(sorted(refusals, key=lambda r: r.anchor)))


def _alike(a: FeedForwardSite, b: FeedForwardSite) -> bool:
    if (a.gate is None) != (b.gate is None) or a.activation.name != b.activation.name:
        return False
    pairs = [(a.up, b.up)] if a.gate is None or b.gate is None else [(a.up, b.up), (a.gate, b.gate)]
    return all(x.projection.node == y.projection.node and np.array_equal(x.columns, y.columns) for x, y in pairs)


# ------------------------------------------------------------------ one block


def _match(flow: Flow, block: Block, readings: Readings, name: str, layer: int, owner: str) -> FeedForwardSite:
    """Raises NotUnderstood with the refusal's reason, Unrelated where there is no nonlinearity at all."""
    if block.obstacle is not None:
        raise NotUnderstood(block.obstacle)
    inside = Inside.of(flow, block)
    reading = readings.of(inside)
    factors = [HiddenInput(inside.projections[s.source], s.columns) for s in inside.slots]
    gate = factors[reading.gate] if reading.gate is not None else None
    up = factors[0 if reading.gate is None else 1 - reading.gate]
    down = linear_map(flow, flow.nodes[block.down])
    error = _replay_error(flow, inside, reading, down)
    if not error <= TOLERANCES[flow.dtype]:
        raise NotUnderstood(f"it does not replay from its weights (relative error {error:.1e})")
    return FeedForwardSite(
        name=name,
        layer=layer,
        width=down.features,
        hidden=len(up.columns),
        up=up,
        gate=gate,
        activation=Activation(reading.name, reading.of, block.inner),
        down=down,
        input=block.input,
        residual=block.residual,
        nodes=_nodes(flow, block),
        replay_error=error,
        owner=owner,
    )


def _nodes(flow: Flow, block: Block) -> tuple[int, ...]:
    ends = {block.down, *block.projections, *block.inner}
    for value in (*block.sources, block.output):
        node = flow.producer(value)
        while node is not None and node.index not in ends:  # a bias, perhaps with roundings in front of it
            ends.add(node.index)
            fed = [v for v in node.inputs if v and flow.is_fed(v)]
            node = flow.producer(fed[0]) if fed else None
    return tuple(sorted(ends))


# ------------------------------------------------------------------ replay


def _replay_error(flow: Flow, inside: Inside, reading: Reading, down: Projection) -> float:
    projected = [_projected(flow, p) for p in inside.projections]
    if reading.name is None or flow.dtype == "int8":
        hidden = inside.hidden(projected)
    else:
        factors = [projected[s.source][:, s.columns] for s in inside.slots]
        activated = NONLINEARITIES[reading.name](factors[reading.gate or 0])
        hidden = activated if reading.gate is None else activated * factors[1 - reading.gate]
    mine = _applied(flow, down, hidden.astype(np.float32))
    seen = np.asarray(flow.value(down.output), dtype=np.float64).reshape(mine.shape)
    return relative(mine.astype(np.float64), seen)


def _projected(flow: Flow, projection: Projection) -> Array:
    x = np.asarray(flow.value(projection.input), dtype=np.float32)
    return _applied(flow, projection, x.reshape(-1, x.shape[-1]))


def _applied(flow: Flow, projection: Projection, x: Array) -> Array:
    """[rows, features] in float32, as programs compute; a weight is not copied to be widened."""
    w = np.asarray(flow.value(projection.weight), dtype=np.float32)
    out = x @ (w.T if projection.out_first else w)
    if flow.dtype == "int8":
        matrix = flow.nodes[projection.node].outputs[0]
        early, _ = operand_roundings(flow, matrix, projection.output, projection.output)
        out = executed(flow, early, out)
    if projection.bias is not None:
        bias = np.asarray(flow.value(projection.bias), dtype=np.float32).reshape(-1)
        positions = projection.bias_positions(np.arange(projection.features))
        out = out + np.where(positions < 0, np.float32(0.0), bias[positions])
    return np.asarray(out)


# ------------------------------------------------------------------ sharing and names


def _without_shared(flow: Flow, sites: list[FeedForwardSite]) -> tuple[list[FeedForwardSite], list[FeedForwardSite]]:
    """(sites, those of them with a weight that anything but the same projection of another block reads too)."""
    readers = _readers_of_stored(flow)
    roles = {node: role for s in sites for node, role in _roles(s).items()}

    def is_shared(site: FeedForwardSite) -> bool:
        for node, role in _roles(site).items():
            weight = next(v for v in flow.nodes[node].inputs if flow.is_constant(v) and len(flow.shape(v)) > 1)
            others = {n for stored in _stored(flow, weight) for n in readers.get(stored, ())}
            if any(roles.get(n) != role for n in others):
                return True
        return False

    shared = [s for s in sites if is_shared(s)]
    return [s for s in sites if s not in shared], shared


def _roles(site: FeedForwardSite) -> dict[int, tuple[str, ...]]:
    """By contraction, what it computes; a fused one computes both factors."""
    named = [("gate", site.gate.projection.node)] if site.gate is not None else []
    named += [("up", site.up.projection.node), ("down", site.down.node)]
    return {node: tuple(role for role, other in named if other == node) for _, node in named}


def _readers_of_stored(flow: Flow) -> dict[Value, set[int]]:
    """For each stored matrix the nodes that work on fed data with it, perhaps computed further first."""
    readers: dict[Value, set[int]] = {}
    for node in flow.nodes:
        if all(flow.is_constant(v) for v in node.inputs if v):
            continue
        for value in node.inputs:
            if value and flow.is_constant(value):
                for stored in _stored(flow, value):
                    readers.setdefault(stored, set()).add(node.index)
    return readers


def _stored(flow: Flow, value: Value) -> list[Value]:
    """The stored matrices that a constant is made of."""
    return [v for v in flow.weights_above(value) if len(flow.weights[v].shape) > 1]


class _Names:
    """Names of blocks: the scope that their projections share, told apart from attentions and from each other."""

    def __init__(self, flow: Flow, taken: frozenset[str]) -> None:
        self.flow, self.taken = flow, taken
        self.used: dict[str, int] = {}

    def of(self, block: Block) -> tuple[str, int, str]:
        """(name, layer, owner)."""
        into = [*(self.flow.nodes[i] for i in block.projections), *self._producers(block.sources)]
        out = [self.flow.nodes[block.down], *self._producers([block.output])]
        owners = [[n.owner for n in side if n.owner] for side in (into, out)]
        owner = common_scope([name for side in owners for name in side]) if all(owners) else ""
        scope = owner or common_scope(self._stored([*into, *out]))
        base = scope or f"feed_forward.{len(self.used)}"
        if any(t == scope or t.startswith(f"{scope}.") for t in self.taken) and scope:
            base = f"{scope}.feed_forward"
        number = self.used.get(base, 0)
        self.used[base] = number + 1
        name = base if number == 0 else f"{base}#{number}"
        return name, layer_of(name, len(self.used) - 1), owner

    def _producers(self, values: Iterable[Value]) -> list[Node]:
        return [node for v in values if (node := self.flow.producer(v)) is not None]

    def _stored(self, nodes: Iterable[Node]) -> list[str]:
        names = [self.flow.weights[v].name for n in nodes for v in n.inputs if v in self.flow.weights]
        return [n for n in names if "." in n]
