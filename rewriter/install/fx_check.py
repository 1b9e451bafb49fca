"""Proof that a rewritten graph computes what it says: it must equal the original with repeated heads, or mixed.

The original graph is run with its key and value weights replaced by the new heads, each repeated for the old heads
that it stands for, with what the oracle makes of each mixed sublayer's input in the place of its output, and with what
a sparse attention gives of its operands in the place of a full one's output. That is the definition of what the
rewrite may change, whether the step is exact or lossy.

What routes tokens is compared place by place, with its torch body on what it read in this very run: a score that is
rounded otherwise may route another token, and no more is equal from there on. The original goes on from what it gave.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx import Node as FxNode

from codegen.ops.grouped_query_attention.reference import shown
from codegen.ops.linear_attention.reference import linear_attention
from codegen.ops.token_mixing import token_mixing
from codegen.spec import LinearAttention
from passes.dataflow import Array, Flow, Value
from passes.hidden_keys import HIDES
from passes.layout import canonical, laid_out
from passes.match.score_terms import apply_modifier
from passes.replay import TOLERANCES, softmax
from passes.site import Projection
from passes.targets.replacement import Replacement
from passes.weights.head_gains import stored_gains
from rewriter.capture.torch_export import GraphView
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_routed import Routed

HINT = "this is a fault of rewriter: please report the model; the original is unchanged"


def require_equal(
    view: GraphView,
    module: GraphModule,
    bound: Mapping[str, Any],
    replacements: Iterable[Replacement],
    attended: Mapping[str, str],
    apart: Collection[str] = (),
    routed: Sequence[Routed] = (),
) -> None:
    """Compare site outputs and graph outputs of the rewritten `module` with the widened original's.

    Args:
        bound: what each placeholder of `module` holds.
        attended: by site name the name of the node that took the place of the site's output.
        apart: names of sites that share keys or values with attentions that stay: only they read new ones.
        routed: what routes tokens, at attentions and feed-forward blocks.

    Raises UnsupportedModel if they differ by more than rounding.
    """
    replacements = list(replacements)
    sources: dict[Value, str] = {}
    for name, value in view.names.items():
        sources.setdefault(value, name)
    outputs = {r.site.name: sources[r.around.output if r.mixing else r.site.output] for r in replacements}
    widened = _widened(view, [r for r in replacements if r.site.name not in apart])
    own = {r.site.output: _widened(view, [r]) for r in replacements if r.site.name in apart}
    for r in (r for r in replacements if r.site.name in apart):
        widened |= _new_output(view, r)
    limit = TOLERANCES[view.flow.dtype]
    after = _Run(module, {}, {}, {*attended.values(), *(n.name for r in routed for n in (r.given, r.result))})
    others = [r for r in replacements if r.site.name not in {one.replacement.site.name for one in routed}]
    try:
        with torch.no_grad():
            new = after.on(bound)
            widened |= _given_by(routed, after.seen, limit)
            before = _Run(view.module, widened, view.names, outputs.values(), others, view.flow, own)
            old = before.on(view.bound)
    except UnsupportedModel:
        raise
    except Exception as error:  # any operator may fail on shapes it was not made for
        raise UnsupportedModel(f"the rewritten graph does not run: {error}", hint=HINT) from error
    moved = {r.site.name for r in replacements if r.gathered}  # heads have changed places there; what follows tells
    for name, output in outputs.items():
        if name in moved:
            continue
        _require_close(before.seen[output], after.seen[attended[name]], limit, f"the attention of {name}")
    caches = {sources.get(value) for r in replacements for o in (r.site.k, r.site.v) for value, _ in o.presents}
    for number, (a, b, source) in enumerate(zip(old, new, _results(view.module.graph), strict=True)):
        if isinstance(a, Tensor) and getattr(source, "name", None) not in caches:
            _require_close(a, b, limit, f"output {number}")


def _given_by(routed: Sequence[Routed], seen: Mapping[str, Tensor], limit: float) -> dict[Value, Tensor]:
    """What stands where tokens are routed, by the original's value, once it is what it should be."""
    found: dict[Value, Tensor] = {}
    for one in routed:
        given, result = seen[one.given.name], seen[one.result.name]
        name = f"what takes the place of {one.replacement.site.name}"
        _require_close(one.expected(given, result), result, limit, name)
        found[one.value] = result
    return found


def _widened(view: GraphView, replacements: Iterable[Replacement]) -> dict[Value, Tensor]:
    """The original's weights with the new ones in their place, key and value heads repeated."""
    changed: dict[Value, Tensor] = {}
    for r in (r for r in replacements if r.mixing is None and not r.pattern):
        changed |= _new_output(view, r)
        for role, operand in (("q", r.site.q), *r.site.shared):
            heads = r.grouped.heads if role == "q" else r.grouped.kv_heads
            repeats = operand.heads // heads
            projection = operand.projection
            places = {"weight": operand.columns, "bias": projection.bias_positions(operand.columns)}
            gains = stored_gains(operand)
            if operand.norm is not None and operand.norm.gains is not None:
                places |= dict.fromkeys(gains, operand.norm.gains.places)
            for part, value in (("weight", projection.weight), ("bias", projection.bias), *gains.items()):
                array = r.tensors.get(f"{role}_{part}")
                if array is None or value is None:
                    continue
                by_head = np.repeat(array.reshape(heads, operand.dim, *array.shape[1:]), repeats, axis=0)
                tensor = changed.setdefault(value, view.tensors[value].detach().clone())
                rows = torch.from_numpy(places[part].reshape(-1).astype(np.int64))
                wide = torch.from_numpy(np.ascontiguousarray(by_head.reshape(-1, *array.shape[1:])))
                wide, rows = wide.to(dtype=tensor.dtype, device=tensor.device), rows.to(tensor.device)
                if part == "weight":
                    changed[value] = _with_rows(projection, tensor, rows, wide)
                else:
                    tensor.view(-1)[rows] = wide
    return changed


def _with_rows(projection: Projection, stored: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """The weight with some rows of its matrix, seen as [out, in], replaced; may write into `stored`."""
    if projection.weight_axes is None:
        (stored if projection.out_first else stored.t())[rows] = new
        return stored
    turned = stored.permute(projection.weight_axes)
    matrix = turned.reshape(-1, projection.features)
    matrix[:, rows] = new.t()
    back = [projection.weight_axes.index(axis) for axis in range(stored.dim())]
    return matrix.view(turned.shape).permute(back).contiguous()


def _new_output(view: GraphView, replacement: Replacement) -> dict[Value, Tensor]:
    """What the output projection reads after the rewrite, where that changes."""
    out = replacement.site.out
    named = () if out is None else (("weight", out.weight), ("bias", out.bias))
    changed: dict[Value, Tensor] = {}
    for part, value in named:
        array = replacement.tensors.get(f"out_{part}")
        if array is not None and value is not None and out is not None:
            old = view.tensors[value]
            turned = array if part == "bias" else out.stored(array, tuple(old.shape))
            new = torch.from_numpy(np.array(turned, order="C"))
            changed[value] = new.to(dtype=old.dtype, device=old.device).view(old.shape)
    return changed


class _Run(Interpreter):
    """Runs a graph with some values replaced, some sublayers mixed by the oracle, and some nodes' results kept."""

    def __init__(
        self,
        module: GraphModule,
        replaced: Mapping[Value, Tensor],
        names: Mapping[str, Value],
        kept: Iterable[str],
        replacements: Iterable[Replacement] = (),
        flow: Flow | None = None,
        own: Mapping[Value, Mapping[Value, Tensor]] = MappingProxyType({}),
    ) -> None:
        """`own`: values for which weights are others, and these weights; all else is as it is."""
        super().__init__(module, garbage_collect_values=not own)
        self._own = own
        replacements = list(replacements)
        self._flow = flow
        self._otherwise = {r.site.output: r for r in replacements if r.pattern or r.linear is not None}
        self._seams = {o.seam for r in self._otherwise.values() for o in (r.site.q, r.site.k, r.site.v)}
        self._mixed = {r.around.output: r for r in replacements if r.mixing is not None}
        self._hidden: dict[Value, Tensor] = {}
        self._replaced, self._names, self._kept = replaced, names, set(kept)
        self._mutates = any(_is_mutable(n) for n in module.graph.nodes)
        self.seen: dict[str, Tensor] = {}

    def on(self, bound: Mapping[str, Any]) -> list[Any]:
        """Leaves of the output for these placeholder values."""
        inputs = [bound[n.name] for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        result = self.run(*inputs, enable_io_processing=False)
        return list(torch.utils._pytree.tree_leaves(result))

    def run_node(self, n: FxNode) -> Any:
        result = super().run_node(n)
        value = self._names.get(n.name, "")
        result = self._replaced.get(value, result)
        if value in self._own:
            result = self._with_weights(n, self._own[value])
        if value in self._mixed:
            result = self._mix(self._mixed[value], result)
        if value in self._otherwise:
            result = self._attended(self._otherwise[value], result)
        if value in self._seams or any(value == r.around.input for r in self._mixed.values()):
            self._hidden[value] = result.clone() if self._mutates else result
        if self._mutates and n.op in {"placeholder", "get_attr"} and isinstance(result, Tensor):
            result = result.clone()  # an in-place operator must not reach the model's own tensors
        if n.name in self._kept:
            self.seen[n.name] = result.clone() if self._mutates else result
        return result

    def _with_weights(self, end: FxNode, weights: Mapping[Value, Tensor]) -> Any:
        """What `end` would give in this run with these weights. Outputs of other attentions are as they are."""
        new: dict[FxNode, Any] = {}
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            value = self._names.get(node.name, "")
            if value in weights:
                new[node] = weights[value]
            elif (node is end or value not in self._own) and any(n in new for n in node.all_input_nodes):
                arguments, keywords = torch.fx.node.map_arg(
                    (node.args, node.kwargs), lambda n: new[n] if n in new else self.env[n]
                )
                new[node] = node.target(*arguments, **keywords)
            if node is end:
                break
        return new[end]

    def _mix(self, replacement: Replacement, like: Tensor) -> Tensor:
        """What the oracle makes of the sublayer's input in this run, laid out like its output."""
        around, spec = replacement.around, replacement.mixing
        assert spec is not None
        hidden = self._hidden[around.input].detach().double().cpu().numpy()
        mixed = token_mixing(spec, around.by_token(hidden, hidden.shape), **replacement.tensors)
        laid = around.laid_out(mixed, like.detach().double().cpu().numpy())
        return torch.from_numpy(laid).to(dtype=like.dtype, device=like.device)

    def _attended(self, replacement: Replacement, like: Tensor) -> Tensor:
        """What the site's operands in this run give by the oracle, laid out like its output."""
        site, spec = replacement.site, replacement.grouped
        assert self._flow is not None
        q, k, v = (
            canonical(self._hidden[o.seam].detach().double().cpu().numpy(), o.seam_axes, o.heads, o.dim)
            for o in (site.q, site.k, site.v)
        )
        if replacement.linear is not None:
            output = self._linear(replacement, replacement.linear, q, k, v)
        else:
            k, v = (x[:, np.arange(spec.heads) // spec.group] for x in (k, v))
            scores = q @ k.swapaxes(-1, -2) * site.scale
            for modifier in site.modifiers:
                scores = apply_modifier(self._flow, modifier, scores)
            output = softmax(np.where(shown(spec, *scores.shape[-2:]), scores, -np.inf)) @ v
        laid = laid_out(output, site.output_axes)
        return torch.from_numpy(laid.reshape(like.shape)).to(dtype=like.dtype, device=like.device)

    def _linear(self, replacement: Replacement, spec: LinearAttention, q: Array, k: Array, v: Array) -> Array:
        site = replacement.site
        assert self._flow is not None
        bias = np.zeros((len(q), site.heads, q.shape[2], k.shape[2]))
        for modifier in site.modifiers:
            bias = apply_modifier(self._flow, modifier, bias)
        visible = bias[:, 0, -1] > HIDES
        return linear_attention(spec, q / site.q.gain, k / site.k.gain, v, replacement.tensors, visible)


def _is_mutable(node: FxNode) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _results(graph: Graph) -> list[Any]:
    """What the leaves of the output are, in the order in which `_Run.on` returns them."""
    output = next(n for n in graph.nodes if n.op == "output")
    return list(torch.utils._pytree.tree_leaves(output.args[0]))


def _require_close(before: Tensor, after: Tensor, limit: float, what: str) -> None:
    if before.shape != after.shape or before.dtype != after.dtype:
        raise UnsupportedModel(
            f"{what} became {after.dtype} {tuple(after.shape)} from {before.dtype} {tuple(before.shape)}", hint=HINT
        )
    counted = torch.isfinite(before)  # rows that are masked everywhere may be NaN before and zeros after
    difference = (before.double() - after.double()).abs()[counted]
    largest = float(before.double()[counted].abs().max()) if bool(counted.any()) else 0.0
    error = float(difference.max()) if difference.numel() else 0.0
    if not error <= limit * max(largest, 1e-6):
        raise UnsupportedModel(f"{what} does not equal that of repeated heads (off by {error:.1e})", hint=HINT)
