"""What provenance says of a value: an affine form over sources, and what rotations and products make of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from passes.dataflow import Array, Flow, Node, Value

NormKind = Literal["rms", "layer", "l2", "clip"]

SourceKind = Literal["projection", "biased", "norm", "input"]


class Opaque(Exception):
    """Provenance ends at a node whose effect on elements is not affine in one source.

    Attributes:
        node: where; None for a value that no node produces.
    """

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Source:
    """One tensor whose elements ids point to: ``id - base`` is the flat index into `value`.

    Attributes:
        kind: "biased" is a re-layout of a projection to which a constant is added that depends on its columns only.
        norm: which norm, where `kind` is "norm"; a clamp, which treats every feature alike, counts as one.
        under: what is normalised, or what the constant is added to.
        bias: that constant.
        bias_index: [features] flat position in `bias` for each column of the projection, -1 where it is not reached.
    """

    value: Value
    kind: SourceKind
    shape: tuple[int, ...]
    base: int
    norm: NormKind | None = None
    under: Value | None = None
    bias: Value | None = None
    bias_index: Array | None = None

    @cached_property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def holds(self, ids: Array) -> Array:
        return (ids >= self.base) & (ids < self.base + self.size)


@dataclass(frozen=True)
class Form:
    """The affine form of one value; all arrays have its shape. `bias` is None when it is zero everywhere."""

    ids: tuple[Array, ...]
    coefficients: tuple[Array, ...]
    bias: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.ids[0].shape)

    @property
    def plain(self) -> bool:
        """Whether it is elements of sources as they are: a mere re-layout."""
        return len(self.ids) == 1 and self.bias is None and not (self.coefficients[0] != 1).any()

    def scaled(self, factor: Array) -> Form:
        shape = np.broadcast_shapes(self.shape, factor.shape)
        wide = self.broadcast(shape)
        bias = None if wide.bias is None else wide.bias * factor
        return Form(wide.ids, tuple(c * factor for c in wide.coefficients), bias)

    def broadcast(self, shape: tuple[int, ...]) -> Form:
        if shape == self.shape:
            return self
        bias = None if self.bias is None else np.broadcast_to(self.bias, shape)
        return Form(
            tuple(np.broadcast_to(i, shape) for i in self.ids),
            tuple(np.broadcast_to(c, shape) for c in self.coefficients),
            bias,
        )

    def plus(self, other: Form) -> Form:
        """The sum; an element that both have at one place is one term with their coefficients added."""
        shape = np.broadcast_shapes(self.shape, other.shape)
        a, b = self.broadcast(shape), other.broadcast(shape)
        ids, coefficients = list(a.ids), list(a.coefficients)
        for term, coefficient in zip(b.ids, b.coefficients, strict=True):
            same = next((i for i, own in enumerate(a.ids) if np.array_equal(own, term)), None)
            if same is None:
                ids.append(term)
                coefficients.append(coefficient)
            else:
                coefficients[same] = coefficients[same] + coefficient
        return Form(tuple(ids), tuple(coefficients), bias_of_sum(a.bias, b.bias))

    def evaluate(self, flow: Flow, sources: Sequence[Source]) -> Array:
        """The value this form denotes, float64, from the recorded sources."""
        total = np.zeros(self.shape) if self.bias is None else np.array(self.bias, dtype=np.float64)
        for ids, coefficients in zip(self.ids, self.coefficients, strict=True):
            for source in sources:
                here = source.holds(ids)
                if here.any():
                    flat = np.asarray(flow.value(source.value), dtype=np.float64).reshape(-1)
                    total += np.where(here, flat[np.where(here, ids - source.base, 0)] * coefficients, 0.0)
        return total


def bias_of_sum(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return np.asarray(a + b)


def mapped(form: Form, move: Callable[[Array], Array]) -> Form:
    bias = None if form.bias is None else move(form.bias)
    return Form(tuple(move(i) for i in form.ids), tuple(move(c) for c in form.coefficients), bias)


def turned(form: Form, factor: Array, node: Node) -> Form:
    """A form of pairs (..., 2) times complex numbers: (a + ib)(c + is) = (ac - bs) + i(bc + as)."""
    if node.op != "Mul" or form.shape[-1] != 2:
        raise Opaque("complex numbers are combined other than by a product", node)
    real, imaginary = (np.asarray(p, dtype=np.float64)[..., None] for p in (factor.real, factor.imag))
    swapped = mapped(form, lambda a: a[..., ::-1])
    return form.scaled(real).plus(swapped.scaled(imaginary * np.array([-1.0, 1.0])))


def rotate(form: Form, cos: Array, sin: Array, interleaved: bool, num_heads: int) -> Form:
    """Apply a rotary embedding with caches [B, S, r/2] to a form [B, H, S, D] or [B, S, H * D]."""
    flat = len(form.shape) == 3
    split = form
    if flat:
        batch, length, features = form.shape
        shape = (batch, length, num_heads, features // num_heads)
        split = mapped(form, lambda a: a.reshape(shape).transpose(0, 2, 1, 3))
    half = cos.shape[-1]
    pairs = np.arange(2 * half)
    if interleaved:
        partner, slot = pairs ^ 1, pairs // 2
        first = pairs % 2 == 0
    else:
        partner, slot = (pairs + half) % (2 * half), pairs % half
        first = pairs < half
    rest = np.arange(2 * half, split.shape[-1])
    tail = (*cos.shape[:-1], len(rest))
    own = np.concatenate([cos[..., slot], np.ones(tail)], -1)[:, None]
    other = np.concatenate([np.where(first, -1.0, 1.0) * sin[..., slot], np.zeros(tail)], -1)[:, None]
    index = np.concatenate([partner, rest])
    turned = split.scaled(own).plus(mapped(split, lambda a: a[..., index]).scaled(other))
    if not flat:
        return turned
    return mapped(turned, lambda a: a.transpose(0, 2, 1, 3).reshape(form.shape))
