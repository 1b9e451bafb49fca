"""Runs of an .onnx model that stop at values and go on with others: one onnxruntime session for each stretch of nodes.

A stretch reads what is alive before it and gives what is read after it, so that between two sites only those values are
held for each batch. Sessions are shared by all runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from passes.dataflow import Array, Value
from rewriter.calibration.batches import Batch, as_numpy, not_taken
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.capture.onnx_session import data_folder, open_session, widened
from rewriter.errors import UsageError


@dataclass
class Program:
    """A captured file, cut into stretches on demand.

    Attributes:
        index: the node that computes each value.
        last: the last node that reads each value; the number of nodes for outputs of the model.
    """

    capture: OnnxCapture
    index: dict[Value, int] = field(default_factory=dict)
    last: dict[Value, int] = field(default_factory=dict)
    _sessions: dict[tuple[int, int, frozenset[Value]], ort.InferenceSession] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, node in enumerate(self.capture.flow.nodes):
            self.index.update({name: i for name in node.outputs if name})
            self.last.update({name: i for name in node.inputs if name})

    def session(self, start: int, stop: int, wanted: frozenset[Value]) -> ort.InferenceSession:
        """Nodes `start` to `stop`, the latter included; gives `wanted` and what later nodes read, perhaps more."""
        known = (k for k in self._sessions if k[:2] == (start, stop) and k[2] >= wanted)
        key = next(known, (start, stop, wanted))
        if key not in self._sessions:
            self._sessions[key] = self._open(start, stop, wanted)
        return self._sessions[key]

    def _open(self, start: int, stop: int, wanted: frozenset[Value]) -> ort.InferenceSession:
        flow, model = self.capture.flow, self.capture.model
        inside = range(start, stop + 1)
        computed = {name for i in inside for name in flow.nodes[i].outputs if name}
        needed = {name for i in inside for name in flow.nodes[i].inputs if name} - computed
        initializers = model.graph.initializers
        weights = [initializers[name] for name in sorted(needed) if name in initializers]
        fed = sorted(needed - {w.name for w in weights})
        given = sorted(name for name in computed if name in wanted or self.last.get(name, -1) > stop)
        graph = onnx.helper.make_graph(
            [ir.serde.serialize_node(self.capture.nodes[i]) for i in inside],
            "stretch",
            [self._declared(name) for name in fed],
            [onnx.ValueInfoProto(name=name) for name in given],
            [ir.serde.serialize_tensor(w.const_value) for w in weights if w.const_value is not None],
        )
        proto = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()],
            ir_version=model.ir_version,
            functions=[ir.serde.serialize_function(f) for f in model.functions.values()],
        )
        return open_session(proto, data_folder(model), optimise=True)

    def _declared(self, name: Value) -> onnx.ValueInfoProto:
        """An input of any shape; its type is the model's own, or what an earlier stretch gave."""
        dtype = self._types.get(name)
        value = self.capture.values[name]
        kind = dtype if dtype is not None else int(value.dtype or ir.DataType.FLOAT)
        return onnx.helper.make_tensor_value_info(name, kind, None)

    _types: dict[Value, int] = field(default_factory=dict)

    def note(self, values: Mapping[Value, Array]) -> None:
        """Remember the types of what stretches gave; files need not declare them."""
        for name, array in values.items():
            if name not in self._types:
                self._types[name] = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


class OnnxTrial:
    """One run; see `passes.protocols.Trial`."""

    def __init__(self, program: Program, feeds: Mapping[Value, Array]) -> None:
        self._program = program
        self._held: dict[Value, Array] = dict(feeds)
        self._next = 0
        program.note(feeds)

    def advance(self, until: Value, wanted: Collection[Value]) -> dict[Value, Array]:
        stop = self._program.index[until]
        kept = {name: widened(self._held[name]) for name in wanted if name in self._held}
        if stop >= self._next:
            session = self._program.session(self._next, stop, frozenset(wanted))
            names = [o.name for o in session.get_outputs()]
            given = {i.name: self._held[i.name] for i in session.get_inputs()}
            found = dict(zip(names, self._run(session, names, given), strict=True))
            self._program.note(found)
            kept.update({name: widened(a) for name, a in found.items() if name in wanted})
            self._held.update(found)
            self._next = stop + 1
        last = self._program.last
        self._held = {name: a for name, a in self._held.items() if last.get(name, -1) >= self._next or name == until}
        missing = set(wanted) - set(kept)
        if missing:
            raise KeyError(f"not computed on the way: {sorted(missing)[0]}")
        return kept

    def _run(self, session: ort.InferenceSession, names: list[str], given: Mapping[str, Array]) -> Sequence[Array]:
        """What fails before the first site has nothing but the batch to go by."""
        try:
            found: Sequence[Array] = session.run(names, given)
        except Exception as error:  # onnxruntime's errors share no public base class
            if self._next:
                raise
            raise not_taken(error) from error
        return found

    def put(self, value: Value, array: Array) -> None:
        if value in self._held:
            old = self._held[value]
            self._held[value] = np.ascontiguousarray(array, dtype=old.dtype).reshape(old.shape)

    def fork(self) -> OnnxTrial:
        other = OnnxTrial(self._program, self._held)
        other._next = self._next
        return other


class OnnxProbe:
    """Batches of a file; see `passes.protocols.Probe`."""

    def __init__(self, program: Program, feeds: Sequence[Mapping[Value, Array]]) -> None:
        self._program, self._feeds = program, feeds

    def trials(self) -> list[OnnxTrial]:
        return [OnnxTrial(self._program, feeds) for feeds in self._feeds]


def onnx_probe(capture: OnnxCapture, batches: Sequence[Batch]) -> OnnxProbe:
    """Runs of a captured file; raises UsageError if batches do not fit its inputs."""
    return OnnxProbe(Program(capture), [feeds_of(capture.model, batch) for batch in batches])


def feeds_of(model: ir.Model, batch: Batch) -> dict[Value, Array]:
    """A batch by input name and in the declared type; masks, segments, positions and empty caches are made up."""
    stored = model.graph.initializers
    inputs = {v.name: v for v in model.graph.inputs if v.name and v.name not in stored}
    given = dict(zip(inputs, batch.args, strict=False)) | dict(batch.kwargs)
    feeds: dict[Value, Array] = {}
    ids = as_numpy(given["input_ids"]) if "input_ids" in given else None
    for name, value in inputs.items():
        word = name if name in given else name.rpartition("/")[2]  # a branch that was lifted reads inputs of its own
        made = as_numpy(given[word]) if word in given else _made_up(word, value, ids)
        if made is None:
            raise UsageError(f"the batches lack the input {name!r}, which the file has", hint="give it in each batch")
        dtype = value.dtype.numpy() if value.dtype is not None else made.dtype
        feeds[name] = np.ascontiguousarray(made, dtype=dtype)
    return feeds


def _made_up(name: str, value: ir.Value, ids: Array | None) -> Array | None:
    if ids is None:
        return None
    if name == "attention_mask":
        return np.ones(ids.shape, np.int64)
    if name == "token_type_ids":
        return np.zeros(ids.shape, np.int64)
    if name == "position_ids":
        return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    if name.startswith("use_cache"):
        return np.zeros([1] * (0 if value.shape is None else len(value.shape)), np.bool_)
    if name.startswith("past_key_values") and value.shape is not None and len(value.shape) == 4:
        heads, width = value.shape[1], value.shape[3]
        if isinstance(heads, int) and isinstance(width, int):
            return np.zeros((ids.shape[0], heads, 0, width), np.float32)
    return None
