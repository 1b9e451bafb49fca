"""Door out for ONNX: edits the model at the matched sites and nowhere else.

Per site: new key and value projections feed the old path (rotation, norms, cache) at its stem, which then works on
fewer heads; one grouped attention node takes the place of the two contractions and the softmax; what is left
unread is removed. The node is the standard Attention operator where the file's opset has it (23, 24), else a
call of a model-local function.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from codegen.ops.grouped_query_attention.onnx_body import DOMAIN, attributes, function
from codegen.ops.grouped_query_attention.onnx_tiles import functions
from passes.dataflow import Array, Flow, Value
from passes.site import AttentionSite, Modifier, Operand
from passes.targets.block import BlockReplacement
from passes.targets.replacement import Replacement
from passes.weights.head_gains import gains_like, stored_gains
from passes.weights.projection import operand_bias, operand_weight
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.capture.unfuse import WrittenOut
from rewriter.install.onnx_experts import ExpertWriter
from rewriter.install.onnx_linear import linear_call
from rewriter.install.onnx_mixing import Mixing
from rewriter.install.onnx_obstacles import (
    HEADS_IN_BATCH,
    fed_queries,
    fused_shape,
    group_size,
    heads_apart,
    laid_freely,
    unflattened_input,
    window_size,
)
from rewriter.install.onnx_quantised import emit_product
from rewriter.install.onnx_repeat import repeat_heads
from rewriter.install.onnx_weights import emit_like, emit_plain
from rewriter.onnx_nodes import NodeWriter


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
    editor = _Editor(capture)
    done: list[Installed] = []
    records: list[dict[str, Any]] = []
    for r in replacements:
        projections = {capture.nodes[o.projection.node].name or "" for o in r.site.operands}
        done.append(editor.repeat(r) if r.site.name in repeated else editor.replace(r))
        caches = [list(port) for operand in (r.site.k, r.site.v) for port in operand.presents]
        lost = tuple(name for p in projections for name in (gone or {}).get(p, ()))
        records.append(_record(r, replace(done[-1], removed=(*done[-1].removed, *lost)), done[-1].exact, caches))
    for b in blocks:
        mixture = editor.replace_block(b)
        records.append(_record(b, mixture, b.exact and mixture.exact, []))
    metadata = capture.model.metadata_props
    metadata["rewriter.version"] = version
    metadata["rewriter.target"] = target
    metadata["rewriter.sites"] = json.dumps(records)
    return done


def _record(
    replacement: Replacement | BlockReplacement, done: Installed, exact: bool, caches: list[list[Any]]
) -> dict[str, Any]:
    """What the file says of one site."""
    return {
        "name": replacement.site.name,
        "from": replacement.before,
        "to": replacement.after,
        "exact": exact,
        "changed": list(done.removed),
        "caches": caches,
    }


@dataclass
class _Editor:
    """Works site by site on one model.

    Attributes:
        shared: new initializers by content.
        dead: nodes beyond the matched ones that may be unread now.
        seams: for each seam already fed anew, the value that now stands there and its axes.
        standing_in: what has taken the place of a value that later sites may read.
        fed: for the site at hand, by role, what a fused operator that is kept reads instead of its old operand.
    """

    capture: OnnxCapture
    shared: dict[tuple[str, bytes], ir.Value] = field(default_factory=dict)
    seams: dict[Value, tuple[ir.Value, tuple[str, ...]]] = field(default_factory=dict)
    dead: list[ir.Node] = field(default_factory=list)
    standing_in: dict[Value, ir.Value] = field(default_factory=dict)
    fed: dict[str, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.capture.model
        self.graph = self.model.graph
        self.opset = self.model.opset_imports.get("", 1)
        taken = set(self.capture.values) | {n.name for n in self.capture.nodes if n.name} | self._in_bodies()
        self.write = NodeWriter(self.graph, taken)
        added = (w.constants for w in self.capture.written_out.values())
        self._rounded = any(n.op_type == "QuantizeLinear" for n in self.capture.nodes)
        self.mixing = Mixing(self)
        self.experts = ExpertWriter(self)
        self._stored = frozenset(self.graph.initializers).difference(*added)

    def _in_bodies(self) -> set[str]:
        """Names of values in bodies of control flow, which may stand for nothing else outside of them."""
        bodies = [graph for graph in self.model.graphs() if graph is not self.graph]
        made = (v for body in bodies for n in body for v in n.outputs)
        return {v.name for body in bodies for v in (*body.inputs, *body.initializers.values()) if v.name} | {
            v.name for v in made if v.name
        }

    # ------------------------------------------------------------ one site

    def replace(self, replacement: Replacement) -> Installed:
        site = replacement.site
        if replacement.mixing is not None:
            last, biases = self.mixing.install(replacement)
            removed = [name for bias in biases for name in self._unread(bias)]
            removed += self._sweep([last, *self._old_nodes(site)])
            removed += self._sweep(self._release_shapes(site))
            return Installed(site.name, tuple(n for n in removed if n in self._stored), 0.0, False)
        self.fed = {}
        if replacement.linear is not None:
            self._attend(replacement)
            removed = [*self._sweep(self._old_nodes(site)), *self._sweep(self._release_shapes(site))]
            return Installed(site.name, tuple(n for n in removed if n in self._stored), 0.0, False)
        spec, error = replacement.grouped, 0.0
        regained: list[str] = []
        for role, operand in () if spec.pattern else site.shared:
            weight, bias = replacement.tensors[f"{role}_weight"], replacement.tensors.get(f"{role}_bias")
            error = max(error, self._reproject(site, role, operand, spec.kv_heads, weight, bias))
            regained += self._regain(site, role, operand, replacement)
        for role, operand in () if spec.pattern else fed_queries(replacement):
            flow, tensors = self.capture.flow, replacement.tensors
            weight = tensors["q_weight"] if "q_weight" in tensors else operand_weight(flow, operand)
            bias = tensors.get("q_bias") if "q_weight" in tensors else operand_bias(flow, operand)
            error = max(error, self._reproject(site, role, operand, site.heads, weight, bias))
        self._attend(replacement)
        lost, requantised = self._project_output(replacement)
        error = max(error, requantised)
        removed = [*regained, *lost, *self._sweep(self._old_nodes(site))]
        removed += self._sweep(self._release_shapes(site))
        exact = replacement.exact and error < 1e-6 and not self._rounded
        return Installed(site.name, tuple(n for n in removed if n in self._stored), error, exact)

    def repeat(self, replacement: Replacement) -> Installed:
        """Shrink the projections of keys and values, and leave the attention as it is."""
        site = replacement.site
        unread, error = repeat_heads(self, replacement)
        removed = [n for n in self._sweep(unread) if n in self._stored]
        return Installed(site.name, tuple(removed), error, replacement.exact and error < 1e-6 and not self._rounded)

    def replace_block(self, replacement: BlockReplacement) -> Installed:
        site = replacement.site
        last = self.experts.install(replacement)
        removed = self._sweep([last, *(self.capture.nodes[i] for i in reversed(site.nodes))])
        return Installed(site.name, tuple(n for n in removed if n in self._stored), 0.0, not self._rounded)

    def _reproject(
        self, site: AttentionSite, role: str, operand: Operand, heads: int, weight: Array, bias: Array | None
    ) -> float:
        """Feed the path from its stem on with a projection to `heads` heads."""
        projection = operand.projection
        stem = self.value(operand.stem)
        order = list(operand.stem_features)
        rows = weight.reshape(heads, operand.dim, -1)[:, order].reshape(heads * operand.dim, -1)
        tokens = ("b", "s") if operand.batch_first else ("s", "b")
        nodes, stored, out, error = self._project(operand, rows, f"{site.name}.{role}")
        if bias is not None:
            vector = bias.reshape(heads, operand.dim)[:, order].reshape(-1)
            assert projection.bias is not None
            held = emit_like(self.value(projection.bias), vector, f"{site.name}.{role}.bias", self.write.unique)
            nodes += held.nodes
            stored += held.initializers
            out = self.write.op(nodes, "Add", [out, self.share(held.value) if not held.nodes else held.value],
                           f"{site.name}.{role}.projected")  # fmt: skip
        wanted, present = (self.capture.element_type(v) for v in (operand.stem, projection.output))
        if wanted is not None and present is not None and wanted != present:
            out = self.write.op(nodes, "Cast", [out], f"{site.name}.{role}.cast", to=int(wanted))
        axes = operand.stem_axes
        kept = self._kept_operator(site)
        inside = kept is not None and self._stem_is_inside(kept, role, operand)
        if kept is not None and inside:
            axes = ("b", "s", "hd") if kept.flat else ("b", "h", "s", "d")
        elif laid_freely(operand):
            axes = ("b", "h", "s", "d")
        group = group_size(self.capture.flow, operand)
        out = self._arrange(nodes, out, tokens, axes, heads, operand.dim, f"{site.name}.{role}", group)
        producer = stem.producer()
        assert producer is not None
        self.graph.insert_after(producer, nodes)
        for value in stored:
            if value.name and value.name not in self.graph.initializers and value.uses():
                self.graph.register_initializer(value)
        if inside:
            self.fed[role] = out
            return error
        self._rewire(operand, stem, out, heads)
        self.seams[operand.seam] = (out, axes) if operand.seam == operand.stem else (
            self.value(operand.seam), operand.seam_axes)  # fmt: skip
        return error

    def _regain(self, site: AttentionSite, role: str, operand: Operand, replacement: Replacement) -> list[str]:
        """A norm on the path multiplies the new heads by their own numbers; returns removed initializers."""
        removed: list[str] = []
        for part, name in stored_gains(operand).items():
            assert operand.norm is not None and operand.norm.gains is not None
            old, reader = self.value(name), self.capture.nodes[operand.norm.gains.reader]
            shape = self.capture.flow.shape(name)
            numbers = gains_like(operand, replacement.tensors[f"{role}_{part}"], shape)
            emitted = emit_like(old, numbers, f"{site.name}.{role}.{part}", self.write.unique)
            new = emitted.value if emitted.nodes else self.share(emitted.value)
            self.graph.insert_before(reader, emitted.nodes)
            for position, value in enumerate(reader.inputs):
                if value is old:
                    reader.replace_input_with(position, new)
            for value in emitted.initializers:
                if value.name and value.name not in self.graph.initializers and value.uses():
                    self.graph.register_initializer(value)
            removed += self._unread(old)
        return removed

    def _project(
        self, operand: Operand, rows: Array, name: str
    ) -> tuple[list[ir.Node], list[ir.Value], ir.Value, float]:
        """(nodes, initializers, result without bias, requantisation error) of the product with `rows` [out, in]."""
        projection, x = operand.projection, self._three_axes(operand)
        nodes: list[ir.Node] = []
        if len(self.capture.flow.shape(x.name or "")) == 2:  # one sequence, without a batch
            shape = self.write.ints([1, -1, rows.shape[1]], f"{name}.sequence")
            x = self.write.op(nodes, "Reshape", [x, shape], f"{name}.input")
        quantised = self.capture.quantised.get(projection.node)
        if quantised is not None:
            product = emit_product(quantised, x, rows.T, f"{name}.weight", self.write.unique)
            return [*nodes, *product.nodes], product.initializers, product.value, product.error
        old = self.value(projection.weight)
        store = emit_like if projection.weight_axes is None else emit_plain
        emitted = store(old, rows if projection.out_first else rows.T, f"{name}.weight", self.write.unique)
        if not emitted.nodes:
            emitted.value = self.share(emitted.value)
        nodes += emitted.nodes
        matrix = emitted.value
        if projection.out_first:
            matrix = self.write.op(nodes, "Transpose", [matrix], f"{name}.weight_t", perm=[1, 0])
        out = self.write.op(nodes, "MatMul", [x, matrix], f"{name}.matmul")
        return nodes, list(emitted.initializers), out, emitted.error

    def share(self, value: ir.Value) -> ir.Value:
        """Equal new initializers are stored once: weights that layers shared stay shared."""
        tensor = value.const_value
        if tensor is None:
            return value
        return self.shared.setdefault((str(tensor.dtype) + str(tensor.shape), tensor.tobytes()), value)

    def _three_axes(self, operand: Operand) -> ir.Value:
        name = unflattened_input(self.capture, operand)
        assert name is not None  # sites where it is lost are not installed
        return self.value(name)

    def _arrange(
        self,
        nodes: list[ir.Node],
        value: ir.Value,
        tokens: tuple[str, str],
        axes: tuple[str, ...],
        heads: int,
        dim: int,
        name: str,
        group: int = 1,
    ) -> ir.Value:
        """[tokens..., heads * dim] as the stem is laid out; `group` is the size of an axis "g"."""
        if axes == (*tokens, "hd"):
            return value
        wanted = "".join(axes).replace("g", "")  # behind "h"; a last Reshape takes them apart
        value = self.write.op(
            nodes, "Reshape", [value, self.write.ints([0, 0, heads, dim], f"{name}.split")], f"{name}.heads"
        )
        have = "".join(tokens) + "hd"
        perm = [have.index(a) for a in wanted]
        if perm != [0, 1, 2, 3]:
            value = self.write.op(nodes, "Transpose", [value], f"{name}.ordered", perm=perm)
        if all(len(a) == 1 for a in axes) and "g" not in axes:
            return value
        if axes in HEADS_IN_BATCH:
            return self._lead(nodes, value, [-1], [2, 3], f"{name}.arranged")
        shape = fused_shape(axes, heads, dim, group)
        assert shape is not None  # sites laid out otherwise are not installed
        return self.write.op(nodes, "Reshape", [value, self.write.ints(shape, f"{name}.fused")], f"{name}.arranged")

    def _rewire(self, operand: Operand, stem: ir.Value, new: ir.Value, heads: int) -> None:
        """The path reads the new stem; its values, caches and presents change their number of heads."""
        inside = {id(self.capture.nodes[i]) for i in operand.path}
        for node, position in list(stem.uses()):
            if id(node) in inside:
                node.replace_input_with(position, new)
        if stem.is_graph_output():
            self._become_output(stem, new)
        if heads == operand.heads:
            return
        for index, axis in operand.reshapes:
            self._recount(self.capture.nodes[index], axis, operand.heads, heads)
        for index in operand.path:
            node = self.capture.nodes[index]
            self._narrow_gain(node)
            if node.op_type == "RotaryEmbedding" and node.attributes.get_int("num_heads", 0) == operand.heads:
                node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
            for value in node.outputs:
                if value is not stem and not value.is_graph_output():
                    value.shape = None
        if operand.past is not None and operand.past_head_axis is not None:
            _resize(self.value(operand.past), operand.past_head_axis, heads)
        for name, axis in operand.presents:
            _resize(new if name == operand.stem else self.value(name), axis, heads)

    def _narrow_gain(self, node: ir.Node) -> None:
        """A norm whose numbers are spread over heads, and the same for all of them, is given those of one.

        They are inputs of the norm, or written out behind it.
        """
        if node.op_type in {"RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization"}:
            places = [1, 2]
        elif node.op_type in {"Mul", "Add"}:
            places = [i for i, value in enumerate(node.inputs) if value is not None and self._is_constant(value.name)]
        else:
            return
        for position, value in enumerate(node.inputs):
            name = value.name if value is not None and position in places else None
            if name is None or len(self.capture.flow.shape(name)) < 2:
                continue
            numbers = np.asarray(self.capture.flow.value(name))
            rows = numbers.reshape(-1, numbers.shape[-1])
            if len(rows) > 1 and (rows == rows[0]).all():
                node.replace_input_with(position, self.write.constant(rows[0].copy(), f"{name}_of_one_head"))

    def _is_constant(self, name: Value | None) -> bool:
        if name is None or name not in self.capture.values:  # what was put in a moment ago
            return False
        return not self.capture.flow.data_dependent(name) and not self.capture.flow.is_fed(name)

    def _recount(self, node: ir.Node, axis: int, before: int, heads: int) -> None:
        """Write the new number of heads into a shape that is written out."""
        name = node.outputs[0].name
        assert name is not None and node.inputs[1] is not None
        if self._left_open(node.inputs[1], axis):
            return
        size = self.capture.flow.shape(name)[axis] // before * heads
        nodes: list[ir.Node] = []
        stem, rank = f"{name}.{heads}_heads", len(self.capture.flow.shape(name))
        parts = [self.write.ints([size], f"{stem}.size")]
        if axis > 0:
            first = self.write.ints([*range(axis)], f"{stem}.first")
            parts.insert(0, self.write.op(nodes, "Gather", [node.inputs[1], first], f"{stem}.lead"))
        if axis + 1 < rank:
            last = self.write.ints([*range(axis + 1, rank)], f"{stem}.last")
            parts.append(self.write.op(nodes, "Gather", [node.inputs[1], last], f"{stem}.rest"))
        shape = self.write.op(nodes, "Concat", parts, f"{stem}.shape", axis=0)
        self.graph.insert_before(node, nodes)
        node.replace_input_with(1, shape)

    def _left_open(self, shape: ir.Value, axis: int) -> bool:
        """Whether a constant shape leaves an axis to what comes in (-1, 0)."""
        name = shape.name
        return name is not None and self._is_constant(name) and bool(self.capture.flow.value(name)[axis] <= 0)

    def _become_output(self, old: ir.Value, new: ir.Value) -> None:
        position = next(i for i, o in enumerate(self.graph.outputs) if o is old)
        name, new.type, new.shape = old.name, old.type, old.shape
        old.name = self.write.unique(f"{name}_before")
        new.name = name
        self.graph.outputs[position] = new

    # ------------------------------------------------------------ attention

    def _attend(self, replacement: Replacement) -> None:
        site, spec = replacement.site, replacement.grouped
        kept = self._kept_operator(site)
        stays = not spec.pattern and replacement.linear is None
        if kept is not None and (stays or kept.node.op_type == "GroupQueryAttention"):
            self._put_back(kept, spec.kv_heads, window_size(spec.pattern))
            return
        q, k, v = (self.seams.get(o.seam, (self.value(o.seam), o.seam_axes)) for o in (site.q, site.k, site.v))
        if (
            stays
            and self.capture.flow.nodes[site.anchor].op == "Attention"
            and self._keep_operator(site, spec.kv_heads, k, v, self.seams.get(site.q.seam))
        ):
            return
        output = self.value(site.output)
        after = output.producer()
        assert after is not None
        nodes: list[ir.Node] = []
        operands = [
            self._canonical(nodes, value, axes, heads, f"{site.name}.{role}")
            for role, (value, axes), heads in (("q", q, spec.heads), ("k", k, spec.kv_heads), ("v", v, spec.kv_heads))
        ]
        dtype = self.capture.element_type(site.output) or output.dtype or ir.DataType.FLOAT
        operands[0] = self._tempered(nodes, site, operands[0], dtype)
        bias = None if replacement.linear is not None else self._bias(nodes, site, dtype, operands[0])
        plain = spec.softcap is None and not spec.masked_rows_are_zero and not spec.sinks and not spec.pattern
        if replacement.linear is not None:
            attended = linear_call(self, nodes, replacement, operands, dtype)
        elif self.opset in (23, 24) and plain and self._bias_has_queries(site):
            attended = self._standard(nodes, site, spec.causal, operands, bias)
        else:
            attended = self._function(nodes, replacement, operands, bias, dtype)
        attended = self._from_canonical(nodes, attended, site)
        attended.type, attended.shape = output.type, output.shape
        self.graph.insert_after(after, nodes)
        output.replace_all_uses_with(attended, replace_graph_outputs=True)

    def _keep_operator(
        self,
        site: AttentionSite,
        kv_heads: int,
        k: tuple[ir.Value, tuple[str, ...]],
        v: tuple[ir.Value, tuple[str, ...]],
        q: tuple[ir.Value, tuple[str, ...]] | None,
    ) -> bool:
        """A standard Attention operator repeats heads by itself: give it fewer, and new queries if there are any."""
        anchor = self.capture.nodes[site.anchor]
        flat = len(self.capture.flow.shape(self.capture.flow.nodes[site.anchor].inputs[0])) == 3
        wanted = ("b", "s", "hd") if flat else ("b", "h", "s", "d")
        elsewhere = any(fed is not None and fed[1] != wanted for fed in (q, k, v))
        if elsewhere or abs(site.scale - self._operator_scale(site)) > 1e-7:
            return False
        repeated = [v.producer() for v in anchor.inputs[1:3] if v is not None]
        if q is not None and site.q.seam == site.q.stem:
            anchor.replace_input_with(0, q[0])
        anchor.replace_input_with(1, k[0])
        anchor.replace_input_with(2, v[0])
        self.dead += [n for n in repeated if n is not None]
        if flat:
            anchor.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", kv_heads)
        return True

    def _kept_operator(self, site: AttentionSite) -> WrittenOut | None:
        """The fused operator that this site was written out from, if it goes on with fewer key/value heads."""
        written = self.capture.written_out.get(site.owner)
        return written if written is not None and written.native else None

    def _stem_is_inside(self, kept: WrittenOut, role: str, operand: Operand) -> bool:
        """Whether all between the projection and the operator only moves elements, so that it can be fed directly."""
        given = kept.operand(role)
        if given is None:  # packed with another operand
            return True
        flow = self.capture.flow
        before, stem = flow.producer(given.name or ""), flow.producer(operand.stem)
        return before is None or stem is None or before.index <= stem.index

    def _put_back(self, kept: WrittenOut, kv_heads: int, window: int | None = None) -> None:
        """The fused operator again, in place of what it was written out in, on fewer key/value heads or seeing less."""
        inputs = list(kept.inputs)
        for position, role in enumerate("qkv"):
            inputs[position] = self.fed.get(role, inputs[position])
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
        last = self.value(kept.outputs[0]).producer()
        assert last is not None
        self.graph.insert_after(last, node)
        for position, (name, new) in enumerate(zip(kept.outputs, node.outputs, strict=True)):
            if not name:
                continue
            old = self.value(name)
            new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = self.write.unique(f"{name}_before"), name
            self.dead += [n for n in [old.producer()] if n is not None]
            if position:
                _resize(new, 1, kv_heads)
        for past in kept.pasts:
            _resize(past, 1, kv_heads)

    def _operator_scale(self, site: AttentionSite) -> float:
        scale = self.capture.flow.nodes[site.anchor].attrs.get("scale")
        return float(scale) if scale else site.head_dim**-0.5

    def _canonical(
        self, nodes: list[ir.Node], value: ir.Value, axes: tuple[str, ...], heads: int, name: str
    ) -> ir.Value:
        """Any seam as [B, heads, tokens, features]."""
        if axes == ("b", "h", "s", "d"):
            return value
        if all(len(a) == 1 for a in axes) and len(axes) == 4:
            return self.write.op(nodes, "Transpose", [value], f"{name}.canonical", perm=[axes.index(a) for a in "bhsd"])
        if axes == ("bh", "s", "d"):
            return self._lead(nodes, value, [-1, heads], [1, 2], f"{name}.canonical")
        if axes == ("hb", "s", "d"):
            return self._heads_behind(nodes, value, heads, f"{name}.canonical")
        if axes == ("b", "s", "hd"):
            shape = self.write.ints([0, 0, heads, -1], f"{name}.split_shape")
            split = self.write.op(nodes, "Reshape", [value, shape], f"{name}.split")
            return self.write.op(nodes, "Transpose", [split], f"{name}.canonical", perm=[0, 2, 1, 3])
        if heads_apart(axes):
            perm = [[a or "g" for a in axes].index(letter) for letter in "bhgsd"]
            if perm != sorted(perm):
                value = self.write.op(nodes, "Transpose", [value], f"{name}.apart", perm=perm)
            return self._lead(nodes, value, [-1, heads], [3, 4], f"{name}.canonical")
        raise AssertionError(f"queries, keys or values laid out as {axes} are not installed")

    def _from_canonical(self, nodes: list[ir.Node], value: ir.Value, site: AttentionSite) -> ir.Value:
        axes, name = site.output_axes, f"{site.name}.output"
        if axes == ("b", "h", "s", "d"):
            return value
        if all(len(a) == 1 for a in axes) and len(axes) == 4:
            return self.write.op(nodes, "Transpose", [value], name, perm=["bhsd".index(a) for a in axes])
        if axes == ("bh", "s", "d"):
            return self._lead(nodes, value, [-1], [2, 3], name)
        if axes == ("hb", "s", "d"):
            value = self.write.op(nodes, "Transpose", [value], f"{name}.turned", perm=[1, 0, 2, 3])
            return self._lead(nodes, value, [-1], [2, 3], name)
        if axes == ("b", "s", "hd"):
            turned = self.write.op(nodes, "Transpose", [value], f"{name}.turned", perm=[0, 2, 1, 3])
            return self.write.op(nodes, "Reshape", [turned, self.write.ints([0, 0, -1], f"{name}.merged")], name)
        raise AssertionError(f"sites whose output is laid out as {axes} are not installed")

    def _heads_behind(self, nodes: list[ir.Node], value: ir.Value, heads: int, name: str) -> ir.Value:
        """[heads * B, S, D] as [B, heads, S, D]."""
        value = self._lead(nodes, value, [heads, -1], [1, 2], f"{name}.apart")
        return self.write.op(nodes, "Transpose", [value], name, perm=[1, 0, 2, 3])

    def _lead(self, nodes: list[ir.Node], value: ir.Value, lead: list[int], keep: list[int], name: str) -> ir.Value:
        """Reshape to `lead`, one size of which is -1, followed by the value's own sizes along the axes `keep`."""
        shape = self.write.op(nodes, "Shape", [value], f"{name}.shape")
        tail = self.write.op(nodes, "Gather", [shape, self.write.ints(keep, f"{name}.tail")], f"{name}.sizes")
        full = self.write.op(nodes, "Concat", [self.write.ints(lead, f"{name}.lead"), tail], f"{name}.full", axis=0)
        return self.write.op(nodes, "Reshape", [value, full], name)

    def _tempered(self, nodes: list[ir.Node], site: AttentionSite, query: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Queries [B, H, S, D] times what each head's scores are multiplied by."""
        if site.temperature is None:
            return query
        assert site.temperature.value is not None
        factor, name = self.value(site.temperature.value), f"{site.name}.tempered"
        if factor.dtype not in (None, dtype):
            factor = self.write.op(nodes, "Cast", [factor], f"{name}.factor", to=int(dtype))
        step = "Mul" if site.temperature.number == 1.0 else "Div"
        return self.write.op(nodes, step, [query, factor], name)

    def _bias(self, nodes: list[ir.Node], site: AttentionSite, dtype: ir.DataType, query: ir.Value) -> ir.Value | None:
        """All masks and biases added up as one tensor in the scores' dtype; `query` is [B, H, S, D]."""
        total: ir.Value | None = None
        for number, modifier in enumerate(m for m in site.modifiers if m.kind in {"bias", "mask", "unmask"}):
            part = self._additive(nodes, modifier, f"{site.name}.bias{number or ''}", dtype, site.heads)
            if modifier.windows is not None:
                part = self._by_batch(nodes, part, modifier, query, f"{site.name}.bias{number or ''}")
            total = (
                part if total is None else self.write.op(nodes, "Add", [total, part], f"{site.name}.bias_sum{number}")
            )
        return total

    def _additive(
        self, nodes: list[ir.Node], modifier: Modifier, name: str, dtype: ir.DataType, heads: int
    ) -> ir.Value:
        assert modifier.value is not None and modifier.number is not None
        value = self.value(modifier.value)
        if modifier.kind == "bias":
            if modifier.number != 1.0:
                value = self.write.op(
                    nodes, "Mul", [value, self.write.scalar(modifier.number, dtype, f"{name}.factor")], name
                )
        else:
            zero = self.write.scalar(0.0, dtype, f"{name}.zero")
            low = float(np.finfo(dtype.numpy()).min) if dtype.numpy() in (np.float32, np.float16) else -np.inf
            masked = modifier.number if np.isinf(modifier.number) else max(modifier.number, low)
            fill = self.write.scalar(masked, dtype, f"{name}.masked")
            pair = [zero, fill] if modifier.kind == "mask" else [fill, zero]
            value = self.write.op(nodes, "Where", [value, *pair], name)
        if modifier.apart is not None:
            return self._joined(nodes, value, self.capture.flow.shape(modifier.value), modifier.apart, name)
        if modifier.windows is not None:
            return value
        if modifier.heads_first:
            return self._heads_behind(nodes, value, heads, f"{name}.by_head")
        if len(self.capture.flow.shape(modifier.value)) == 3 and self.capture.flow.shape(modifier.value)[0] != 1:
            value = self._lead(nodes, value, [-1, heads], [1, 2], f"{name}.by_head")
        return value

    def _by_batch(
        self, nodes: list[ir.Node], value: ir.Value, modifier: Modifier, query: ir.Value, name: str
    ) -> ir.Value:
        """What broadcasts to [B / W, W, H, S, T], as what broadcasts to [B, H, S, T]."""
        assert modifier.windows is not None and modifier.value is not None
        shape = self.capture.flow.shape(modifier.value)
        counted = self.write.op(nodes, "Shape", [query], f"{name}.query")
        batch = self.write.op(nodes, "Gather", [counted, self.write.ints([0], f"{name}.first")], f"{name}.batch")
        images = self.write.op(
            nodes, "Div", [batch, self.write.ints([modifier.windows], f"{name}.per")], f"{name}.images"
        )
        ones = self.write.ints([modifier.windows, 1, 1, 1], f"{name}.windows")
        wide = self.write.op(nodes, "Concat", [images, ones], f"{name}.wide_shape", axis=0)
        value = self.write.op(nodes, "Expand", [value, wide], f"{name}.wide")
        heads = (1, 1, 1, *shape)[-3]
        return self._lead(nodes, value, [-1, heads], [3, 4], f"{name}.by_batch")

    def _joined(
        self, nodes: list[ir.Node], value: ir.Value, shape: tuple[int, ...], apart: tuple[int, int], name: str
    ) -> ir.Value:
        """What broadcasts to [B, KV, G, S, T], as what broadcasts to [B, KV * G, S, T]; `apart` is (KV, G)."""
        by_head = (1, 1, 1, *shape)[-4:-2] != (1, 1)
        groups, heads = apart if by_head else (1, 1)
        wide = self.write.ints([1, groups, heads, 1, 1], f"{name}.apart")
        value = self.write.op(nodes, "Expand", [value, wide], f"{name}.wide")
        return self._lead(nodes, value, [-1, groups * heads], [3, 4], f"{name}.joined")

    def _bias_has_queries(self, site: AttentionSite) -> bool:
        """Whether masks and biases have a row per query, which onnxruntime's Attention insists on."""
        shape = self.capture.flow.shape
        shapes = [shape(m.value) for m in site.modifiers if m.kind in {"bias", "mask", "unmask"} and m.value]
        queries = shape(site.q.seam)[next(i for i, a in enumerate(site.q.seam_axes) if "s" in a)]
        return not shapes or np.broadcast_shapes(*shapes, (1, 1))[-2] == queries

    def _rows_of_bias(self, site: AttentionSite) -> Literal["one", "each"] | None:
        """Whether masks and biases have one row for all queries or one for each; None if that is not told, or not all
        have four axes. Without any, "each"."""
        masks = [m for m in site.modifiers if m.kind in {"bias", "mask", "unmask"} and m.value]
        found = set()
        for flow in [self.capture.flow, *([self.capture.other.flow] if self.capture.other is not None else [])]:
            shapes = [flow.shape(m.value) for m in masks if m.value]
            queries, keys = (
                flow.shape(o.seam)[next(i for i, a in enumerate(o.seam_axes) if "s" in a)] for o in (site.q, site.k)
            )
            if masks and (any(m.apart for m in masks) or max(map(len, shapes)) != 4 or queries < 2):
                return None
            rows, columns = np.broadcast_shapes(*shapes)[-2:] if masks else (queries, keys)
            if columns != keys or rows not in (1, queries):
                return None
            found.add("one" if rows == 1 else "each")
        return found.pop() if len(found) == 1 else None  # type: ignore[return-value]

    def _standard(
        self, nodes: list[ir.Node], site: AttentionSite, causal: bool, operands: list[ir.Value], bias: ir.Value | None
    ) -> ir.Value:
        inputs = operands if bias is None else [*operands, bias]
        return self.write.op(nodes, "Attention", inputs, site.name, is_causal=int(causal), scale=site.scale)

    def _function(
        self,
        nodes: list[ir.Node],
        replacement: Replacement,
        operands: list[ir.Value],
        bias: ir.Value | None,
        dtype: ir.DataType,
    ) -> ir.Value:
        spec = replacement.grouped
        rows = self._rows_of_bias(replacement.site)
        tiled = functions(spec, self.opset, bias_by_key=rows == "one")
        bodies = tiled if rows is not None else [function(spec, self.opset)]
        for body in bodies:
            self.model.functions.setdefault(body.identifier(), body)
        self.model.opset_imports.setdefault(DOMAIN, 1)
        self.model.ir_version = max(self.model.ir_version, 8)
        sinks = []
        for m in (m for m in replacement.site.modifiers if m.kind == "sinks" and m.value):
            assert m.value is not None
            sinks.append(self.value(m.value))
            if m.apart is None:
                sinks[-1] = self._wide_sinks(nodes, m.value, operands[0], f"{replacement.site.name}.sinks")
            else:
                shape, name = self.capture.flow.shape(m.value), f"{replacement.site.name}.sinks"
                sinks[-1] = self._joined(nodes, sinks[-1], shape, m.apart, name)
        node = ir.Node(
            DOMAIN,
            bodies[0].name,
            [*operands, *([] if bias is None else [bias]), *sinks],
            attributes(spec, dtype),
            num_outputs=1,
            name=self.write.unique(f"{replacement.site.name}/attention"),  # a name that captures read the site off
        )
        node.outputs[0].name = self.write.unique(f"{replacement.site.name}.attended")
        nodes.append(node)
        return node.outputs[0]

    def _wide_sinks(self, nodes: list[ir.Node], name: Value, query: ir.Value, scope: str) -> ir.Value:
        """Sinks [B, H, S, n], expanded after the queries: files may do so after the old scores, which would stay."""
        value, shape = self.value(name), self.capture.flow.shape(name)
        expand = value.producer()
        if expand is None or expand.op_type != "Expand" or expand.inputs[0] is None or len(shape) != 4:
            return value
        counted = self.write.op(nodes, "Shape", [query], f"{scope}.query")
        rows = self.write.op(nodes, "Gather", [counted, self.write.ints([0, 1, 2], f"{scope}.axes")], f"{scope}.rows")
        size = self.write.op(
            nodes, "Concat", [rows, self.write.ints([shape[3]], f"{scope}.n")], f"{scope}.size", axis=0
        )
        return self.write.op(nodes, "Expand", [expand.inputs[0], size], f"{scope}.wide")

    def _project_output(self, replacement: Replacement) -> tuple[list[str], float]:
        """Give the output projection its new weight and bias; returns removed initializers, requantisation error."""
        site, out = replacement.site, replacement.site.out
        removed: list[str] = []
        worst = 0.0
        for part, name in () if out is None else (("weight", out.weight), ("bias", out.bias)):
            array = replacement.tensors.get(f"out_{part}")
            if array is None or name is None or out is None:
                continue
            old = self.value(name)
            shape = self.capture.flow.shape(name)
            shaped = array.reshape(shape) if part == "bias" else out.stored(array, shape)
            store = emit_plain if part == "weight" and out.weight_axes is not None else emit_like
            emitted = store(old, shaped, f"{site.name}.out.{part}", self.write.unique)
            new = emitted.value if emitted.nodes else self.share(emitted.value)
            reader = self.capture.nodes[out.node]
            last = self.value(out.output).producer()
            self.graph.insert_before(reader, emitted.nodes)
            for node in (reader, last):
                for position, value in enumerate(node.inputs if node is not None else ()):
                    if value is old and node is not None:
                        node.replace_input_with(position, new)
            for value in emitted.initializers:
                if value.name and value.name not in self.graph.initializers and value.uses():
                    self.graph.register_initializer(value)
            removed += self._unread(old)
            worst = max(worst, emitted.error)
        return removed, worst

    def _unread(self, value: ir.Value) -> list[str]:
        """Remove a weight that nothing reads any more, with what made it; returns names of removed initializers."""
        producer = value.producer()
        if producer is not None:
            return self._sweep([producer])
        if value.name and value.name in self.graph.initializers and not value.uses():
            del self.graph.initializers[value.name]
            return [value.name]
        return []

    # ------------------------------------------------------------ pieces

    def value(self, name: Value) -> ir.Value:
        return self.standing_in.get(name) or self.capture.values[name]

    # ------------------------------------------------------------ clean-up

    def _old_nodes(self, site: AttentionSite) -> list[ir.Node]:
        """What may have become unread, last first."""
        numbers = {*site.nodes, *(o.projection.node for o in site.operands)}
        numbers |= {i for o in site.operands for i in o.path}
        dead, self.dead = self.dead, []
        return dead + [self.capture.nodes[i] for i in sorted(numbers, reverse=True)]

    def _sweep(self, todo: list[ir.Node]) -> list[str]:
        """Remove unread nodes and what only they read; returns names of removed initializers."""
        removed: list[str] = []
        outputs = {id(o) for o in self.graph.outputs}
        while todo:
            node = todo.pop(0)
            if node.graph is None or any(o.uses() or id(o) in outputs for o in node.outputs):
                continue
            inputs = [v for v in node.inputs if v is not None]
            self.graph.remove(node, safe=True)
            for value in inputs:
                producer = value.producer()
                if producer is not None:
                    todo.append(producer)
                elif value.name and value.name in self.graph.initializers and not value.uses():
                    del self.graph.initializers[value.name]
                    removed.append(value.name)
        return removed

    def _release_shapes(self, site: AttentionSite) -> list[ir.Node]:
        """Where only shapes of old projections or scores are still read, read them off the projections' inputs instead.

        Returns the nodes that nothing reads any more.
        """
        flow = self.capture.flow
        released: list[ir.Node] = []
        for operand in site.operands:
            names = [*flow.nodes[operand.projection.node].outputs, operand.projection.output, operand.stem]
            names += [v for i in operand.path for v in flow.nodes[i].outputs]
            if self.capture.nodes[operand.projection.node].graph is not None:
                released += self._released(names, [operand])
        scores = [v for i in site.nodes if self.capture.nodes[i].graph is not None for v in flow.nodes[i].outputs]
        return released + self._released(scores, [site.q, site.k])

    def _released(self, names: Sequence[Value], operands: Sequence[Operand]) -> list[ir.Node]:
        """Readers of nothing but the shapes of these values, whose shapes come from elsewhere now."""
        done: list[ir.Node] = []
        for name in dict.fromkeys(names):
            value = self.capture.values.get(name)
            readers = {id(n): n for n, _ in value.uses()} if value is not None else {}
            if all(n.op_type == "Shape" for n in readers.values()):
                done += [n for n in readers.values() if self._release(n, name, operands)]
        return done

    def _release(self, reader: ir.Node, name: Value, operands: Sequence[Operand]) -> bool:
        parts = self._dimensions(name, [self._three_axes(o) for o in operands])
        if parts is None:
            return False
        start = reader.attributes.get_int("start", 0)
        end = reader.attributes.get_int("end", len(parts))
        nodes: list[ir.Node] = []
        stem = f"{reader.outputs[0].name}_released"
        whole = self.write.op(
            nodes, "Concat", [self._dimension(nodes, p, stem) for p in parts[start:end]], stem, axis=0
        )
        self.graph.insert_after(reader, nodes)
        reader.outputs[0].replace_all_uses_with(whole)
        return True

    def _dimension(self, nodes: list[ir.Node], part: tuple[ir.Value, int] | int, stem: str) -> ir.Value:
        if isinstance(part, int):
            return self.write.ints([part], f"{stem}.size")
        x, axis = part
        shape = self.write.op(nodes, "Shape", [x], f"{stem}.input")
        return self.write.op(nodes, "Gather", [shape, self.write.ints([axis], f"{stem}.axis")], f"{stem}.dim")

    def _dimensions(self, name: Value, sources: Sequence[ir.Value]) -> list[tuple[ir.Value, int] | int] | None:
        """Each dimension of a value as (source, its axis) or a constant, told from two recordings."""
        first = self.capture.flow
        other = self.capture.other
        second = other.flow if other is not None else first
        axes = [(x, axis) for x in sources for axis in (0, 1)]
        parts: list[tuple[ir.Value, int] | int] = []
        for size, later in zip(first.shape(name), second.shape(name), strict=True):
            like = (p for p in axes if self._sizes(p, first, second) == (size, later))
            found = next(like, None) if size != later else None
            if found is None and size != later:
                return None
            parts.append(size if found is None else found)
        return parts

    def _sizes(self, part: tuple[ir.Value, int], first: Flow, second: Flow) -> tuple[int, int]:
        x, axis = part
        assert x.name is not None
        return first.shape(x.name)[axis], second.shape(x.name)[axis]


def _resize(value: ir.Value, axis: int, heads: int) -> None:
    """Change one dimension of a declared shape."""
    if value.shape is not None and not value.shape.is_unknown_dim(axis):
        dims = list(value.shape)
        dims[axis] = heads
        value.shape = ir.Shape(dims)
