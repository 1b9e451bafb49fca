"""Surgery on a flat aten graph: new projections at the stems, one grouped attention per site, and a sweep."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node as FxNode

from codegen.sight import Pattern
from codegen.spec import GroupedQueryAttention
from passes.dataflow import Array, Value
from passes.site import AttentionSite, Operand
from passes.targets.replacement import Replacement
from passes.token_blocks import PARTED, parted_behind
from passes.weights.head_gains import gains_like, stored_gains
from passes.weights.projection import operand_bias, operand_weight
from rewriter.capture.torch_export import GraphView
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_attention import attention, mask_of
from rewriter.install.fx_emit import HINT, LETTERS, Emitter, aten, require_known
from rewriter.install.fx_linear import linear_attention, require_linear
from rewriter.install.fx_mixing import MixPlan, apply_mixing, plan_mixing
from rewriter.install.fx_path import Resize, below_stem, is_nested, resizes
from rewriter.install.fx_sight import narrowed
from rewriter.install.fx_store import Store

FLATTENING = frozenset({"Reshape", "Identity", "Cast", "Unsqueeze"})

RELAYING = frozenset(
    {aten.transpose.int, aten.permute.default, aten._to_copy.default, aten.to.dtype, aten.reshape.default}
)
"""Operators whose results may have their argument's strides, in another order."""

_ROLES = {"q": "query", "k": "key", "v": "value"}

Laid = tuple[FxNode, tuple[str, ...]]
"""A node and what its axes are."""


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


@dataclass(frozen=True)
class _NewParameter:
    """A parameter that has a node but no key yet.

    Attributes:
        sources: keys of the stored weights that the old matrix was made from.
        whole: the old matrix fed this operand alone, laid out like the new one: its key may be kept.
    """

    node: FxNode
    tensor: Tensor
    role: str
    part: str
    site: str
    sources: tuple[str, ...]
    whole: bool


@dataclass
class Editor:
    """Edits one graph: `plan` and `apply` site by site, then `finish`.

    Attributes:
        view: the graph before, recorded.
        store: its copy, and where its parameters live.
        attended: for each site the node that took the place of its output.
    """

    view: GraphView
    store: Store
    attended: dict[str, FxNode] = field(default_factory=dict)
    _parameters: dict[tuple[Value, bytes, bytes], _NewParameter] = field(default_factory=dict)
    _stems: dict[tuple[Value, int], Laid] = field(default_factory=dict)
    _replaced: list[FxNode] = field(default_factory=list)
    _copies: dict[FxNode, FxNode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flow = self.view.flow
        self.graph = self.store.graph
        self.emitter = Emitter(self.graph)
        self._nodes = {n.name: n for n in self.graph.nodes}
        self._by_value: dict[Value, FxNode] = {}
        for name, value in self.view.names.items():
            if name in self._nodes:
                self._by_value.setdefault(value, self._nodes[name])

    def node(self, value: Value) -> FxNode:
        """The graph's node for a value; raises UnsupportedModel if a wrapped region hides it."""
        found = self._by_value.get(value)
        if found is None:
            raise UnsupportedModel(f"{value} lies inside a wrapped region (autocast, flex_attention)", hint=HINT)
        return found

    # ------------------------------------------------------------ planning: nothing is edited yet

    def plan(self, replacement: Replacement, *, apart: bool = False) -> SitePlan | MixPlan:
        """What will be done at a site; `apart` is as in `SitePlan`. Raises UnsupportedModel if it cannot be."""
        if replacement.mixing is not None:
            return plan_mixing(self, replacement)
        if replacement.decoupled is not None:
            raise UnsupportedModel(
                "keys and values of different head counts are installed in torch modules only, not in graphs",
                hint="rewrite the module before it is exported",
            )
        site, spec, tensors = replacement.site, replacement.grouped, replacement.tensors
        plans = []
        stay = bool(spec.pattern) or replacement.linear is not None  # the projections do
        if replacement.linear is not None:
            require_linear(self, replacement)
        if any(m.windows or m.heads_first for m in site.modifiers):
            raise UnsupportedModel("masks meet its scores window by window, or heads before sequences", hint=HINT)
        if site.temperature is not None:
            raise UnsupportedModel("each head's scores have a temperature of their own", hint=HINT)
        if spec.pattern and spec.sinks:
            raise UnsupportedModel("it has attention sinks among its scores", hint=HINT)
        for role, operand in () if stay else site.shared:
            weight, bias = tensors[f"{role}_weight"], tensors.get(f"{role}_bias")
            planned = self._plan_operand(site, role, operand, spec.kv_heads, weight, bias, apart=apart)
            plans.append(replace(planned, gains=self._gains(replacement, role, operand)))
        if stay:
            pass
        elif "q_weight" in tensors:
            plans.append(self._plan_operand(site, "q", site.q, site.heads, tensors["q_weight"], tensors.get("q_bias")))
        else:
            plans += self._plan_queries(site)
        if not (site.k.seam and site.v.seam):
            raise UnsupportedModel("its heads are repeated before they are rotated", hint=HINT)
        require_known(site.q.seam_axes, splittable=True, apart=True)
        for axes in (site.k.seam_axes, site.v.seam_axes):
            require_known(axes, splittable=True)
        require_known(site.output_axes, splittable=False)
        masks = [m.value for m in site.modifiers if m.value is not None]
        for value in (site.q.seam, site.k.seam, site.v.seam, site.output, *masks, *self._output_parts(replacement)):
            self.node(value)
        if not stay:
            _require_one_mask(spec)
        return SitePlan(replacement, tuple(plans), apart)

    def _plan_queries(self, site: AttentionSite) -> list[Reprojection]:
        """Queries from projections or parts of parameters that go away, since keys or values come from them too."""
        gone = {o.projection.node for _, o in site.shared}
        parts = {v for _, o in site.shared for v in self._parted(o)}
        kept = [
            (f"q{i or ''}", o)
            for i, o in enumerate(site.q.parts)
            if o.projection.node in gone or parts & set(self._parted(o))
        ]
        return [
            self._plan_operand(site, role, o, site.heads, operand_weight(self.flow, o), operand_bias(self.flow, o))
            for role, o in kept
        ]

    def _parted(self, operand: Operand) -> list[Value]:
        """The stored weights that an operand's matrix is a part of."""
        weight = operand.projection.weight
        size = int(np.prod(self.flow.shape(weight)))
        return [v for v in self.flow.weights_above(weight) if int(np.prod(self.flow.weights[v].shape)) > size]

    def _plan_operand(
        self,
        site: AttentionSite,
        role: str,
        operand: Operand,
        heads: int,
        weight: Array,
        bias: Array | None,
        *,
        apart: bool = False,
    ) -> Reprojection:
        self.node(operand.stem)
        require_known(operand.stem_axes, splittable=False, apart=role == "q")
        if heads != operand.heads:
            self._require_private(site, role, operand, apart=apart)
        changes = tuple(resizes(self.flow, self._nodes, operand, heads))
        projected = self._three_axes(operand)
        if parted_behind(self.flow, operand, projected):
            raise UnsupportedModel(PARTED.format(_ROLES[role[0]]), hint=HINT)
        return Reprojection(role, operand, heads, projected, weight, bias, changes)

    def _gains(self, replacement: Replacement, role: str, operand: Operand) -> dict[Value, Array]:
        """New numbers of a norm on the operand's path, laid out as the old ones. Raises UnsupportedModel."""
        found = {}
        for part, value in stored_gains(operand).items():
            self.node(value)
            found[value] = gains_like(operand, replacement.tensors[f"{role}_{part}"], self.flow.shape(value))
        return found

    def _require_private(self, site: AttentionSite, role: str, operand: Operand, *, apart: bool) -> None:
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
        path = below_stem(self.flow, operand)
        changed = [operand.stem, *(v for n in path for v in n.outputs if v)]
        presents = {value for value, _ in operand.presents}
        mine = {n.index for n in (*path, *self.flow.ancestors(site.output))}
        readers = [n.name for v in changed[1:] for n in self.flow.consumers(v) if n.index not in mine]
        outputs = [v for v in changed[1:] if v in self.flow.outputs and v not in presents]
        early = [v for v in presents if v not in changed]
        for name in (*readers, *outputs, *early):
            raise UnsupportedModel(f"its {role} heads are also read at {name}", hint=HINT)

    def _three_axes(self, operand: Operand) -> Value:
        """The projection's input with batch and tokens on axes of their own, found above a flattening."""
        name = operand.projection.input
        while len(self.flow.shape(name)) != 3:
            node = self.flow.producer(name)
            above = node.inputs[0] if node is not None and node.op in FLATTENING else ""
            if not above or self.flow.shape(above)[-1] != self.flow.shape(name)[-1]:
                raise UnsupportedModel(
                    f"the projection of {operand.stem} reads a flattened tensor whose batch and token axes are lost",
                    hint=HINT,
                )
            name = above
        self.node(name)
        return name

    # ------------------------------------------------------------ one site

    def apply(self, plan: SitePlan | MixPlan) -> None:
        site = plan.replacement.site
        if isinstance(plan, MixPlan):
            output = plan.replacement.around.output
            self._replaced.append(self.node(output))
            mixed = apply_mixing(self, plan)
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
            self._measure([self._nodes[self.flow.nodes[i].name] for i in sorted(numbers)])
        self._attend(plan.replacement, seams)
        self._project_output(plan.replacement)

    def _separate(self, operand: Operand) -> None:
        """Edit a copy of what lies between stem and seam from now on; who else reads it keeps what was there."""
        copies = self._copies
        for name in [n.name for n in below_stem(self.flow, operand)]:
            original = self._nodes[name]
            if original in copies.values():
                continue
            for fx in (original, *(u for u in list(original.users) if u.target is operator.getitem)):
                with self.graph.inserting_after(fx):
                    copies[fx] = self.graph.node_copy(fx, lambda n: copies.get(n, n))
            self._nodes[name] = copies[original]
        for value, node in self._by_value.items():
            self._by_value[value] = copies.get(node, node)

    @staticmethod
    def _output_parts(replacement: Replacement) -> dict[Value, str]:
        """Values of the output projection that change, with the part that each is."""
        out = replacement.site.out
        named = () if out is None else ((out.weight, "weight"), (out.bias, "bias"))
        return {value: part for value, part in named if value is not None and f"out_{part}" in replacement.tensors}

    def _project_output(self, replacement: Replacement) -> None:
        """Give the output projection its new weight and bias."""
        site, out = replacement.site, replacement.site.out
        for value, part in self._output_parts(replacement).items():
            assert out is not None
            array = replacement.tensors[f"out_{part}"]
            old = self.node(value)
            array = array if part == "bias" else out.stored(array, self.flow.shape(value))
            new = self._new_numbers(site.name, value, "out", part, array)
            for index in (out.node, getattr(self.flow.producer(out.output), "index", out.node)):
                reader = self._of(index)
                if reader is not None:
                    reader.replace_input_with(old, new)
            self._replaced.append(old)

    def _reproject(self, site: AttentionSite, planned: Reprojection) -> Laid:
        """Feed the path from its stem on with a projection to the new heads."""
        operand, heads = planned.operand, planned.heads
        known = self._stems.get((operand.stem, heads))
        if known is not None:
            return known
        stem, like = self.node(operand.stem), self._of(operand.projection.node) or self.node(operand.stem)
        axes = operand.stem_axes
        if operand.seam == operand.stem and not operand.presents:
            axes = tuple(LETTERS)  # nothing lies between: lay heads out as attention wants them
        group = self.flow.shape(operand.stem)[axes.index("g")] if "g" in axes else 1
        weight, bias = (self._parameter(site, planned, part) for part in ("weight", "bias"))
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
            old, reader = self.node(value), self._of(norm.gains.reader)
            assert reader is not None  # a path inside a wrapped region is not planned
            reader.replace_input_with(old, self._new_numbers(site.name, value, planned.role, part, numbers))
            self._replaced.append(old)

    def _new_numbers(self, site: str, value: Value, role: str, part: str, array: Array) -> FxNode:
        """A node for what takes a parameter's place, in its shape unless heads are fewer.

        Sites that read one old parameter read one new one.
        """
        key = (value, role.encode(), array.tobytes())
        if key not in self._parameters:
            recorded = self.view.tensors[value]
            tensor = torch.from_numpy(np.array(array, order="C")).to(dtype=recorded.dtype, device=recorded.device)
            tensor = tensor.view(recorded.shape) if tensor.numel() == recorded.numel() else tensor
            node = self.store.read(re.sub(r"\W+", "_", f"{site}_{role}_{part}"))
            self.emitter.stand_for(node, tensor)
            sources, whole = self._stored(value, recorded.numel()), value in self.flow.weights
            self._parameters[key] = _NewParameter(node, tensor, role, part, site, sources, whole)
        return self._parameters[key].node

    def _rewire(self, site: AttentionSite, planned: Reprojection, stem: FxNode, new: FxNode) -> None:
        """The path reads the new stem; its sizes, and what a norm multiplies heads by, follow the number of heads."""
        path = [self._nodes[n.name] for n in below_stem(self.flow, planned.operand)]
        for change in planned.resizes:  # these hold what a node reads, too, so they come first
            self._nodes[change.node].args = torch.fx.node.map_arg(change.args, lambda n: self._nodes[n.name])
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
        like = self._of(site.anchor) or output
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

    def _of(self, index: int) -> FxNode | None:
        """The graph's node for a node of the flow; None inside a wrapped region."""
        node = self.flow.nodes[index]
        return None if is_nested(node) else self._nodes.get(node.name)

    # ------------------------------------------------------------ parameters

    def _parameter(self, site: AttentionSite, planned: Reprojection, part: str) -> FxNode | None:
        """A node for new weights; sites that use one old weight alike use one new weight."""
        operand = planned.operand
        array = planned.weight if part == "weight" else planned.bias
        old = operand.projection.weight if part == "weight" else operand.projection.bias
        if array is None or old is None:
            return None
        by_head = array.reshape(planned.heads, operand.dim, *array.shape[1:])[:, list(operand.stem_features)]
        rows = np.ascontiguousarray(by_head).reshape(array.shape)
        key = (old, operand.columns.tobytes(), rows.tobytes())
        if key not in self._parameters:
            recorded = self.view.tensors[old]
            tensor = torch.from_numpy(rows.copy()).to(dtype=recorded.dtype, device=recorded.device)
            node = self.store.read(re.sub(r"\W+", "_", f"{site.name}_{planned.role}_{part}"))
            self.emitter.stand_for(node, tensor)
            whole = operand.columns.size == operand.projection.features and operand.projection.out_first
            self._parameters[key] = _NewParameter(
                node, tensor, planned.role, part, site.name, self._stored(old, recorded.numel()), whole
            )
        return self._parameters[key].node

    def parameter(self, site: str, old: Value, rows: Array, *, whole: bool) -> FxNode:
        """A node for `rows`, which take the place of all columns of the matrix or bias `old`."""
        key = (old, b"", np.ascontiguousarray(rows).tobytes())
        if key not in self._parameters:
            recorded = self.view.tensors[old]
            tensor = torch.from_numpy(np.array(rows)).to(dtype=recorded.dtype, device=recorded.device)
            part = "weight" if rows.ndim == 2 else "bias"
            node = self.store.read(re.sub(r"\W+", "_", f"{site}_kv_{part}"))
            self.emitter.stand_for(node, tensor)
            stored = self._stored(old, recorded.numel())
            self._parameters[key] = _NewParameter(node, tensor, "kv", part, site, stored, whole)
        return self._parameters[key].node

    def vector(self, replacement: Replacement, part: str) -> FxNode:
        """A node for a parameter of a mix."""
        array, out = replacement.tensors[part], replacement.site.out
        key = (out.weight if out is not None else "", part.encode(), array.tobytes())
        if key not in self._parameters:
            recorded = self.view.tensors[replacement.around.output]
            wide = recorded.dtype if recorded.dtype == torch.float64 else torch.float32
            tensor = torch.from_numpy(np.array(array)).to(dtype=wide, device=recorded.device)
            node = self.store.read(re.sub(r"\W+", "_", f"{replacement.site.name}_mix_{part}"))
            self.emitter.stand_for(node, tensor)
            weight = self.view.tensors[out.weight] if out is not None else None
            sources = self._stored(out.weight, weight.numel()) if out is not None and weight is not None else ()
            self._parameters[key] = _NewParameter(node, tensor, "mix", part, replacement.site.name, sources, False)
        return self._parameters[key].node

    def feature(self, replacement: Replacement, part: str) -> FxNode:
        """A node for a parameter of linear attention, in float32; sites that share their keys' weight share it."""
        array, value = replacement.tensors[part], replacement.site.k.projection.weight
        key = (value, part.encode(), array.tobytes())
        if key not in self._parameters:
            recorded = self.view.tensors[value]
            tensor = torch.from_numpy(np.array(array)).to(dtype=torch.float32, device=recorded.device)
            node = self.store.read(re.sub(r"\W+", "_", f"{replacement.site.name}_linear_{part}"))
            self.emitter.stand_for(node, tensor)
            sources = self._stored(value, recorded.numel())
            self._parameters[key] = _NewParameter(node, tensor, "linear", part, replacement.site.name, sources, False)
        return self._parameters[key].node

    def constant(self, site: str, tensor: Tensor) -> FxNode:
        """A node for a table of numbers that is no parameter."""
        key = ("", b"", tensor.cpu().numpy().tobytes())
        if key not in self._parameters:
            node = self.store.read(re.sub(r"\W+", "_", f"{site}_kv_index"))
            self.emitter.stand_for(node, tensor)
            self._parameters[key] = _NewParameter(node, tensor, "kv", "index", site, (), False)
        return self._parameters[key].node

    def _stored(self, value: Value, size: int) -> tuple[str, ...]:
        reads = [value, *(v for n in self.flow.ancestors(value) for v in n.inputs)]
        found = dict.fromkeys(w.name for v in reads if (w := self.flow.weights.get(v)) is not None and w.name)
        return tuple(name for name in found if (t := self.store.get(name)) is not None and t.numel() == size)

    # ------------------------------------------------------------ clean-up

    def finish(self, sites: Iterable[AttentionSite]) -> None:
        """Remove what is unread now, and give the new parameters keys."""
        for site in sites:
            self._sweep(site)
        gone = self.store.dropped()
        kept_keys = [p.sources[0] for p in self._parameters.values() if self._may_keep(p, gone)]
        keyed: list[tuple[_NewParameter, str, bool]] = []
        for new in self._parameters.values():
            old = [t for name in new.sources if (t := self.store.get(name)) is not None]
            keep = self._may_keep(new, gone) and kept_keys.count(new.sources[0]) == 1
            keyed.append((new, new.sources[0] if keep else _key(new), any(t.requires_grad for t in old)))
        for key in gone:
            self.store.remove(key)
        for new, wanted, trainable in keyed:
            learned = new.tensor.is_floating_point()
            tensor = nn.Parameter(new.tensor, requires_grad=trainable) if learned else new.tensor
            self.store.put(new.node, self._free(wanted), tensor)

    @staticmethod
    def _may_keep(new: _NewParameter, gone: set[str]) -> bool:
        return new.whole and len(new.sources) == 1 and new.sources[0] in gone

    def _free(self, wanted: str) -> str:
        key, number = wanted, 0
        while self.store.get(key) is not None:
            number += 1
            key = f"{wanted}_{number}"
        return key

    def _sweep(self, site: AttentionSite) -> None:
        """Erase the site's nodes that nothing reads, and what only they read."""
        numbers = {*site.nodes, *(o.projection.node for o in site.operands)}
        numbers |= {i for o in site.operands for i in o.path}
        matched = {n for i in numbers if (n := self._of(i)) is not None}
        matched |= {u for n in matched for u in n.users if u.target is operator.getitem}
        todo = [self.node(site.output), *matched, *self._replaced]
        self._replaced = []
        erased: set[FxNode] = set()
        alive = set(self.graph.nodes)
        while todo:
            node = todo.pop()
            if node in erased or node not in alive or not self._removable(node, matched):
                continue
            for check in [*node.users]:
                self.graph.erase_node(check)
                erased.add(check)
            inputs = node.all_input_nodes
            erased.add(node)
            if self.store.is_weight(node):
                self.store.drop(node)
            else:
                self.graph.erase_node(node)
            todo += inputs

    def _removable(self, node: FxNode, matched: set[FxNode]) -> bool:
        if any(u.target is not aten._assert_tensor_metadata.default for u in node.users):
            return False
        if self.store.is_weight(node):
            return True
        return node.op in {"call_function", "get_attr"} and (node in matched or not node.is_impure())


def _key(new: _NewParameter) -> str:
    """Beside the old weight, with the operand's letter: "attn.c_attn.weight" gives "attn.c_attn.k_weight"."""
    path, _, leaf = new.sources[0].rpartition(".") if len(new.sources) == 1 else (new.site, "", new.part)
    path = ".".join(re.sub(r"\W+", "_", step) for step in path.split("."))
    leaf = new.part if new.role in ("mix", "linear") else leaf
    return f"{path}.{new.role}_{leaf}" if path else f"{new.role}_{leaf}"


def _with_order(spec: GroupedQueryAttention) -> Pattern:
    """The pattern, with the causal order in it where there is one."""
    return tuple(replace(sight, ordered=sight.ordered or spec.causal) for sight in spec.pattern)


def _require_one_mask(spec: GroupedQueryAttention) -> None:
    if spec.causal and (spec.bias or spec.softcap is not None):
        raise UnsupportedModel("it is causal by an attribute and has a mask or softcap beside it", hint=HINT)
