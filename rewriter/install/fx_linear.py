"""Linear attention in a flat aten graph: the torch body, exported for any batch and length, and copied node by node.

Masks are read for which keys they hide from the last query, as in files (`rewriter/install/onnx_linear.py`).
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from codegen.ops.linear_attention.torch_body import unguarded
from codegen.spec import LinearAttention
from passes.hidden_keys import HIDES, masks_of, more_than_hidden_keys, size
from passes.site import AttentionSite, Modifier
from passes.targets.replacement import Replacement
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_body import copied, exported_body
from rewriter.install.fx_emit import HINT, Emitter, aten

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor

BATCH, QUERIES, KEYS = 3, 23, 37
"""Sizes to export at; any would do."""


def require_linear(editor: Editor, replacement: Replacement) -> None:
    """Raises UnsupportedModel where the site's masks are more than an order and hidden keys."""
    reason = more_than_hidden_keys(editor.flow, replacement.site)
    if reason is not None:
        raise UnsupportedModel(reason, hint=HINT)


def linear_attention(editor: Editor, like: FxNode, replacement: Replacement, q: FxNode, k: FxNode, v: FxNode) -> FxNode:
    """[B, H, S, V] of q [B, H, S, D], k [B, N, T, D], v [B, N, T, V], in q's dtype."""
    site, spec, emitter = replacement.site, replacement.linear, editor.emitter
    assert spec is not None
    held = [editor.parameters.of_linear_attention(replacement, name) for name in spec.shapes]
    shown = _shown(editor, like, site, k)
    if site.q.gain != 1.0:
        q = emitter.call(like, aten.mul.Tensor, q, 1 / site.q.gain)
    if site.k.gain != 1.0:
        k = emitter.call(like, aten.mul.Tensor, k, 1 / site.k.gain)
    behind = size(editor.flow, site.q, "s") != size(editor.flow, site.k, "s")
    body = _body(spec, editor.view.tensors[site.q.seam].dtype, shown is not None, behind)
    return copied(emitter, like, body, [q, k, v, *held, *([] if shown is None else [shown])])


class _Body(nn.Module):
    def __init__(self, spec: LinearAttention) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, k: Tensor, v: Tensor, held: tuple[Tensor, ...], shown: Tensor | None) -> Tensor:
        return unguarded(self.spec, q, k, v, dict(zip(self.spec.shapes, held, strict=True)), shown)


@lru_cache(maxsize=32)
def _body(spec: LinearAttention, dtype: torch.dtype, shown: bool, behind: bool) -> GraphModule:
    """A graph of q, k, v, the parameters, and which keys are shown [B, T]; `behind` other keys the queries stand."""
    plain, keys = spec.attention, KEYS if behind else QUERIES
    q = torch.zeros(BATCH, plain.heads, QUERIES, plain.head_dim, dtype=dtype)
    k, v = (torch.zeros(BATCH, plain.kv_heads, keys, d, dtype=dtype) for d in (plain.head_dim, plain.value_dim))
    held = tuple(torch.zeros(shape) for shape in spec.shapes.values())
    visible = torch.ones(BATCH, keys, dtype=torch.bool) if shown else None
    batch, queries = Dim("batch"), Dim("queries")
    tokens = Dim("keys") if behind else queries
    free: dict[str, Any] = {"q": {0: batch, 2: queries}, "k": {0: batch, 2: tokens}, "v": {0: batch, 2: tokens}}
    free |= {"held": tuple(None for _ in held), "shown": {0: batch, 1: tokens} if shown else None}
    arguments = (q, k, v, held, visible)
    return exported_body(_Body(spec), arguments, free)


# ------------------------------------------------------------ masks


def _shown(editor: Editor, like: FxNode, site: AttentionSite, k: FxNode) -> FxNode | None:
    """[B, T], boolean: which of the keys k [B, N, T, D] the last query sees; None where there is no mask."""
    total: FxNode | None = None
    for modifier in (m for m in site.modifiers if m.value in masks_of(site)):
        part = _kept(editor.emitter, like, modifier, _last_row(editor, like, site, modifier))
        total = part if total is None else editor.emitter.call(like, aten.logical_and.default, total, part)
    if total is None:
        return None
    batch, keys = (editor.emitter.call(like, aten.sym_size.int, k, axis) for axis in (0, 2))
    return editor.emitter.call(like, aten.expand.default, total, [batch, keys])


def _last_row(editor: Editor, like: FxNode, site: AttentionSite, modifier: Modifier) -> FxNode:
    """[B or 1, T or 1] of a mask [.., S, T], of which each axis but the last may be 1 or missing."""
    assert modifier.value is not None
    value, shape, call = editor.node(modifier.value), editor.flow.shape(modifier.value), editor.emitter.call
    rank = len(shape)
    value = call(like, aten.select.int, value, -2, -1) if rank > 1 else value
    if rank == 3 and shape[0] not in (1, site.heads):  # heads lie along the axis of the batch
        return call(like, aten.slice.Tensor, value, 0, 0, sys.maxsize, site.heads)
    by_batch = rank == (5 if modifier.apart is not None else 4)
    for _ in range(rank - 2 - by_batch):  # heads, of which all see the same
        value = call(like, aten.select.int, value, int(by_batch), 0)
    return value if by_batch else call(like, aten.unsqueeze.default, value, 0)


def _kept(emitter: Emitter, like: FxNode, modifier: Modifier, row: FxNode) -> FxNode:
    """Boolean: which keys a row of a mask keeps."""
    if modifier.kind != "bias":
        return row if modifier.kind == "mask" else emitter.call(like, aten.logical_not.default, row)
    if modifier.number != 1.0:
        row = emitter.call(like, aten.mul.Tensor, row, modifier.number)
    return emitter.call(like, aten.gt.Scalar, row, HIDES)
