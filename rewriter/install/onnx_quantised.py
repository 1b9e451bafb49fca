"""New projections in place of quantised ones: the same operators on weights requantised in the same scheme.

A column that the old weight holds bit for bit keeps its integers, so a step that loses nothing in float loses nothing
here. Activations go on being quantised as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array
from rewriter.capture.onnx_constants import stored_numbers, stored_tensor
from rewriter.capture.quantised import QuantisedProduct, block_points, unpack, unpacked_matrix


@dataclass
class EmittedProduct:
    """A product with a new weight.

    Attributes:
        value: the float result, without bias.
        nodes, initializers: new, in order.
        error: largest error of a new weight, as a part of the largest weight.
    """

    value: ir.Value
    nodes: list[ir.Node]
    initializers: list[ir.Value] = field(default_factory=list)
    error: float = 0.0


@dataclass(frozen=True)
class Codes:
    """A quantised [in, out] matrix as its operator stores it; `points` is None where the operator needs none."""

    codes: Array
    scale: Array
    points: Array | None
    error: float


def emit_product(
    old: QuantisedProduct, x: ir.Value, weight: Array, name: str, unique: Callable[[str], str]
) -> EmittedProduct:
    """`x` times `weight` [in, out], through the operators that `old` goes through."""
    made = in_blocks(old, weight) if old.form == "blocks" else as_integers(old, weight)
    codes = _stored(made.codes, stored_tensor(old.codes).dtype, unique(f"{name}_quantized"))
    scale = _stored(made.scale, stored_tensor(old.scale).dtype, unique(f"{name}_scale"))
    point = None
    if old.zero_point is not None and made.points is not None:
        point = _stored(made.points, stored_tensor(old.zero_point).dtype, unique(f"{name}_zero_point"))
    writer = _Writer(name, unique)
    if old.form == "integer":
        quantized, x_scale, x_point = writer.quantize(old, x)
        product = writer.op(old.core, [quantized, codes, x_point, point], "integers")
        cast = next(n for n in old.hidden if n.op_type == "Cast")
        real = writer.op(cast, [product], "float")
        factor = writer.op(old.node, [x_scale, scale], "factor")
        value = writer.op(old.node, [real, factor], "product")
    elif old.form == "integer_to_float":
        quantized, x_scale, x_point = writer.quantize(old, x)
        value = writer.op(old.core, [quantized, codes, x_scale, scale, x_point, point], "product")
    elif old.form == "dynamic":
        value = writer.op(old.core, [x, codes, scale, point], "product")
    else:
        value = writer.op(old.core, [x, codes, scale, point], "product", N=weight.shape[1])
    stored = [codes, scale, *([point] if point is not None else [])]
    return EmittedProduct(value, writer.nodes, stored, made.error)


class _Writer:
    """Copies of operators on new inputs."""

    def __init__(self, name: str, unique: Callable[[str], str]) -> None:
        self.name, self.unique = name, unique
        self.nodes: list[ir.Node] = []

    def op(self, like: ir.Node, inputs: list[ir.Value | None], name: str, **changed: int) -> ir.Value:
        while inputs[-1] is None:
            inputs.pop()
        kept = [a for a in like.attributes.values() if a.name not in changed]
        attributes = [*kept, *(ir.AttrInt64(k, v) for k, v in changed.items())]
        node = ir.Node(
            like.domain, like.op_type, inputs, attributes, num_outputs=1, name=self.unique(f"{self.name}/{name}")
        )
        node.outputs[0].name = self.unique(f"{self.name}.{name}")
        self.nodes.append(node)
        return node.outputs[0]

    def quantize(self, old: QuantisedProduct, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The quantised activations; those of the old product where they have the layout that is wanted."""
        quantizer = old.hidden[0]
        if quantizer.inputs[0] is not x:
            quantizer = ir.Node(
                "", "DynamicQuantizeLinear", [x], num_outputs=3, name=self.unique(f"{self.name}/quantize")
            )
            for output, part in zip(quantizer.outputs, ("quantized", "scale", "zero_point"), strict=True):
                output.name = self.unique(f"{self.name}.input_{part}")
            self.nodes.append(quantizer)
        codes, scale, point = quantizer.outputs
        return codes, scale, point


# ------------------------------------------------------------------ integers of eight bits


def as_integers(old: QuantisedProduct, weight: Array) -> Codes:
    """`weight` [in, out] in the scheme of `old`: one scale or one per column, with or without zero points."""
    low, high = (0, 255) if old.packed.dtype == np.uint8 else (-128, 127)
    scales = stored_numbers(old.scale)
    points = old.points
    found = _held_columns(old, weight)
    single = scales.size == 1
    if single and (found >= 0).all():
        return Codes(old.packed[:, found], scales, points, 0.0)
    wide = np.zeros(1, np.int64) if points is None else points.reshape(-1).astype(np.int64)
    axis = None if single else 0
    shared = bool((wide == wide[0]).all()) and (wide.size < scales.size or wide[0] == (128 if low == 0 else 0))
    scale, point = _about(weight, axis, int(wide[0]), low, high) if shared else _affine(weight, axis, low, high)
    codes = np.clip(np.rint(weight / scale) + point, low, high)
    if not single:
        kept = found >= 0
        source = found[kept]
        codes[:, kept] = old.packed[:, source]
        scale[kept] = scales.reshape(-1)[source]
        point[kept] = np.broadcast_to(wide, scales.size)[source]
    values = (codes - point) * scale
    shape = scales.shape if single else (-1,)
    stored = None if points is None else _like(point, points, scales.size).astype(points.dtype)
    return Codes(
        codes.astype(old.packed.dtype), scale.reshape(shape).astype(np.float32), stored, _error(values, weight)
    )


def _like(point: Array, old: Array, columns: int) -> Array:
    """Zero points of new columns in the form of the old: one number, or one for each."""
    if old.size == 1 and columns > 1:
        return point[:1].reshape(old.shape)
    return point.reshape(old.shape if old.size == 1 else (-1,))


def _about(weight: Array, axis: int | None, point: int, low: int, high: int) -> tuple[Array, Array]:
    """Scales with which all weights fit around one zero point."""
    room = min(point - low, high - point)
    scale = np.atleast_1d(np.maximum(np.abs(weight).max(axis=axis), 1e-12) / room)
    return scale, np.full(scale.shape, point, np.int64)


def _affine(weight: Array, axis: int | None, low: int, high: int) -> tuple[Array, Array]:
    """Scale and zero point of the range of the weights, zero included."""
    least, most = np.minimum(weight.min(axis=axis), 0.0), np.maximum(weight.max(axis=axis), 0.0)
    scale = np.atleast_1d(np.maximum(most - least, 1e-12) / (high - low))
    return scale, np.atleast_1d(np.rint(low - least / scale)).astype(np.int64)


# ------------------------------------------------------------------ blocks of a few bits


def in_blocks(old: QuantisedProduct, weight: Array) -> Codes:
    """`weight` [in, out] in blocks of `old`'s size and bits, with zero points where `old` has them."""
    rows, columns = weight.shape
    bits, block = old.bits, old.block
    blocks = -(-rows // block)
    wide = np.zeros((columns, blocks * block), np.float32)
    wide[:, :rows] = weight.T
    apart = wide.reshape(columns, blocks, block)
    top = (1 << bits) - 1
    if old.points is None:
        extreme = np.take_along_axis(apart, np.abs(apart).argmax(-1)[..., None], -1)[..., 0]
        scale = np.where(extreme == 0, 1.0, extreme / -(1 << (bits - 1)))
        point = np.full(scale.shape, 1 << (bits - 1))
    else:
        least, most = np.minimum(apart.min(-1), 0.0), np.maximum(apart.max(-1), 0.0)
        scale = np.where(most > least, (most - least) / top, 1.0)
        point = np.clip(np.rint(-least / scale), 0, top).astype(
            np.float32 if old.points.dtype.kind == "f" else np.int64
        )
    codes = np.clip(np.rint(apart / scale[..., None]) + point[..., None], 0, top).astype(np.uint8)
    _keep_held_blocks(old, weight, codes, scale, point)
    packed = pack(codes.reshape(columns, -1), bits).reshape(columns, blocks, -1)
    scales = scale.astype(stored_numbers(old.scale).dtype)
    points = None if old.points is None else _stored_points(point, bits, old.points)
    values = unpacked_matrix(packed, scales, points, bits, block, rows, columns)
    shape = (-1,) if old.scale.shape is not None and old.scale.shape.rank() == 1 else scales.shape
    return Codes(packed, scales.reshape(shape), points, _error(values, weight))


def _keep_held_blocks(old: QuantisedProduct, weight: Array, codes: Array, scale: Array, point: Array) -> None:
    found = _held_columns(old, weight)
    kept = found >= 0
    if not kept.any():
        return
    before, blocks = old.shape[1], scale.shape[1]
    held = unpack(old.packed.reshape(before, -1), old.bits)[:, : blocks * old.block].reshape(before, blocks, -1)
    codes[kept] = held[found[kept]]
    scale[kept] = stored_numbers(old.scale).reshape(before, blocks)[found[kept]]
    if old.points is not None:
        point[kept] = block_points(old.points, old.bits, before, blocks)[found[kept]]


def _stored_points(point: Array, bits: int, old: Array) -> Array:
    """Zero points [out, blocks] in the form of the old."""
    stored = point if old.dtype.kind == "f" else pack(point.astype(np.uint8), bits)
    return stored.reshape(-1) if old.ndim == 1 else stored


def pack(codes: Array, bits: int) -> Array:
    """[n, numbers] to [n, bytes], lowest bits first, the last byte filled with zeros."""
    each = 8 // bits
    short = -codes.shape[1] % each
    parts = np.pad(codes, ((0, 0), (0, short))).reshape(codes.shape[0], -1, each).astype(np.uint16)
    shifted = parts << np.arange(0, 8, bits, dtype=np.uint16)
    return np.asarray(shifted.sum(-1), dtype=np.uint8)


# ------------------------------------------------------------------ pieces


def _held_columns(old: QuantisedProduct, weight: Array) -> Array:
    """For each column of `weight` the column of the old matrix that equals it bit for bit, -1 if there is none."""
    before = np.ascontiguousarray(old.matrix.T)
    place = {column.tobytes(): i for i, column in enumerate(before)}
    return np.array([place.get(c.tobytes(), -1) for c in np.ascontiguousarray(weight.T.astype(np.float32))])


def _error(values: Array, weight: Array) -> float:
    return float(np.abs(values - weight).max() / max(float(np.abs(weight).max()), 1e-12))


def _stored(array: Array, dtype: ir.DataType, name: str) -> ir.Value:
    tensor = ir.Tensor(np.array(array, dtype=dtype.numpy(), order="C"), dtype=dtype, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
