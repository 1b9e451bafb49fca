"""A site's subgraph as a small drawing: which nodes there are, what part each plays, what flows between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from passes.dataflow import SHAPE_READERS, Flow, Node, Value
from passes.feed_forward_site import FeedForwardSite
from passes.site import AttentionSite, Operand, Projection, Refusal

Role = Literal["input", "query", "key", "value", "score", "gate", "up", "activation", "mask", "output", "unread"]
Kind = Literal["attention", "feed_forward"]

MOST_NODES = 60
"""A refused site has no known extent; of its surroundings this many nodes are drawn, the nearest first."""


@dataclass(frozen=True)
class Box:
    """One box of a drawing.

    Attributes:
        key: unique in the drawing.
        title: the operator, or what comes in.
        detail: shapes and names; text from the model, to be escaped by whoever draws it.
    """

    key: str
    title: str
    detail: str
    role: Role


@dataclass(frozen=True)
class Picture:
    """The subgraph of one site or block; `edges` are (from, to) keys of boxes."""

    name: str
    caption: str
    rewritable: bool
    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str], ...]
    kind: Kind = "attention"


@dataclass(frozen=True)
class Drawing:
    """A picture that stands for all sites whose subgraphs are alike; `also` are the names of the others."""

    picture: Picture
    also: tuple[str, ...] = ()


def distinct(pictures: Iterable[Picture]) -> tuple[Drawing, ...]:
    """One drawing for each structure (operators, parts and edges), in order of first appearance."""
    groups: dict[object, list[Picture]] = {}
    for picture in pictures:
        place = {box.key: number for number, box in enumerate(picture.boxes)}
        edges = tuple((place[a], place[b]) for a, b in picture.edges)
        kinds = tuple((box.role, "" if box.role in {"input", "mask"} else box.title) for box in picture.boxes)
        reason = "" if picture.rewritable else picture.caption
        groups.setdefault((picture.rewritable, reason, kinds, edges), []).append(picture)
    return tuple(Drawing(first, tuple(p.name for p in others)) for first, *others in groups.values())


def site_picture(flow: Flow, site: AttentionSite) -> Picture:
    """The nodes that matching read as one attention, from the projections' inputs to the output projection."""
    roles: dict[int, Role] = {index: "score" for index in site.nodes}
    roles[site.anchor] = "score"
    if site.out is not None:
        roles.update(dict.fromkeys(_projection_nodes(flow, site.out), "output"))
        roles.update(dict.fromkeys(_between(flow, [site.output], [site.out.node]), "output"))
    named: tuple[tuple[Role, Operand], ...] = (("query", site.q), ("key", site.k), ("value", site.v))
    operands = [(role, part) for role, operand in named for part in operand.parts]
    for role, operand in operands:
        for index in (*_projection_nodes(flow, operand.projection), *operand.path):
            roles.setdefault(index, role)
    scores = [i for i, role in roles.items() if role == "score"]
    for role, operand in operands:  # repetition, transposition and scale behind the seam belong to the operand
        roles.update(dict.fromkeys(_between(flow, [operand.seam], scores, set(roles)), role))
    kinds = [m.kind for m in site.modifiers]
    masks = {m.value: m.kind for m in site.modifiers if m.value is not None}
    traits = ["causal"] * site.causal + ["cross"] * site.cross + ["cached"] * site.cached
    heads = f"{site.heads} query heads, {site.kv_heads} key/value heads of {site.head_dim}"
    caption = ", ".join([heads, *traits, *kinds])
    return _picture(flow, site.name, caption, True, roles, masks)


def feed_forward_picture(flow: Flow, site: FeedForwardSite) -> Picture:
    """The nodes of one feed-forward block, from the projections of the hidden layer to the output projection."""
    roles: dict[int, Role] = dict.fromkeys(site.nodes, "activation")
    roles.update(dict.fromkeys(_projection_nodes(flow, site.up.projection), "up"))
    if site.gate is not None and site.gate.projection.node != site.up.projection.node:
        roles.update(dict.fromkeys(_projection_nodes(flow, site.gate.projection), "gate"))
    roles.update(dict.fromkeys(_projection_nodes(flow, site.down), "output"))
    name = site.activation.name or "an activation of its own"
    caption = f"{site.style}, {name}, {site.width} → {site.hidden} → {site.width}"
    return replace(_picture(flow, site.name, caption, True, roles, {}), kind="feed_forward")


def refusal_picture(flow: Flow, refusal: Refusal) -> Picture:
    """What lies around the anchor of a site that was not understood, up to the projections above it."""
    roles: dict[int, Role] = {refusal.anchor: "score"}
    todo = deque([flow.nodes[refusal.anchor]])
    while todo and len(roles) < MOST_NODES:
        node = todo.popleft()
        for value in node.inputs:
            above = flow.producer(value) if value else None
            if above is None or above.index in roles or flow.is_constant(value) or not flow.is_fed(value):
                continue
            roles[above.index] = "unread"
            if flow.projection_operands(above) is None:
                todo.append(above)
    return _picture(flow, refusal.name, refusal.reason, False, roles, {})


def _between(flow: Flow, starts: Iterable[Value], ends: Iterable[int], known: Container[int] = ()) -> list[int]:
    """Nodes on a way from one of `starts` to a node of `ends`, both ends and what is `known` left out."""
    first = min((p.index for v in starts if (p := flow.producer(v)) is not None), default=-1)
    last, reached = max(ends, default=-1), set(starts)
    forward: list[Node] = []
    for node in flow.nodes[first + 1 : last]:
        if node.index not in known and reached.intersection(node.inputs) and node.op not in SHAPE_READERS:
            reached.update(node.outputs)
            forward.append(node)
    wanted = {v for i in ends for v in flow.nodes[i].inputs}
    found = []
    for node in reversed(forward):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            found.append(node.index)
    return found


def _projection_nodes(flow: Flow, projection: Projection) -> list[int]:
    """The contraction and, where the bias is a node of its own, what lies up to its sum."""
    above = flow.ancestors(projection.output, stop=lambda node: node.index == projection.node)
    return [n.index for n in above if n.index >= projection.node and not flow.is_constant(n.outputs[0])]


def _picture(
    flow: Flow, name: str, caption: str, rewritable: bool, roles: dict[int, Role], masks: Mapping[Value, str]
) -> Picture:
    boxes = [Box(f"n{i}", _title(flow.nodes[i]), _detail(flow, flow.nodes[i]), roles[i]) for i in sorted(roles)]
    edges: dict[tuple[str, str], None] = {}
    outside: dict[Value, Box] = {}
    for index in sorted(roles):
        for value in flow.nodes[index].inputs:
            above = flow.producer(value) if value else None
            if above is not None and above.index in roles:
                edges[f"n{above.index}", f"n{index}"] = None
            elif value and flow.is_fed(value) and not flow.is_constant(value):
                box = outside.setdefault(value, _outside(flow, value, len(outside), masks))
                edges[box.key, f"n{index}"] = None
    return Picture(name, caption, rewritable, (*outside.values(), *boxes), tuple(edges))


def _outside(flow: Flow, value: Value, number: int, masks: Mapping[Value, str]) -> Box:
    """A value that comes in from elsewhere in the program."""
    kind = masks.get(value)
    detail = "  ".join(s for s in (_shape(flow, value), _short(value) if kind else "") if s)
    return Box(f"i{number}", kind or _short(value), detail, "mask" if kind else "input")


def _title(node: Node) -> str:
    return f"{node.domain}.{node.op}" if "." in node.domain.removeprefix("ai.onnx") else node.op


def _detail(flow: Flow, node: Node) -> str:
    weights = [flow.weights[v] for v in node.inputs if v in flow.weights and len(flow.weights[v].shape) > 1]
    shown = [_shape(flow, node.outputs[0]), *(_short(w.name) for w in weights[:1])]
    return "  ".join(s for s in shown if s)


def _shape(flow: Flow, value: Value) -> str:
    try:
        return " x ".join(map(str, flow.shape(value)))
    except KeyError:  # the ONNX door records only what matching needs
        return ""


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
