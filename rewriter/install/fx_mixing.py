"""Mixing in a flat aten graph: an attention's whole sublayer becomes one Fourier transform of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node as FxNode

from codegen.spec import FourierMixing
from passes.targets.replacement import Replacement
from rewriter.install.fx_emit import Emitter, aten

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class MixPlan:
    """A replacement whose input and output are nodes of the graph."""

    replacement: Replacement


def plan_mixing(editor: Editor, replacement: Replacement) -> MixPlan:
    """Raises UnsupportedModel where a wrapped region hides the sublayer's input or output."""
    for value in (replacement.around.input, replacement.around.output):
        editor.node(value)
    return MixPlan(replacement)


def apply_mixing(editor: Editor, plan: MixPlan) -> FxNode:
    """Put the mix in the place of the sublayer's output; returns its last node."""
    replacement, around = plan.replacement, plan.replacement.around
    spec = replacement.mixing
    assert spec is not None
    output = editor.node(around.output)
    vectors = [editor.vector(replacement, name) for name in ("gain", "bias") if name in replacement.tensors]
    with editor.graph.inserting_before(output):
        mixed = _mix(editor.emitter, output, editor.node(around.input), spec, around.batch_first)
        for operation, vector in zip((aten.mul.Tensor, aten.add.Tensor), vectors, strict=False):
            mixed = editor.emitter.call(output, operation, mixed, vector)
        recorded = editor.view.tensors[around.output]
        if recorded.dim() == 2:
            mixed = editor.emitter.call(output, aten.flatten.using_ints, mixed, 0, 1)
        if recorded.dtype not in WIDE or recorded.dtype != editor.view.tensors[around.input].dtype:
            mixed = editor.emitter.call(output, aten.to.dtype, mixed, recorded.dtype)
    output.replace_all_uses_with(mixed)
    return mixed


def _mix(emitter: Emitter, like: FxNode, x: FxNode, spec: FourierMixing, batch_first: bool) -> FxNode:
    """[B, S, E] or [S, B, E] in float32, or in float64 where x is; contiguous, since views may follow."""
    wide = x if x.meta["val"].dtype in WIDE else emitter.call(like, aten.to.dtype, x, torch.float32)
    frequencies = emitter.call(like, aten.fft_fft2.default, wide, None, [1 if batch_first else 0, 2])
    real = emitter.call(like, aten.real.default, frequencies)
    if not spec.hartley:
        return emitter.call(like, aten.contiguous.default, real)
    return emitter.call(like, aten.sub.Tensor, real, emitter.call(like, aten.imag.default, frequencies))
