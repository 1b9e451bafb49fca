"""Runs a long graph in stretches: onnxruntime compares every node with every output of the model that it opens (1.31),
so that recording values of every layer in one session takes a time that grows with the square of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnxruntime as ort

from passes.dataflow import Array

NODES = 8192
"""Of one stretch; shorter graphs are run as they stand."""

_TYPES = {
    f"tensor({name})": int(onnx.TensorProto.DataType.Value(kind))
    for name, kind in (
        *((k.lower(), k) for k in ("FLOAT", "DOUBLE", "FLOAT16", "BOOL", "STRING")),
        *((k.lower(), k) for k in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")),
    )
}
"""What onnxruntime calls types of tensors that numpy has."""

Opened = Callable[[onnx.ModelProto], ort.InferenceSession]


class CannotCut(ValueError):
    """The graph has to be run as a whole: its nodes stand in no order, or what passes a cut is no plain tensor."""


@dataclass(frozen=True)
class Port:
    """An input or an output, as onnxruntime describes it."""

    name: str
    type: str


@dataclass(frozen=True)
class _Stretch:
    session: ort.InferenceSession
    fed: tuple[str, ...]
    given: tuple[str, ...]


@dataclass(frozen=True)
class Stretches:
    """Sessions that run one after the other, and answer as one ``onnxruntime.InferenceSession`` would."""

    stretches: tuple[_Stretch, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def get_inputs(self) -> tuple[Port, ...]:
        return self.inputs

    def get_outputs(self) -> tuple[Port, ...]:
        return self.outputs

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Array], options: ort.RunOptions | None = None
    ) -> list[Any]:
        """Values by name, all outputs if no names are given; raises what onnxruntime raises."""
        wanted = [port.name for port in self.outputs] if names is None else list(names)
        last = {name: i for i, stretch in enumerate(self.stretches) for name in stretch.fed}
        last |= dict.fromkeys(wanted, len(self.stretches))
        held: dict[str, Any] = dict(feeds)
        for i, stretch in enumerate(self.stretches):
            own = {name: held[name] for name in stretch.fed}
            held.update(zip(stretch.given, stretch.session.run(stretch.given, own, options), strict=True))
            held = {name: value for name, value in held.items() if last.get(name, -1) > i}
        return [held[name] for name in wanted]


def open_stretches(proto: onnx.ModelProto, more: Iterable[str], opened: Opened, size: int = NODES) -> Stretches:
    """Open `proto` in stretches of `size` nodes; its outputs are the model's and the values called `more`.

    Raises CannotCut, and whatever `opened` raises.
    """
    wanted = tuple(dict.fromkeys((*(value.name for value in proto.graph.output), *more)))
    cutter = _Cutter(proto, frozenset(wanted), size)
    stretches: list[_Stretch] = []
    for fed, given, part in cutter.parts():
        session = opened(part)
        cutter.types.update((o.name, str(o.type)) for o in session.get_outputs())
        stretches.append(_Stretch(session, fed, given))
    stored = {tensor.name for tensor in proto.graph.initializer}
    kinds = {port.name: str(port.type) for stretch in stretches for port in stretch.session.get_inputs()}
    inputs = tuple(Port(v.name, kinds.get(v.name, "")) for v in proto.graph.input if v.name not in stored)
    if not cutter.wanted <= cutter.types.keys():
        raise CannotCut("an output is not computed by a node")
    return Stretches(tuple(stretches), inputs, tuple(Port(name, cutter.types[name]) for name in wanted))


@dataclass
class _Cutter:
    """Attributes: types: of what the stretches give that are open by now."""

    proto: onnx.ModelProto
    wanted: frozenset[str]
    size: int
    types: dict[str, str] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], onnx.ModelProto]]:
        """(what it reads, what it gives, the model) of each stretch; the types of what one gives serve the next."""
        nodes = self.proto.graph.node
        stretches = [nodes[i : i + self.size] for i in range(0, len(nodes), self.size)]
        reads = [dict.fromkeys(n for node in stretch for n in _read_by(node)) for stretch in stretches]
        last = {name: i for i, names in enumerate(reads) for name in names}
        stored = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        inputs = {value.name: value for value in self.proto.graph.input if value.name not in stored}
        computed = {name for node in nodes for name in node.output if name}
        for i, stretch in enumerate(stretches):
            own = [name for node in stretch for name in node.output if name]
            given = tuple(n for n in dict.fromkeys(own) if n in self.wanted or last.get(n, i) > i)
            if not given:
                continue
            outer = reads[i].keys() - set(own) - stored.keys()
            fed = tuple(n for n in reads[i] if n in outer and (n in inputs or n in computed))
            ports = [inputs[name] if name in inputs else self._declared(name) for name in fed]
            weights = [stored[name] for name in reads[i] if name in stored]
            yield fed, given, self._model(stretch, ports, given, weights)

    def _declared(self, name: str) -> onnx.ValueInfoProto:
        kind = _TYPES.get(self.types.get(name, ""))
        if kind is None:
            raise CannotCut(f"{name!r} is read before it is computed, or is no plain tensor")
        return onnx.helper.make_tensor_value_info(name, kind, None)

    def _model(
        self,
        nodes: Sequence[onnx.NodeProto],
        ports: Sequence[onnx.ValueInfoProto],
        given: Sequence[str],
        weights: Sequence[onnx.TensorProto],
    ) -> onnx.ModelProto:
        outputs = [onnx.ValueInfoProto(name=name) for name in given]
        graph = onnx.GraphProto(name="stretch", node=nodes, input=ports, output=outputs, initializer=weights)
        whole = self.proto
        return onnx.ModelProto(
            ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions, graph=graph
        )


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node and the bodies in it read, some of which may be the bodies' own."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
        for body in bodies:
            for inner in body.node:
                yield from _read_by(inner)
            yield from (value.name for value in body.output)
