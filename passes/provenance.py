"""Where did each element come from? Answered by running the program's own layout operators on index tensors.

A value is written as a sparse affine form over sources::

    value[e] = sum_t coefficient_t[e] * SOURCE.flat[id_t[e]] + bias[e]

Sources are outputs of learned projections, those with a bias that is added further on, outputs of norms, and cached
tensors fed to the program. Ids start at 1 and 0 means "no element", so operators that fill with zeros need no special
case. Layout operators run unchanged on ids, coefficients and bias; scales, rotations and masks are then read off the
numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from passes.contents import Contents
from passes.dataflow import LAYOUT, Array, Flow, Node, Value
from passes.forms import Form, NormKind, Opaque, Source, SourceKind, bias_of_sum, mapped, rotate, turned
from passes.operator_kinds import (
    AVERAGING,
    CHOOSERS,
    COMPLEX_VIEWS,
    NORMS,
    PASS_THROUGH,
    POOLING,
    SCATTERING,
    data_operands,
)
from passes.projections import layout_of
from passes.whole_projection import projection_at
from passes.written_norms import recognise_norm


class Memory:
    """What tracers of one flow hand on to each other, which is small.

    Attributes:
        known: what was read of structures that repeat, by structure (`match.repeats`).
        contents: of values that no hidden state reaches.
    """

    def __init__(self, flow: Flow) -> None:
        self.known: dict[Hashable, Any] = {}
        self.contents = Contents(flow)


class Tracer:
    """Computes forms, each once, and holds them."""

    def __init__(self, flow: Flow, memory: Memory | None = None) -> None:
        self.flow = flow
        self.memory = Memory(flow) if memory is None else memory
        self.sources: list[Source] = []
        self._bases: list[int] = []
        self._forms: dict[Value, Form] = {}
        self._next_id = 1

    def source_of(self, ids: Array) -> list[Source]:
        """The sources that these ids point into, in order of first registration."""
        pointing = ids[ids > 0]
        if not pointing.size:
            return []
        # in a long program a value points into few of its sources, and those were registered close together
        first, last = (bisect_right(self._bases, int(i)) - 1 for i in (pointing.min(), pointing.max()))
        near = self.sources[first : last + 1]
        seen = np.bincount(np.searchsorted(self._bases[first : last + 1], pointing, side="right") - 1)
        return [s for s, count in zip(near, seen, strict=True) if count]

    def trace(self, value: Value) -> Form:
        """The form of `value`. Raises Opaque where an operator is not understood."""
        form = self._forms.get(value)
        if form is None:
            form = self._forms[value] = self._trace(value)
        return form

    def as_input(self, value: Value) -> Form:
        """Treat a value fed to the program (a cache) as a source of its own."""
        return self._register(value, "input")

    def _register(
        self,
        value: Value,
        kind: SourceKind,
        norm: NormKind | None = None,
        under: Value | None = None,
        bias: Value | None = None,
        bias_index: Array | None = None,
    ) -> Form:
        if value in self._forms:
            return self._forms[value]
        shape = self.flow.shape(value)
        source = Source(value, kind, shape, self._next_id, norm, under, bias, bias_index)
        self._next_id += source.size
        self.sources.append(source)
        self._bases.append(source.base)
        ids = np.arange(source.base, source.base + source.size, dtype=np.int64).reshape(shape)
        form = self._forms[value] = Form((ids,), (np.ones(shape),), None)
        return form

    def _trace(self, value: Value) -> Form:
        node = self.flow.producer(value)
        if node is None:
            raise Opaque("reaches a program input without passing a projection")
        if projection_at(self.flow, value) is not None:
            return self._register(value, "projection")
        if (turned := self.flow.turned_pairs(node)) is not None:
            return self._pairs(node, *turned)
        if node.op in NORMS:
            return self._norm(node, value)
        if node.op == "Clip" and not any(v and self.flow.data_dependent(v) for v in node.inputs[1:]):
            return self._register(value, "norm", "clip", node.inputs[0])
        if node.op in PASS_THROUGH or node.op in COMPLEX_VIEWS:
            return self.trace(node.inputs[0])
        if node.op in LAYOUT:
            return self._layout(node, value)
        if node.op in {"Add", "Sub", "Mul", "Div"}:
            return self._arithmetic(node, value)
        if node.op == "Neg":
            return self.trace(node.inputs[0]).scaled(np.array(-1.0))
        if node.op == "ReduceSum" and (axis := self._summed_pairs(node)) is not None:
            return self._sum_of_pairs(node, axis)
        if node.op == "MaskedFill":
            return self._masked_fill(node)
        if node.op == "RotaryEmbedding":
            return self._rotary_embedding(node)
        if node.op == "BatchNormalization" and self._convolves(node.inputs[0]):
            return self.trace(node.inputs[0])  # refused there, for what is the greater obstacle
        if node.op == "BatchNormalization":
            raise Opaque(
                "a batch normalisation stands between projection and scores; fold it into the projection's weights "
                "first (torch.nn.utils.fusion), which is the same",
                node,
            )
        if node.op in {"Conv", "aten.conv_transpose1d", "aten.conv_transpose2d"}:
            raise Opaque(
                "a convolution mixes tokens between projection and score, so what is compared is no projection of one "
                "token; leave this attention as it is (layers= selects others)",
                node,
            )
        largest = node.op == "Max" and len(node.inputs) == 1  # along an axis, not of two values
        if largest or node.op.rpartition(".")[2] in POOLING:
            raise Opaque(
                "the largest of several numbers is taken between projection and score (pooling), so heads are no "
                "linear map of one token; leave this attention as it is (layers= selects others)",
                node,
            )
        if node.op.rpartition(".")[2] in AVERAGING:
            raise Opaque(
                "tokens are averaged between projection and score (landmarks, as in Nyström attention, or pooling), so "
                "no single token is compared; leave this attention as it is (layers= selects others)",
                node,
            )
        if node.op == "ReduceSum":
            raise Opaque(
                "several numbers are added up between projection and score (landmarks that tokens are summed to, or "
                "pooling), so no single token is compared; leave this attention as it is (layers= selects others)",
                node,
            )
        scatters = node.op.rpartition(".")[2].rstrip("_") in SCATTERING
        if scatters and not any(self.flow.data_dependent(v) for v in node.inputs[1:-1] if v):
            raise Opaque(
                "new tokens are written at given places into a tensor that holds all (a cache of fixed size); heads "
                "are read where past keys and values are joined to new ones: give example inputs that make the model "
                "attend without a cache, or join them",
                node,
            )
        if scatters:
            raise Opaque(
                "what projections give is added up, between projection and score, at places that are chosen by "
                "something computed from hidden states (a router), so heads are no linear map of one token",
                node,
            )
        raise Opaque(f"operator {node.op} between projection and score is not understood", node)

    def _convolves(self, value: Value) -> bool:
        """Whether a value is laid out from a convolution over several tokens, or in groups."""
        while (node := self.flow.producer(value)) is not None and node.op in LAYOUT | PASS_THROUGH:
            value = node.inputs[0]
        if node is None or node.op != "Conv":
            return False
        kernel = self.flow.shape(node.inputs[1])
        return any(n != 1 for n in kernel[2:]) or kernel[1] != self.flow.shape(node.inputs[0])[1]

    def _pairs(self, node: Node, data: int, table: int) -> Form:
        """Pairs of features times matrices of two rows."""
        terms, _, result = str(node.attrs["equation"]).replace(" ", "").partition("->")
        mine, theirs = (terms.split(",")[i] for i in (data, table))
        summed = next(c for c in theirs if c in mine and c not in result)
        form, numbers = self.trace(node.inputs[data]), np.asarray(self.flow.value(node.inputs[table]), np.float64)
        shape = self.flow.shape(node.outputs[0])

        def laid(array: Array, term: str, place: int) -> Array:
            """One of the two elements, along the axes of the result."""
            taken, left = array.take(place, axis=term.index(summed)), term.replace(summed, "")
            ordered = taken.transpose([left.index(c) for c in result if c in left])
            wide = [ordered.shape[[c for c in result if c in left].index(c)] if c in left else 1 for c in result]
            return np.broadcast_to(ordered.reshape(wide), shape)

        factors = [laid(numbers, theirs, place) for place in (0, 1)]
        both = [(f, form.ids[t], form.coefficients[t], p) for t in range(len(form.ids)) for p, f in enumerate(factors)]
        bias = None
        if form.bias is not None:
            bias = sum((laid(form.bias, mine, p) * f for p, f in enumerate(factors)), np.zeros(shape))
        return Form(
            tuple(laid(ids, mine, place) for _, ids, _, place in both),
            tuple(laid(coefficient, mine, place) * factor for factor, _, coefficient, place in both),
            bias,
        )

    def _summed_pairs(self, node: Node) -> int | None:
        """The axis, of two elements, that a sum runs over; None if it sums more."""
        shape = self.flow.shape(node.inputs[0])
        numbers = np.sqrt(np.arange(2.0, 2.0 + np.prod(shape, dtype=np.int64))).reshape(shape)
        result = node.evaluate([numbers, *(self.flow.value(v) if v else None for v in node.inputs[1:])])[0]
        for axis in (a for a, n in enumerate(shape) if n == 2):
            total = numbers.sum(axis)
            if result.size == total.size and np.allclose(result.reshape(-1), total.reshape(-1)):
                return axis
        return None

    def _sum_of_pairs(self, node: Node, axis: int) -> Form:
        form, shape = self.trace(node.inputs[0]), self.flow.shape(node.outputs[0])
        first, second = (mapped(form, lambda a, at=at: a.take(at, axis=axis).reshape(shape)) for at in (0, 1))  # type: ignore[misc]
        return first.plus(second)

    def _norm(self, node: Node, value: Value) -> Form:
        kinds: dict[str, NormKind] = {"LayerNormalization": "layer", "LpNormalization": "l2"}
        return self._register(value, "norm", kinds.get(node.op, "rms"), node.inputs[0])

    def _layout(self, node: Node, value: Value) -> Form:
        """Run the node on ids, on coefficients and on the bias of each operand that carries data."""
        self._require_free_choice(node)
        forms = {i: f for i, v in enumerate(node.inputs) if v and (f := self._operand(node, i)) is not None}
        if not forms:
            raise Opaque(self._unreached(node), node)
        which = node.outputs.index(value)
        terms = max(len(f.ids) for f in forms.values())
        width = range(terms)
        ids = tuple(self._run(node, which, forms, _IdsOf(t)) for t in width)
        coefficients = tuple(self._moved_coefficients(node, which, forms, t, ids[t]) for t in width)
        bias = None
        if any(f.bias is not None for f in forms.values()) or self._has_plain_operands(node, forms):
            bias = self._run(
                node, which, forms, lambda f: np.zeros(f.shape) if f.bias is None else f.bias, plain_as_bias=True
            )
            bias = bias if bias.any() else None
        return Form(ids, coefficients, bias)

    def _moved_coefficients(self, node: Node, which: int, forms: dict[int, Form], term: int, moved: Array) -> Array:
        """Coefficients of one term behind a layout node, whose ids `moved` are known."""
        if _all_one(forms.values(), term) and moved.all():  # ones stay ones, wherever they go
            return np.ones(moved.shape)
        return self._run(node, which, forms, _CoefficientsOf(term))

    def _operand(self, node: Node, position: int) -> Form | None:
        """Form of a data operand of a layout node; None for shapes, indices, constants and masks."""
        value = node.inputs[position]
        if position not in data_operands(node):
            return None
        if self.flow.data_dependent(value):
            return self.trace(value)
        if node.op == "Concat" and self.flow.is_fed(value) and (root := cache_root(self.flow, value)) is not None:
            if root not in self._forms:
                self.as_input(root)
            return self.trace(value)
        return None

    def _has_plain_operands(self, node: Node, forms: dict[int, Form]) -> bool:
        return any(i not in forms for i in data_operands(node) if i < len(node.inputs) and node.inputs[i])

    def _run(
        self,
        node: Node,
        which: int,
        forms: dict[int, Form],
        pick: Callable[[Form], Array],
        plain_as_bias: bool = False,
    ) -> Array:
        arguments: list[Array | None] = []
        data = data_operands(node)
        dtype = pick(next(iter(forms.values()))).dtype
        for i, value in enumerate(node.inputs):
            if i in forms:
                arguments.append(pick(forms[i]))
            elif not value:
                arguments.append(None)
            elif i in data:
                plain = self.flow.value(value)
                arguments.append(plain.astype(dtype) if plain_as_bias else np.zeros(plain.shape, dtype))
            else:
                arguments.append(self.flow.value(value))
        return np.asarray(node.evaluate(arguments)[which])

    def _unreached(self, node: Node) -> str:
        """Why a layout operator's result is not told from ids: none of its operands carries any."""
        cache = next((c for v in node.inputs if v and (c := cache_root(self.flow, v)) is not None), None)
        if cache is None:
            return f"{node.op} of values that no projection reaches"
        return (
            f"the cache that comes in as {cache} is cut into parts ({node.op}), of keys and values or of layers, so no "
            "input would have fewer heads by itself; export the model with inputs of their own for each layer's keys "
            "and values, or without a cache"
        )

    def _arithmetic(self, node: Node, value: Value) -> Form:
        a, b = node.inputs[:2]
        deep = self.flow.data_dependent(a), self.flow.data_dependent(b)
        if all(deep):
            return self._two_data_operands(node, value)
        if not any(deep):
            raise Opaque(f"{node.op} of values that no projection reaches", node)
        form, other = (self.trace(a), self.flow.value(b)) if deep[0] else (self.trace(b), self.flow.value(a))
        if np.iscomplexobj(other):
            return turned(form, other, node)
        constant = np.asarray(other, dtype=np.float64)
        if node.op == "Mul":
            return form.scaled(constant)
        if node.op == "Div":
            if not deep[0]:
                raise Opaque("a constant divided by a projection is not affine", node)
            return form.scaled(1.0 / constant)
        sign = -1.0 if node.op == "Sub" else 1.0
        if node.op == "Add" and (index := self._bias_index(form, b if deep[0] else a)) is not None:
            under, bias = (a, b) if deep[0] else (b, a)
            return self._register(value, "biased", under=under, bias=bias, bias_index=index)
        if not deep[0]:  # constant - form
            form = form.scaled(np.array(sign))
            sign = 1.0
        shape = np.broadcast_shapes(form.shape, constant.shape)
        form = form.broadcast(shape)
        return Form(form.ids, form.coefficients, bias_of_sum(form.bias, np.broadcast_to(sign * constant, shape)))

    def _bias_index(self, form: Form, other: Value) -> Array | None:
        """Where in the constant `other` each column of a projection finds what is added to it behind some layout.

        None if `form` is not a mere re-layout of one projection without a bias, or tokens are not treated alike.
        """
        if not self.flow.is_constant(other) or not form.plain:
            return None
        shape, ids = self.flow.shape(other), form.ids[0]
        sources = self.source_of(ids)
        if len(sources) != 1 or sources[0].kind != "projection" or np.broadcast_shapes(shape, form.shape) != form.shape:
            return None
        projection = projection_at(self.flow, sources[0].value)
        if projection is None or projection[1] is not None or (ids == 0).any():
            return None
        layout = layout_of(self.flow, projection[0])
        if isinstance(layout, str):
            return None
        positions = np.broadcast_to(np.arange(np.prod(shape, dtype=np.int64)).reshape(shape), form.shape)
        columns = layout.columns[ids - sources[0].base]
        index = np.full(layout.features, -1)
        index[columns] = positions
        return index if (index[columns] == positions).all() else None

    def _two_data_operands(self, node: Node, value: Value) -> Form:
        norm = recognise_norm(self.flow, node)
        if norm is not None:
            kind, normed = norm
            return self._register(value, "norm", kind, normed)
        if node.op in {"Mul", "Div"}:
            raise Opaque("the operand is multiplied by something computed from hidden states", node)
        left, right = self.trace(node.inputs[0]), self.trace(node.inputs[1])
        return left.plus(right if node.op == "Add" else right.scaled(np.array(-1.0)))

    def _masked_fill(self, node: Node) -> Form:
        self._require_free_choice(node)
        form = self.trace(node.inputs[0])
        mask = self.flow.value(node.inputs[1]).astype(bool)
        fill = np.asarray(self.flow.value(node.inputs[2]), dtype=np.float64)
        kept = form.scaled((~mask).astype(np.float64))
        added = np.broadcast_to(np.where(mask, fill, 0.0), kept.shape)
        return Form(kept.ids, kept.coefficients, bias_of_sum(kept.bias, added) if added.any() else kept.bias)

    def _require_free_choice(self, node: Node) -> None:
        """Elements that hidden states choose come from elsewhere on every other input."""
        for position in CHOOSERS.get(node.op, ()):
            if position < len(node.inputs) and self.flow.data_dependent(node.inputs[position]):
                raise Opaque(f"{node.op} takes elements that are chosen by something computed from hidden states", node)

    def _rotary_embedding(self, node: Node) -> Form:
        """ONNX RotaryEmbedding (opset 23): y = x * cos + partner(x) * sin, written out on the form."""
        form = self.trace(node.inputs[0])
        cos, sin = (np.asarray(self.flow.value(v), dtype=np.float64) for v in node.inputs[1:3])
        if len(node.inputs) > 3 and node.inputs[3]:
            positions = self.flow.value(node.inputs[3]).astype(np.int64)
            if positions.ndim == 1:  # where a whole batch starts
                positions = np.broadcast_to(positions + np.arange(form.shape[-2]), (form.shape[0], form.shape[-2]))
            cos, sin = cos[positions], sin[positions]
        heads = int(node.attrs.get("num_heads", 0)) or form.shape[-1] // (2 * cos.shape[-1])
        return rotate(form, cos, sin, bool(node.attrs.get("interleaved", 0)), heads)


def cache_root(flow: Flow, value: Value) -> Value | None:
    """The float program input of rank 3 or more that `value` is a mere re-layout of, or None."""
    while (node := flow.producer(value)) is not None:
        if node.op not in LAYOUT | PASS_THROUGH:
            return None
        value = node.inputs[0]
    if value not in flow.inputs:
        return None
    array = flow.value(value)
    return value if array.dtype.kind == "f" and array.ndim >= 3 else None


def _all_one(forms: Iterable[Form], term: int) -> bool:
    return all(term < len(f.ids) and bool((f.coefficients[term] == 1).all()) for f in forms)


@dataclass(frozen=True)
class _IdsOf:
    """Picks the ids of one term; forms with fewer terms have none there."""

    term: int

    def __call__(self, form: Form) -> Array:
        return form.ids[self.term] if self.term < len(form.ids) else np.zeros(form.shape, np.int64)


@dataclass(frozen=True)
class _CoefficientsOf:
    """Picks the coefficients of one term; forms with fewer terms have zeros there."""

    term: int

    def __call__(self, form: Form) -> Array:
        return form.coefficients[self.term] if self.term < len(form.ids) else np.zeros(form.shape)
