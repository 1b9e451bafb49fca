"""New weights stored the way the old ones were: same dtype, same cast, transpose or quantisation around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array
from rewriter.capture.onnx_constants import constant_tensor


@dataclass
class Emitted:
    """What a new weight needs in the graph.

    Attributes:
        value: what the contraction reads.
        initializers: new stored tensors.
        nodes: new nodes between them, in order.
        error: worst relative error of requantisation; 0 where nothing was quantised.
    """

    value: ir.Value
    initializers: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    error: float = 0.0


def emit_like(old: ir.Value, array: Array, name: str, unique: Callable[[str], str]) -> Emitted:
    """Store float `array` as the program stores `old`: through the same chain of operators.

    `array` has the layout that `old` has (rank 2, any size along its axes). Chains that are understood are
    Cast, Transpose, Identity, Mul of a cast integer by a scale, and DequantizeLinear; anything else becomes a
    plain float initializer.
    """
    node = old.producer()
    if node is None or node.op_type == "Constant":
        return emit_plain(old, array, name, unique)
    inner = node.inputs[0]
    if node.op_type == "Transpose" and inner is not None:
        perm = node.attributes.get_ints("perm") if "perm" in node.attributes else tuple(range(array.ndim))[::-1]
        below = emit_like(inner, np.transpose(array, np.argsort(perm)), name, unique)
        return _through(below, node, [below.value], unique)
    if node.op_type == "Identity" and inner is not None:
        return emit_like(inner, array, name, unique)
    if node.op_type == "Cast" and inner is not None and _stored(inner) is not None and _is_float(inner):
        below = emit_like(inner, array, name, unique)
        return _through(below, node, [below.value], unique)
    if node.op_type == "Mul" and (found := _cast_and_scale(node)) is not None:
        return _cast_mul(node, *found, array, name, unique)
    if node.op_type == "DequantizeLinear" and _stored(inner) is not None:
        return _dequantize(node, array, name, unique)
    return emit_plain(old, array, name, unique)


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node."""
    return None if value is None else constant_tensor(value)


def _is_float(value: ir.Value) -> bool:
    tensor = _stored(value)
    return tensor is not None and tensor.dtype.is_floating_point()


def _dtype(value: ir.Value) -> ir.DataType:
    tensor = _stored(value)
    if tensor is not None and tensor.dtype.is_floating_point():
        return tensor.dtype
    return value.dtype if value.dtype is not None else ir.DataType.FLOAT


def _tensor(array: Array, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    return ir.Tensor(np.array(array, dtype=dtype.numpy(), order="C"), dtype=dtype, name=name)


def _stored_value(array: Array, dtype: ir.DataType, name: str) -> ir.Value:
    return ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(dtype),
        const_value=_tensor(array, dtype, name),
    )


def emit_plain(old: ir.Value, array: Array, name: str, unique: Callable[[str], str]) -> Emitted:
    """Store float `array`, whatever its shape, as a tensor of the dtype of `old`."""
    value = _stored_value(array, _dtype(old), unique(name))
    return Emitted(value, [value])


def _through(below: Emitted, node: ir.Node, inputs: list[ir.Value], unique: Callable[[str], str]) -> Emitted:
    """The same operator, with the same attributes, on new inputs."""
    copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1)
    copy.outputs[0].name = unique(f"{below.value.name}_{node.op_type.lower()}")
    copy.outputs[0].type = node.outputs[0].type
    return Emitted(copy.outputs[0], below.initializers, [*below.nodes, copy], below.error)


def _cast_and_scale(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    for position in (0, 1):
        cast = node.inputs[position].producer() if node.inputs[position] is not None else None  # type: ignore[union-attr]
        scale = node.inputs[1 - position]
        if cast is None or cast.op_type != "Cast" or scale is None or _stored(scale) is None:
            continue
        tensor = _stored(cast.inputs[0])
        if tensor is not None and tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
            return cast, scale
    return None


def _cast_mul(
    node: ir.Node, cast: ir.Node, scale: ir.Value, array: Array, name: str, unique: Callable[[str], str]
) -> Emitted:
    """int8 → Cast → Mul(scale), symmetric; the scale keeps its axis."""
    stored, held = _stored(scale), _stored(cast.inputs[0])
    assert stored is not None and held is not None
    shape = tuple(int(s) for s in stored.numpy().shape)
    axes = tuple(a for a, n in enumerate(_padded(shape, array.ndim)) if n == 1)
    codes, factors, error = _symmetric(array, axes, 127)
    factors = factors if stored.size > 1 else factors.reshape(shape)
    integers = _stored_value(codes, held.dtype, unique(f"{name}_quantized"))
    new_scale = _stored_value(factors, stored.dtype, unique(f"{name}_scale"))
    below = _through(Emitted(integers, [integers]), cast, [integers], unique)
    inputs = [below.value, new_scale] if node.inputs[1] is scale else [new_scale, below.value]
    out = _through(below, node, inputs, unique)
    return Emitted(out.value, [integers, new_scale], out.nodes, error)


def _padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape


def _symmetric(array: Array, axes: tuple[int, ...], top: int) -> tuple[Array, Array, float]:
    """(codes, scales with kept axes, worst error relative to the largest weight)."""
    scales = np.maximum(np.abs(array).max(axis=axes, keepdims=True), 1e-12) / top
    codes = np.clip(np.rint(array / scales), -top, top)
    error = float(np.abs(codes * scales - array).max() / max(float(np.abs(array).max()), 1e-12))
    return codes, scales, error


def _dequantize(node: ir.Node, array: Array, name: str, unique: Callable[[str], str]) -> Emitted:
    """DequantizeLinear, per tensor or per axis; zero points are kept at the middle of the range."""
    held, old_scale = _stored(node.inputs[0]), _stored(node.inputs[1])
    if held is None or old_scale is None or held.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return emit_plain(node.outputs[0], array, name, unique)
    axis = node.attributes.get_int("axis", 1) % array.ndim
    axes = tuple(range(array.ndim)) if old_scale.size == 1 else tuple(a for a in range(array.ndim) if a != axis)
    codes, factors, error = _symmetric(array, axes, 127)
    middle = 128 if held.dtype == ir.DataType.UINT8 else 0
    integers = _stored_value(codes + middle, held.dtype, unique(f"{name}_quantized"))
    shape = () if old_scale.numpy().ndim == 0 else (-1,)
    new_scale = _stored_value(factors.reshape(shape), old_scale.dtype, unique(f"{name}_scale"))
    inputs, stored = [integers, new_scale], [integers, new_scale]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        point = _stored_value(np.full(factors.size, middle).reshape(shape), held.dtype, unique(f"{name}_zero_point"))
        inputs.append(point)
        stored.append(point)
    out = _through(Emitted(integers, stored), node, inputs, unique)
    return Emitted(out.value, stored, out.nodes, error)
