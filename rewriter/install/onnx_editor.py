"""One .onnx model under edit: new names and weights, what stands in for what, and what nothing reads any more.

What is done at a site is in the modules beside this one (projections, paths, attention, mixes, experts); they share
this state and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from passes.dataflow import Value
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.install.onnx_weights import Emitted
from rewriter.onnx_nodes import NodeWriter


@dataclass
class Editor:
    """Works site by site on one model.

    Attributes:
        shared: new initializers by content.
        seams: for the site at hand, by seam that is fed anew, the value that stands there now and its axes.
        dead: nodes beyond the matched ones that may be unread now.
        standing_in: what has taken the place of a value that later sites may read.
        fed: for the site at hand, by role, what a fused operator that is kept reads instead of its old operand.
    """

    capture: OnnxCapture
    shared: dict[tuple[str, bytes], ir.Value] = field(default_factory=dict)
    seams: dict[Value, tuple[ir.Value, tuple[str, ...]]] = field(default_factory=dict)
    dead: list[ir.Node] = field(default_factory=list)
    standing_in: dict[Value, ir.Value] = field(default_factory=dict)
    fed: dict[str, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.capture.model
        self.graph = self.model.graph
        self.opset = self.model.opset_imports.get("", 1)
        taken = set(self.capture.values) | {n.name for n in self.capture.nodes if n.name} | self._in_bodies()
        self.write = NodeWriter(self.graph, taken)
        self.rounded = any(n.op_type == "QuantizeLinear" for n in self.capture.nodes)
        added = (w.constants for w in self.capture.written_out.values())
        self._stored = frozenset(self.graph.initializers).difference(*added)

    def _in_bodies(self) -> set[str]:
        """Names of values in bodies of control flow, which may stand for nothing else outside of them."""
        bodies = [graph for graph in self.model.graphs() if graph is not self.graph]
        made = (v for body in bodies for n in body for v in n.outputs)
        return {v.name for body in bodies for v in (*body.inputs, *body.initializers.values()) if v.name} | {
            v.name for v in made if v.name
        }

    def value(self, name: Value) -> ir.Value:
        return self.standing_in.get(name) or self.capture.values[name]

    def as_boolean(self, nodes: list[ir.Node], mask: Value, value: ir.Value, name: str) -> ir.Value:
        """A mask, or `value` made of it, as a condition: weights behind a softmax may be multiplied by numbers."""
        if self.capture.flow.value(mask).dtype == np.bool_:
            return value
        return self.write.op(nodes, "Cast", [value], name, to=int(ir.DataType.BOOL))

    def share(self, value: ir.Value) -> ir.Value:
        """Equal new initializers are stored once: weights that layers shared stay shared."""
        tensor = value.const_value
        if tensor is None:
            return value
        return self.shared.setdefault((str(tensor.dtype) + str(tensor.shape), tensor.tobytes()), value)

    def hold(self, nodes: list[ir.Node], emitted: Emitted) -> ir.Value:
        """What reads a new weight; its nodes are appended to `nodes`, its tensors become initializers."""
        nodes += emitted.nodes
        value = emitted.value if emitted.nodes else self.share(emitted.value)
        self.register(emitted.initializers if emitted.nodes else [value])
        return value

    def register(self, stored: Sequence[ir.Value]) -> None:
        for value in stored:
            if value.name and value.name not in self.graph.initializers:
                self.graph.register_initializer(value)

    def call_at(
        self, nodes: list[ir.Node], site: str, word: str, bodies: Sequence[ir.Function], inputs: Sequence[ir.Value],
        described: Sequence[ir.Attr],
    ) -> ir.Value:  # fmt: skip
        """The result of a call of the first of `bodies`, all of which the model has from now on.

        The call is named ``site/word``: captures of the new file read the site off that.
        """
        for body in bodies:
            self.declare(body)
        name = self.write.unique(f"{site}/{word}")
        node = ir.Node(bodies[0].domain, bodies[0].name, inputs, described, num_outputs=1, name=name)
        node.outputs[0].name = self.write.unique(f"{site}.{word}")
        nodes.append(node)
        return node.outputs[0]

    def declare(self, body: ir.Function) -> None:
        self.model.functions.setdefault(body.identifier(), body)
        for domain in (body.domain, *body.opset_imports):
            self.model.opset_imports.setdefault(domain, 1)
        self.model.ir_version = max(self.model.ir_version, 8)

    def was_stored(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of `names` that are initializers of the file, not of what reading it added."""
        return tuple(name for name in names if name in self._stored)

    def unread(self, value: ir.Value) -> list[str]:
        """Remove a weight that nothing reads any more, with what made it; returns names of removed initializers."""
        producer = value.producer()
        if producer is not None:
            return self.sweep([producer])
        if value.name and value.name in self.graph.initializers and not value.uses():
            del self.graph.initializers[value.name]
            return [value.name]
        return []

    def sweep(self, todo: list[ir.Node]) -> list[str]:
        """Remove unread nodes and what only they read; returns names of removed initializers."""
        removed: list[str] = []
        outputs = {id(o) for o in self.graph.outputs}
        while todo:
            node = todo.pop(0)
            if node.graph is None or any(o.uses() or id(o) in outputs for o in node.outputs):
                continue
            inputs = [v for v in node.inputs if v is not None]
            self.graph.remove(node, safe=True)
            for value in inputs:
                producer = value.producer()
                if producer is not None:
                    todo.append(producer)
                elif value.name and value.name in self.graph.initializers and not value.uses():
                    del self.graph.initializers[value.name]
                    removed.append(value.name)
        return removed
