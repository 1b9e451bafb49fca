"""Door in for ONNX: a model seen as a Flow, with its values recorded by one onnxruntime session.

Only what lies around anchors is recorded. Structure comes from the file; layout operators run in numpy
(`onnx_vocabulary`); constant subgraphs (dequantised or transposed weights) are evaluated on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import onnx_ir as ir

from codegen.ops.grouped_query_attention.onnx_tiles import masked_name
from passes.dataflow import Array, Flow, Value
from passes.match.feed_forward_blocks import recorded_values
from passes.products import with_products
from passes.softmaxes import with_softmaxes
from rewriter.capture.around_anchors import around_anchors
from rewriter.capture.bounded_run import OUT_OF_BOUNDS
from rewriter.capture.cache_sizes import CacheSize
from rewriter.capture.constant_values import ConstantValues
from rewriter.capture.cut_weights import cutting_sizes, unchanged
from rewriter.capture.feeds import MaskStyle, candidate_sizes, make_feeds
from rewriter.capture.fused.written_out import WrittenOut
from rewriter.capture.onnx_session import RecordingSession
from rewriter.capture.onnx_view import (
    FUNCTION_DOMAIN,
    float_dtype,
    is_written_out,
    nodes_shown,
    quantised_matrices,
    stored_weights,
)
from rewriter.capture.quantised import QuantisedProduct, quantised_product
from rewriter.capture.random_draws import require_no_draws
from rewriter.errors import UnsupportedModel, first_line

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
        constants: values that no input reaches.
        sizes: (batch, length, past) of the recording.
        feeds: the recorded inputs.
        written_out: fused operators that standard ones stand for in `model`, by the scope of what stands for them.
        quantised: products with quantised weights by node index; `flow` shows each as a product with a float matrix.
    """

    model: ir.Model
    flow: Flow
    nodes: tuple[ir.Node, ...]
    values: Mapping[str, ir.Value]
    session: RecordingSession
    constants: ConstantValues
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
        read = partial(_read, recorded, self.constants)
        return replace(self, flow=replace(self.flow, read=read), sizes=sizes, feeds=feeds)


def capture(model: ir.Model, written_out: Mapping[str, WrittenOut] | None = None) -> OnnxCapture:
    """View a model and record it at the first sizes at which onnxruntime runs it.

    Names are given to unnamed values, and model-local functions other than rewriter's own are inlined. `written_out`
    are the fused operators that `unfuse` wrote out in this model.
    Raises UnsupportedModel with onnxruntime's reason if the model runs at none, or if it draws random numbers.
    """
    inline_functions(model)
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
    shown = (replace(n, inputs=()) if known.keys() & set(n.outputs) else n for n in nodes_shown(nodes, products))
    constants = ConstantValues(model, {p.name: p for p in products.values()}, known)
    flow = Flow(
        with_softmaxes(with_products(tuple(shown))),
        tuple(v.name for v in model.graph.inputs if v.name and v.name not in model.graph.initializers),
        tuple(v.name for v in model.graph.outputs if v.name),
        stored_weights(model, nodes) | quantised_matrices(products.values()),
        constants.value,
        float_dtype(model),
    )
    wanted = (
        around_anchors(flow)
        | recorded_values(flow)
        | cutting_sizes(flow)
        | {v.name for w in fused.values() for v in w.inputs if v is not None and v.name}
    )
    session = RecordingSession(model, sorted(wanted - set(flow.weights) - set(flow.inputs)))
    recorded, feeds, sizes = _first_run(model, fused, session)
    flow = replace(flow, read=partial(_read, recorded, constants))
    return OnnxCapture(model, flow, nodes, values, session, constants, sizes, feeds, fused, products)


def _read(recorded: Mapping[str, Array], constants: ConstantValues, name: Value) -> Array:
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
    model: ir.Model, written_out: Mapping[str, WrittenOut], session: RecordingSession
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


def why_not_runnable(model: ir.Model) -> str | None:
    """What onnxruntime says where a model runs at none of the sizes that are tried; None if it does."""
    try:
        _first_run(model, {}, RecordingSession(model, []))
    except UnsupportedModel as error:
        return str(error)
    return None


def inline_functions(model: ir.Model) -> None:
    """Write out calls of functions that are read as what their bodies say; raises UnsupportedModel."""
    for node in model.graph:
        if node.domain == FUNCTION_DOMAIN:  # where two ways lead to one result, the one without branches is read
            node.op_type = masked_name(node.op_type)
    if any(is_written_out(f) for f in model.functions.values()):
        from onnx_ir.passes.common import InlinePass

        try:
            InlinePass(criteria=is_written_out)(model)
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
