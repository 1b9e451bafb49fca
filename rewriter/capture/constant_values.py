"""Values of a file that no input reaches, evaluated when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir

from passes.dataflow import Array
from rewriter.capture.bounded_run import OUT_OF_BOUNDS, run_within, time_limit
from rewriter.capture.memory_limit import too_much
from rewriter.capture.onnx_bodies import everything_read
from rewriter.capture.onnx_constants import constant_tensor
from rewriter.capture.onnx_session import cannot, open_session, widened
from rewriter.capture.quantised import QuantisedProduct
from rewriter.errors import first_line


class ConstantValues:
    """Values that no input reaches: initializers, Constant nodes, and what is computed from them."""

    def __init__(self, model: ir.Model, matrices: Mapping[str, QuantisedProduct], known: Mapping[str, Array]) -> None:
        self.model, self.matrices, self.known = model, matrices, known
        self._computed: dict[str, Array] = {}
        self._producers = {o.name: n for n in model.graph for o in n.outputs if o.name}
        self._places = {id(n): i for i, n in enumerate(model.graph)}

    @cached_property
    def _unfed(self) -> frozenset[str]:
        """Names of computed values that no input reaches. Known at once: asking upwards each time takes a time that
        grows with the depth of the value."""
        held = self.model.graph.initializers
        known: set[str] = set(self.known)
        for node in self.model.graph:
            if all(name in known or name in held for name in everything_read(node)):
                known.update(o.name for o in node.outputs if o.name)
        return frozenset(known)

    @cached_property
    def _time_limit(self) -> float:
        return time_limit(self.model)

    def value(self, name: str) -> Array:
        initializer = self.model.graph.initializers.get(name)
        if initializer is not None and initializer.const_value is not None:
            return as_array(initializer.const_value)
        if name in self.matrices:
            return self.matrices[name].matrix
        if name in self.known:
            return self.known[name]
        if name not in self._computed:
            self._computed[name] = self._compute(name)
        return self._computed[name]

    def _compute(self, name: str) -> Array:
        node = self._producers.get(name)
        if node is None or name not in self._unfed:
            raise KeyError(name)
        tensor = constant_tensor(node.outputs[0])
        if tensor is not None:
            return as_array(tensor)
        inner = self._subgraph(node)
        proto = onnx.helper.make_model(
            onnx.helper.make_graph(
                [ir.serde.serialize_node(n) for n in inner],
                "constant",
                [],
                [onnx.ValueInfoProto(name=name)],
                [t for n in inner for t in self._initializers(n)],
            ),
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in self.model.opset_imports.items()],
            ir_version=self.model.ir_version,
        )
        try:
            session = open_session(proto, None, optimise=False)
            return widened(np.asarray(run_within(self._time_limit, session, None, {})[0]))
        except OUT_OF_BOUNDS:
            raise
        except Exception as error:
            reason = f"compute the constant {name[:80]!r}: {first_line(error)}"
            raise too_much(error) or cannot(reason) from error

    def _subgraph(self, node: ir.Node) -> list[ir.Node]:
        """The nodes above a constant value's, itself included, in execution order."""
        found: dict[int, ir.Node] = {}
        todo = [node]
        while todo:
            current = todo.pop()
            if id(current) in found:
                continue
            found[id(current)] = current
            above = (self._producers.get(name) for name in everything_read(current) if name not in self.known)
            todo.extend(n for n in above if n is not None)
        return sorted(found.values(), key=lambda n: self._places[id(n)])

    def _initializers(self, node: ir.Node) -> Iterator[onnx.TensorProto]:
        for name in dict.fromkeys(everything_read(node)):
            if name in self.known:
                yield onnx.numpy_helper.from_array(self.known[name], name)
            held = self.model.graph.initializers.get(name)
            if held is not None and held.const_value is not None:
                proto = onnx.numpy_helper.from_array(held.const_value.numpy(), name)
                proto.data_type = int(held.const_value.dtype)
                yield proto


def as_array(tensor: ir.TensorProtocol) -> Array:
    array = np.asarray(tensor.numpy())
    return array.astype(np.float32) if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else array
