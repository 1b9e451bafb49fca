"""Experts, light and heavy branches, or gated units in a file: a block becomes one call of a function on its input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from codegen.conditional import ConditionalFeedForward
from codegen.ops.conditional_feed_forward import onnx_body as conditional
from codegen.ops.conditional_routing import onnx_body as routing
from codegen.ops.gated_attention import onnx_body as unit
from codegen.ops.mixed_chunk_attention import onnx_body as chunked
from codegen.ops.mixture_of_experts import microsoft_moe
from codegen.ops.mixture_of_experts import onnx_body as mixture
from codegen.spec import GatedAttention, MixedChunkAttention, MixtureOfExperts
from passes.dataflow import Array, Value
from passes.targets.block import BlockReplacement, given_to
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.install.onnx_editor import Editor


@dataclass(frozen=True)
class _Declared:
    """Functions, the first of which is called, and what calls of it need.

    Attributes:
        word: that names of calls end with.
        attributes: of a call, by x's dtype. stored: parameters as they are written, by name, for x's dtype.
    """

    functions: Sequence[ir.Function]
    word: str
    attributes: Callable[[ir.DataType], list[ir.Attr]]
    stored: Callable[[Mapping[str, Array], ir.DataType], Mapping[str, Array]]


def contrib_obstacle(capture: OnnxCapture, replacement: BlockReplacement) -> str | None:
    """Why onnxruntime's own operator cannot be written here, or None if it can."""
    assert isinstance(replacement.spec, MixtureOfExperts)
    return microsoft_moe.why_not(replacement.spec, _kind(capture, _given(capture, replacement)))


def _given(capture: OnnxCapture, replacement: BlockReplacement) -> Value:
    """What the function reads."""
    by_sequence = not isinstance(replacement.spec, MixtureOfExperts)
    site = replacement.site
    return given_to(capture.flow, site) if by_sequence else Value(site.up.projection.input)


def _kind(capture: OnnxCapture, name: Value) -> ir.DataType:
    return capture.element_type(name) or capture.values[name].dtype or ir.DataType.FLOAT


def _declared(capture: OnnxCapture, replacement: BlockReplacement, opset: int) -> _Declared:
    spec = replacement.spec
    if isinstance(spec, GatedAttention):
        held = functools.partial(unit.stored, spec)
        return _Declared([unit.function(spec, opset)], "unit", functools.partial(unit.attributes, spec), held)
    if isinstance(spec, MixedChunkAttention):
        held = functools.partial(unit.stored, spec)
        return _Declared(chunked.functions(spec, opset), "unit", functools.partial(chunked.attributes, spec), held)
    if isinstance(spec, ConditionalFeedForward):
        body, described, types = conditional.function(spec, opset), routing.attributes, routing.stored_as
        return _Declared([body], "branches", described, functools.partial(_as, types))
    if replacement.contrib and contrib_obstacle(capture, replacement) is None:
        turned = functools.partial(_turned, spec)
        return _Declared([microsoft_moe.function(spec, opset)], "experts", lambda _: [], turned)
    body, described, types = mixture.function(spec, opset), mixture.attributes, mixture.stored_as
    return _Declared([body], "experts", described, functools.partial(_as, types))


def _as(
    stored_as: Callable[[str, ir.DataType], ir.DataType], tensors: Mapping[str, Array], kind: ir.DataType
) -> Mapping[str, Array]:
    return {part: tensor.astype(stored_as(part, kind).numpy()) for part, tensor in tensors.items()}


def _turned(spec: MixtureOfExperts, tensors: Mapping[str, Array], kind: ir.DataType) -> Mapping[str, Array]:
    return {part: tensor.astype(kind.numpy()) for part, tensor in microsoft_moe.stored(spec, tensors).items()}


def install_block(editor: Editor, replacement: BlockReplacement) -> ir.Node:
    """Put the function's call in the place of the block's output; returns the node that gave it, now unread."""
    site = replacement.site
    declared = _declared(editor.capture, replacement, editor.opset)
    flow = editor.capture.flow
    name = _given(editor.capture, replacement)
    x, output = editor.value(name), editor.value(site.output)
    producer = output.producer()
    assert producer is not None
    kind = _kind(editor.capture, name)
    nodes: list[ir.Node] = []
    if len(flow.shape(name)) != 3:
        x = editor.write.op(
            nodes, "Reshape", [x, editor.write.ints([1, -1, site.width], f"{site.name}.sizes")], f"{site.name}.batch"
        )
    weights = [
        editor.write.constant(tensor, f"{site.name}.{part}")
        for part, tensor in declared.stored(replacement.tensors, kind).items()
    ]
    described = declared.attributes(kind)
    mixed = editor.call_at(nodes, site.name, declared.word, declared.functions, [x, *weights], described)
    if len(flow.shape(site.output)) != 3:
        mixed = editor.write.op(
            nodes, "Reshape", [mixed, editor.write.ints([-1, site.width], f"{site.name}.sizes")], f"{site.name}.flat"
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
