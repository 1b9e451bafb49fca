"""Products of activations with quantised weights, seen as one product with the float matrix that the weights stand for.

Covered are dynamic quantisation (DynamicQuantizeLinear, MatMulInteger, Cast, Mul), what onnxruntime fuses it to
(DynamicQuantizeMatMul, MatMulIntegerToFloat), and weights of a few bits in blocks (MatMulNBits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array
from rewriter.capture.onnx_constants import constant_tensor, stored_numbers, stored_tensor
from rewriter.onnx_nodes import input_at

Form = Literal["integer", "dynamic", "integer_to_float", "blocks"]


@dataclass(frozen=True, eq=False)
class QuantisedProduct:
    """One product ``x @ W`` whose W [in, out] is stored as integers.

    Attributes:
        node: gives the float product; with a bias of its own if `bias` is there.
        core: reads the stored integers.
        hidden: nodes between `x` and `node` that only serve this or like products.
        x: float activations.
        codes, scale, zero_point: the stored tensors.
        bits, block: of weights in blocks along their inputs; 8 and 0 elsewhere.
    """

    form: Form
    node: ir.Node
    core: ir.Node
    hidden: tuple[ir.Node, ...]
    x: ir.Value
    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    bias: ir.Value | None
    bits: int = 8
    block: int = 0

    @property
    def name(self) -> str:
        """What the float matrix is called; two products that share the stored integers share it."""
        return f"{self.codes.name} (dequantised)"

    @property
    def shape(self) -> tuple[int, int]:
        if self.form == "blocks":
            return self.core.attributes["K"].as_int(), self.core.attributes["N"].as_int()
        rows, columns = stored_tensor(self.codes).shape
        return int(rows), int(columns)  # type: ignore[arg-type]

    @property
    def matrix(self) -> Array:
        """[in, out], float32; made anew each time, so that a large model's matrices are not all held at once."""
        scale = stored_numbers(self.scale)
        if self.form == "blocks":
            return unpacked_matrix(self.packed, scale, self.points, self.bits, self.block, *self.shape)
        codes = stored_tensor(self.codes).numpy().astype(np.float32)
        points = 0.0 if self.zero_point is None else stored_numbers(self.zero_point).reshape(-1)
        return np.asarray((codes - points) * scale.reshape(-1), dtype=np.float32)

    @property
    def packed(self) -> Array:
        return stored_tensor(self.codes).numpy()

    @property
    def points(self) -> Array | None:
        """Zero points as stored; float32 where they are floats, as those of blocks may be."""
        if self.zero_point is None:
            return None
        stored = stored_tensor(self.zero_point)
        return stored_numbers(self.zero_point) if stored.dtype.is_floating_point() else stored.numpy()


def unpacked_matrix(
    packed: Array, scale: Array, points: Array | None, bits: int, block: int, rows: int, columns: int
) -> Array:
    """[in, out] of weights packed as [out, blocks, bytes], lowest bits first; zero points lie packed over blocks, or
    are floats, one for each."""
    blocks = -(-rows // block)
    codes = unpack(packed.reshape(columns, -1), bits)[:, : blocks * block].reshape(columns, blocks, block)
    middle = np.full((columns, blocks), 1 << (bits - 1), np.float32)
    offsets = middle if points is None else block_points(points, bits, columns, blocks)
    values = (codes.astype(np.float32) - offsets[..., None]) * scale.reshape(columns, blocks, 1)
    return np.asarray(values.reshape(columns, -1)[:, :rows].T, dtype=np.float32)


def block_points(points: Array, bits: int, columns: int, blocks: int) -> Array:
    """Zero points [out, blocks], of integers that are packed or of floats that are not."""
    if points.dtype.kind == "f":
        return points.reshape(columns, blocks)
    return unpack(points.reshape(columns, -1), bits)[:, :blocks]


def unpack(packed: Array, bits: int) -> Array:
    """[n, bytes] uint8 to [n, bytes * 8 / bits], lowest bits first."""
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(packed.shape[0], -1)


def quantised_product(node: ir.Node) -> QuantisedProduct | None:
    """The product whose float result `node` gives; None if it is none, or one that is not covered."""
    if node.domain in {"", "ai.onnx"} and node.op_type == "Mul":
        return _integer(node)
    if node.domain != "com.microsoft":
        return None
    if node.op_type == "DynamicQuantizeMatMul":
        x, codes, scale, point, bias = (input_at(node, i) for i in range(5))
        return _checked("dynamic", node, node, (), x, codes, scale, point, bias)
    if node.op_type == "MatMulIntegerToFloat":
        quantizer = _quantizer(input_at(node, 0), input_at(node, 2), input_at(node, 4))
        codes, scale, point, bias = (input_at(node, i) for i in (1, 3, 5, 6))
        if quantizer is None:
            return None
        return _checked("integer_to_float", node, node, (quantizer,), input_at(quantizer, 0), codes, scale, point, bias)
    return _blocks(node) if node.op_type == "MatMulNBits" else None


def _integer(node: ir.Node) -> QuantisedProduct | None:
    """Mul(Cast(MatMulInteger(x, w, x point, w point)), Mul(x scale, w scale)), in either order."""
    for position in (0, 1):
        cast, scales = (_producer(input_at(node, i)) for i in (position, 1 - position))
        core = _producer(input_at(cast, 0)) if cast is not None and cast.op_type == "Cast" else None
        if core is None or scales is None or core.op_type != "MatMulInteger" or scales.op_type != "Mul":
            continue
        for first in (0, 1):
            quantizer = _quantizer(input_at(core, 0), input_at(scales, first), input_at(core, 2))
            if quantizer is not None:
                hidden = (quantizer, core, cast, scales)
                return _checked(
                    "integer", node, core, tuple(n for n in hidden if n is not None), input_at(quantizer, 0),
                    input_at(core, 1), input_at(scales, 1 - first), input_at(core, 3), None,
                )  # fmt: skip
    return None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _quantizer(codes: ir.Value | None, scale: ir.Value | None, point: ir.Value | None) -> ir.Node | None:
    """The DynamicQuantizeLinear that gives all three."""
    node = codes.producer() if codes is not None else None
    if node is None or node.op_type != "DynamicQuantizeLinear":
        return None
    return node if list(node.outputs) == [codes, scale, point] else None


def _blocks(node: ir.Node) -> QuantisedProduct | None:
    x, codes, scale, point, order, bias = (input_at(node, i) for i in range(6))
    bits, block = (_number(node, name) for name in ("bits", "block_size"))
    plain = point is None or (constant_tensor(point) is not None and _has_points(stored_tensor(point).dtype))
    if order is not None or not plain or bits not in (2, 4, 8) or block < 1 or "weight_prepacked" in node.attributes:
        return None
    return _checked("blocks", node, node, (), x, codes, scale, point, bias, bits, block)


def _has_points(dtype: ir.DataType) -> bool:
    """Whether zero points of blocks may be stored like that: packed as the weights are, or as floats (HQQ)."""
    return dtype in {ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def _number(node: ir.Node, name: str) -> int:
    """An attribute that must be an integer; 0 where it is not."""
    held = node.attributes.get(name)
    return held.as_int() if held is not None and held.type == ir.AttributeType.INT and not held.is_ref() else 0


def _checked(
    form: Form,
    node: ir.Node,
    core: ir.Node,
    hidden: tuple[ir.Node, ...],
    x: ir.Value | None,
    codes: ir.Value | None,
    scale: ir.Value | None,
    point: ir.Value | None,
    bias: ir.Value | None,
    bits: int = 8,
    block: int = 0,
) -> QuantisedProduct | None:
    """The product if its weight is stored as a matrix of integers."""
    if x is None or codes is None or scale is None:
        return None
    stored = [constant_tensor(v) for v in (codes, scale, *([point] if point is not None else []))]
    if any(t is None for t in stored):
        return None
    kind = stored_tensor(codes).dtype
    if kind == ir.DataType.UINT8 and form != "blocks" and point is None:
        return None
    if kind not in {ir.DataType.INT8, ir.DataType.UINT8} or (form != "blocks" and len(stored_tensor(codes).shape) != 2):
        return None
    return QuantisedProduct(form, node, core, hidden, x, codes, scale, point, bias, bits, block)
