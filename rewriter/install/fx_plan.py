"""What is to be done at a site of an aten graph, or why it cannot be; nothing is edited yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from codegen.spec import GroupedQueryAttention
from passes.dataflow import Array, Value
from passes.site import AttentionSite, Operand
from passes.targets.replacement import Replacement
from passes.token_blocks import PARTED, parted_behind
from passes.weights.head_gains import gains_like, stored_gains
from passes.weights.projection import operand_bias, operand_weight
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_emit import HINT, require_known
from rewriter.install.fx_linear import require_linear
from rewriter.install.fx_path import Resize, below_stem, resizes

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor

FLATTENING = frozenset({"Reshape", "Identity", "Cast", "Unsqueeze"})

_ROLES = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class Reprojection:
    """One operand's new projection, planned.

    Attributes:
        input: the value with batch and tokens on axes of their own.
        weight: [heads * dim, in], head-major; bias [heads * dim] or None.
        resizes: what changes between stem and seam.
        gains: new numbers that a norm on the path multiplies heads by, and what it adds, by the value they stand for.
    """

    role: str
    operand: Operand
    heads: int
    input: Value
    weight: Array
    bias: Array | None
    resizes: tuple[Resize, ...]
    gains: Mapping[Value, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class SitePlan:
    """One site to be written anew.

    Attributes:
        apart: an attention that stays reads the same keys or values: what lies between is made a second time.
    """

    replacement: Replacement
    operands: tuple[Reprojection, ...]
    apart: bool = False


def plan_site(editor: Editor, replacement: Replacement, *, apart: bool = False) -> SitePlan:
    """What will be done at a site; `apart` is as in `SitePlan`. Raises UnsupportedModel if it cannot be."""
    if replacement.decoupled is not None:
        raise UnsupportedModel(
            "keys and values of different head counts are installed in torch modules only, not in graphs",
            hint="rewrite the module before it is exported",
        )
    site, spec, tensors = replacement.site, replacement.grouped, replacement.tensors
    plans = []
    stay = bool(spec.pattern) or replacement.linear is not None  # the projections do
    if replacement.linear is not None:
        require_linear(editor, replacement)
    if site.stays and spec.kv_heads != site.kv_heads:
        raise UnsupportedModel(site.stays, hint=HINT)
    if any(m.windows or m.heads_first for m in site.modifiers):
        raise UnsupportedModel("masks meet its scores window by window, or heads before sequences", hint=HINT)
    if site.temperature is not None:
        raise UnsupportedModel("each head's scores have a temperature of their own", hint=HINT)
    if spec.pattern and spec.sinks:
        raise UnsupportedModel("it has attention sinks among its scores", hint=HINT)
    for role, operand in () if stay else site.shared:
        weight, bias = tensors[f"{role}_weight"], tensors.get(f"{role}_bias")
        planned = _plan_operand(editor, site, role, operand, spec.kv_heads, weight, bias, apart=apart)
        plans.append(replace(planned, gains=_gains(editor, replacement, role, operand)))
    if stay:
        pass
    elif "q_weight" in tensors:
        plans.append(_plan_operand(editor, site, "q", site.q, site.heads, tensors["q_weight"], tensors.get("q_bias")))
    else:
        plans += _plan_queries(editor, site)
    if not (site.k.seam and site.v.seam):
        raise UnsupportedModel("its heads are repeated before they are rotated", hint=HINT)
    require_known(site.q.seam_axes, splittable=True, apart=True)
    for axes in (site.k.seam_axes, site.v.seam_axes):
        require_known(axes, splittable=True)
    require_known(site.output_axes, splittable=False)
    masks = [m.value for m in site.modifiers if m.value is not None]
    for value in (site.q.seam, site.k.seam, site.v.seam, site.output, *masks, *output_parts(replacement)):
        editor.node(value)
    if not stay:
        _require_one_mask(spec)
    return SitePlan(replacement, tuple(plans), apart)


def _plan_queries(editor: Editor, site: AttentionSite) -> list[Reprojection]:
    """Queries from projections or parts of parameters that go away, since keys or values come from them too."""
    gone = {o.projection.node for _, o in site.shared}
    parts = {v for _, o in site.shared for v in _parted(editor, o)}
    kept = [
        (f"q{i or ''}", o)
        for i, o in enumerate(site.q.parts)
        if o.projection.node in gone or parts & set(_parted(editor, o))
    ]
    return [
        _plan_operand(editor, site, role, o, site.heads, operand_weight(editor.flow, o), operand_bias(editor.flow, o))
        for role, o in kept
    ]


def _parted(editor: Editor, operand: Operand) -> list[Value]:
    """The stored weights that an operand's matrix is a part of."""
    weight = operand.projection.weight
    size = int(np.prod(editor.flow.shape(weight)))
    return [v for v in editor.flow.weights_above(weight) if int(np.prod(editor.flow.weights[v].shape)) > size]


def _plan_operand(
    editor: Editor,
    site: AttentionSite,
    role: str,
    operand: Operand,
    heads: int,
    weight: Array,
    bias: Array | None,
    *,
    apart: bool = False,
) -> Reprojection:
    editor.node(operand.stem)
    require_known(operand.stem_axes, splittable=False, apart=role == "q")
    if heads != operand.heads:
        _require_private(editor, site, role, operand, apart=apart)
    changes = tuple(resizes(editor.flow, editor.nodes, operand, heads))
    projected = _three_axes(editor, operand)
    if parted_behind(editor.flow, operand, projected):
        raise UnsupportedModel(PARTED.format(_ROLES[role[0]]), hint=HINT)
    return Reprojection(role, operand, heads, projected, weight, bias, changes)


def _gains(editor: Editor, replacement: Replacement, role: str, operand: Operand) -> dict[Value, Array]:
    """New numbers of a norm on the operand's path, laid out as the old ones. Raises UnsupportedModel."""
    found = {}
    for part, value in stored_gains(operand).items():
        editor.node(value)
        found[value] = gains_like(operand, replacement.tensors[f"{role}_{part}"], editor.flow.shape(value))
    return found


def _require_private(editor: Editor, site: AttentionSite, role: str, operand: Operand, *, apart: bool) -> None:
    """Fewer heads may be seen by this attention only, and by caches that the graph hands out; `apart` is as in
    `SitePlan`."""
    if operand.past is not None:
        raise UnsupportedModel(
            f"its {role} cache {operand.past} is an input of the graph, whose shape must not change",
            hint="export the model without a key/value cache, or rewrite the module",
        )
    if apart and operand.presents:
        raise UnsupportedModel(f"its {role} heads leave the graph as a cache", hint=HINT)
    if apart:
        return
    path = below_stem(editor.flow, operand)
    changed = [operand.stem, *(v for n in path for v in n.outputs if v)]
    presents = {value for value, _ in operand.presents}
    mine = {n.index for n in (*path, *editor.flow.ancestors(site.output))}
    readers = [n.name for v in changed[1:] for n in editor.flow.consumers(v) if n.index not in mine]
    outputs = [v for v in changed[1:] if v in editor.flow.outputs and v not in presents]
    early = [v for v in presents if v not in changed and not _beside(editor, operand, v)]
    for name in (*readers, *outputs, *early):
        raise UnsupportedModel(f"its {role} heads are also read at {name}", hint=HINT)


def _beside(editor: Editor, operand: Operand, value: Value) -> bool:
    """Whether an output is a transposition of the stem off the path, which goes on with all heads."""
    node = editor.flow.producer(value)
    return node is not None and node.op == "Transpose" and node.inputs[0] == operand.stem


def _three_axes(editor: Editor, operand: Operand) -> Value:
    """The projection's input with batch and tokens on axes of their own, found above a flattening."""
    name = operand.projection.input
    while len(editor.flow.shape(name)) != 3:
        node = editor.flow.producer(name)
        above = node.inputs[0] if node is not None and node.op in FLATTENING else ""
        if not above or editor.flow.shape(above)[-1] != editor.flow.shape(name)[-1]:
            raise UnsupportedModel(
                f"the projection of {operand.stem} reads a flattened tensor whose batch and token axes are lost",
                hint=HINT,
            )
        name = above
    editor.node(name)
    return name


def output_parts(replacement: Replacement) -> dict[Value, str]:
    """Values of the output projection that change, with the part that each is."""
    out = replacement.site.out
    named = () if out is None else ((out.weight, "weight"), (out.bias, "bias"))
    return {value: part for value, part in named if value is not None and f"out_{part}" in replacement.tensors}


def _require_one_mask(spec: GroupedQueryAttention) -> None:
    if spec.causal and (spec.bias or spec.softcap is not None):
        raise UnsupportedModel("it is causal by an attribute and has a mask or softcap beside it", hint=HINT)
