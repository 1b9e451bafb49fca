"""Door in for ONNX: a model seen as a Flow, with its values recorded by one onnxruntime session.

Only what lies around anchors is recorded. Structure comes from the file; layout operators run in numpy
(`onnx_vocabulary`); constant subgraphs (dequantised or transposed weights) are evaluated on demand.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from codegen.ops.grouped_query_attention.onnx_tiles import masked_name
from passes.dataflow import CONTRACTIONS, LAYOUT, Array, Flow, Node, Value, Weight, unflattened, unlike
from passes.match.feed_forward_blocks import recorded_values
from passes.match.masked_weights import MEET, OF_SUMS, SUMS
from passes.match.scores import anchors
from passes.products import with_products
from passes.provenance import PASS_THROUGH
from passes.softmaxes import with_softmaxes
from rewriter.capture.bounded_run import OUT_OF_BOUNDS, run_within, time_limit
from rewriter.capture.cache_sizes import CacheSize
from rewriter.capture.cut_weights import cutting_sizes, unchanged
from rewriter.capture.exact_integers import with_unsigned_weights
from rewriter.capture.feeds import MaskStyle, candidate_sizes, make_feeds
from rewriter.capture.fused.unfuse import obstacle
from rewriter.capture.fused.written_out import WrittenOut
from rewriter.capture.memory_limit import too_much
from rewriter.capture.onnx_constants import constant_tensor
from rewriter.capture.onnx_elementwise import single_node
from rewriter.capture.onnx_vocabulary import OPERATORS
from rewriter.capture.quantised import QuantisedProduct, quantised_product
from rewriter.capture.random_draws import require_no_draws
from rewriter.capture.sequences import OnTensors, on_tensors
from rewriter.capture.stretches import NODES as STRETCH
from rewriter.capture.stretches import Stretches, open_stretches
from rewriter.capture.unread import drop_unread
from rewriter.errors import UnsupportedModel, first_line

FUNCTION_DOMAIN = "rewriter.ops"

_PLAIN = frozenset(
    {
        *(ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS),
        *(ir.AttributeType.STRING, ir.AttributeType.STRINGS),
    }
)
"""Attributes that are numbers and words."""

_ELEMENT_TYPES = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
    "tensor(double)": ir.DataType.DOUBLE,
}


_UNRUNNABLE = "check that the file runs in onnxruntime with inputs of any size"
_UNIMPLEMENTED = (
    "onnxruntime has no CPU kernel for it, and files are rewritten on the CPU: export in float32 (or float16), rewrite "
    "that, and convert what comes out"
)


@dataclass(frozen=True)
class OnnxCapture:
    """A model file and its view.

    Attributes:
        model: the model itself; doors out edit it.
        flow: the view; ``flow.nodes[i]`` is ``nodes[i]``.
        nodes: the model's nodes in order.
        values: the model's values by name.
        session: runs the model with the recorded values as extra outputs.
        sizes: (batch, length, past) of the recording.
        feeds: the recorded inputs.
        written_out: fused operators that standard ones stand for in `model`, by the scope of what stands for them.
        quantised: products with quantised weights by node index; `flow` shows each as a product with a float matrix.
    """

    model: ir.Model
    flow: Flow
    nodes: tuple[ir.Node, ...]
    values: Mapping[str, ir.Value]
    session: _Session
    sizes: tuple[int, int, int]
    feeds: Mapping[str, Array]
    written_out: Mapping[str, WrittenOut] = field(default_factory=dict)
    quantised: Mapping[int, QuantisedProduct] = field(default_factory=dict)

    def element_type(self, name: Value) -> ir.DataType | None:
        """What onnxruntime inferred for a recorded value; files need not say it."""
        return _ELEMENT_TYPES.get(self.session.types.get(name, ""))

    @cached_property
    def other(self) -> OnnxCapture | None:
        """The same model recorded at other sizes; None if its sizes are fixed."""
        batch, length, past = self.sizes
        pasts = (past + 1, past) if past else (0,)  # some caches are as large as they are
        tried = [(b, length + 2, p) for p in pasts for b in (batch + 1, batch)]
        others = (self.at(sizes) for sizes in (*tried, (batch + 1, length, past)))  # images of other sides may not fit
        return next((other for other in others if other is not None), None)

    @cached_property
    def varies_all(self) -> bool:
        """Whether recordings at other sizes differ in all axes that inputs leave open."""
        batch, length, past = self.sizes
        if self.other is not None and self.other.sizes[1] == length:
            return False
        # an axis in which the file does not run at another size counts as varied, but for the sides of images: these
        # stay as they are at every third length
        later = length + (3 if self.other is None else 2)
        more = _feeds(self.model, self.written_out, (batch + 1, later, past + 1 if past else 0))
        shapes = {
            v.name: v.shape for v in self.model.graph.inputs if v.name and v.name in self.feeds and v.shape is not None
        }
        return more is not None and not any(
            not isinstance(declared, int) and size > 1 and size == later
            for name, shape in shapes.items()
            for declared, size, later in zip(shape, self.feeds[name].shape, more[name].shape, strict=True)
        )

    def at(self, sizes: tuple[int, int, int], seed: int = 1) -> OnnxCapture | None:
        """The same file recorded at other sizes; None if it does not run there or has the sizes baked in."""
        feeds = _feeds(self.model, self.written_out, sizes, seed)
        if feeds is None or all(feeds[n].shape == self.feeds[n].shape for n in feeds):
            return None
        try:
            recorded = self.session.run(feeds)
        except Exception:
            return None
        read = partial(_read, recorded, self.session.constants)
        return replace(self, flow=replace(self.flow, read=read), sizes=sizes, feeds=feeds)


def capture(model: ir.Model, written_out: Mapping[str, WrittenOut] | None = None) -> OnnxCapture:
    """View a model and record it at the first sizes at which onnxruntime runs it.

    Names are given to unnamed values, and model-local functions other than rewriter's own are inlined. `written_out`
    are the fused operators that `unfuse` wrote out in this model.
    Raises UnsupportedModel with onnxruntime's reason if the model runs at none, or if it draws random numbers.
    """
    _inline_functions(model)
    _name_everything(model)
    require_no_draws(model)
    captured = _captured_with(model, written_out or {}, {})
    sizes = cutting_sizes(captured.flow)
    if not sizes:
        return captured
    other = captured.other
    known = unchanged(captured.flow, other.flow if other is not None else None, sizes)
    return _captured_with(model, written_out or {}, known) if known else captured


def _captured_with(model: ir.Model, fused: Mapping[str, WrittenOut], known: Mapping[Value, Array]) -> OnnxCapture:
    """The view of a model in which these values, read off shapes of inputs, are constants."""
    nodes = tuple(model.graph)
    values = {v.name: v for v in _values(model) if v.name}
    products = {i: p for i, n in enumerate(nodes) if (p := quantised_product(n)) is not None}
    shown = (replace(n, inputs=()) if known.keys() & set(n.outputs) else n for n in _shown(nodes, products))
    flow = Flow(
        with_softmaxes(with_products(tuple(shown))),
        tuple(v.name for v in model.graph.inputs if v.name and v.name not in model.graph.initializers),
        tuple(v.name for v in model.graph.outputs if v.name),
        _weights(model, nodes) | _matrices(products.values()),
        lambda name: (_ for _ in ()).throw(KeyError(name)),
        _float_dtype(model),
    )
    constants = _Constants(model, {p.name: p for p in products.values()}, known)
    flow = replace(flow, read=partial(_read, {}, constants))
    wanted = (
        _wanted(flow)
        | recorded_values(flow)
        | cutting_sizes(flow)
        | {v.name for w in fused.values() for v in w.inputs if v is not None and v.name}
    )
    session = _Session(model, sorted(wanted - set(flow.weights) - set(flow.inputs)), constants)
    recorded, feeds, sizes = _first_run(model, fused, session)
    return OnnxCapture(
        model,
        replace(flow, read=partial(_read, recorded, constants)),
        nodes,
        values,
        session,
        sizes,
        feeds,
        fused,
        products,
    )


def _read(recorded: Mapping[str, Array], constants: _Constants, name: Value) -> Array:
    array = recorded.get(name)
    return constants.value(name) if array is None else array


def _feeds(
    model: ir.Model, written_out: Mapping[str, WrittenOut], sizes: tuple[int, int, int], seed: int = 0
) -> dict[str, Array] | None:
    """Inputs on which the operators that were written out would run too; None if these sizes are beyond them."""
    batch, length, past = sizes
    if not all(w.runs_at(batch, length, past) for w in written_out.values()):
        return None
    mask: MaskStyle = "ones" if any(w.equal_lengths for w in written_out.values()) else "mixed"
    return make_feeds(model, batch=batch, length=length, past=past, seed=seed, mask=mask, caches=_caches(written_out))


def _caches(written_out: Mapping[str, WrittenOut]) -> dict[str, CacheSize]:
    return {name: size for w in written_out.values() for name, size in w.cache_sizes.items()}


def _first_run(
    model: ir.Model, written_out: Mapping[str, WrittenOut], session: _Session
) -> tuple[dict[str, Array], dict[str, Array], tuple[int, int, int]]:
    reason = "no sizes to try"
    for sizes in candidate_sizes(model, _caches(written_out)):
        feeds = _feeds(model, written_out, sizes)
        if feeds is None:
            continue
        try:
            return session.run(feeds), feeds, sizes
        except OUT_OF_BOUNDS:
            raise
        except Exception as error:  # onnxruntime raises unrelated types
            reason = first_line(error)
    raise UnsupportedModel(
        f"onnxruntime cannot run the model: {reason}",
        hint=_UNIMPLEMENTED if "NOT_IMPLEMENTED" in reason else _UNRUNNABLE,
    )


class _Session:
    """The model in onnxruntime, optimisation off, with extra outputs; in one session, or in stretches if it is long."""

    def __init__(self, model: ir.Model, extra: Sequence[str], constants: _Constants) -> None:
        self.model, self.extra, self.constants = model, extra, constants
        self.time_limit = time_limit(model)

    @cached_property
    def _opened(self) -> ort.InferenceSession | Stretches:
        proto = ir.serde.serialize_model(self.model)
        drop_unread(proto, self.model)
        with_unsigned_weights(proto)
        present = {o.name for o in proto.graph.output}
        wanted = [n for n in self.extra if n not in present]
        opened = partial(open_session, folder=data_folder(self.model), optimise=False)
        if len(proto.graph.node) > STRETCH:
            with contextlib.suppress(Exception):  # opened as a whole, it says what is wrong with it
                return open_stretches(proto, wanted, opened)
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted)
        try:
            return opened(proto)
        except Exception as error:  # onnxruntime raises unrelated types
            raise too_much(error) or _refused(f"open the model: {first_line(error)}") from error

    @cached_property
    def types(self) -> dict[str, str]:
        """onnxruntime's name of each output's type."""
        return {o.name: str(o.type) for o in self._opened.get_outputs()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = list(self.types)
        arrays = run_within(self.time_limit, self._opened, names, feeds)
        out = {n: widened(a) for n, a in zip(names, arrays, strict=True) if isinstance(a, np.ndarray)}
        return {**out, **{n: widened(a) for n, a in feeds.items()}}


def _refused(what: str) -> UnsupportedModel:
    return UnsupportedModel(f"onnxruntime cannot {what}", hint="check that the file runs in onnxruntime")


def open_session(proto: onnx.ModelProto, folder: str | None, *, optimise: bool) -> ort.InferenceSession:
    """A CPU session from memory; external data is looked for in `folder`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        # both plans are made in a time that grows with the square of the graph (1.31), and serve few runs
        options.enable_mem_pattern = options.enable_mem_reuse = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of every matrix
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def data_folder(model: ir.Model) -> str | None:
    """Where the model's external data lies; None if it has none."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            return str(value.const_value.base_dir)
    return None


def widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


class _Constants:
    """Values that no input reaches: initializers, Constant nodes, and what is computed from them."""

    def __init__(self, model: ir.Model, matrices: Mapping[str, QuantisedProduct], known: Mapping[str, Array]) -> None:
        self.model, self.matrices, self.known = model, matrices, known
        self._computed: dict[str, Array] = {}
        self._producers = {o.name: n for n in model.graph for o in n.outputs if o.name}
        self._places = {id(n): i for i, n in enumerate(model.graph)}

    @cached_property
    def _unfed(self) -> frozenset[str]:
        """Names of computed values that no input reaches. Known at once: asking upwards each time takes a time that
        grows with the depth of the value."""
        held = self.model.graph.initializers
        known: set[str] = set(self.known)
        for node in self.model.graph:
            if all(name in known or name in held for name in _reads(node)):
                known.update(o.name for o in node.outputs if o.name)
        return frozenset(known)

    @cached_property
    def _time_limit(self) -> float:
        return time_limit(self.model)

    def value(self, name: str) -> Array:
        initializer = self.model.graph.initializers.get(name)
        if initializer is not None and initializer.const_value is not None:
            return _numpy(initializer.const_value)
        if name in self.matrices:
            return self.matrices[name].matrix
        if name in self.known:
            return self.known[name]
        if name not in self._computed:
            self._computed[name] = self._compute(name)
        return self._computed[name]

    def _compute(self, name: str) -> Array:
        node = self._producers.get(name)
        if node is None or name not in self._unfed:
            raise KeyError(name)
        tensor = constant_tensor(node.outputs[0])
        if tensor is not None:
            return _numpy(tensor)
        inner = self._subgraph(node)
        proto = onnx.helper.make_model(
            onnx.helper.make_graph(
                [ir.serde.serialize_node(n) for n in inner],
                "constant",
                [],
                [onnx.ValueInfoProto(name=name)],
                [t for n in inner for t in self._initializers(n)],
            ),
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in self.model.opset_imports.items()],
            ir_version=self.model.ir_version,
        )
        try:
            session = open_session(proto, None, optimise=False)
            return widened(np.asarray(run_within(self._time_limit, session, None, {})[0]))
        except OUT_OF_BOUNDS:
            raise
        except Exception as error:
            reason = f"compute the constant {name[:80]!r}: {first_line(error)}"
            raise too_much(error) or _refused(reason) from error

    def _subgraph(self, node: ir.Node) -> list[ir.Node]:
        """The nodes above a constant value's, itself included, in execution order."""
        found: dict[int, ir.Node] = {}
        todo = [node]
        while todo:
            current = todo.pop()
            if id(current) in found:
                continue
            found[id(current)] = current
            above = (self._producers.get(name) for name in _reads(current) if name not in self.known)
            todo.extend(n for n in above if n is not None)
        return sorted(found.values(), key=lambda n: self._places[id(n)])

    def _initializers(self, node: ir.Node) -> Iterator[onnx.TensorProto]:
        for name in dict.fromkeys(_reads(node)):
            if name in self.known:
                yield onnx.numpy_helper.from_array(self.known[name], name)
            held = self.model.graph.initializers.get(name)
            if held is not None and held.const_value is not None:
                proto = onnx.numpy_helper.from_array(held.const_value.numpy(), name)
                proto.data_type = int(held.const_value.dtype)
                yield proto


def _numpy(tensor: ir.TensorProtocol) -> Array:
    array = np.asarray(tensor.numpy())
    return array.astype(np.float32) if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else array


def hidden_anchors(model: ir.Model) -> list[tuple[str, str]]:
    """(node name, operator) of control-flow nodes in whose bodies a softmax or an attention stands."""
    found = []
    for node in model.graph:
        if any(_holds_anchor(body) for body in _bodies(node)):
            found.append((node.name or node.op_type, node.op_type))
    return found


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _holds_anchor(graph: ir.Graph) -> bool:
    return any(
        n.op_type == "Softmax" or n.op_type.endswith("Attention") or any(_holds_anchor(b) for b in _bodies(n))
        for n in graph
    )


def _inline_functions(model: ir.Model) -> None:
    for node in model.graph:
        if node.domain == FUNCTION_DOMAIN:  # where two ways lead to one result, the one without branches is read
            node.op_type = masked_name(node.op_type)
    if any(_written_out(f) for f in model.functions.values()):
        from onnx_ir.passes.common import InlinePass

        try:
            InlinePass(criteria=_written_out)(model)
        except Exception as error:  # onnx_ir raises unrelated types, at versions that differ and at wrong calls
            raise UnsupportedModel(
                f"a function of the model cannot be written out: {first_line(error)}",
                hint="export it again without functions, or write them out with onnx.inliner",
            ) from error


def _name_everything(model: ir.Model) -> None:
    taken = {v.name for v in _values(model)}
    number = 0
    for node in model.graph:
        for output in node.outputs:
            if output.name is None and output.uses():
                while (name := f"unnamed_{number}") in taken:
                    number += 1
                output.name = name
                taken.add(name)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _weights(model: ir.Model, nodes: Iterable[ir.Node]) -> dict[Value, Weight]:
    fed = {v.name for v in model.graph.inputs}
    weights = {
        name: Weight(
            name,
            tuple(int(s) for s in value.const_value.shape),  # type: ignore[arg-type]
            value.const_value.dtype.name.lower(),
            len(value.uses()),
        )
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and name not in fed
    }
    for node in nodes:
        tensor = constant_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None and node.outputs[0].name:
            shape = tuple(int(s) for s in tensor.shape)  # type: ignore[arg-type]
            name = node.outputs[0].name
            weights[name] = Weight(name, shape, tensor.dtype.name.lower(), len(node.outputs[0].uses()))
    return weights


def _float_dtype(model: ir.Model) -> str:
    """The floating dtype most of the stored numbers have; "int8" where activations are quantised on the way."""
    counts: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + int(tensor.size)
    name = max(counts, key=lambda k: counts[k]) if counts else "FLOAT"
    if any(_rounds(n) for n in model.graph):
        return "int8"
    return {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}[name]


def _rounds(node: ir.Node) -> bool:
    """Whether an operator quantises activations."""
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("accuracy_level", 0) == 4
    return node.op_type in {"QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"}


def _matrices(products: Iterable[QuantisedProduct]) -> dict[Value, Weight]:
    """The float matrices that quantised weights stand for."""
    held = {p.name: p for p in products}
    return {n: Weight(n, p.shape, f"int{p.bits}", len(p.codes.uses())) for n, p in held.items()}


def _shown(nodes: Sequence[ir.Node], products: Mapping[int, QuantisedProduct]) -> tuple[Node, ...]:
    """Nodes as the flow shows them: products with quantised weights as one, sequences of tensors seen through.

    What stands before such nodes and is read by no other reads nothing.
    """
    through = {i: t for i, n in enumerate(nodes) if (t := on_tensors(n)) is not None}
    shown = {id(nodes[i]) for i in (*products, *through)}
    hidden = [*(p.hidden for p in products.values()), *(t.hidden for t in through.values())]
    inner = {id(n): n for group in hidden for n in group}
    while read := {k for k, n in inner.items() if not _users(n) <= inner.keys() | shown}:
        inner = {k: n for k, n in inner.items() if k not in read}
    return tuple(
        _product(i, n, products[i])
        if i in products
        else _on_tensors(i, n, through[i])
        if i in through
        else replace(_node(i, n), op="Folded", inputs=())
        if id(n) in inner
        else _node(i, n)
        for i, n in enumerate(nodes)
    )


def _users(node: ir.Node) -> set[int]:
    return {id(user) for output in node.outputs for user, _ in output.uses()}


def _product(index: int, node: ir.Node, product: QuantisedProduct) -> Node:
    bias = (product.bias.name or "",) if product.bias is not None else ()
    inputs = (product.x.name or "", product.name, *bias)
    return replace(_node(index, node), op="Gemm" if bias else "MatMul", domain="", attrs={}, inputs=inputs)


def _on_tensors(index: int, node: ir.Node, through: OnTensors) -> Node:
    inputs = tuple(v.name or "" for v in through.inputs)
    return replace(_node(index, node), op=through.op, inputs=inputs, evaluate=through.run, likeness=unlike)


def _node(index: int, node: ir.Node) -> Node:
    attrs = {k: _attribute(a) for k, a in node.attributes.items() if isinstance(a, ir.Attr)}
    if node.domain == FUNCTION_DOMAIN:
        attrs["is_causal"] = int("Causal" in node.op_type)
    if (reason := obstacle(node)) is not None:
        attrs["unread"] = reason
    if any(_holds_anchor(body) for body in _bodies(node)):
        attrs["softmax_inside"] = True
    inputs = tuple((v.name or "") if v is not None else "" for v in node.inputs)
    if node.op_type == "RotaryEmbedding" and node.domain == "com.microsoft":  # the standard one takes positions last
        inputs = (inputs[0], *inputs[2:4], inputs[1])
    return Node(
        index=index,
        op=_canonical_op(node),
        domain=node.domain,
        attrs=attrs,
        inputs=inputs + _captured(node, inputs),
        outputs=tuple(v.name or "" for v in node.outputs),
        evaluate=_evaluator(node, attrs),
        owner=_owner(node),
        name=node.name or "",
        likeness=partial(_likeness, node),
    )


def _likeness(node: ir.Node) -> str | None:
    """The operator and its attributes; None if some of them are more than numbers and words."""
    plain = {k: a.value for k, a in node.attributes.items() if isinstance(a, ir.Attr) and a.type in _PLAIN}
    if len(plain) < len(node.attributes):
        return None
    return f"{node.domain}::{node.op_type} {sorted(plain.items())!r} {len(node.outputs)}"


def _written_out(function: ir.Function) -> bool:
    """Whether calls of a function are read as what its body says: all but attention of ours that sees every key."""
    return function.domain != FUNCTION_DOMAIN or "Sparse" in function.name


def _canonical_op(node: ir.Node) -> str:
    if node.domain in ("", "ai.onnx"):
        return "Conv" if node.op_type == "ConvInteger" else node.op_type  # of integers, but a convolution
    known = CONTRACTIONS | {
        "RotaryEmbedding", "SimplifiedLayerNormalization", "GroupedQueryAttention", "QLinearSoftmax",
        "QuantizeLinear", "DequantizeLinear",
    }  # fmt: skip
    # an attention of whatever kind has a softmax inside, unless it is linear
    if node.domain == "com.microsoft" and node.op_type.endswith("Attention") and not node.op_type.startswith("Linear"):
        return "MultiHeadAttention"
    if node.domain == FUNCTION_DOMAIN and "Attention" in node.op_type:
        return "GroupedQueryAttention"
    if node.domain == FUNCTION_DOMAIN and node.op_type.startswith("mixture"):
        return "MixtureOfExperts"
    return node.op_type if node.op_type in known else f"{node.domain}.{node.op_type}"


def _attribute(attribute: ir.Attr) -> Any:
    return None if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) else attribute.value


def _reads(node: ir.Node) -> tuple[str, ...]:
    """Everything that a node reads: its inputs, and what its bodies read that are no inputs of it."""
    return (*(v.name for v in node.inputs if v is not None and v.name), *_captured(node, ()))


def _captured(node: ir.Node, explicit: tuple[str, ...]) -> tuple[str, ...]:
    """Outer values that the bodies of a control-flow node read."""
    names: dict[str, None] = {}
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            own = {v.name for n in attribute.value for v in n.outputs} | {v.name for v in attribute.value.inputs}
            own |= set(attribute.value.initializers)
            for inner in attribute.value:
                names.update({v.name: None for v in inner.inputs if v is not None and v.name and v.name not in own})
    return tuple(n for n in names if n not in explicit)


def _evaluator(node: ir.Node, attrs: Mapping[str, Any]) -> Callable[[Sequence[Array | None]], tuple[Array, ...]]:
    count = len(node.outputs)
    if node.op_type not in OPERATORS:
        return single_node(node)

    def evaluate(arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        return OPERATORS[node.op_type](attrs, arrays, count)

    return evaluate


def _owner(node: ir.Node) -> str:
    """The module path that an exporter left: name scopes (dynamo) or the node's own name (TorchScript)."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        try:
            path = ast.literal_eval(scopes)
        except (SyntaxError, ValueError):
            path = []
        if isinstance(path, list) and len(path) >= 2:
            return str(path[-2])
    name = (node.name or "").strip("/")
    return name.rsplit("/", 1)[0].replace("/", ".") if "/" in name else ""


def _wanted(flow: Flow) -> set[Value]:
    """Values around every anchor: up to the projections it reads, down to the projection that reads it, biased."""
    wanted: set[Value] = set()

    def stop(node: Node) -> bool:
        operands = flow.projection_operands(node)
        if operands is None:
            return False
        # a constant of more axes may be queries that are learned, or their product with a weight: keys lie above
        return node.op != "MatMul" or len(flow.shape(node.inputs[operands[1]])) <= 2

    around = [node for anchor in anchors(flow) for node in _downstream(flow, anchor)]
    biases = [n for p in around if stop(p) for n in flow.consumers(p.outputs[0]) if n.op == "Add"]
    for node in (*around, *biases):
        wanted.update(v for v in (*node.inputs, *node.outputs) if v)
    for above in flow.ancestors(*(v for node in around for v in node.inputs), stop=stop):
        wanted.update(v for v in (*above.inputs, *above.outputs) if v)
        wanted.update(unflattened(flow, above.inputs[0]) if stop(above) else ())
    return wanted


def _downstream(flow: Flow, anchor: Node) -> list[Node]:
    """The anchor and what its output flows through until a projection reads it."""
    found, todo = {anchor.index: anchor}, [(anchor, anchor.op != "Softmax", False)]
    while todo:
        node, mixed, summed = todo.pop()
        follows = LAYOUT | PASS_THROUGH | ({"IsNaN"} if mixed else MEET) | (OF_SUMS if summed else set())
        for value in node.outputs:
            for reader in flow.consumers(value):
                if reader.index in found:
                    continue
                found[reader.index] = reader
                if reader.op in CONTRACTIONS:
                    if flow.projection_operands(reader) is None and not mixed:
                        todo.append((reader, True, False))
                elif reader.op in follows:
                    todo.append((reader, mixed, summed or reader.op in SUMS))
    return list(found.values())
