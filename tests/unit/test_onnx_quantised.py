"""Packing of weights of a few bits, and requantisation in the scheme of the weights that were there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.capture.quantised import QuantisedProduct, quantised_product, unpack
from rewriter.install.onnx_quantised import as_integers, in_blocks, pack

ROWS, COLUMNS = 40, 6


@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_packing_is_undone_by_unpacking(bits: int, rows: int, numbers: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, numbers)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-numbers * bits // 8))
    assert np.array_equal(unpack(packed, bits)[:, :numbers], codes)


def value(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def product(
    kind: str, codes: np.ndarray, scale: np.ndarray, points: np.ndarray | None, **attrs: int
) -> QuantisedProduct:
    inputs: list[ir.Value | None] = [ir.Value(name="x"), value("w", codes), value("s", scale)]
    if points is not None:
        inputs.append(value("z", points))
    attributes = [ir.AttrInt64(k, v) for k, v in attrs.items()]
    found = quantised_product(ir.Node("com.microsoft", kind, inputs, attributes, num_outputs=1))
    assert found is not None
    return found


def integers(dtype: type, columns: bool, point: int | None) -> QuantisedProduct:
    rng = np.random.default_rng(0)
    info = np.iinfo(dtype)
    codes = rng.integers(info.min, info.max + 1, (ROWS, COLUMNS)).astype(dtype)
    scale = np.linspace(0.01, 0.03, COLUMNS if columns else 1).astype(np.float32)
    points = None if point is None else np.full(scale.shape, point, dtype)
    if points is not None and columns:
        points[1] += 3
    return product("DynamicQuantizeMatMul", codes, scale, points)


SCHEMES = [
    (np.int8, False, None), (np.int8, False, 0), (np.int8, True, 0), (np.uint8, False, 128), (np.uint8, False, 90),
    (np.uint8, True, 120),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "columns", "point"), SCHEMES)
def test_columns_that_were_there_keep_their_integers(dtype: type, columns: bool, point: int | None) -> None:
    old = integers(dtype, columns, point)
    chosen = [4, 1, 1, 0]
    made = as_integers(old, old.matrix[:, chosen])
    assert made.error < 1e-7 and np.array_equal(made.codes, old.packed[:, chosen])


@pytest.mark.parametrize(("dtype", "columns", "point"), SCHEMES)
def test_new_columns_are_off_by_half_a_step(dtype: type, columns: bool, point: int | None) -> None:
    old = integers(dtype, columns, point)
    weight = np.random.default_rng(1).standard_normal((ROWS, 3)).astype(np.float32)
    made = as_integers(old, weight)
    assert made.codes.dtype == dtype and (made.points is None) is (point is None)
    assert made.scale.shape == ((3,) if columns else (1,))
    back = (made.codes.astype(np.float64) - (0 if made.points is None else made.points)) * made.scale
    # zero points are rounded too, so a step at the end of the range may be cut off
    assert (np.abs(back - weight) <= 1.01 * made.scale).all()
    assert made.error == pytest.approx(np.abs(back - weight).max() / np.abs(weight).max(), rel=1e-3)
    assert np.abs(back[::-1] - weight).max() > 1.0, "the control: another order of rows"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("points", ["none", "packed", "floats"])
def test_blocks_of_a_few_bits(bits: int, points: str) -> None:
    """40 rows in blocks of 16: the last block is half empty, and zero points of three blocks fill no whole byte."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (COLUMNS, 3, 16 * bits // 8)).astype(np.uint8)
    scale = rng.uniform(0.1, 0.2, (COLUMNS, 3)).astype(np.float32)
    whole = rng.integers(0, 1 << bits, (COLUMNS, 3)).astype(np.uint8)
    floats = whole.astype(np.float32) + np.float32(0.25)
    zero = {"none": None, "packed": pack(whole, bits), "floats": floats}[points]
    old = product("MatMulNBits", codes, scale, zero, K=ROWS, N=COLUMNS, bits=bits, block_size=16)
    assert old.matrix.shape == (ROWS, COLUMNS)
    same = in_blocks(old, old.matrix[:, [2, 5]])
    assert same.error == 0 and np.array_equal(same.scale, scale[[2, 5]])
    weight = rng.standard_normal((ROWS, 2)).astype(np.float32)
    made = in_blocks(old, weight)
    new = product("MatMulNBits", made.codes, made.scale, made.points, K=ROWS, N=2, bits=bits, block_size=16)
    steps = np.repeat(np.abs(made.scale), 16, axis=1)[:, :ROWS].T
    assert (np.abs(new.matrix - weight) <= 1.01 * steps).all()
    assert made.error < {2: 0.8, 4: 0.15, 8: 0.02}[bits]
    assert np.abs(new.matrix[::-1] - weight).max() > 1.0
