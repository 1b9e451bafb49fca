"""A site's subgraph as a small drawing: which nodes there are, what part each plays, what flows between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from passes.dataflow import Flow, Node, Value
from passes.site import AttentionSite, Operand, Projection, Refusal

Role = Literal["input", "query", "key", "value", "score", "mask", "output", "unread"]

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
    """The subgraph of one site; `edges` are (from, to) keys of boxes."""

    name: str
    caption: str
    rewritable: bool
    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str], ...]


def site_picture(flow: Flow, site: AttentionSite) -> Picture:
    """The nodes that matching read as one attention, from the projections' inputs to the output projection."""
    roles: dict[int, Role] = {index: "score" for index in site.nodes}
    roles[site.anchor] = "score"
    for index in _between(flow, site.output, site.merged):
        roles[index] = "output"
    if site.out is not None:
        roles.update(dict.fromkeys(_projection_nodes(flow, site.out), "output"))
    operands: tuple[tuple[Role, Operand], ...] = (("query", site.q), ("key", site.k), ("value", site.v))
    for role, operand in operands:
        for index in (*_projection_nodes(flow, operand.projection), *operand.path):
            roles.setdefault(index, role)
    _fill_gaps(flow, roles, operands)
    kinds = [m.kind for m in site.modifiers]
    masks = {m.value: m.kind for m in site.modifiers if m.value is not None}
    traits = ["causal"] * site.causal + ["cross"] * site.cross + ["cached"] * site.cached
    heads = f"{site.heads} query heads, {site.kv_heads} key/value heads of {site.head_dim}"
    caption = ", ".join([heads, *traits, *kinds])
    return _picture(flow, site.name, caption, True, roles, masks)


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


def _between(flow: Flow, start: Value, end: Value | None) -> list[int]:
    if end is None or start == end:
        return []
    first = flow.producer(start)
    above = flow.ancestors(end, stop=lambda node: start in node.inputs)
    return [n.index for n in above if first is None or n.index > first.index]


def _projection_nodes(flow: Flow, projection: Projection) -> list[int]:
    """The contraction and, where the bias is a node of its own, what lies up to its sum."""
    above = flow.ancestors(projection.output, stop=lambda node: node.index == projection.node)
    return [n.index for n in above if n.index >= projection.node and not flow.is_constant(n.outputs[0])]


def _fill_gaps(flow: Flow, roles: dict[int, Role], operands: Iterable[tuple[Role, Operand]]) -> None:
    """Nodes between an operand's seam and the scores (repetition, transposition, scale) belong to the operand."""
    scores = [flow.nodes[i] for i, role in roles.items() if role == "score"]
    known = set(roles)
    above = flow.ancestors(*(v for node in scores for v in node.inputs if v), stop=lambda node: node.index in known)
    for role, operand in operands:
        reached = {operand.seam}
        for node in above:
            if node.index not in known and reached.intersection(node.inputs):
                reached.update(node.outputs)
                roles.setdefault(node.index, role)


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
    """A value that comes in from elsewhere in the program, with the program's inputs that it depends on."""
    kind = masks.get(value)
    roots = {v for node in flow.ancestors(value) for v in node.inputs if v in flow.inputs}
    names = [v for v in flow.inputs if v in roots and v != value][:3]
    said = [_shape(flow, value), f"from {', '.join(names)}" if names else ""]
    return Box(f"i{number}", kind or _short(value), "  ".join(s for s in said if s), "mask" if kind else "input")


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
