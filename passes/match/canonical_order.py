"""An operand's elements in the order [batch, heads, tokens, features], told by the rows and columns they are of."""

from __future__ import annotations

from copy import copy

import numpy as np

from passes.dataflow import Array
from passes.forms import Source
from passes.match.origins import Turn
from passes.match.verdicts import NotUnderstood

Axes = tuple[str, ...]


def in_blocks(axes: Axes) -> bool:
    """Whether sequences are blocks of tokens, which have an axis of their own behind the batch's."""
    return axes.count("b") > 1


class HeadsApart(NotUnderstood):
    """Two leading axes of an operand hold its heads, and a view that joins them may be understood."""


class Canonical:
    """Terms of an operand with axes [B, H, T, D], new tokens only."""

    def __init__(
        self,
        ids: list[Array],
        coefficients: list[Array],
        source: Source,
        bias: Array | None,
        new: slice,
        lead: tuple[Array, Array, Axes],
    ) -> None:
        self.source = source
        self._batch, self._head, names = lead
        self.axes: Axes = (*names, "s", "d")
        self.ids = [self.arrange(i[..., new, :]) for i in ids]
        self.coefficients = [self.arrange(c[..., new, :]) for c in coefficients]
        self.offset = None if bias is None else self.arrange(bias[..., new, :])

    def under(self, turn: Turn) -> Canonical:
        """The rotated pairs that a norm was given, arranged as what it gives. Raises NotUnderstood."""
        if len(self.ids) > 1:
            raise NotUnderstood("it is rotated both before and after it is normalised")
        flat = self.ids[0] - self.source.base
        found = copy(self)
        found.source, found.offset = turn.source, None
        found.ids = [ids[flat] for ids in turn.ids]
        found.coefficients = [c[flat] for c in turn.coefficients]
        return found

    def arrange(self, array: Array) -> Array:
        flat = array.reshape(-1, *array.shape[-2:])
        batches, heads = int(self._batch.max()) + 1, int(self._head.max()) + 1
        out = np.empty((batches, heads, *flat.shape[1:]), array.dtype)
        out[self._batch, self._head] = flat
        return out

    def positions(self, to_rows: Array, to_columns: Array) -> tuple[Array, list[Array]]:
        """(rows [B, T], one [H, D] column table per term); refuses tables that vary over tokens."""
        tables = []
        rows = None
        for ids in self.ids:
            present: Array = np.asarray(ids > 0)
            flat: Array = np.where(present, ids - self.source.base, 0)
            columns, row = to_columns[flat], to_rows[flat]
            table = np.where(present, columns, -1).max(axis=(0, 2))
            if ((columns != table[None, :, None, :]) & present).any():
                raise NotUnderstood("features are arranged differently from token to token")
            if rows is None:
                rows = row[:, 0, :, 0]
            if ((row != rows[:, None, :, None]) & present).any():
                raise NotUnderstood("one token's features come from several tokens")
            tables.append(table)
        assert rows is not None
        return rows, tables

    def rotation(self, tables: list[Array]) -> tuple[Array, Array | None, Array, Array | None]:
        """(own columns [H, D], partner feature [D], own coefficient [B, T, D], partner's); one head stands for all."""
        gains = [c[:, 0] for c in self.coefficients]
        if len(tables) == 1:
            return tables[0], None, gains[0], None
        return _untangle(tables, gains)

    def require_equal_heads(self, heads: Array | None) -> None:
        """Shared heads must be treated alike, or merging their weights would not merge the heads."""
        if heads is None:
            return
        for c in self.coefficients:
            if np.abs(c - c[:, :1]).max() > 1e-6 * max(1.0, float(np.abs(c).max())):
                raise NotUnderstood(
                    "its heads are rotated by angles of their own (learned positions, or one rotation over the "
                    "features of all heads), so merged heads would have to share them"
                    if len(self.coefficients) > 1
                    else "key or value heads are scaled differently from each other"
                )
        if self.offset is not None and np.abs(self.offset - self.offset[:, :1]).max() > 1e-6:
            raise NotUnderstood(
                "numbers of their own for each head (such as projected positions) are added to the keys or values "
                "behind the projection; heads that are merged would have to share them"
            )


def lead_roles(rows: Array, columns: Array, one_block: bool = False) -> tuple[Array, Array, Axes]:
    """Batch and head index of each leading position, and what each leading axis is.

    `rows` and `columns` are [lead..., T, D]: position in the projection's output. An axis along which rows
    vary runs over sequences, any other over heads (repeated heads have equal columns). `one_block`: an axis of size 1
    is one of blocks, not of groups.
    """
    lead = rows.shape[:-2]
    if not lead:
        raise NotUnderstood(
            "it is one head of one sequence: no axis of a batch or of heads lies beside tokens and features, so it "
            "has no heads to share; give its input a batch axis to have it read"
        )
    row_of = index_of(rows[..., 0].reshape(-1, rows.shape[-2]))
    if len(lead) == 2:
        return _two_lead_axes(row_of.reshape(lead))
    if len(lead) == 1:
        batches = int(row_of.max()) + 1
        heads = lead[0] // batches
        number = np.arange(lead[0])
        if batches == lead[0] and batches > 1:
            return number, np.zeros_like(number), ("b",)
        if (row_of == number // heads).all():
            return number // heads, number % heads, ("bh",)
        if (row_of == number % batches).all():
            return number % batches, number // batches, ("hb",)
    if len(lead) == 3:
        row_of = row_of.reshape(lead)
        if not (one_block or varies(row_of, 1) or varies(row_of, 2)):
            raise HeadsApart("its heads lie along two axes, the query's do not")
        if (found := _blocks(row_of)) is not None:
            return found
    raise NotUnderstood(
        f"its {len(lead)} leading axes are not a batch and heads, nor a batch, groups and heads, nor a batch, blocks "
        "of tokens and heads; attention in blocks of tokens is also read where blocks lie on the batch axis "
        "([batch * blocks, ...]), which is the same"
    )


def _blocks(row_of: Array) -> tuple[Array, Array, Axes] | None:
    """Where two of three leading axes run over sequences, which are blocks of tokens then; else None."""
    same = [axis for axis in range(3) if not varies(row_of, axis)]
    wide = [axis for axis in same if row_of.shape[axis] > 1]
    if not same or len(wide) > 1:
        return None
    by_head = (wide or same)[-1]
    index = np.indices(row_of.shape).reshape(3, -1)
    outer, inner = (axis for axis in range(3) if axis != by_head)
    names = tuple("h" if axis == by_head else "b" for axis in range(3))
    return index[outer] * row_of.shape[inner] + index[inner], index[by_head], names


def _two_lead_axes(row_of: Array) -> tuple[Array, Array, Axes]:
    lead = row_of.shape
    wide = [a for a, n in enumerate(lead) if n > 1]
    batch_axis = next((a for a in wide if varies(row_of, a)), None)
    if batch_axis is None:
        batch_axis = 1 if lead[1] == 1 and lead[0] > 1 else 0
    if any(varies(row_of, a) for a in wide if a != batch_axis):
        raise NotUnderstood(
            "both leading axes of an operand run over tokens or sequences (as where tokens are cut into blocks behind "
            "an axis of batch and heads); give the weights to an attention between all tokens, which is read (target "
            "window makes it local again)"
        )
    index = np.indices(lead).reshape(2, -1)
    return index[batch_axis], index[1 - batch_axis], ("b", "h") if batch_axis == 0 else ("h", "b")


def features_for_tokens(rows: Array, columns: Array) -> bool:
    """Whether tokens run along the last axis of [lead..., T, D] and columns along the one before it."""
    turned = varies(rows, rows.ndim - 1) and varies(columns, columns.ndim - 2)
    return turned and not varies(rows, rows.ndim - 2) and not varies(columns, columns.ndim - 1)


def varies(array: Array, axis: int) -> bool:
    lines = array.swapaxes(0, axis)
    return bool((lines[1:] != lines[:-1]).any())


def varying_fields(code: Array, axis: int, fields: dict[str, int]) -> list[str]:
    """The fields of `code` that are not constant along an axis."""
    lines = code.swapaxes(0, axis)
    changed = int(np.bitwise_or.reduce(lines[1:] ^ lines[:-1], axis=None))
    return [name for name, mask in fields.items() if changed & mask]


def index_of(signatures: Array) -> Array:
    """Number of the first occurrence of each row among distinct rows."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(r.tobytes(), len(seen)) for r in np.ascontiguousarray(signatures)])


def _partners(first: Array, second: Array) -> Array:
    """For each feature the one that is made from the same two columns."""
    where: dict[frozenset[int], list[int]] = {}
    for d, (a, b) in enumerate(zip(first, second, strict=True)):
        where.setdefault(frozenset((int(a), int(b))), []).append(d)
    partner = np.arange(len(first))
    for pair in where.values():
        if len(pair) == 2:
            partner[pair[0]], partner[pair[1]] = pair[1], pair[0]
    return partner


def _untangle(tables: list[Array], gains: list[Array]) -> tuple[Array, Array, Array, Array]:
    """Tell the own term of a rotated pair from the partner's: own coefficients are equal on both features.

    A column's gain (a norm's weight, a long-context factor) multiplies it at both features of its pair and is
    divided out first: gain(x)^2 = own^2 + partner^2, constant over tokens.
    """
    first, second = tables[0].copy(), tables[1].copy()
    own, other = gains[0].copy(), gains[1].copy()

    def swap(where: Array) -> None:
        first[:, where], second[:, where] = second[:, where], first[:, where].copy()
        own[..., where], other[..., where] = other[..., where], own[..., where].copy()

    partner = _partners(first[0], second[0])
    index = np.arange(len(partner))
    turned = partner != index
    swap((first[0] == first[0][partner]) & turned & (index > partner))
    other[..., ~turned] *= (second[0] >= 0)[~turned]
    if np.abs(other[..., ~turned]).max(initial=0.0) > 0 or not (first[:, partner] == second)[:, turned].all():
        raise NotUnderstood("pairs of features are combined, but not by a rotation")
    gain = np.where(turned, np.sqrt(own**2 + other[..., partner] ** 2), np.abs(own))
    if np.abs(gain - gain[:1, :1]).max() > 2e-2 * gain.max():
        late = np.sqrt(own**2 + other**2)
        if np.abs(late - late[:1, :1]).max() <= 2e-2 * late.max():
            raise NotUnderstood(
                "each feature is multiplied by a number of its own behind the rotation (as where queries and keys are "
                "scaled after rotary positions), which no weight in front of it can hold; leave this attention as it "
                "is (layers= selects others)"
            )
        raise NotUnderstood(
            "pairs of features are combined with weights that vary over tokens, not by a rotation (as where positions "
            "scale what they rotate)"
        )
    gain = np.maximum(gain, 1e-30)
    cos = own / gain
    swap(turned & (np.abs(cos - cos[..., partner]).max(axis=(0, 1)) > 2e-2))
    gain = np.where(turned, np.sqrt(own**2 + other[..., partner] ** 2), np.maximum(np.abs(own), 1e-30))
    cos, sin = own / gain, other / gain[..., partner]
    if np.abs(cos - cos[..., partner]).max() > 2e-2 or np.abs(sin + sin[..., partner])[..., turned].max() > 2e-2:
        raise NotUnderstood("pairs of features are combined, but not by a rotation")
    return first, partner, own, other
