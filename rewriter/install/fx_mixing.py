"""Mixing in a flat aten graph: an attention's whole sublayer becomes one mix of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node as FxNode

from codegen.conditional import ConditionalAttention
from codegen.spec import (
    FourierMixing,
    GatedUnit,
    LinearMixing,
    Structure,
    TokenMixing,
)
from passes.dataflow import Value
from passes.hidden_keys import hiding
from passes.targets.replacement import Replacement
from rewriter.install.fx_emit import Emitter, aten
from rewriter.install.fx_routed import conditional_attention, gated_unit, require_padding_told

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class MixPlan:
    """A replacement whose input and output are nodes of the graph."""

    replacement: Replacement


def plan_mixing(editor: Editor, replacement: Replacement) -> MixPlan:
    """Raises UnsupportedModel where a wrapped region hides the sublayer's input or output, or padding is not told."""
    if isinstance(replacement.spec, ConditionalAttention):
        require_padding_told(editor, replacement)
        for modifier in hiding(editor.flow, replacement.site):
            editor.node(Value(modifier.value or ""))
    for value in (replacement.around.input, replacement.around.output):
        editor.node(value)
    return MixPlan(replacement)


def apply_mixing(editor: Editor, plan: MixPlan) -> FxNode:
    """Put the mix in the place of the sublayer's output; returns its last node."""
    replacement, around = plan.replacement, plan.replacement.around
    spec = replacement.mixing
    assert spec is not None
    output = editor.node(around.output)
    held = {name: editor.parameters.of_mix(replacement, name) for name in spec.shapes}
    write, x = _Writer(editor.emitter, output, held), editor.node(around.input)
    given = editor.view.tensors[around.input].dtype
    with editor.graph.inserting_before(output):
        wide = x if given in WIDE else write.call(aten.to.dtype, x, torch.float32)
        if isinstance(spec, ConditionalAttention):
            mixed = conditional_attention(editor, output, replacement, wide)
        elif isinstance(spec, GatedUnit):
            mixed = gated_unit(editor, output, replacement, wide, list(held.values()))
        else:
            mixed = _mix(write, wide, spec, around.batch_first)
        recorded = editor.view.tensors[around.output]
        if recorded.dim() == 2:
            mixed = editor.emitter.call(output, aten.flatten.using_ints, mixed, 0, 1)
        if recorded.dtype not in WIDE or recorded.dtype != given:
            mixed = editor.emitter.call(output, aten.to.dtype, mixed, recorded.dtype)
    output.replace_all_uses_with(mixed)
    return mixed


def _mix(write: _Writer, x: FxNode, spec: TokenMixing, batch_first: bool) -> FxNode:
    """[B, S, E] or [S, B, E], in float32 or float64 as x is; contiguous, since views may follow."""
    if isinstance(spec, LinearMixing):
        return _linear(write, x, spec, batch_first)
    assert isinstance(spec, FourierMixing)
    return _fourier(write, x, spec, batch_first)


@dataclass(frozen=True)
class _Writer:
    """Attributes:
    like: the node whose place the mix takes.
    held: the mix's parameters.
    """

    emitter: Emitter
    like: FxNode
    held: dict[str, FxNode]

    def call(self, target: Any, *arguments: Any) -> FxNode:
        return self.emitter.call(self.like, target, *arguments)


def _fourier(write: _Writer, x: FxNode, spec: FourierMixing, batch_first: bool) -> FxNode:
    frequencies = write.call(aten.fft_fft2.default, x, None, [1 if batch_first else 0, 2])
    found = write.call(aten.real.default, frequencies)
    if spec.hartley:
        found = write.call(aten.sub.Tensor, found, write.call(aten.imag.default, frequencies))
    else:
        found = write.call(aten.contiguous.default, found)
    for name, operation in (("gain", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        found = write.call(operation, found, write.held[name]) if name in write.held else found
    return found


def _linear(write: _Writer, x: FxNode, spec: LinearMixing, batch_first: bool) -> FxNode:
    """A sequence that is longer than the matrix ends in the product's error."""
    x = x if batch_first else write.call(aten.transpose.int, x, 0, 1)
    features = _matrix(write, spec.structure, write.held["features"], spec.hidden)
    if spec.structure is not Structure.DENSE:
        features = write.call(aten.transpose.int, features, 0, 1)
    sequence = _matrix(write, spec.structure, write.held["sequence"], spec.tokens)
    tokens = write.call(aten.sym_size.int, x, 1)
    for axis in (0, 1):
        sequence = write.call(aten.slice.Tensor, sequence, axis, 0, tokens)
    found = write.call(aten.matmul.default, sequence, write.call(aten.matmul.default, x, features))
    found = write.call(aten.add.Tensor, found, write.held["bias"]) if "bias" in write.held else found
    return found if batch_first else write.call(aten.contiguous.default, write.call(aten.transpose.int, found, 0, 1))


def _matrix(write: _Writer, structure: Structure, stored: FxNode, size: int) -> FxNode:
    """[N, N] of what it is made of."""
    if structure is Structure.DENSE:
        return stored
    if structure is Structure.CIRCULANT:
        turned = write.call(aten.flip.default, stored, [0])
        stored = write.call(aten.cat.default, [turned, write.call(aten.slice.Tensor, turned, 0, 0, size - 1)])
    return write.call(aten.flip.default, write.call(aten.unfold.default, stored, 0, size, 1), [0])
