"""What a sparse pattern shows, as aten nodes: positions from the operands' sizes, and one mask with what there is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node as FxNode

from codegen.sight import Pattern, visible
from rewriter.install.fx_attention import Mask
from rewriter.install.fx_emit import Emitter, aten


@dataclass(frozen=True)
class _Emitted:
    """A node that `codegen.sight.visible` computes with: each of its operators adds a node."""

    emitter: Emitter
    like: FxNode
    node: FxNode

    def _op(self, target: Any, other: Any) -> _Emitted:
        second = other.node if isinstance(other, _Emitted) else other
        return _Emitted(self.emitter, self.like, self.emitter.call(self.like, target, self.node, second))

    def __abs__(self) -> _Emitted:
        return _Emitted(self.emitter, self.like, self.emitter.call(self.like, aten.abs.default, self.node))

    def __sub__(self, other: _Emitted) -> _Emitted:
        return self._op(aten.sub.Tensor, other)

    def __floordiv__(self, number: int) -> _Emitted:
        return self._op(aten.floor_divide.default, number)

    def __mod__(self, number: int) -> _Emitted:
        return self._op(aten.remainder.Scalar, number)

    def __lt__(self, number: int) -> _Emitted:
        return self._op(aten.lt.Scalar, number)

    def __ge__(self, number: int) -> _Emitted:
        return self._op(aten.ge.Scalar, number)

    def __le__(self, other: _Emitted) -> _Emitted:
        return self._op(aten.le.Tensor, other)

    def __eq__(self, other: object) -> Any:
        return self._op(aten.eq.Tensor, other)

    def __and__(self, other: _Emitted) -> _Emitted:
        return self._op(aten.logical_and.default, other)

    def __or__(self, other: _Emitted) -> _Emitted:
        return self._op(aten.logical_or.default, other)


def narrowed(
    emitter: Emitter, like: FxNode, pattern: Pattern, heads: int, q: FxNode, k: FxNode, mask: Mask | None
) -> Mask:
    """One mask of what there is and what the pattern shows, for q [B, H, S, D] and k [B, N, T, D]."""
    rows, columns = _positions(emitter, like, q, k)
    sights = [visible(sight, rows, columns).node for sight in pattern]
    if len(sights) == 1:
        shown = sights[0]
    else:
        shown = emitter.call(like, aten.stack.default, [sights[head % len(sights)] for head in range(heads)])
    shown = emitter.call(like, aten.unsqueeze.default, shown, 0)
    shown = emitter.call(like, aten.unsqueeze.default, shown, 0) if len(sights) == 1 else shown
    if mask is None:
        return Mask(shown, True)
    if mask.boolean:
        return Mask(emitter.call(like, aten.logical_and.default, mask.node, shown), True)
    return Mask(emitter.call(like, aten.where.ScalarOther, shown, mask.node, -float("inf")), False)


def _positions(emitter: Emitter, like: FxNode, q: FxNode, k: FxNode) -> tuple[_Emitted, _Emitted]:
    """Positions of queries [S, 1], which are the last of the keys', and of keys [T]."""
    queries, keys = (_length(emitter, like, x) for x in (q, k))
    fixed = isinstance(queries, int) and isinstance(keys, int)
    first = keys - queries if fixed else emitter.call(like, operator.sub, keys, queries)
    device = _device(emitter, like, q)
    rows = emitter.call(like, aten.arange.start, first, keys, device=device, pin_memory=False)
    columns = emitter.call(like, aten.arange.default, keys, device=device, pin_memory=False)
    rows = emitter.call(like, aten.unsqueeze.default, rows, -1)
    return _Emitted(emitter, like, rows), _Emitted(emitter, like, columns)


def _length(emitter: Emitter, like: FxNode, x: FxNode) -> Any:
    """The size of the token axis: a number where the graph has fixed it."""
    value = x.meta.get("val")
    size = None if value is None else value.shape[2]
    return size if isinstance(size, int) else emitter.call(like, aten.sym_size.int, x, 2)


def _device(emitter: Emitter, like: FxNode, x: FxNode) -> Any:
    value = x.meta.get("val")
    return emitter.device if value is None else value.device
