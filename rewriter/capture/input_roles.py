"""What each input of an ONNX graph is: ids, mask, positions, past keys, features; read off dtype, rank and use.

Names are a hint; where a name says nothing, the operators that an input reaches decide.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from rewriter.capture.cache_sizes import CACHE_SLOTS, CacheSize, cache_size

Kind = Literal[
    "ids", "segments", "positions", "mask", "bias", "past", "image", "audio", "wave", "features",
    "flag", "count", "past_length", "total_length", "last_index",
]  # fmt: skip
Axis = Literal["batch", "length", "past", "total", "encoder", "channels", "side", "frames", "samples", "other"]

CONTRACTIONS = frozenset(
    {"MatMul", "Gemm", "Einsum", "Conv", "FusedMatMul", "MatMulInteger", "MatMulNBits", "QLinearMatMul", "ConvInteger"}
)
MOVERS = frozenset(
    {"Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Expand"}
)
"""Operators that keep each element's value."""

_QKV_SLOTS = {0, 1, 2}
_LARGE = 1e3


@dataclass(frozen=True)
class InputRole:
    """One graph input and what to feed it.

    Attributes:
        axes: what each axis measures.
        bound: ids and positions must stay below it; None if no table was found.
        true_masks: for masks, True if 1 means "masked" instead of "keep".
        additive: for float masks, True if it is added to scores (0 keeps, a large negative number masks).
        channels: size of the "channels" axis where it is not declared.
    """

    name: str
    kind: Kind
    dtype: ir.DataType
    shape: tuple[int | str | None, ...]
    axes: tuple[Axis, ...]
    bound: int | None = None
    true_masks: bool = False
    additive: bool = False
    channels: int | None = None


@dataclass(frozen=True)
class Arrival:
    """An operator that an input reaches.

    Attributes:
        slot: at which of its inputs.
        flipped: True if 0 and 1 were swapped on the way.
        moved_only: True if the elements arrive as they were.
        calls: the model functions that it is inside of, outermost first, each with the node that calls it.
    """

    node: ir.Node
    slot: int
    flipped: bool
    moved_only: bool
    calls: tuple[tuple[ir.Node, ir.Function], ...] = ()

    def operand(self, slot: int) -> ir.Value | None:
        """An input of the operator; a function's parameter is followed to what the call passes."""
        value = self.node.inputs[slot]
        for call, function in reversed(self.calls):
            position = next((i for i, parameter in enumerate(function.inputs) if parameter is value), None)
            if position is None:
                break
            value = call.inputs[position]
        return value


def input_roles(model: ir.Model) -> tuple[InputRole, ...]:
    """The role of every input that a caller must feed, in graph order.

    Sequence, optional and string inputs are left out; feeding those is the caller's decision.
    """
    values = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    decoder = any(_words(v) & {"decoder"} for v in values)
    return tuple(_role(model, v, decoder) for v in values if _is_tensor(v))


def _is_tensor(value: ir.Value) -> bool:
    return (value.type is None or isinstance(value.type, ir.TensorType)) and value.dtype != ir.DataType.STRING


def _role(model: ir.Model, value: ir.Value, decoder: bool) -> InputRole:
    arrivals = list(arrivals_of(model, value))
    kind = _kind(value, arrivals)
    shape = _shape(value) if kind != "past" else _cache_shape(_shape(value), arrivals)
    other_side = _is_other_side(value, decoder)
    return InputRole(
        name=value.name or "",
        kind=kind,
        dtype=value.dtype or ir.DataType.FLOAT,
        shape=shape,
        axes=_state_axes(shape) if kind == "past" and _is_state(value) else _axes(kind, shape, other_side),
        bound=_bound(arrivals) if kind in {"ids", "segments", "positions"} else None,
        true_masks=kind == "mask" and _true_masks(value, arrivals),
        additive=kind == "mask" and _is_float(value) and not _is_binary(arrivals),
        channels=_channels(arrivals),
    )


def _shape(value: ir.Value) -> tuple[int | str | None, ...]:
    dims = value.shape.dims if value.shape is not None else ()
    return tuple(d if isinstance(d, int) else d.value for d in dims)


def _cache_shape(shape: tuple[int | str | None, ...], arrivals: list[Arrival]) -> tuple[int | str | None, ...]:
    """What a cache's shape leaves open, as the fused operator that reads it has it."""
    for a in arrivals:
        if a.moved_only and a.slot in CACHE_SLOTS.get(a.node.op_type, ()):
            return sized(shape, cache_size(a.node, a.node.inputs, a.slot))
    return shape


def sized(shape: tuple[int | str | None, ...], size: CacheSize) -> tuple[int | str | None, ...]:
    """A cache's shape [..., heads, P, features] with these numbers where it says none."""
    if len(shape) < 4:
        return shape
    told = (d if n is None or isinstance(d, int) else n for d, n in zip(shape[-3:], size, strict=True))
    return (*shape[:-3], *told)


def _words(value: ir.Value) -> frozenset[str]:
    return frozenset(re.split(r"[^a-z]+", (value.name or "").lower()))


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _is_other_side(value: ir.Value, decoder: bool) -> bool:
    """True if the input belongs to the sequence that cross-attention reads."""
    words = _words(value)
    if words & {"encoder", "cross"}:
        return True
    return decoder and not words & {"decoder", "past", "cache", "self"}


# --- kinds ---------------------------------------------------------------------------------------


def _kind(value: ir.Value, arrivals: list[Arrival]) -> Kind:
    return _float_kind(value, arrivals) if _is_float(value) else _discrete_kind(value, arrivals)


def _float_kind(value: ir.Value, arrivals: list[Arrival]) -> Kind:
    name, rank = (value.name or "").lower(), len(_shape(value))
    if "mask" in name:
        return "mask"
    if rank >= 3 and (re.search(r"past|cache", name) or _reaches_past(rank, arrivals)):
        return "past"
    convolutions = [a for a in arrivals if a.node.op_type in {"Conv", "ConvInteger"} and a.slot == 0]
    if convolutions:
        return "image" if rank == 4 else "audio" if rank == 3 else "wave"
    if rank >= 2 and _reaches_scores(arrivals):
        return "mask" if _is_binary(arrivals) else "bias"
    return "features"


def _discrete_kind(value: ir.Value, arrivals: list[Arrival]) -> Kind:
    name, shape = (value.name or "").lower(), _shape(value)
    scalar = len(shape) == 0 or all(d == 1 for d in shape)
    named = _named_kind(name, scalar)
    if named is not None:
        return named
    if value.dtype == ir.DataType.BOOL:
        return "flag" if len(shape) < 2 else "mask"
    for arrival in arrivals:
        if arrival.node.op_type == "GroupQueryAttention" and arrival.slot in {5, 6}:
            return "last_index" if arrival.slot == 5 else "total_length"
    if _bound(arrivals) is not None:
        return "ids"
    if any(a.node.op_type in {"Sin", "Cos", "RotaryEmbedding"} for a in arrivals):
        return "positions"
    if len(shape) < 2 and scalar:
        return "count"
    return "mask" if len(shape) >= 2 and _reaches_scores(arrivals) else "ids"


def _named_kind(name: str, scalar: bool) -> Kind | None:
    if "past" in name and scalar:
        return "past_length"
    if "use_cache" in name:
        return "flag"
    if "total_seq" in name:
        return "total_length"
    if "seqlens" in name:
        return "last_index"
    if "position" in name or "pos_id" in name:
        return "positions"
    if "mask" in name and not scalar:
        return "mask"
    if "token_type" in name or "segment" in name:
        return "segments"
    return None


def _reaches_past(rank: int, arrivals: list[Arrival]) -> bool:
    return any(
        a.slot in CACHE_SLOTS.get(a.node.op_type, ()) or (rank >= 4 and a.moved_only and a.node.op_type == "Concat")
        for a in arrivals
    )


def _reaches_scores(arrivals: list[Arrival]) -> bool:
    return any(
        a.node.op_type in {"Softmax", "MaskedSoftmax"}
        or ("Attention" in a.node.op_type and a.slot not in _QKV_SLOTS | set(CACHE_SLOTS.get(a.node.op_type, ())))
        for a in arrivals
    )


# --- where an input goes -------------------------------------------------------------------------


def arrivals_of(model: ir.Model, value: ir.Value) -> Iterator[Arrival]:
    """Every use of `value`, nearest first, also inside subgraphs and model functions.

    The walk goes on behind elementwise and layout operators and stops at contractions, attentions,
    table look-ups and softmax.
    """
    todo: deque[tuple[ir.Value, tuple[tuple[ir.Node, ir.Function], ...], bool, bool]] = deque()
    todo.append((value, (), False, True))
    seen: set[tuple[int, tuple[int, ...], bool]] = set()
    while todo:
        current, calls, flipped, moved_only = todo.popleft()
        key = (id(current), tuple(id(call) for call, _ in calls), flipped)
        if key in seen:
            continue
        seen.add(key)
        for node, slot in current.uses():
            function = model.functions.get(node.op_identifier())
            if function is not None:
                todo.append((function.inputs[slot], (*calls, (node, function)), flipped, moved_only))
                continue
            yield Arrival(node, slot, flipped, moved_only, calls)
            if not _stops(node, slot):
                swaps = _flips(node, slot)
                still_moved = moved_only and node.op_type in MOVERS
                todo.extend((out, calls, flipped != swaps, still_moved) for out in node.outputs)
        if calls:
            call, function = calls[-1]
            returned = (i for i, out in enumerate(function.outputs) if out is current and i < len(call.outputs))
            todo.extend((call.outputs[i], calls[:-1], flipped, moved_only) for i in returned)


def _stops(node: ir.Node, slot: int) -> bool:
    if node.op_type in CONTRACTIONS or node.op_type in {"Shape", "Size", "Softmax", "MaskedSoftmax", "OneHot"}:
        return True
    if "Attention" in node.op_type or node.op_type == "EmbedLayerNormalization":
        return True
    return slot > 0 and node.op_type in {"Gather", "GatherBlockQuantized", "GatherND", "GatherElements", "Reshape"}


def _flips(node: ir.Node, slot: int) -> bool:
    """True if the operator swaps the meaning of 0 and 1: not x, c - x, x == 0, x < 1."""
    if node.op_type == "Not":
        return True
    if node.op_type == "Sub":
        return slot == 1
    other = _constant(node, 1 - slot)
    if node.op_type == "Equal":
        return other == 0
    if node.op_type in {"Less", "LessOrEqual"}:
        return slot == 0
    return node.op_type in {"Greater", "GreaterOrEqual"} and slot == 1


def _constant(node: ir.Node, slot: int) -> float | None:
    """The value of a constant input whose elements are all equal; None otherwise."""
    if not 0 <= slot < len(node.inputs):
        return None
    value = node.inputs[slot]
    for _ in range(8):
        if value is None:
            return None
        array = constant_array(value)
        if array is not None:
            flat = array.reshape(-1)
            return float(flat[0]) if flat.size and bool((flat == flat[0]).all()) else None
        producer = value.producer()
        if producer is None or producer.op_type not in MOVERS:
            return None
        value = producer.inputs[0]
    return None


def constant_array(value: ir.Value, limit: int = 65536) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    """The elements of an initializer or Constant of at most `limit` elements; None for anything else."""
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type in {"Constant", "ConstantOfShape"}:
        attribute = producer.attributes.get("value")
        if attribute is not None:
            tensor = attribute.as_tensor()
        else:
            plain = next(iter(producer.attributes.values()), None)
            is_number = (
                plain is not None
                and not plain.is_ref()
                and plain.name in {"value_float", "value_int", "value_floats", "value_ints"}
            )
            return np.asarray(plain.value) if plain is not None and is_number else None
    if tensor is None or tensor.size > limit or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


# --- tables and convolutions ---------------------------------------------------------------------


def _bound(arrivals: list[Arrival]) -> int | None:
    """The smallest table that the input indexes directly."""
    rows = [r for a in arrivals if a.moved_only and (r := _table_rows(a)) is not None]
    return min(rows, default=None)


def _table_rows(arrival: Arrival) -> int | None:
    node, slot = arrival.node, arrival.slot
    if node.op_type in {"Gather", "GatherBlockQuantized"} and slot == 1:
        name = "axis" if node.op_type == "Gather" else "gather_axis"
        return _rows(arrival.operand(0), node.attributes[name].as_int() if name in node.attributes else 0)
    if node.op_type == "EmbedLayerNormalization" and slot in {0, 1}:
        return _rows(arrival.operand(2 if slot == 0 else 4), 0)
    if node.op_type == "OneHot" and slot == 0:
        depth = _constant(node, 1)
        return None if depth is None else int(depth)
    return None


def _rows(table: ir.Value | None, axis: int) -> int | None:
    """Declared size of one axis of a table that no graph input feeds."""
    for _ in range(8):
        if table is None:
            return None
        shape = table.const_value.shape if table.const_value is not None else table.shape
        producer = table.producer()
        constant = table.const_value is not None or (producer is not None and producer.op_type == "Constant")
        if constant and producer is not None and shape is None:
            array = constant_array(table, 1 << 40)
            return None if array is None or array.ndim < 2 else array.shape[axis]
        if constant and shape is not None:
            size = shape[axis] if len(shape) >= 2 else None
            return size if isinstance(size, int) else None
        if producer is None or producer.op_type not in {"Cast", "CastLike", "DequantizeLinear", "Mul", "Identity"}:
            return None
        table = max((v for v in producer.inputs if v is not None), key=_rank, default=None)
    return None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _channels(arrivals: list[Arrival]) -> int | None:
    """Input channels of the convolution that the input reaches, or input features of its first matrix."""
    for arrival in arrivals:
        if arrival.slot != 0 or len(arrival.node.inputs) < 2:
            continue
        weight = arrival.node.inputs[1]
        shape = weight.shape if weight is not None and weight.const_value is not None else None
        if shape is None:
            continue
        if arrival.node.op_type == "Conv":
            group = arrival.node.attributes["group"].as_int() if "group" in arrival.node.attributes else 1
            return int(shape[1]) * group if isinstance(shape[1], int) else None
        if arrival.node.op_type == "MatMul" and len(shape) == 2 and isinstance(shape[0], int):
            return shape[0]
    return None


# --- masks ---------------------------------------------------------------------------------------


def _gives_whole_numbers(cast: ir.Node) -> bool:
    """False as well where a call of a function left the type out, which it then has from nowhere."""
    to = cast.attributes.get("to")
    known = to is not None and to.value is not None
    return known and not ir.DataType(cast.attributes["to"].as_int()).is_floating_point()


def _is_binary(arrivals: list[Arrival]) -> bool:
    """True if a float input is read as 0 or 1: 1 - x, a comparison, a cast to bool or integer."""
    for a in arrivals:
        if a.node.op_type in {"Equal", "Greater", "Less", "Not"} or (a.node.op_type == "Sub" and a.slot == 1):
            return True
        if a.node.op_type == "Cast" and _gives_whole_numbers(a.node):
            return True
    return False


def _true_masks(value: ir.Value, arrivals: list[Arrival]) -> bool:
    """True if 1 means "do not look": found where the mask picks, or is scaled to, a large negative number."""
    for arrival in arrivals:
        verdict = _masks(arrival)
        if verdict is not None:
            return verdict != arrival.flipped
    return value.dtype == ir.DataType.BOOL and "padding" in _words(value)


def _masks(arrival: Arrival) -> bool | None:
    """Whether a 1 that arrives here masks; None if this operator does not tell."""
    node, slot = arrival.node, arrival.slot
    if node.op_type == "Where" and slot == 0:
        chosen, other = _constant(node, 1), _constant(node, 2)
        if chosen is not None and chosen <= -_LARGE:
            return True
        return False if other is not None and other <= -_LARGE else None
    if node.op_type == "Mul":
        factor = _constant(node, 1 - slot)
        return None if factor is None or abs(factor) < _LARGE else factor < 0
    if node.op_type in {"Attention", "MultiHeadAttention"} and slot >= 3:
        return False
    return None


# --- axes ----------------------------------------------------------------------------------------


def _axes(kind: Kind, shape: tuple[int | str | None, ...], other_side: bool) -> tuple[Axis, ...]:
    sequence: Axis = "encoder" if other_side else "length"
    keys: Axis = "encoder" if other_side else "total"
    rank = len(shape)
    if kind == "past":
        return _past_axes(shape, "encoder" if other_side else "past")
    grids: dict[str, dict[int, tuple[Axis, ...]]] = {
        "mask": {2: ("batch", keys), 3: ("batch", "length", keys), 4: ("batch", "other", "length", keys)},
        "bias": {2: ("length", keys), 3: ("other", "length", keys), 4: ("batch", "other", "length", keys)},
    }
    rows: dict[str, tuple[Axis, ...]] = {
        "ids": ("batch", sequence),
        "segments": ("batch", sequence),
        "positions": ("batch", sequence) if rank < 3 else ("other", "batch", sequence),
        "image": ("batch", "channels", "side", "side"),
        "audio": ("batch", "channels", "frames"),
        "wave": ("batch", "samples"),
        "features": ("batch", "channels") if rank == 2 else ("batch", sequence, "channels"),
    }
    if kind == "mask" and rank == 2 and shape[0] == shape[1] and shape[0] is not None:
        return ("length", keys)
    if rank == 1 and kind in {"ids", "segments", "positions", "mask"}:
        return (keys if kind == "mask" else sequence,)
    axes = grids[kind].get(rank, ("batch",)) if kind in grids else rows.get(kind, ("batch",))
    others: list[Axis] = ["other"] * rank
    if kind == "features" and rank > 3 and isinstance(shape[1], int) and not isinstance(shape[2], int):
        return ("batch", "other", sequence, *others)[:rank]  # heads, keys or values
    return (*axes, *others)[:rank]


def _is_state(value: ir.Value) -> bool:
    """Whether what is kept from call to call does not grow: [B, channels, taps], or so it is called."""
    words, shape = _words(value), _shape(value)
    fixed = len(shape) == 3 and not isinstance(shape[0], int) and all(isinstance(d, int) for d in shape[1:])
    return fixed or bool(words & {"conv", "recurrent", "ssm", "state"} and not words & {"key", "value", "kv"})


def _state_axes(shape: tuple[int | str | None, ...]) -> tuple[Axis, ...]:
    others: list[Axis] = ["other"] * len(shape)
    return ("batch", *others[1:])


def _past_axes(shape: tuple[int | str | None, ...], cached: Axis) -> tuple[Axis, ...]:
    """[B, heads, past, dim], with whatever axes come first: the batch is the first open axis, the past the second."""
    rank = len(shape)
    axes: list[Axis] = ["other"] * rank
    first = 1 if rank == 5 else 0
    axes[first] = "batch"
    open_axes = [i for i, d in enumerate(shape) if not isinstance(d, int) and i > first]
    axes[open_axes[0] if len(open_axes) == 1 else rank - 2] = cached
    return tuple(axes)
