"""Model-local functions of a file: none may call itself, nor all together stand for an absurd number of nodes.

Runtimes write calls out as the nodes of their bodies, and some never come to an end. A few functions that call each
other ten times over are enough for billions of nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rewriter.errors import InvalidModelFile

if TYPE_CHECKING:
    import onnx

MOST_NODES = 1_000_000
"""Nodes that a file's calls may stand for."""

_Name = tuple[str, str, str]


def require_finite_functions(proto: onnx.ModelProto, name: str) -> None:
    """Raises InvalidModelFile if a function calls itself, through others too, or calls stand for too many nodes."""
    bodies = {(f.domain, f.name, f.overload): Counter(_calls(f.node)) for f in proto.functions}
    sizes: dict[_Name, int] = {}
    for function in bodies:
        _measure(function, bodies, sizes, name)
    total = sum(sizes.get(call, 1) * times for call, times in Counter(_calls(proto.graph.node)).items())
    if total > MOST_NODES and bodies:
        raise InvalidModelFile(
            f"{name} makes no sense: its functions stand for more than {MOST_NODES:,} nodes", hint="export it again"
        )


def _measure(start: _Name, bodies: dict[_Name, Counter[_Name]], sizes: dict[_Name, int], name: str) -> None:
    """Find out how many nodes a function and those that it calls stand for, the innermost first."""
    path: dict[_Name, Iterator[_Name]] = {}
    todo = [start]
    while todo:
        current = todo[-1]
        if current in sizes:
            todo.pop()
            continue
        if current not in path:
            path[current] = iter([call for call in bodies[current] if call in bodies])
        inner = next((call for call in path[current] if call not in sizes), None)
        if inner is None:
            sizes[current] = sum(sizes.get(call, 1) * times for call, times in bodies[current].items())
            del path[current]
        elif inner in path:
            raise InvalidModelFile(
                f"{name} is malformed: the function {inner[1][:80]!r} calls itself", hint="export it again"
            )
        else:
            todo.append(inner)


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[_Name]:
    """What each node calls, nodes in bodies of control flow included."""
    todo = [nodes]
    while todo:
        for node in todo.pop():
            yield node.domain, node.op_type, node.overload
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else []
                todo.extend(graph.node for graph in (*graphs, *attribute.graphs))
