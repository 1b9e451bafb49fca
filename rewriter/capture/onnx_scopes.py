"""Names of a model file: everything that is read is made somewhere where it is known, and nothing is made twice.

Runtimes open no other file, readers only warn or take one of two at random, and what comes later counts on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from rewriter.errors import InvalidModelFile

if TYPE_CHECKING:
    import onnx

Scopes = Sequence[AbstractSet[str]]
"""Names that are known, those of the innermost graph first."""

_AGAIN = "export the model again"


def require_sound_names(proto: onnx.ModelProto, name: str) -> None:
    """Raises InvalidModelFile if a graph, a body or a function reads what nothing makes, or holds something twice."""
    _require_once((f"{f.domain}::{f.name}:{f.overload}" for f in proto.functions), "the function", name)
    _require_one_version(proto, name)
    _check_graph(proto.graph, (), name)
    for function in proto.functions:
        where = f"the function {function.name[:80]!r}"
        known = _require_once((*function.input, *_made(function.node)), "a value of a function", name)
        _check_nodes(function.node, (known,), name, where)
        _check_outputs(function.output, (known,), name, where)


def _check_graph(graph: onnx.GraphProto, outer: Scopes, name: str) -> None:
    where = f"the body {graph.name[:80]!r}" if outer else "the graph"
    inputs = _require_once((x.name for x in graph.input), "an input", name)
    _require_one_content(graph, name)
    stored = {*(x.name for x in graph.initializer), *(x.values.name for x in graph.sparse_initializer)}
    given = inputs | stored  # an initializer may be an input's default
    known = _require_once((*given, *_made(graph.node)), "a value", name)
    scopes = (known, *outer)
    _check_nodes(graph.node, scopes, name, where)
    _check_outputs((output.name for output in graph.output), scopes, name, where)


def _made(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    return (output for node in nodes for output in node.output if output)


def _check_nodes(nodes: Iterable[onnx.NodeProto], scopes: Scopes, name: str, where: str) -> None:
    for node in nodes:
        missing = next((read for read in node.input if read and not _is_known(read, scopes)), None)
        if missing is not None:
            what = f"{where}, at node {node.name[:80]!r}," if node.name else where
            raise InvalidModelFile(
                f"{name} is malformed: {what} reads {missing[:80]!r}, which nothing makes", hint=_AGAIN
            )
        _require_once((a.name for a in node.attribute), "an attribute of one node", name)
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _check_graph(body, scopes, name)


def _check_outputs(outputs: Iterable[str], scopes: Scopes, name: str, where: str) -> None:
    missing = next((output for output in outputs if not _is_known(output, scopes)), None)
    if missing is not None:
        raise InvalidModelFile(
            f"{name} is malformed: nothing makes {missing[:80]!r}, an output of {where}", hint=_AGAIN
        )


def _is_known(name: str, scopes: Scopes) -> bool:
    return any(name in known for known in scopes)


def _require_once(names: Iterable[str], what: str, name: str) -> set[str]:
    """All of them; raises InvalidModelFile if one comes twice."""
    seen: set[str] = set()
    for text in names:
        if text and text in seen:
            raise InvalidModelFile(f"{name} is malformed: it holds {what} {text[:80]!r} twice", hint=_AGAIN)
        seen.add(text)
    return seen


def _require_one_content(graph: onnx.GraphProto, name: str) -> None:
    """Two initializers of one name are one, or runtimes take either."""
    held: dict[str, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        first = held.setdefault(tensor.name, tensor)
        if first is not tensor and first != tensor:
            raise InvalidModelFile(
                f"{name} is malformed: it holds two initializers called {tensor.name[:80]!r}", hint=_AGAIN
            )


def _require_one_version(proto: onnx.ModelProto, name: str) -> None:
    versions: dict[str, int] = {}
    for imported in proto.opset_import:
        domain = "" if imported.domain == "ai.onnx" else imported.domain
        if versions.setdefault(domain, imported.version) != imported.version:
            raise InvalidModelFile(f"{name} names two versions of the operator set {domain[:80]!r}", hint=_AGAIN)
