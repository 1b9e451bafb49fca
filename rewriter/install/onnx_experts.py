"""Experts in a file: a feed-forward block becomes one call of a model-local function on its input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from codegen.ops.mixture_of_experts.onnx_body import DOMAIN, attributes, function, function_name, stored_as
from codegen.spec import MixtureOfExperts
from passes.dataflow import Value
from passes.targets.block import BlockReplacement
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


@dataclass
class ExpertWriter:
    """Writes mixtures of experts into one model.

    Attributes:
        functions: identifiers of the functions that are declared already.
    """

    editor: Editing
    functions: set[str] = field(default_factory=set)

    def install(self, replacement: BlockReplacement) -> ir.Node:
        """Put the mixture in the place of the block's output; returns the node that gave it, now unread."""
        editor, site, spec = self.editor, replacement.site, replacement.spec
        assert isinstance(spec, MixtureOfExperts), "others were refused before anything was edited"
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
        self._declare(function(spec, editor.opset))
        weights = [
            editor.write.constant(tensor.astype(stored_as(part, kind).numpy()), f"{site.name}.{part}")
            for part, tensor in replacement.tensors.items()
        ]
        call = ir.Node(
            DOMAIN,
            function_name(spec),
            [x, *weights],
            attributes(kind),
            num_outputs=1,
            name=editor.write.unique(f"{site.name}/experts"),
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
