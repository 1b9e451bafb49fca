"""Every numpy operator of the ONNX door against onnxruntime, on shapes and arguments that hypothesis makes up.

Provenance moves int64 ids, float64 coefficients and biases through these operators, so each runs on ids here: a wrong
element cannot pass for a right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from passes.dataflow import LAYOUT, Array
from rewriter.capture.onnx_vocabulary import OPERATORS

SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Call:
    """One operator call: `inputs` may hold None for an omitted input."""

    op: str
    inputs: Sequence[Array | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 18


def onnxruntime_says(call: Call) -> list[Array]:
    names = [f"in{i}" if a is not None else "" for i, a in enumerate(call.inputs)]
    given_arrays = {n: a for n, a in zip(names, call.inputs, strict=True) if a is not None}
    node = helper.make_node(call.op, names, [f"out{i}" for i in range(call.outputs)], **call.attrs)
    graph = helper.make_graph(
        [node],
        "one",
        [_info(n, a) for n, a in given_arrays.items()],
        [onnx.ValueInfoProto(name=f"out{i}") for i in range(call.outputs)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", call.opset)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(a) for a in session.run(None, given_arrays)]


@cache
def _dtype(name: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(name)))


def _info(name: str, array: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _dtype(array.dtype.name), array.shape)


def agree(call: Call) -> list[Array]:
    expected = onnxruntime_says(call)
    got = OPERATORS[call.op](call.attrs, call.inputs, call.outputs)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    return expected


def ids(shape: Sequence[int], dtype: str = "int64") -> Array:
    """Distinct elements, none of them 0."""
    return np.arange(1, 1 + int(np.prod(shape, dtype=np.int64)), dtype=dtype).reshape(tuple(shape))


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
DTYPES = st.sampled_from(["int64", "float32", "float64"])


# ------------------------------------------------------------------ one test per operator


@SETTINGS
@given(shapes, DTYPES, st.data())
def test_reshape(shape: list[int], dtype: str, data: st.DataObject) -> None:
    x = ids(shape, dtype)
    wanted = data.draw(
        st.sampled_from([[-1], [x.size], [1, -1], [0, -1], [-1, x.shape[-1]], [*shape, 1], [0] * x.ndim])
    )
    agree(Call("Reshape", [x, np.array(wanted, np.int64)]))


def test_reshape_of_nothing_with_allowzero() -> None:
    agree(Call("Reshape", [np.zeros((0, 3), np.float32), ints(3, 0)], {"allowzero": 1}))


@SETTINGS
@given(shapes, st.data())
def test_flatten(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape)))
    agree(Call("Flatten", [ids(shape, "float32")], {"axis": axis}))


@SETTINGS
@given(shapes, st.data())
def test_transpose(shape: list[int], data: st.DataObject) -> None:
    agree(Call("Transpose", [ids(shape)], {"perm": data.draw(st.permutations(range(len(shape))))}))
    agree(Call("Transpose", [ids(shape)]))


@SETTINGS
@given(shapes, st.data())
def test_squeeze_and_unsqueeze(shape: list[int], data: st.DataObject) -> None:
    rank = len(shape) + 2
    axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=2, max_size=2, unique=True))
    signed = [a - rank if data.draw(st.booleans()) else a for a in axes]
    (wide,) = agree(Call("Unsqueeze", [ids(shape), np.array(signed, np.int64)]))
    agree(Call("Squeeze", [wide, np.array(signed, np.int64)]))
    agree(Call("Squeeze", [wide]))
    agree(Call("Unsqueeze", [ids(shape)], {"axes": sorted(axes)}, opset=11))
    agree(Call("Squeeze", [wide], {"axes": sorted(axes)}, opset=11))


@SETTINGS
@given(shapes, st.data())
def test_expand(shape: list[int], data: st.DataObject) -> None:
    narrow = [1 if data.draw(st.booleans()) else n for n in shape]
    wanted = [1 if data.draw(st.booleans()) else n for n in shape]
    lead = data.draw(st.lists(st.integers(1, 3), max_size=2))
    agree(Call("Expand", [ids(narrow), np.array([*lead, *wanted], np.int64)]))


@SETTINGS
@given(shapes, st.data())
def test_tile(shape: list[int], data: st.DataObject) -> None:
    repeats = [data.draw(st.integers(1, 3)) for _ in shape]
    agree(Call("Tile", [ids(shape), np.array(repeats, np.int64)]))


@SETTINGS
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_slice(shape: list[int], data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape), unique=True))
    near, high, low = st.integers(-7, 7), [2**31 - 1, 2**63 - 1], [-(2**31), -(2**63)]
    starts = [data.draw(st.one_of(near, st.sampled_from(high + low))) for _ in axes]
    steps = [data.draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in axes]
    # "to the end" in the direction of the step
    ends = [data.draw(st.one_of(near, st.sampled_from(high if step > 0 else low))) for step in steps]
    signed = [a - len(shape) if data.draw(st.booleans()) else a for a in axes]
    agree(Call("Slice", [ids(shape), *(np.array(v, np.int64) for v in (starts, ends, signed, steps))]))
    forward = [end if step > 0 else high[0] for end, step in zip(ends, steps, strict=True)]
    agree(Call("Slice", [ids(shape), *(np.array(v, np.int64) for v in (starts, forward, signed))]))


@SETTINGS
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_slice_by_attributes(shape: list[int], data: st.DataObject) -> None:
    starts, ends = ([data.draw(st.integers(-6, 6)) for _ in shape] for _ in range(2))
    agree(Call("Slice", [ids(shape, "float32")], {"starts": starts, "ends": ends}, opset=9))


@SETTINGS
@given(shapes, st.integers(1, 4), st.data())
def test_split(shape: list[int], count: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = [data.draw(st.integers(0, 3)) for _ in range(count)]
    shape[axis] = sum(sizes)
    agree(Call("Split", [ids(shape, "float32"), np.array(sizes, np.int64)], {"axis": axis}, count))
    agree(Call("Split", [ids(shape, "float32")], {"axis": axis, "split": sizes}, count, opset=11))


@SETTINGS
@given(shapes, st.integers(1, 4), st.data())
def test_split_into_equal_parts(shape: list[int], count: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    shape[axis] = count * data.draw(st.integers(1, 3))
    agree(Call("Split", [ids(shape, "float32")], {"axis": axis}, count, opset=13))
    agree(Call("Split", [ids(shape, "float32")], {"axis": axis, "num_outputs": count}, count))
    shape[axis] = 7
    if count < 4:  # the last part is smaller
        agree(Call("Split", [ids(shape, "float32")], {"axis": axis, "num_outputs": count}, count))


@SETTINGS
@given(shapes, st.integers(1, 3), st.data())
def test_concat(shape: list[int], count: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    pieces = []
    for piece in range(count):
        shape[axis] = data.draw(st.integers(1, 3))
        pieces.append(ids(shape) + 100 * piece)
    agree(Call("Concat", pieces, {"axis": axis}))


@SETTINGS
@given(shapes, st.lists(st.integers(1, 3), max_size=2), st.data())
def test_gather(shape: list[int], index_shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    index = np.array(
        [data.draw(st.integers(-size, size - 1)) for _ in range(int(np.prod(index_shape, dtype=int)))], np.int64
    ).reshape(index_shape)
    agree(Call("Gather", [ids(shape), index], {"axis": axis}))
    agree(Call("Gather", [ids(shape), index.astype(np.int32)], {"axis": axis}))


@SETTINGS
@given(shapes, st.data())
def test_gather_elements(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    index_shape = list(shape)
    index_shape[axis] = data.draw(st.integers(1, 5))
    index = rng.integers(-size, size, index_shape)
    agree(Call("GatherElements", [ids(shape), index], {"axis": axis}))
    for other in range(len(shape)):  # an index that covers only a part of the other axes
        if other != axis % len(shape) and shape[other] > 1:
            agree(Call("GatherElements", [ids(shape), index.take([0], axis=other)], {"axis": axis}))


@SETTINGS
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_gather_nd(shape: list[int], data: st.DataObject) -> None:
    batch = data.draw(st.integers(0, len(shape) - 1))
    depth = data.draw(st.integers(1, len(shape) - batch))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    lead = (*shape[:batch], *data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    index = np.stack([rng.integers(-n, n, lead) for n in shape[batch : batch + depth]], axis=-1)
    agree(Call("GatherND", [ids(shape), index], {"batch_dims": batch}))


@SETTINGS
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_scatter_nd(shape: list[int], data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, len(shape)))
    places = int(np.prod(shape[:depth], dtype=int))
    chosen = data.draw(st.lists(st.integers(0, places - 1), min_size=1, max_size=places, unique=True))
    index = np.stack(np.unravel_index(chosen, shape[:depth]), axis=-1).astype(np.int64)
    updates = 100 + ids([len(chosen), *shape[depth:]])
    agree(Call("ScatterND", [ids(shape), index, updates]))


@SETTINGS
@given(shapes, st.data())
def test_scatter_elements(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    order = rng.permuted(
        np.broadcast_to(np.expand_dims(np.arange(shape[axis]), _others(shape, axis)), shape), axis=axis
    )
    keep = [slice(None)] * len(shape)
    keep[axis] = slice(0, data.draw(st.integers(1, shape[axis])))
    index = order[tuple(keep)]
    if data.draw(st.booleans()):
        index = index - shape[axis]
    agree(Call("ScatterElements", [ids(shape), index, 100 + ids(index.shape)], {"axis": axis}))
    for other in range(len(shape)):  # an index that covers only a part of the other axes
        if other != axis % len(shape) and shape[other] > 1:
            part = index.take(range(shape[other] - 1), axis=other)
            agree(Call("ScatterElements", [ids(shape), part, 100 + ids(part.shape)], {"axis": axis}))


def _others(shape: Sequence[int], axis: int) -> list[int]:
    return [a for a in range(len(shape)) if a != axis % len(shape)]


@SETTINGS
@given(shapes, st.data())
def test_pad(shape: list[int], data: st.DataObject) -> None:
    before = [data.draw(st.integers(0, 2)) for _ in shape]
    after = [data.draw(st.integers(0, 2)) for _ in shape]
    agree(Call("Pad", [ids(shape, "float32"), np.array([*before, *after], np.int64)]))
    agree(Call("Pad", [ids(shape, "float32")], {"pads": [*before, *after], "mode": "constant"}, opset=10))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    agree(Call("Pad", [ids(shape, "float32"), ints(before[0], after[0]), None, ints(axis)]))


def test_pad_with_negative_pads_crops() -> None:
    agree(Call("Pad", [ids([3, 5], "float32"), ints(0, -1, 0, 2)]))
    agree(Call("Pad", [ids([3, 5], "float32"), ints(1, -2, -1, -1)]))


@SETTINGS
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(-4, 4), st.booleans())
def test_trilu(shape: list[int], k: int, upper: bool) -> None:
    agree(Call("Trilu", [ids(shape), np.array(k, np.int64)], {"upper": int(upper)}))
    agree(Call("Trilu", [ids(shape)], {"upper": int(upper)}))


@SETTINGS
@given(shapes, st.data())
def test_where(shape: list[int], data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    narrow = [1 if data.draw(st.booleans()) else n for n in shape]
    agree(Call("Where", [rng.random(narrow) > 0.5, ids(shape), 100 + ids(narrow)]))


@SETTINGS
@given(shapes, DTYPES)
def test_identity(shape: list[int], dtype: str) -> None:
    agree(Call("Identity", [ids(shape, dtype)]))


def test_dropout_is_the_identity() -> None:
    agree(Call("Dropout", [ids([2, 3], "float32")]))


# ------------------------------------------------------------------ the whole


TESTED = {name.removeprefix("test_").replace("_", "") for name in globals() if name.startswith("test_")}
SHARED = {"squeeze": "squeezeandunsqueeze", "unsqueeze": "squeezeandunsqueeze", "dropout": "dropoutistheidentity"}


def test_every_operator_is_compared() -> None:
    missing = [op for op in OPERATORS if SHARED.get(op.lower(), op.lower()) not in TESTED]
    assert missing == []


def test_every_operator_counts_as_layout() -> None:
    assert set(OPERATORS) <= LAYOUT


def test_what_would_compute_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        OPERATORS["Pad"]({"mode": "reflect"}, [ids([3]), ints(1, 1)], 1)
    with pytest.raises(NotImplementedError):
        OPERATORS["ScatterND"]({"reduction": "add"}, [ids([3]), ints(1).reshape(1, 1), ints(5)], 1)
    with pytest.raises(NotImplementedError):
        OPERATORS["ScatterElements"]({"reduction": b"add"}, [ids([3]), ints(1), ints(5)], 1)


def test_a_wrong_result_would_be_seen() -> None:
    """The control of `agree`."""
    x = ids([2, 2])
    (expected,) = onnxruntime_says(Call("Transpose", [x], {"perm": [0, 1]}))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(OPERATORS["Transpose"]({"perm": [1, 0]}, [x], 1)[0], expected)
