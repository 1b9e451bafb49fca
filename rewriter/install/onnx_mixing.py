"""Mixing in a file: an attention's whole sublayer becomes one call of a model-local function on its input.

What a Fourier transform wants of the length alone (see the function's body) is computed by a second function, once for
all layers that were seen to have one length at both sizes of the recording.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_attention import onnx_body as conditional
from codegen.ops.conditional_routing.onnx_body import attributes as conditional_attributes
from codegen.ops.conditional_routing.onnx_body import stored_as
from codegen.ops.fourier_mixing.onnx_body import (
    DOMAIN,
    attributes,
    feature_tables,
    function,
    tables_attributes,
    tables_count,
    tables_function,
    tables_name,
)
from codegen.ops.function_body import computed_in
from codegen.ops.gated_attention import onnx_body as unit
from codegen.ops.linear_mixing import onnx_body as linear
from codegen.ops.mixed_chunk_attention import onnx_body as chunked
from codegen.spec import FourierMixing, GatedAttention, GatedUnit, LinearMixing, MixedChunkAttention, TokenMixing
from passes.dataflow import Value
from passes.hidden_keys import hiding
from passes.sublayer import Sublayer
from passes.targets.replacement import Replacement
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_padding import shown_tokens

ADDED_BIAS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Fused operators that add an output projection's bias themselves, and the input that is the bias."""

TableKey = tuple[ir.DataType, bool, tuple[int, ...]]


@dataclass
class Mixing:
    """Writes mixes into one model.

    Attributes:
        lengths: by what decides them, the outputs of the function that computes them, and the node after which they
            are there.
        features: matrices of the transform over features, by width and type.
    """

    editor: Editor
    lengths: dict[TableKey, tuple[list[ir.Value], int]] = field(default_factory=dict)
    features: dict[tuple[int, ir.DataType], list[ir.Value]] = field(default_factory=dict)

    def install(self, replacement: Replacement) -> tuple[ir.Node, list[ir.Value]]:
        """Put the mix in the place of the sublayer's output; returns what may be unread now."""
        editor, around, site = self.editor, replacement.around, replacement.site
        spec = replacement.mixing
        assert spec is not None
        x, output = editor.value(around.input), editor.value(around.output)
        producer = output.producer()
        assert producer is not None
        nodes: list[ir.Node] = []
        kind = editor.capture.element_type(around.input) or x.dtype or ir.DataType.FLOAT
        if not around.batch_first:
            x = editor.write.op(nodes, "Transpose", [x], f"{site.name}.batched", perm=[1, 0, 2])
        mixed = self._call(nodes, replacement, spec, x, kind)
        if not around.batch_first:
            mixed = editor.write.op(nodes, "Transpose", [mixed], f"{site.name}.turned", perm=[1, 0, 2])
        if len(editor.capture.flow.shape(around.output)) == 2:
            shape = editor.write.ints([-1, spec.hidden], f"{site.name}.flat_shape")
            mixed = editor.write.op(nodes, "Reshape", [mixed, shape], f"{site.name}.flat")
        wanted = editor.capture.element_type(around.output) or output.dtype or kind
        if wanted != kind:
            mixed = editor.write.op(nodes, "Cast", [mixed], f"{site.name}.cast", to=int(wanted))
        mixed.type, mixed.shape = output.type, output.shape
        editor.graph.insert_after(producer, nodes)
        self._stand_in(around.output, output, mixed)
        keeps = isinstance(spec, (GatedAttention, MixedChunkAttention, ConditionalAttention)) or spec.bias
        return producer, [] if keeps else _without_added_bias(mixed)

    def _stand_in(self, name: Value, output: ir.Value, mixed: ir.Value) -> None:
        """Readers, those that come with later sites, and the model's outputs get the mix, under the output's name."""
        output.replace_all_uses_with(mixed, replace_graph_outputs=True)
        output.name, mixed.name = self.editor.write.unique(f"{name}_before"), output.name
        self.editor.standing_in[name] = mixed

    def _call(
        self, nodes: list[ir.Node], replacement: Replacement, spec: TokenMixing, x: ir.Value, kind: ir.DataType
    ) -> ir.Value:
        editor, name = self.editor, replacement.site.name
        if isinstance(spec, LinearMixing):
            body, described, tables, stored = linear.function(spec, editor.opset), linear.attributes(spec), [], kind
        elif isinstance(spec, (GatedAttention, MixedChunkAttention)):
            return self._unit(nodes, replacement, spec, x, kind)
        elif isinstance(spec, ConditionalAttention):
            return self._conditional(nodes, replacement, spec, x, kind)
        else:
            body, described = function(spec, editor.opset), attributes(spec, kind)
            tables = [*self._features(spec, kind), *self._lengths(nodes, replacement.around, spec, x, kind)]
            stored = computed_in(kind)
        held = [
            editor.write.constant(replacement.tensors[part].astype(stored.numpy()), f"{name}.{part}")
            for part in spec.shapes
        ]
        return editor.call_at(nodes, name, "mixing", [body], [x, *tables, *held], described)

    def _unit(
        self, nodes: list[ir.Node], replacement: Replacement, spec: GatedUnit, x: ir.Value, kind: ir.DataType
    ) -> ir.Value:
        editor, name = self.editor, replacement.site.name
        if isinstance(spec, GatedAttention):
            bodies, described = [unit.function(spec, editor.opset)], unit.attributes(spec, kind)
        else:
            bodies, described = chunked.functions(spec, editor.opset), chunked.attributes(spec, kind)
        held = [
            editor.write.constant(array, f"{name}.{role}")
            for role, array in unit.stored(spec, replacement.tensors, kind).items()
        ]
        return editor.call_at(nodes, name, "mixing", bodies, [x, *held], described)

    def _conditional(
        self, nodes: list[ir.Node], replacement: Replacement, spec: ConditionalAttention, x: ir.Value, kind: ir.DataType
    ) -> ir.Value:
        editor, site = self.editor, replacement.site
        flow = editor.capture.flow
        masks = [editor.value(Value(m.value or "")) for m in hiding(flow, site)]
        shown = shown_tokens(editor.write, nodes, flow, site, masks, editor.opset)
        body = conditional.function(spec, editor.opset, masked=shown is not None)
        held = [
            editor.write.constant(
                replacement.tensors[part].astype(stored_as(part, kind).numpy()), f"{site.name}.{part}"
            )
            for part in spec.shapes
        ]
        given = [x, *([] if shown is None else [shown]), *held]
        return editor.call_at(nodes, site.name, "mixing", [body], given, conditional_attributes(kind))

    def _features(self, spec: FourierMixing, kind: ir.DataType) -> list[ir.Value]:
        key = (spec.hidden, computed_in(kind))
        if key not in self.features:
            named = zip(("first", "second"), feature_tables(spec, kind), strict=True)
            name = f"fourier_{spec.hidden}"
            self.features[key] = [self.editor.write.constant(table, f"{name}_{part}") for part, table in named]
        return self.features[key]

    def _lengths(
        self, nodes: list[ir.Node], around: Sublayer, spec: FourierMixing, x: ir.Value, kind: ir.DataType
    ) -> list[ir.Value]:
        """The length's tables, computed here unless an earlier layer of the same length has them."""
        key = (computed_in(kind), spec.hartley, self._recorded_lengths(around))
        producer = self.editor.capture.flow.producer(around.output)
        here = producer.index if producer is not None else -1
        known = self.lengths.get(key)
        if key[2] and known is not None and known[1] <= here:
            return known[0]
        self.editor.declare(tables_function(spec, self.editor.opset))
        name = self.editor.write.unique(f"{tables_name(spec)}_node")
        node = ir.Node(
            DOMAIN, tables_name(spec), [x], tables_attributes(kind), num_outputs=tables_count(spec), name=name
        )
        for number, output in enumerate(node.outputs):
            output.name = self.editor.write.unique(f"{name}.{number}")
        nodes.append(node)
        self.lengths[key] = (list(node.outputs), here)
        return list(node.outputs)

    def _recorded_lengths(self, around: Sublayer) -> tuple[int, ...]:
        """Tokens at both sizes of the recording; () where there is one size only and the file does not fix it."""
        capture, axis = self.editor.capture, 1 if around.batch_first else 0
        first = capture.flow.shape(around.input)[axis]
        other = capture.other
        try:
            if other is not None:
                return first, other.flow.shape(around.input)[axis]
        except KeyError:
            return ()
        inputs = (v.shape for v in self.editor.graph.inputs if v.shape is not None)
        return () if any(not isinstance(size, int) for shape in inputs for size in shape) else (first,)


def _without_added_bias(mixed: ir.Value) -> list[ir.Value]:
    """Where what follows adds the old output projection's bias, it adds none; returns those biases.

    A fitted mix is fitted to what came before that bias, which then stays.
    """
    gone = []
    for node, position in list(mixed.uses()):
        place = ADDED_BIAS.get(node.op_type, 0)
        if position < 2 <= place < len(node.inputs) and (bias := node.inputs[place]) is not None:
            node.replace_input_with(place, None)
            gone.append(bias)
    return gone
