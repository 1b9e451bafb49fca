"""Torch bodies in the place of attentions and feed-forward blocks of a flat aten graph, copied node by node
(`rewriter/install/fx_spec_body.py`): light and heavy branches, experts, and gated units.

Shape legend: B batch, S tokens, H features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node as FxNode

from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_attention.torch_body import numbers_of
from codegen.spec import GatedUnit, MixtureOfExperts
from passes.dataflow import Value
from passes.hidden_keys import padding_obstacle
from passes.targets.block import BlockReplacement, given_to
from passes.targets.replacement import Replacement
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_body import copied
from rewriter.install.fx_emit import HINT, aten
from rewriter.install.fx_padding import shown_tokens
from rewriter.install.fx_spec_body import BodySpec, SpecBody, groups, spec_body

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor

ONE_GROUP = "the graph leaves sizes open, so all tokens of a call are one group, however many"


@dataclass(frozen=True)
class BlockPlan:
    """A block whose input and output are nodes of the graph."""

    replacement: BlockReplacement
    input: Value


@dataclass(frozen=True)
class Routed:
    """A body that was written at one place, for its proof.

    Attributes:
        value: of the original, whose place `result` takes.
        given: hidden states that it reads.
        note: for the report.
    """

    replacement: Replacement | BlockReplacement
    value: Value
    given: FxNode
    result: FxNode
    note: str = ""

    def expected(self, given: Tensor, like: Tensor) -> Tensor:
        """What the torch body, run as it is, makes of these hidden states, laid out and stored like `like`."""
        spec, r = self.replacement.spec, self.replacement
        assert isinstance(spec, BodySpec)
        held = {name: torch.from_numpy(np.array(r.tensors[name])).to(given.device) for name in spec.shapes}
        wide = torch.promote_types(given.dtype, torch.float32)
        if isinstance(r, Replacement):
            batch_first = r.around.batch_first
            shown = None if r.shown is None else torch.from_numpy(np.ascontiguousarray(r.shown)).to(given.device)
        else:
            batch_first, shown = r.batch_first or isinstance(spec, MixtureOfExperts), None
        x = given.to(wide).reshape(1, *given.shape) if given.dim() == 2 else given.to(wide)
        ordered = x if batch_first else x.transpose(0, 1)
        held = {name: tensor.to(wide) for name, tensor in held.items()}
        parts = 1 if self.note else groups(spec, (x.shape[0], x.shape[1]))
        found: Tensor = SpecBody(spec, parts)(ordered, tuple(held.values()), shown, None)
        return (found if batch_first else found.transpose(0, 1)).reshape(like.shape).to(like.dtype)


def require_padding_told(editor: Editor, replacement: Replacement) -> None:
    """Raises UnsupportedModel where conditional attention cannot tell which tokens are padding."""
    reason = padding_obstacle(editor.flow, replacement.site)
    if reason is not None:
        raise UnsupportedModel(reason, hint=HINT)


def conditional_attention(editor: Editor, like: FxNode, replacement: Replacement, wide: FxNode) -> FxNode:
    """Of hidden states [B, S, H] or [S, B, H] in float32 at least; laid out alike."""
    spec, first = replacement.spec, replacement.around.batch_first
    assert isinstance(spec, ConditionalAttention)
    ordered = _turned(editor, like, wide, not first)
    shown = shown_tokens(editor, like, replacement.site, ordered)
    held = [editor.parameters.of_mix(replacement, name) for name in spec.shapes]
    table = editor.parameters.table(replacement.site.name, numbers_of(spec)) if spec.buckets else None
    body = spec_body(spec, _wide_dtype(editor, replacement), None, shown is not None)
    operands = [ordered, *held, *(n for n in (shown, table) if n is not None)]
    return _turned(editor, like, copied(editor.emitter, like, body, operands), not first)


def gated_unit(editor: Editor, like: FxNode, replacement: Replacement, wide: FxNode, held: Sequence[FxNode]) -> FxNode:
    """As `conditional_attention`, of a unit and its parameters; padding takes part."""
    spec, first = replacement.spec, replacement.around.batch_first
    assert isinstance(spec, GatedUnit)
    body = spec_body(spec, _wide_dtype(editor, replacement), None, False)
    found = copied(editor.emitter, like, body, [_turned(editor, like, wide, not first), *held])
    return _turned(editor, like, found, not first)


def _wide_dtype(editor: Editor, replacement: Replacement) -> torch.dtype:
    return torch.promote_types(editor.view.tensors[replacement.around.input].dtype, torch.float32)


def _turned(editor: Editor, like: FxNode, x: FxNode, turn: bool) -> FxNode:
    """Batches and tokens in the other order; contiguous, since views may follow."""
    call = editor.emitter.call
    return call(like, aten.contiguous.default, call(like, aten.transpose.int, x, 0, 1)) if turn else x


def plan_block(editor: Editor, replacement: BlockReplacement) -> BlockPlan:
    """Raises UnsupportedModel where a wrapped region hides the block's input or output."""
    spec, site, flow = replacement.spec, replacement.site, editor.flow
    given = Value(site.up.projection.input) if isinstance(spec, MixtureOfExperts) else given_to(flow, site)
    for value in (given, site.output):
        editor.node(value)
        if len(flow.shape(value)) not in (2, 3):
            raise UnsupportedModel("its tokens run over more axes than a batch and a sequence", hint=HINT)
    return BlockPlan(replacement, given)


def apply_block(editor: Editor, plan: BlockPlan) -> Routed:
    """Put the new computation in the place of the block's output."""
    replacement, site, call = plan.replacement, plan.replacement.site, editor.emitter.call
    spec = replacement.spec
    given, output = editor.node(plan.input), editor.node(site.output)
    stored, recorded = editor.view.tensors[site.down.weight].dtype, editor.view.tensors[site.output]
    read = editor.view.tensors[plan.input]
    turned = not replacement.batch_first and not isinstance(spec, MixtureOfExperts) and read.dim() == 3
    held = [editor.parameters.of_block(site.name, site.down.weight, n, replacement.tensors[n]) for n in spec.shapes]
    with editor.graph.inserting_before(output):
        x = given if read.dtype == stored else call(output, aten.to.dtype, given, stored)
        x = call(output, aten.unsqueeze.default, x, 0) if read.dim() == 2 else x
        x = call(output, aten.transpose.int, x, 0, 1) if turned else x
        sizes = _sizes(x)
        body = spec_body(spec, stored, sizes if sizes and groups(spec, sizes) > 1 else None, False)
        found = copied(editor.emitter, output, body, [x, *held])
        found = call(output, aten.transpose.int, found, 0, 1) if turned else found
        found = call(output, aten.flatten.using_ints, found, 0, 1) if recorded.dim() == 2 else found
        found = found if recorded.dtype == stored else call(output, aten.to.dtype, found, recorded.dtype)
        found = call(output, aten.contiguous.default, found)  # views may follow
    output.replace_all_uses_with(found)
    editor.replaced.append(output)
    grouped = isinstance(spec, MixtureOfExperts) and sizes is None
    return Routed(replacement, site.output, given, found, ONE_GROUP if grouped else "")


def _sizes(x: FxNode) -> tuple[int, int] | None:
    """Batch and tokens, where the graph has fixed both."""
    value = x.meta.get("val")
    sizes = () if value is None else tuple(value.shape[:2])
    return (sizes[0], sizes[1]) if sizes and all(isinstance(n, int) for n in sizes) else None
