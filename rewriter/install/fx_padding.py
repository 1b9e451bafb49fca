"""Which tokens are padding, as a node of a flat aten graph: told by the masks of a matched attention, as in files
(`rewriter/install/onnx_padding.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node as FxNode

from passes.dataflow import Value
from passes.hidden_keys import HIDES, hiding
from passes.site import AttentionSite, Modifier
from rewriter.install.fx_emit import aten

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor


def shown_tokens(editor: Editor, like: FxNode, site: AttentionSite, x: FxNode) -> FxNode | None:
    """bool [B, S] for hidden states x [B, S, H], False for padding; None where nothing hides any."""
    found: FxNode | None = None
    for modifier in hiding(editor.flow, site):
        keys = _by_key(editor, like, modifier)
        found = keys if found is None else editor.emitter.call(like, aten.logical_and.default, found, keys)
    if found is None:
        return None
    sizes = [editor.emitter.call(like, aten.sym_size.int, x, axis) for axis in (0, 1)]
    return editor.emitter.call(like, aten.expand.default, found, sizes)


def _by_key(editor: Editor, like: FxNode, modifier: Modifier) -> FxNode:
    """[B or 1, S] of a mask [B, H, S, S], of which each axis but the last may be 1, or of [S or 1, S]."""
    call, value = editor.emitter.call, editor.node(Value(modifier.value or ""))
    if modifier.kind == "bias":
        kept = call(like, aten.gt.Scalar, value, HIDES / (modifier.number or 1.0))
    else:
        kept = call(like, aten.ne.Scalar, value, 0)
        kept = call(like, aten.logical_not.default, kept) if modifier.kind == "unmask" else kept
    if len(editor.flow.shape(modifier.value or "")) == 2:
        return call(like, aten.any.dim, kept, 0, True)
    return call(like, aten.any.dim, call(like, aten.any.dim, kept, 1), 1)
