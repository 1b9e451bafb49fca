"""Fused attention operators of a file that go on as they are, with fewer key/value heads or a shorter window."""

from __future__ import annotations

import onnx_ir as ir

from passes.site import AttentionSite, Operand
from rewriter.capture.fused.written_out import WrittenOut
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_path import resize


def kept_operator(editor: Editor, site: AttentionSite) -> WrittenOut | None:
    """The fused operator that this site was written out from, if it goes on with fewer key/value heads."""
    written = editor.capture.written_out.get(site.owner)
    return written if written is not None and written.native else None


def stem_is_inside(editor: Editor, kept: WrittenOut, role: str, operand: Operand) -> bool:
    """Whether all between the projection and the operator only moves elements, so that it can be fed directly."""
    given = kept.operand(role)
    if given is None:  # packed with another operand
        return True
    flow = editor.capture.flow
    before, stem = flow.producer(given.name or ""), flow.producer(operand.stem)
    return before is None or stem is None or before.index <= stem.index


def keep_operator(
    editor: Editor,
    site: AttentionSite,
    kv_heads: int,
    k: tuple[ir.Value, tuple[str, ...]],
    v: tuple[ir.Value, tuple[str, ...]],
    q: tuple[ir.Value, tuple[str, ...]] | None,
) -> bool:
    """A standard Attention operator repeats heads by itself: give it fewer, and new queries if there are any."""
    anchor = editor.capture.nodes[site.anchor]
    flat = len(editor.capture.flow.shape(editor.capture.flow.nodes[site.anchor].inputs[0])) == 3
    wanted = ("b", "s", "hd") if flat else ("b", "h", "s", "d")
    elsewhere = any(fed is not None and fed[1] != wanted for fed in (q, k, v))
    if elsewhere or abs(site.scale - _operator_scale(editor, site)) > 1e-7:
        return False
    repeated = [v.producer() for v in anchor.inputs[1:3] if v is not None]
    if q is not None and site.q.seam == site.q.stem:
        anchor.replace_input_with(0, q[0])
    anchor.replace_input_with(1, k[0])
    anchor.replace_input_with(2, v[0])
    editor.dead += [n for n in repeated if n is not None]
    if flat:
        anchor.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", kv_heads)
    return True


def put_back(editor: Editor, kept: WrittenOut, kv_heads: int, window: int | None = None) -> None:
    """The fused operator again, in place of what it was written out in, on fewer key/value heads or seeing less."""
    inputs = list(kept.inputs)
    for position, role in enumerate("qkv"):
        inputs[position] = editor.fed.get(role, inputs[position])
    attributes = [a for a in kept.node.attributes.values() if a.name != "kv_num_heads"]
    if kept.flat:
        attributes.append(ir.AttrInt64("kv_num_heads", kv_heads))
    if window is not None:
        before = kept.node.attributes.get_int("local_window_size", -1)
        attributes = [a for a in attributes if a.name != "local_window_size"]
        attributes.append(ir.AttrInt64("local_window_size", min(window, before) if before > 0 else window))
    node = ir.Node(
        kept.node.domain, kept.node.op_type, inputs, attributes, num_outputs=len(kept.outputs), name=kept.node.name
    )
    node.metadata_props.update(kept.node.metadata_props)
    last = editor.value(kept.outputs[0]).producer()
    assert last is not None
    editor.graph.insert_after(last, node)
    for position, (name, new) in enumerate(zip(kept.outputs, node.outputs, strict=True)):
        if not name:
            continue
        old = editor.value(name)
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = editor.write.unique(f"{name}_before"), name
        editor.dead += [n for n in [old.producer()] if n is not None]
        if position:
            resize(new, 1, kv_heads)
    for past in kept.pasts:
        resize(past, 1, kv_heads)


def _operator_scale(editor: Editor, site: AttentionSite) -> float:
    scale = editor.capture.flow.nodes[site.anchor].attrs.get("scale")
    return float(scale) if scale else site.head_dim**-0.5
