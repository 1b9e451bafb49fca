"""Rows of `benchmarks.kernels` for operators in files: onnxruntime with the library of kernels beside onnxruntime with
the functions that a rewritten file carries.

Mixed chunk attention is a whole unit, whose projections are onnxruntime's in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.rows import Clock, Row, interleaved, timed
from codegen.device import DType, host
from codegen.launch.ort_op import build
from codegen.ops.gated_attention import onnx_body as unit
from codegen.ops.linear_attention import onnx_body as linear
from codegen.ops.linear_attention.reference import linear_attention
from codegen.ops.mixed_chunk_attention import onnx_body as chunks
from codegen.ops.mixed_chunk_attention.reference import mixed_chunk_attention
from codegen.registry import select
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention, MixedChunkAttention

Array = NDArray[Any]

LIMIT = 1e-5
CHECKED = 512
"""Tokens of the sequence that is held against double precision."""

OPSET = 18


@dataclass(frozen=True)
class Case:
    """One sequence of `tokens`: 12 heads of 64 features in chunks of 64, or a unit of 768 features, twice as many
    between its projections, and chunks of 256."""

    spec: LinearAttention | MixedChunkAttention
    tokens: int

    def __str__(self) -> str:
        order = "causal" if self._causal else "symmetric"
        if isinstance(self.spec, LinearAttention):
            return f"onnxruntime, linear attention, {self.spec.features.value} features, {order}, {self.tokens} tokens"
        return f"onnxruntime, mixed chunk attention, {order}, {self.tokens} tokens"

    @property
    def _causal(self) -> bool:
        return self.spec.attention.causal if isinstance(self.spec, LinearAttention) else self.spec.causal


def cases(*, quick: bool) -> list[Case]:
    heads = GroupedQueryAttention(12, 12, 64, 64, 0.125, causal=True, masked_rows_are_zero=True)
    learned, elu = LinearAttention(heads, 64), LinearAttention(heads, 64, FeatureMap.ELU1)
    mixed = MixedChunkAttention(768, 1536, 128, 256, causal=True)
    if quick:
        return [Case(learned, 1024), Case(mixed, 1024)]
    specs = (learned, elu, mixed, MixedChunkAttention(768, 1536, 128, 256))
    return [Case(spec, tokens) for spec in specs for tokens in (512, 1024, 4096)]


def run_case(case: Case, runs: int, threads: int, clock: Clock) -> list[Row]:
    """The time of both, and the error of a shorter sequence beside double precision."""
    spec, random = case.spec, np.random.default_rng(0)
    weights = {name: (random.standard_normal(shape) / shape[-1] ** 0.5) for name, shape in spec.shapes.items()}
    choice = select(spec, host(), DType.FLOAT32)
    assert choice is not None
    model, names = _model(spec, weights)
    plain, fast = (_session(model, library, threads) for library in (None, build([choice]).path))
    shapes = _shapes(spec, case.tokens)
    feeds = {n: random.standard_normal(shapes[n]).astype(np.float32) for n in names}
    short = {n: x[..., : min(CHECKED, case.tokens), :] for n, x in feeds.items()}
    right, found = _oracle(spec, short, weights), fast.run(None, short)[0]
    error = float(np.abs(found - right).max() / np.abs(right).max())
    timed(lambda: fast.run(None, feeds), 2, clock)
    ours, theirs = interleaved(
        runs, lambda: fast.run(None, feeds), lambda: plain.run(None, feeds), clock=clock
    )  # fmt: skip
    ratio = theirs.minimum / ours.minimum
    more = {"kind": "file", "error": error, "ours_median": ours.median * 1e3, "peer_median": theirs.median * 1e3}
    more |= {"best_peer": True}
    peer, unit_ = "the file's function", "of the largest output"
    return [
        Row("time", str(case), ours.minimum * 1e3, theirs.minimum * 1e3, peer, "ms", ratio, None, None, more),
        Row("error", str(case), error, LIMIT, "limit", unit_, LIMIT / max(error, 1e-30), 1.0, error <= LIMIT, {}),
    ]


def _shapes(spec: LinearAttention | MixedChunkAttention, tokens: int) -> dict[str, tuple[int, ...]]:
    if isinstance(spec, MixedChunkAttention):
        return {"x": (1, tokens, spec.hidden)}
    plain = spec.attention
    sizes = {
        "q": (plain.heads, plain.head_dim),
        "k": (plain.kv_heads, plain.head_dim),
        "v": (plain.kv_heads, plain.value_dim),
    }
    return {name: (1, heads, tokens, size) for name, (heads, size) in sizes.items()}


def _oracle(
    spec: LinearAttention | MixedChunkAttention, feeds: Mapping[str, Array], weights: Mapping[str, Array]
) -> Array:
    wide = {name: x.astype(np.float64) for name, x in feeds.items()}
    if isinstance(spec, MixedChunkAttention):
        return mixed_chunk_attention(spec, wide["x"], weights)
    return linear_attention(spec, wide["q"], wide["k"], wide["v"], weights)


def _model(spec: LinearAttention | MixedChunkAttention, weights: Mapping[str, Array]) -> tuple[bytes, list[str]]:
    """A file with one call, and the names of what it is fed."""
    single = ir.DataType.FLOAT
    if isinstance(spec, MixedChunkAttention):
        bodies, held = chunks.functions(spec, OPSET), unit.stored(spec, weights, single)
        described, axes = chunks.attributes(spec, single), 3
    else:
        bodies, held = [linear.function(spec, OPSET, shown=False)], linear.stored(spec, weights, single)
        described, axes = linear.attributes(spec, single), 4
    names = list(_shapes(spec, 1))
    inputs = [ir.Value(name=n, type=ir.TensorType(single), shape=ir.Shape([None] * axes)) for n in names]
    constants = [
        ir.Value(name=n, type=ir.TensorType(single), shape=ir.Shape(a.shape), const_value=ir.tensor(a))
        for n, a in held.items()
    ]
    node = ir.Node(linear.DOMAIN, bodies[0].name, [*inputs, *constants], described, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(single)
    opsets = {"": OPSET, linear.DOMAIN: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], name="g", opset_imports=opsets, initializers=constants)
    model = ir.Model(graph, ir_version=8, functions=bodies)
    return bytes(ir.serde.serialize_model(model).SerializeToString()), names


def _session(model: bytes, library: Path | None, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
