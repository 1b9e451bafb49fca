"""Surgery on a flat aten graph: new projections at the stems, one grouped attention per site, and a sweep."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node as FxNode

from codegen.conditional import ConditionalAttention
from codegen.sight import Pattern
from codegen.spec import GroupedQueryAttention
from passes.dataflow import Value
from passes.feed_forward_site import FeedForwardSite
from passes.site import AttentionSite, Operand
from passes.targets.replacement import Replacement
from rewriter.capture.torch_export import GraphView
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_attention import attention, mask_of
from rewriter.install.fx_emit import HINT, LETTERS, Emitter, aten
from rewriter.install.fx_linear import linear_attention
from rewriter.install.fx_mixing import MixPlan, apply_mixing, plan_mixing
from rewriter.install.fx_parameters import NewParameters
from rewriter.install.fx_path import below_stem, is_nested
from rewriter.install.fx_plan import Reprojection, SitePlan, output_parts, plan_site
from rewriter.install.fx_routed import BlockPlan, Routed, apply_block
from rewriter.install.fx_sight import narrowed
from rewriter.install.fx_store import Store
from rewriter.install.fx_sweep import sweep

RELAYING = frozenset(
    {aten.transpose.int, aten.permute.default, aten._to_copy.default, aten.to.dtype, aten.reshape.default}
)
"""Operators whose results may have their argument's strides, in another order."""

Laid = tuple[FxNode, tuple[str, ...]]
"""A node and what its axes are."""


@dataclass
class Editor:
    """Edits one graph: `plan` and `apply` site by site, then `finish`.

    Attributes:
        view: the graph before, recorded.
        store: its copy, and where its parameters live.
        attended: for each site the node that took the place of its output.
        replaced: nodes that something else stands for, not swept yet.
        routed: what routes tokens now.
    """

    view: GraphView
    store: Store
    attended: dict[str, FxNode] = field(default_factory=dict)
    _stems: dict[tuple[Value, int], Laid] = field(default_factory=dict)
    replaced: list[FxNode] = field(default_factory=list)
    routed: list[Routed] = field(default_factory=list)
    _copies: dict[FxNode, FxNode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flow = self.view.flow
        self.graph = self.store.graph
        self.emitter = Emitter(self.graph)
        self.parameters = NewParameters(self.view, self.store, self.emitter)
        self.nodes = {n.name: n for n in self.graph.nodes}
        self._by_value: dict[Value, FxNode] = {}
        for name, value in self.view.names.items():
            if name in self.nodes:
                self._by_value.setdefault(value, self.nodes[name])

    def node(self, value: Value) -> FxNode:
        """The graph's node for a value; raises UnsupportedModel if a wrapped region hides it."""
        found = self._by_value.get(value)
        if found is None:
            raise UnsupportedModel(f"{value} lies inside a wrapped region (autocast, flex_attention)", hint=HINT)
        return found

    def plan(self, replacement: Replacement, *, apart: bool = False) -> SitePlan | MixPlan:
        """What will be done at a site; `apart` is as in `SitePlan`. Raises UnsupportedModel if it cannot be."""
        if replacement.mixing is not None:
            return plan_mixing(self, replacement)
        return plan_site(self, replacement, apart=apart)

    def apply(self, plan: SitePlan | MixPlan | BlockPlan) -> None:
        if isinstance(plan, BlockPlan):
            output = plan.replacement.site.output
            old, done = self.node(output), apply_block(self, plan)
            # of attentions that read it with nothing between
            self.routed = [replace(r, given=done.result) if r.given is old else r for r in self.routed] + [done]
            self._by_value[output] = done.result
            return
        site = plan.replacement.site
        if isinstance(plan, MixPlan):
            output = plan.replacement.around.output
            self.replaced.append(self.node(output))
            given = self.node(plan.replacement.around.input)
            mixed = apply_mixing(self, plan)
            if isinstance(plan.replacement.spec, ConditionalAttention):
                self.routed.append(Routed(plan.replacement, output, given, mixed))
            self.attended[site.name] = self._by_value[output] = mixed  # which a later site may read
            return
        for planned in plan.operands if plan.apart else ():
            self._separate(planned.operand)
        seams: dict[str, Laid] = {
            role: (self.node(o.seam), o.seam_axes) for role, o in (("q", site.q), ("k", site.k), ("v", site.v))
        }
        for planned in plan.operands:
            laid = self._reproject(site, planned)
            if planned.operand.seam == planned.operand.stem:
                seams[planned.role] = laid
        if site.joined:
            numbers = {n.index for p in plan.operands for n in below_stem(self.flow, p.operand)}
            self._measure([self.nodes[self.flow.nodes[i].name] for i in sorted(numbers)])
        self._attend(plan.replacement, seams)
        self.project_output(plan.replacement)

    def _separate(self, operand: Operand) -> None:
        """Edit a copy of what lies between stem and seam from now on; who else reads it keeps what was there."""
        copies = self._copies
        for name in [n.name for n in below_stem(self.flow, operand)]:
            original = self.nodes[name]
            if original in copies.values():
                continue
            for fx in (original, *(u for u in list(original.users) if u.target is operator.getitem)):
                with self.graph.inserting_after(fx):
                    copies[fx] = self.graph.node_copy(fx, lambda n: copies.get(n, n))
            self.nodes[name] = copies[original]
        for value, node in self._by_value.items():
            self._by_value[value] = copies.get(node, node)

    def project_output(self, replacement: Replacement) -> None:
        """Give the output projection its new weight and bias."""
        site, out = replacement.site, replacement.site.out
        for value, part in output_parts(replacement).items():
            assert out is not None
            array = replacement.tensors[f"out_{part}"]
            old = self.node(value)
            array = array if part == "bias" else out.stored(array, self.flow.shape(value))
            new = self.parameters.in_place_of(site.name, value, "out", part, array)
            for index in (out.node, getattr(self.flow.producer(out.output), "index", out.node)):
                reader = self.of(index)
                if reader is not None:
                    reader.replace_input_with(old, new)
            self.replaced.append(old)

    def _reproject(self, site: AttentionSite, planned: Reprojection) -> Laid:
        """Feed the path from its stem on with a projection to the new heads."""
        operand, heads = planned.operand, planned.heads
        known = self._stems.get((operand.stem, heads))
        if known is not None:
            return known
        stem, like = self.node(operand.stem), self.of(operand.projection.node) or self.node(operand.stem)
        axes = operand.stem_axes
        if operand.seam == operand.stem and not operand.presents:
            axes = tuple(LETTERS)  # nothing lies between: lay heads out as attention wants them
        group = self.flow.shape(operand.stem)[axes.index("g")] if "g" in axes else 1
        weight, bias = (self.parameters.of_operand(site.name, planned, part) for part in ("weight", "bias"))
        with self.graph.inserting_before(stem.next):
            out = self.emitter.call(like, aten.linear.default, self.node(planned.input), weight, bias)
            out = self.emitter.call(like, aten.unflatten.int, out, 2, [heads, operand.dim])
            out = self.emitter.arranged(like, out, "bshd" if operand.batch_first else "sbhd", axes, group)
            wanted = self.view.tensors[operand.stem].dtype  # a cast may lie between projection and stem
            if wanted != self.view.tensors[operand.projection.output].dtype:
                out = self.emitter.call(like, aten.to.dtype, out, wanted)
        self._rewire(site, planned, stem, out)
        self._stems[operand.stem, heads] = (out, axes)
        return out, axes

    def _regain(self, site: AttentionSite, planned: Reprojection) -> None:
        """A norm on the path multiplies the new heads by their own numbers."""
        norm = planned.operand.norm
        for value, numbers in planned.gains.items():
            assert norm is not None and norm.gains is not None
            part = "gain" if value == norm.gains.gain else "shift"
            old, reader = self.node(value), self.of(norm.gains.reader)
            assert reader is not None  # a path inside a wrapped region is not planned
            reader.replace_input_with(old, self.parameters.in_place_of(site.name, value, planned.role, part, numbers))
            self.replaced.append(old)

    def _rewire(self, site: AttentionSite, planned: Reprojection, stem: FxNode, new: FxNode) -> None:
        """The path reads the new stem; its sizes, and what a norm multiplies heads by, follow the number of heads."""
        path = [self.nodes[n.name] for n in below_stem(self.flow, planned.operand)]
        for change in planned.resizes:  # these hold what a node reads, too, so they come first
            self.nodes[change.node].args = torch.fx.node.map_arg(change.args, lambda n: self.nodes[n.name])
        self._regain(site, planned)
        for user in list(stem.users):
            if user in path or (user.op == "output" and planned.operand.presents):
                user.replace_input_with(stem, new)
        for fx in path:
            if fx.target is aten.view.default:  # the new stem may have other strides
                fx.target = aten.reshape.default
        if not site.joined:  # else streams have different numbers of heads until the last is fed anew
            self._measure(path)

    def _measure(self, path: Sequence[FxNode]) -> None:
        for fx in path:
            self.emitter.measure(fx)
            for user in fx.users:
                if user.target is operator.getitem:
                    self.emitter.measure(user)

    def _attend(self, replacement: Replacement, seams: dict[str, Laid]) -> None:
        site, spec = replacement.site, replacement.grouped
        output = self.node(site.output)
        like = self.of(site.anchor) or output
        sizes = {
            "q": (spec.heads, spec.head_dim),
            "k": (spec.kv_heads, spec.head_dim),
            "v": (spec.kv_heads, spec.value_dim),
        }
        with self.graph.inserting_before(output):
            q, k, v = (self.emitter.canonical(like, *seams[role], *sizes[role]) for role in "qkv")
            if replacement.linear is not None:
                result = linear_attention(self, like, replacement, q, k, v)
            else:
                result = self._softmax(site, spec, like, q, k, v)
            result = self.emitter.arranged(like, result, LETTERS, site.output_axes)
            if any(u.target is aten.view.default for u in output.users):
                result = self.emitter.call(like, aten.contiguous.default, result)
        self.attended[site.name] = result
        output.replace_all_uses_with(result)
        self._reshape_behind(result)

    def _reshape_behind(self, node: FxNode) -> None:
        """Views of what has other strides than before become reshapes, which copy where they must."""
        todo = [*node.users]
        while todo:
            user = todo.pop()
            if user.target is aten.view.default:
                user.target = aten.reshape.default
            if user.target in RELAYING:
                todo.extend(user.users)

    def _softmax(
        self, site: AttentionSite, spec: GroupedQueryAttention, like: FxNode, q: FxNode, k: FxNode, v: FxNode
    ) -> FxNode:
        mask = mask_of(self.emitter, like, site, self.view, self.node)
        if spec.pattern:
            mask = narrowed(self.emitter, like, _with_order(spec), spec.heads, q, k, mask)
            spec = replace(spec, causal=False)
        return attention(self.emitter, like, spec, q, k, v, mask)

    def of(self, index: int) -> FxNode | None:
        """The graph's node for a node of the flow; None inside a wrapped region."""
        node = self.flow.nodes[index]
        return None if is_nested(node) else self.nodes.get(node.name)

    def finish(self, sites: Iterable[AttentionSite | FeedForwardSite]) -> None:
        """Remove what is unread now, and give the new parameters keys."""
        for site in sites:
            sweep(self, site)
        self.parameters.finish(self.store.dropped())


def _with_order(spec: GroupedQueryAttention) -> Pattern:
    """The pattern, with the causal order in it where there is one."""
    return tuple(replace(sight, ordered=sight.ordered or spec.causal) for sight in spec.pattern)
