"""Door out for ONNX: edits the model at the matched sites and nowhere else.

Per site: new key and value projections (`onnx_projection`) feed the old path (rotation, norms, cache: `onnx_path`) at
its stem, which then works on fewer heads; one grouped attention node (`onnx_attention`) takes the place of the two
contractions and the softmax; what is left unread is removed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from passes.site import AttentionSite
from passes.targets.block import BlockReplacement
from passes.targets.replacement import Replacement
from passes.weights.projection import operand_bias, operand_weight
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.install.onnx_attention import attend
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_experts import install_block
from rewriter.install.onnx_mixing import Mixing
from rewriter.install.onnx_obstacles import fed_queries
from rewriter.install.onnx_projection import project_output, regain, reproject
from rewriter.install.onnx_repeat import repeat_heads
from rewriter.install.onnx_shapes import release_shapes


@dataclass(frozen=True)
class Installed:
    """What was done at one site.

    Attributes:
        removed: initializers that are gone.
        requantisation_error: worst error of new quantised weights, relative to the largest weight; 0 if none are.
        exact: whether the site still computes what it did: not where weights were requantised, nor where roundings
            of activations went with the operators between which they stood.
    """

    name: str
    removed: tuple[str, ...]
    requantisation_error: float
    exact: bool


def install(
    capture: OnnxCapture,
    replacements: Iterable[Replacement],
    *,
    target: str,
    version: str,
    blocks: Sequence[BlockReplacement] = (),
    repeated: Collection[str] = (),
    gone: Mapping[str, Sequence[str]] | None = None,
) -> list[Installed]:
    """Edit ``capture.model`` in place and note in its metadata what was done; the result is of `replacements`.

    Sites named in `repeated` keep their attention, which works on heads that are repeated behind the projections.
    `gone` are initializers that are no longer there for how a projection was written to be read, by that node's name.

    None of `replacements` is held once it is installed.
    """
    editor = Editor(capture)
    mixing = Mixing(editor)
    done: list[Installed] = []
    records: list[dict[str, Any]] = []
    for r in replacements:
        projections = {capture.nodes[o.projection.node].name or "" for o in r.site.operands}
        if r.mixing is not None:
            done.append(_mixed(editor, mixing, r))
        else:
            done.append(_repeated(editor, r) if r.site.name in repeated else _attended(editor, r))
        caches = [list(port) for operand in (r.site.k, r.site.v) for port in operand.presents]
        lost = [name for p in projections for name in (gone or {}).get(p, ())]
        records.append(_record(r, [*done[-1].removed, *lost], done[-1].exact, caches))
    for b in blocks:
        removed = _replaced(editor, b)
        records.append(_record(b, removed, b.exact and not editor.rounded, []))
    metadata = capture.model.metadata_props
    metadata["rewriter.version"] = version
    metadata["rewriter.target"] = target
    metadata["rewriter.sites"] = json.dumps(records)
    return done


def _record(
    replacement: Replacement | BlockReplacement, removed: Sequence[str], exact: bool, caches: list[list[Any]]
) -> dict[str, Any]:
    """What the file says of one site."""
    return {
        "name": replacement.site.name,
        "from": replacement.before,
        "to": replacement.after,
        "exact": exact,
        "changed": list(removed),
        "caches": caches,
    }


def _mixed(editor: Editor, mixing: Mixing, replacement: Replacement) -> Installed:
    """Another computation in the place of the attention and all its projections."""
    site = replacement.site
    last, biases = mixing.install(replacement)
    removed = [name for bias in biases for name in editor.unread(bias)]
    return Installed(site.name, (*editor.was_stored(removed), *_cleaned(editor, site, [last])), 0.0, False)


def _attended(editor: Editor, replacement: Replacement) -> Installed:
    """Another attention behind the projections, which get new weights where it has fewer heads."""
    site = replacement.site
    editor.fed, editor.seams = {}, {}
    if replacement.linear is not None:
        attend(editor, replacement)
        return Installed(site.name, _cleaned(editor, site), 0.0, False)
    error, removed = _new_projections(editor, replacement) if not replacement.grouped.pattern else (0.0, [])
    attend(editor, replacement)
    lost, requantised = project_output(editor, replacement)
    error = max(error, requantised)
    exact = replacement.exact and error < 1e-6 and not editor.rounded
    return Installed(site.name, (*editor.was_stored([*removed, *lost]), *_cleaned(editor, site)), error, exact)


def _new_projections(editor: Editor, replacement: Replacement) -> tuple[float, list[str]]:
    """Keys, values and, where they change, queries; returns the requantisation error and removed initializers."""
    site, tensors, flow = replacement.site, replacement.tensors, editor.capture.flow
    error, removed = 0.0, list[str]()
    for role, operand in site.shared:
        weight, bias = tensors[f"{role}_weight"], tensors.get(f"{role}_bias")
        error = max(error, reproject(editor, site, role, operand, replacement.grouped.kv_heads, weight, bias))
        removed += regain(editor, site, role, operand, replacement)
    for role, operand in fed_queries(replacement):
        weight = tensors["q_weight"] if "q_weight" in tensors else operand_weight(flow, operand)
        bias = tensors.get("q_bias") if "q_weight" in tensors else operand_bias(flow, operand)
        error = max(error, reproject(editor, site, role, operand, site.heads, weight, bias))
    return error, removed


def _repeated(editor: Editor, replacement: Replacement) -> Installed:
    """Smaller projections of keys and values, what follows them, and the attention as it was."""
    unread, error = repeat_heads(editor, replacement)
    lost, requantised = project_output(editor, replacement)
    error = max(error, requantised)
    exact = replacement.exact and error < 1e-6 and not editor.rounded
    removed = editor.was_stored([*lost, *editor.sweep(unread)])
    return Installed(replacement.site.name, removed, error, exact)


def _replaced(editor: Editor, replacement: BlockReplacement) -> tuple[str, ...]:
    """Another computation in the place of a feed-forward block; returns removed initializers."""
    last = install_block(editor, replacement)
    nodes = (editor.capture.nodes[i] for i in reversed(replacement.site.nodes))
    return editor.was_stored(editor.sweep([last, *nodes]))


def _cleaned(editor: Editor, site: AttentionSite, unread: Sequence[ir.Node] = ()) -> tuple[str, ...]:
    """Remove what was read by the old attention alone; returns removed initializers."""
    removed = editor.sweep([*unread, *_old_nodes(editor, site)])
    removed += editor.sweep(release_shapes(editor, site))
    return editor.was_stored(removed)


def _old_nodes(editor: Editor, site: AttentionSite) -> list[ir.Node]:
    """What may have become unread, last first."""
    numbers = {*site.nodes, *(o.projection.node for o in site.operands)}
    numbers |= {i for o in site.operands for i in o.path}
    dead, editor.dead = editor.dead, []
    return dead + [editor.capture.nodes[i] for i in sorted(numbers, reverse=True)]
