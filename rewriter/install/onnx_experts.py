"""Experts, or a light and a heavy branch, in a file: a block becomes one call of a function on its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from codegen.conditional import ConditionalFeedForward
from codegen.ops.conditional_feed_forward import onnx_body as conditional
from codegen.ops.conditional_routing import onnx_body as routing
from codegen.ops.mixture_of_experts import onnx_body as mixture
from codegen.ops.mixture_of_experts.onnx_body import DOMAIN
from passes.dataflow import Value
from passes.targets.block import BlockReplacement, BlockSpec
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.onnx_nodes import NodeWriter


class Editing(Protocol):
    """What is needed of the editor of the model."""

    capture: OnnxCapture
    model: ir.Model
    graph: ir.Graph
    opset: int
    write: NodeWriter

    def value(self, name: Value) -> ir.Value: ...


@dataclass(frozen=True)
class _Declared:
    """A function, and what calls of it need.

    Attributes:
        word: that names of calls end with.
        attributes: of a call, by x's dtype. stored_as: a parameter's dtype, by its name and x's dtype.
    """

    function: ir.Function
    word: str
    attributes: Callable[[ir.DataType], list[ir.Attr]]
    stored_as: Callable[[str, ir.DataType], ir.DataType]


def _declared(spec: BlockSpec, opset: int) -> _Declared:
    if isinstance(spec, ConditionalFeedForward):
        return _Declared(conditional.function(spec, opset), "branches", routing.attributes, routing.stored_as)
    return _Declared(mixture.function(spec, opset), "experts", mixture.attributes, mixture.stored_as)


@dataclass
class ExpertWriter:
    """Writes what replaces feed-forward blocks into one model.

    Attributes:
        functions: identifiers of the functions that are declared already.
    """

    editor: Editing
    functions: set[str] = field(default_factory=set)

    def install(self, replacement: BlockReplacement) -> ir.Node:
        """Put the function's call in the place of the block's output; returns the node that gave it, now unread."""
        editor, site = self.editor, replacement.site
        declared = _declared(replacement.spec, self.editor.opset)
        name = Value(site.up.projection.input)
        x, output = editor.value(name), editor.value(site.output)
        producer = output.producer()
        assert producer is not None
        kind = editor.capture.element_type(name) or x.dtype or ir.DataType.FLOAT
        nodes: list[ir.Node] = []
        flat = len(editor.capture.flow.shape(name)) != 3
        if flat:
            x = editor.write.op(
                nodes, "Reshape", [x, self._sizes([1, -1, site.width], site.name)], f"{site.name}.batch"
            )
        self._declare(declared.function)
        weights = [
            editor.write.constant(tensor.astype(declared.stored_as(part, kind).numpy()), f"{site.name}.{part}")
            for part, tensor in replacement.tensors.items()
        ]
        call = ir.Node(
            DOMAIN,
            declared.function.name,
            [x, *weights],
            declared.attributes(kind),
            num_outputs=1,
            name=editor.write.unique(f"{site.name}/{declared.word}"),
        )
        call.outputs[0].name = editor.write.unique(f"{site.name}.mixed")
        nodes.append(call)
        mixed = call.outputs[0]
        if flat:
            mixed = editor.write.op(
                nodes, "Reshape", [mixed, self._sizes([-1, site.width], site.name)], f"{site.name}.flat"
            )
        wanted = editor.capture.element_type(site.output) or output.dtype or kind
        if wanted != kind:
            mixed = editor.write.op(nodes, "Cast", [mixed], f"{site.name}.cast", to=int(wanted))
        mixed.type, mixed.shape = output.type, output.shape
        editor.graph.insert_after(producer, nodes)
        given_out = output.is_graph_output()
        output.replace_all_uses_with(mixed, replace_graph_outputs=True)
        if given_out:
            kept = output.name
            output.name = editor.write.unique(f"{kept}_before")
            mixed.name = kept
        return producer

    def _sizes(self, sizes: list[int], name: str) -> ir.Value:
        return self.editor.write.ints(sizes, f"{name}.sizes")

    def _declare(self, body: ir.Function) -> None:
        model = self.editor.model
        model.functions.setdefault(body.identifier(), body)
        model.opset_imports.setdefault(DOMAIN, 1)
        model.ir_version = max(model.ir_version, 8)
