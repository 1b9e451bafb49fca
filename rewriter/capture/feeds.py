"""Plausible inputs for an ONNX graph, from nothing but the graph: sizes for open dimensions, values by role."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.capture.cache_sizes import CacheSize
from rewriter.capture.input_roles import (
    CONTRACTIONS,
    MOVERS,
    Axis,
    InputRole,
    constant_array,
    input_roles,
    sized,
)
from rewriter.errors import UnsupportedModel, UsageError

Array = NDArray[Any]
MaskStyle = Literal["mixed", "ones"]

_MASKED = -1e4
"""What an additive mask holds where it masks; fits float16."""
_UNKNOWN_BOUND = 8
_LARGEST_ID = 1000
_LARGEST_INPUT = 1 << 28
MOST_NUMBERS = 2**28
"""Of one made-up input; real ones are smaller, and what a broken file declares may be anything."""
_SIDE, _SMALL_SIDE = 224, 16
_FRAMES = 3000
_LOWERING = frozenset({"Conv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool"})
_SPECIAL_IDS = 3
"""The lowest ids usually mean padding, start and end; plausible text has none inside."""


@dataclass(frozen=True)
class Sizes:
    """What the open dimensions of one feed are."""

    batch: int = 2
    length: int = 7
    past: int = 3

    @property
    def total(self) -> int:
        return self.past + self.length

    @property
    def encoder(self) -> int:
        return self.length + 2


def make_feeds(
    model: ir.Model,
    *,
    batch: int = 2,
    length: int = 7,
    past: int = 3,
    seed: int = 0,
    mask: MaskStyle = "mixed",
    shapes: Mapping[str, Sequence[int]] | None = None,
    caches: Mapping[str, CacheSize] | None = None,
) -> dict[str, Array]:
    """Inputs that any transformer graph should accept, one array per graph input.

    Declared sizes are respected; open dimensions become `batch`, `length`, `past` and what follows from them.
    Ids stay below the tables that they index; masks of style "mixed" hide something in the last row and never
    everything a query may see; positions go on behind the past. `shapes` fixes whole inputs by name, and through
    shared symbols and roles the others follow. `caches` says how large caches are that leave it open.

    Raises:
        UnsupportedModel: an input is a sequence, an optional or a string, or has no declared rank.
        UsageError: `shapes` names no input, or contradicts what an input declares.
    """
    found = _roles(model, caches)
    _check_feedable(model, found)
    roles = _fix_shapes(found, shapes or {})
    sizes = _respect_declared(roles, Sizes(batch, length, past))
    symbols = _symbol_sizes(roles, sizes)
    sides = _sides(model, roles, length)
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    if any(node.op_type == "GroupQueryAttention" for node in model.graph):
        mask = "ones"  # it takes a length per sequence and leaves what lies beyond undefined
    for role in roles:
        shape = _concrete_shape(role, sizes, symbols, sides)
        _check_size(role.name, shape)
        feeds[role.name] = _values(role, shape, sizes, mask, rng)
    return feeds


def _check_size(name: str, shape: tuple[int, ...]) -> None:
    if any(size < 0 for size in shape):
        raise UnsupportedModel(
            f"input {name!r} declares the negative size {min(shape)}", hint="give open dimensions a name instead"
        )
    if prod(max(size, 1) for size in shape) > MOST_NUMBERS:  # also where another size is 0
        raise UnsupportedModel(
            f"input {name!r} declares {prod(shape):,} numbers, too many to make up",
            hint="give large dimensions a name instead, so that they are open",
        )


def _roles(model: ir.Model, caches: Mapping[str, CacheSize] | None) -> tuple[InputRole, ...]:
    known, unknown = caches or {}, (None, None, None)
    roles = [replace(role, shape=sized(role.shape, known.get(role.name, unknown))) for role in input_roles(model)]
    if any(role.kind == "flag" for role in roles) and any(role.kind == "past" for role in roles):
        ids = {dim for role in roles if role.kind == "ids" for dim in role.shape if isinstance(dim, str)}
        roles = [_over_all(role, ids) if role.kind == "mask" else role for role in roles]
    return tuple(roles)


def _over_all(role: InputRole, ids: set[str]) -> InputRole:
    """Where a flag chooses between a first and a later step, masks are declared as the first step has them, over the
    new tokens; a later step's are over the past, too."""
    dims = (None if a == "total" and d in ids else d for a, d in zip(role.axes, role.shape, strict=True))
    return replace(role, shape=tuple(dims))


def candidate_sizes(model: ir.Model, caches: Mapping[str, CacheSize] | None = None) -> list[tuple[int, int, int]]:
    """(batch, length, past) to try in turn when a file has sizes baked in that it does not declare.

    First the default, then sizes read off constants and declared shapes inside the graph, then usual trace sizes.
    Sizes that the declared inputs, or `caches`, do not allow are corrected, and duplicates dropped.
    """
    roles = _roles(model, caches)
    has_past = any(role.kind == "past" for role in roles)
    pasts = (3, 0) if has_past else (0,)
    first, others = [(2, 7), (1, 7)], [*_baked_pairs(model), (1, 8), (2, 8), (1, 16), (1, 1), (1, 128)]
    wanted = [Sizes(b, n, p) for p in pasts for b, n in first]  # some operators go on with a cache at batch 1 only
    wanted += [Sizes(b, n, p) for b, n in others for p in pasts]
    fitted = [_respect_declared(roles, sizes) for sizes in wanted]
    return list(dict.fromkeys((s.batch, s.length, s.past) for s in fitted))


def _check_feedable(model: ir.Model, roles: tuple[InputRole, ...]) -> None:
    known = {role.name for role in roles}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if value.dtype == ir.DataType.STRING:
            raise UnsupportedModel(
                f"input {value.name!r} takes text, and no text is made up for what tokenizes it inside the file",
                hint="cut the file behind its tokenizer (onnx.utils.extract_model), and rewrite what takes ids",
            )
        if value.name not in known:
            raise UnsupportedModel(
                f"input {value.name!r} is no plain tensor",
                hint="export the model with tensor inputs only",
            )
        if value.shape is None:
            raise UnsupportedModel(
                f"input {value.name!r} declares no shape",
                hint="export the model with input shapes; dimensions may be symbolic",
            )


# --- sizes ---------------------------------------------------------------------------------------


def _fix_shapes(roles: tuple[InputRole, ...], shapes: Mapping[str, Sequence[int]]) -> tuple[InputRole, ...]:
    """`roles` with the given shapes in place of the declared ones, also where their symbols occur elsewhere."""
    known = {role.name: role for role in roles}
    symbols: dict[str, int] = {}
    for name, shape in shapes.items():
        role = known.get(name)
        if role is None:
            raise UsageError(f"the model has no input {name!r}", hint=f"its inputs are: {', '.join(known)}")
        fits = len(shape) == len(role.shape) and all(
            size >= 0 and (size == dim or not isinstance(dim, int)) for size, dim in zip(shape, role.shape, strict=True)
        )
        if not fits:
            raise UsageError(
                f"shape {'x'.join(map(str, shape))} does not fit input {name!r}", hint=f"it declares {role.shape}"
            )
        symbols |= {dim: size for size, dim in zip(shape, role.shape, strict=True) if isinstance(dim, str)}
    return tuple(
        replace(role, shape=tuple(shapes[role.name]))
        if role.name in shapes
        else replace(role, shape=tuple(symbols.get(d, d) if isinstance(d, str) else d for d in role.shape))
        for role in roles
    )


def _respect_declared(roles: tuple[InputRole, ...], sizes: Sizes) -> Sizes:
    """`sizes`, corrected where an input declares its batch, length or past as a number."""
    batch = _declared(roles, "batch", {"ids", "segments", "features", "past", "image", "audio", "wave"})
    length = _declared(roles, "length", {"ids", "segments", "positions", "features"})
    past = _declared(roles, "past", {"past"})
    total = _declared(roles, "total", {"mask"})
    fitted = Sizes(batch or sizes.batch, length or sizes.length, sizes.past if past is None else past)
    if not any(role.kind == "past" for role in roles):
        return Sizes(fitted.batch, length or total or fitted.length, 0)
    if total is not None and past is None and total >= fitted.length:
        return Sizes(fitted.batch, fitted.length, total - fitted.length)
    return fitted


def _declared(roles: tuple[InputRole, ...], axis: Axis, kinds: set[str]) -> int | None:
    for role in roles:
        for name, dim in zip(role.axes, role.shape, strict=True):
            if name == axis and role.kind in kinds and isinstance(dim, int):
                return dim
    return None


def _symbol_sizes(roles: tuple[InputRole, ...], sizes: Sizes) -> dict[str, int]:
    """One size per symbol; inputs whose axes are surest decide first."""
    order = ("past", "ids", "features", "segments", "positions", "image", "audio", "wave", "mask", "bias")
    ranked = sorted(roles, key=lambda role: order.index(role.kind) if role.kind in order else len(order))
    symbols: dict[str, int] = {}
    for role in ranked:
        for axis, dim in zip(role.axes, role.shape, strict=True):
            if isinstance(dim, str) and dim not in symbols and _is_atom(dim):
                size = _axis_size(_hinted(dim, axis), sizes, role)
                if size is not None:
                    symbols[dim] = size
    return symbols


def _is_atom(symbol: str) -> bool:
    return not re.search(r"[-+*/()]", symbol)


def _hinted(symbol: str, axis: Axis) -> Axis:
    """Sequence-first inputs are told apart by what their symbols are called."""
    name = symbol.lower()
    if axis in {"length", "total", "channels"} and "batch" in name:
        return "batch"
    if axis == "batch" and re.search(r"seq|len|tokens", name):
        return "length"
    return axis


def _axis_size(axis: Axis, sizes: Sizes, role: InputRole) -> int | None:
    table = {
        "batch": sizes.batch,
        "length": sizes.length,
        "past": sizes.past,
        "total": sizes.total,
        "encoder": sizes.encoder,
        "channels": role.channels,
        "samples": 3200,
        "other": 1 if role.kind in {"mask", "bias"} else 2,
    }
    return table.get(axis)


def _concrete_shape(
    role: InputRole, sizes: Sizes, symbols: Mapping[str, int], sides: tuple[int, int]
) -> tuple[int, ...]:
    shape: list[int] = []
    for place, (axis, dim) in enumerate(zip(role.axes, role.shape, strict=True)):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        size = _evaluate(dim, symbols) if dim is not None else None
        if size is None:
            size = _axis_size(axis, sizes, role)
        shape.append(_open_size(axis, role, sides[place == len(role.axes) - 1]) if size is None else size)
    return tuple(shape)


def _open_size(axis: Axis, role: InputRole, side: int) -> int:
    """Sizes of axes that no argument names."""
    return {"channels": 3 if role.kind == "image" else 16, "side": side, "frames": side}.get(axis, 1)


def _sides(model: ir.Model, roles: tuple[InputRole, ...], length: int) -> tuple[int, int]:
    """Height and width of images: what positions of patches fit; if there are none, other sides at other lengths.

    A model that goes down in resolution takes multiples of `deepest`. Where its first convolution keeps the resolution,
    attention may stand at every pixel: images are small then.
    """
    known = _image_side(model, roles)
    if known is not None or not any(role.kind == "image" for role in roles):
        return (known or _FRAMES,) * 2
    first, deepest = _strides(model, {role.name for role in roles if role.kind == "image"})
    usual, later = max(_SMALL_SIDE, 2 * deepest) if first == 1 else _SIDE, length - Sizes.length
    return usual + later % 3 * deepest, usual + 2 * later % 3 * deepest


def _strides(model: ir.Model, images: set[str]) -> tuple[int, int]:
    """By how much an image's first convolution lowers the resolution, and by how much the deepest value is lower."""
    first, lowered = None, {name: 1 for name in images}
    for node in model.graph:
        above = max((lowered[v.name] for v in node.inputs if v is not None and v.name in lowered), default=None)
        if above is None or node.op_type == "Shape":
            continue
        strides = node.attributes["strides"].as_ints() if "strides" in node.attributes else (1,)
        step = strides[0] if node.op_type in _LOWERING else 1
        first = step if first is None and node.op_type in {"Conv", "ConvInteger"} else first
        lowered |= {v.name: above * step for v in node.outputs if v.name}
    return first or 1, min(max(lowered.values()), _SIDE)


def _evaluate(symbol: str, symbols: Mapping[str, int]) -> int | None:
    """Size of a symbol or of an expression such as ``past + sequence``; None if something in it is unknown."""
    if symbol in symbols:
        return symbols[symbol]
    if _is_atom(symbol):
        return None
    try:
        result = ir.SymbolicDim(symbol).evaluate(symbols)
    except (ValueError, TypeError, ZeroDivisionError):
        return None
    return result if isinstance(result, int) and result >= 0 else None


def _image_side(model: ir.Model, roles: tuple[InputRole, ...]) -> int | None:
    """Side of a square image, or audio frames, that fits the model's own position table; None if there is none."""
    stride, width, near = 1, None, list[ir.Value]()
    for node in model.graph:
        if node.op_type == "Conv" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            strides = node.attributes["strides"].as_ints() if "strides" in node.attributes else (1,)
            stride, width = stride * strides[0], node.inputs[1].const_value.shape[0]
            if any(role.kind == "image" for role in roles):
                near = [*_tables_behind(node.outputs[0])]
                break
    image = any(role.kind == "image" for role in roles)
    for value in (*near, *model.graph.initializers.values()):
        dims = [int(d) for d in value.shape.dims if isinstance(d, int)] if value.shape is not None else []
        if len(dims) in {2, 3} and dims[-1] == width and (len(dims) == 2 or dims[0] == 1) and dims[-2] > 1:
            if _multiplies(value):
                continue
            if not image:
                return dims[-2] * stride
            for extra in (1, 0, 2):
                root = isqrt(dims[-2] - extra)
                if root > 0 and root * root == dims[-2] - extra:
                    return root * stride
    return None


def _multiplies(value: ir.Value, steps: int = 2) -> bool:
    """Whether a stored tensor is a matrix that something is multiplied by, perhaps turned or dequantised first."""
    readers = [node for node, _ in value.uses()]
    if any(node.op_type in CONTRACTIONS for node in readers):
        return True
    moved = [out for n in readers if n.op_type in MOVERS | {"DequantizeLinear"} for out in n.outputs]
    return steps > 0 and any(_multiplies(out, steps - 1) for out in moved)


def _tables_behind(value: ir.Value, steps: int = 8) -> Iterator[ir.Value]:
    """Stored tensors that meet a value, nearest first: positions of patches where a model has those of words, too."""
    todo = [value]
    for _ in range(steps):
        readers = [(value, node) for value in todo for node, _ in value.uses()]
        yield from (t for v, node in readers for other in node.inputs if other is not v for t in _stored(other))
        todo = [out for _, node in readers if node.op_type in _LAYS_OUT for out in node.outputs]


_LAYS_OUT = frozenset({
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Cast", "Identity", "Slice",
    "LayerNormalization",
})  # fmt: skip


def _stored(value: ir.Value | None, steps: int = 4) -> Iterator[ir.Value]:
    """The stored tensor that rows or axes of a value are taken from, if there is one."""
    while value is not None and steps and value.const_value is None and (node := value.producer()) is not None:
        value, steps = (node.inputs[0] if node.inputs else None), steps - 1
    if value is not None and value.const_value is not None:
        yield value


def _baked_pairs(model: ir.Model) -> list[tuple[int, int]]:
    """(batch, length) pairs that reshape constants and declared inner shapes mention most often, then lengths alone."""
    votes: Counter[tuple[int, int]] = Counter()
    for dims in _inner_shapes(model):
        if len(dims) >= 3 and 0 < dims[0] <= 8 and 1 < dims[1] <= 4096:
            votes[dims[0], dims[1]] += 1
    lengths = Counter(n for dims in _computed_shapes(model) for n in dims[:3] if 1 < n <= 4096)
    alone = [(batch, length) for length, _ in lengths.most_common(4) for batch in (2, 1)]
    return [*(pair for pair, _ in votes.most_common(4)), *alone]


def _computed_shapes(model: ir.Model) -> Iterator[list[int]]:
    """Shapes that are put together of sizes read off inputs and of constants; 0 for the former."""
    for node in model.graph:
        target = node.inputs[1] if node.op_type in {"Reshape", "Expand"} and len(node.inputs) > 1 else None
        joined = target.producer() if target is not None else None
        if joined is not None and joined.op_type == "Concat":
            parts = [constant_array(v, 8) if v is not None else None for v in joined.inputs]
            if all(part is None or part.size == 1 for part in parts):
                yield [0 if part is None else int(part.reshape(-1)[0]) for part in parts]


def _inner_shapes(model: ir.Model) -> Iterator[list[int]]:
    for node in model.graph:
        if node.op_type in {"Reshape", "Expand"} and len(node.inputs) > 1 and node.inputs[1] is not None:
            target = constant_array(node.inputs[1], 8)
            if target is not None:
                yield [int(d) for d in target.reshape(-1)]
        for out in node.outputs:
            if out.shape is not None and len(out.shape) >= 3:
                yield [d if isinstance(d, int) else 0 for d in out.shape.dims]


# --- values --------------------------------------------------------------------------------------


def _values(role: InputRole, shape: tuple[int, ...], sizes: Sizes, mask: MaskStyle, rng: np.random.Generator) -> Array:
    if prod(shape) > _LARGEST_INPUT:
        raise UnsupportedModel(
            f"an input of the size {list(shape)} is too large to be tried", hint="export it with smaller or open sizes"
        )
    return _raw_values(role, shape, sizes, mask, rng).astype(role.dtype.numpy())


def _raw_values(
    role: InputRole, shape: tuple[int, ...], sizes: Sizes, mask: MaskStyle, rng: np.random.Generator
) -> Array:
    if role.kind in {"ids", "segments"}:
        return _ids(role, shape, rng)
    if role.kind == "positions":
        first = sizes.past if "encoder" not in role.axes else 0
        row = first + np.arange(shape[-1] if shape else 1)
        return np.broadcast_to(row if role.bound is None else np.minimum(row, role.bound - 1), shape)
    if role.kind == "mask":
        return _mask(role, shape, mask, rng)
    if role.kind == "past":
        return rng.standard_normal(shape)
    constant = {
        "flag": int(sizes.past > 0),
        "count": 1,
        "past_length": sizes.past,
        "total_length": sizes.total,
        "last_index": sizes.total - 1,
    }
    if role.kind in constant:
        return np.full(shape, constant[role.kind])
    return rng.standard_normal(shape) * 0.5


def _ids(role: InputRole, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    unknown = 2 if role.kind == "segments" else _UNKNOWN_BOUND
    high = unknown if role.bound is None else min(role.bound, _LARGEST_ID)
    low = _SPECIAL_IDS if high > 2 * _SPECIAL_IDS and role.kind == "ids" else 0
    values = rng.integers(low, high, shape)
    # a box is (x0, y0, x1, y1), and its width and height index tables too
    return np.sort(values, axis=-1) if len(shape) == 3 and shape[-1] == 4 else values


def _mask(role: InputRole, shape: tuple[int, ...], style: MaskStyle, rng: np.random.Generator) -> Array:
    keep = np.ones(shape, dtype=bool) if style == "ones" else _mixed(role, shape, rng)
    if role.additive:
        return np.where(keep, 0.0, _MASKED)
    return ~keep if role.true_masks else keep


def _mixed(role: InputRole, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """What may be seen: padding at the last row's end or, if the mask is per query, a random choice.

    The choice includes key 0 and the query itself, so that causal models keep something too.
    """
    keep = np.ones(shape, dtype=bool)
    if not shape or shape[-1] < 2:
        return keep
    if len(shape) == 1:
        keep[-1] = False
        return keep
    if len(shape) == 2 and role.axes[0] != "length":
        keep[-1, -max(1, shape[-1] // 4) :] = False
        return keep
    queries, keys = shape[-2:]
    keep &= rng.random(shape) > 0.25
    keep[..., 0] = True
    keep |= np.arange(keys) == np.arange(queries)[:, None] + (keys - queries)
    return keep
