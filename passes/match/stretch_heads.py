"""Which columns of projections are heads of queries, keys and values, where what follows is run and not read.

Scores may be made in chunks, joined from several products, or get biases that queries make. Heads can be shared all the
same, repeated right behind their projections, if head by head the merged output is made of a head's own columns, in one
way for all heads. Noise stands in for what is projected; numbers that each head has of its own (a table of biases) move
with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from passes.dataflow import Array, Value
from passes.match.column_tables import laid_out, tables
from passes.match.stretch import Stretch
from passes.replay import TOLERANCES, relative
from passes.site import Projection, Source

_APART = 1.25
"""How many times more rows of the output a key reaches than a query does."""


@dataclass(frozen=True)
class Part:
    """Columns [heads, dim] of a projection that are one operand's."""

    projection: Projection
    columns: Array

    @property
    def heads(self) -> int:
        return int(self.columns.shape[0])


@dataclass(frozen=True)
class Heads:
    """What a stretch makes its output of.

    Attributes:
        q: the queries, k and v: keys and values, of several kinds of tokens perhaps.
        output: [heads, value dim], the columns of the merged heads.
        causal: whether a key in the middle is seen by no query before it.
        bias: what else makes its scores.
        error: the worst relative error of what was found equal.
    """

    q: Part
    k: tuple[Part, ...]
    v: tuple[Part, ...]
    output: Array
    causal: bool
    bias: Source
    error: float


@dataclass(frozen=True)
class _Role:
    """How the output answers to one part.

    Attributes:
        linear: whether it is an affine function of it.
        reach: (over how many of its rows one row of the part spreads, over how many effectively).
        rows: which.
        wide: whether all of the part reaches most rows; keys of a few tokens that see all others do not.
    """

    part: Part
    linear: bool
    reach: tuple[int, float]
    rows: Array
    wide: bool

    def beyond(self, query: _Role) -> bool:
        """Whether its rows reach further than those of queries, as keys' and values' do."""
        (count, even), (least, least_even) = self.reach, query.reach
        return count >= _APART * least or (count == least and even >= _APART * least_even)


@dataclass
class HeadSearch:
    """Finds the heads of one stretch by running it.

    Attributes:
        least: the least deviation of what stands in for a projection's output; scores of untrained weights are too even
            to tell heads by.
        errors: of what was found equal.
    """

    stretch: Stretch
    least: float = 0.5
    errors: list[float] = field(default_factory=list)

    def found(self) -> Heads | None:
        """None where heads are not told apart, or are mixed."""
        if not self.finite or not self._seen.any():
            return None
        widths = sorted({len(found) for p in self.stretch.projections for found in self._touched(p)})
        for width in (w for w in widths if 1 < w < self._features and self._features % w == 0):
            for output in tables(self._features, self._features // width, width):
                for parts in self._parts(output):
                    self.errors.clear()
                    heads = self._settled(parts, output)
                    if heads is not None:
                        return heads
        return None

    @property
    def finite(self) -> bool:
        """Whether the output is, on such noise."""
        return bool(np.isfinite(self._seen).all())

    # ------------------------------------------------------------ what is run

    @cached_property
    def _noise(self) -> dict[Value, Array]:
        """What is projected, with noise: heads whose weights are equal are told apart then."""
        rng, found = np.random.default_rng(0), {}
        for projection in self.stretch.projections:
            seen = np.asarray(self.stretch.flow.value(projection.output))
            noise = rng.normal(size=seen.shape) * max(float(seen.std()), self.least)
            found[projection.output] = (seen + noise).astype(seen.dtype)
        return found

    @cached_property
    def _other(self) -> dict[Value, Array]:
        """As much noise again, to be put in its place."""
        rng = np.random.default_rng(1)
        return {v: (x.std() * 2 * rng.normal(size=x.shape)).astype(x.dtype) for v, x in self._noise.items()}

    @cached_property
    def _seen(self) -> Array:
        return self.stretch.run(self._noise)

    @property
    def _features(self) -> int:
        return int(self._seen.shape[1])

    def _run(self, given: Mapping[Value, Array], more: Mapping[Value, Array] | None = None) -> Array:
        return self.stretch.run({**self._noise, **given, **(more or {})})

    def _replaced(self, *parts: Part, rows: slice | int = slice(None)) -> dict[Value, Array]:
        """Other noise in these columns, and in some rows only."""
        given: dict[Value, Array] = {}
        for part in parts:
            value = part.projection.output
            old = given.get(value, self._noise[value])
            flat, other = old.reshape(-1, old.shape[-1]).copy(), self._other[value].reshape(-1, old.shape[-1])
            columns = part.columns.reshape(-1)
            if isinstance(rows, int):
                flat[rows, columns] = other[rows, columns]
            else:
                flat[:, columns] = other[:, columns]
            given[value] = flat.reshape(old.shape)
        return given

    def _scaled(self, part: Part, factor: float) -> dict[Value, Array]:
        given = self._noise[part.projection.output].copy()
        given[..., part.columns.reshape(-1)] *= factor
        return {part.projection.output: given}

    @property
    def _limit(self) -> float:
        return TOLERANCES[self.stretch.flow.dtype]

    def _changed(self, answer: Array, axis: int) -> Array:
        """Which rows (axis 1) or columns (axis 0) of the output are others."""
        found: Array = np.abs(answer - self._seen).max(axis=axis) > self._limit * np.abs(self._seen).max()
        return np.flatnonzero(found)

    def _equal(self, mine: Array, wished: Array) -> bool:
        error = relative(mine, wished)
        if error <= self._limit:
            self.errors.append(error)
        return error <= self._limit

    # ------------------------------------------------------------ candidates

    def _touched(self, projection: Projection) -> Iterator[Array]:
        """Which columns of the output some single columns of a projection reach."""
        probes = (0,) if len(self.stretch.projections) > 2 else (0, *(projection.features * n // 6 for n in (2, 3, 4)))
        for column in probes:
            yield self._changed(self._run(self._replaced(Part(projection, np.array([[column]])))), 0)

    def _parts(self, output: Array) -> Iterator[list[Part]]:
        """Ways to part the projections into operands of heads of which the first makes the first of the output."""
        projections = self.stretch.projections
        for counts in _ways([p.features for p in projections]):
            found = [next(self._alone(p, output, n), []) for p, n in zip(projections, counts, strict=True)]
            if sum(map(len, found)) >= 3:
                yield [part for parts in found for part in parts]

    def _alone(self, projection: Projection, output: Array, parts: int) -> Iterator[list[Part]]:
        """Columns of a projection of which those of the first head are all that the first head of the output is made
        of, as many heads as divide the output's."""
        heads = len(output)
        for count in (n for n in range(heads, 1, -1) if heads % n == 0 and projection.features % (n * parts) == 0):
            for group in laid_out(projection.features, count, parts):
                rest = Part(projection, np.concatenate([table[1:] for table in group]))
                own = output[: heads // count].reshape(-1)
                if not self._equal(self._run(self._replaced(rest))[:, own], self._seen[:, own]):
                    continue
                first = Part(projection, np.concatenate([table[:1] for table in group]))
                changed = self._changed(self._run(self._replaced(first)), 0)
                if len(changed) and np.isin(changed, own).all():
                    yield [Part(projection, table) for table in group]

    # ------------------------------------------------------------ roles

    def _settled(self, parts: list[Part], output: Array) -> Heads | None:
        """Roles of these parts, proved; None if they have none."""
        roles = [self._role(part) for part in parts]
        if any(role is None for role in roles):
            return None
        known = [role for role in roles if role is not None and role.wide]
        if len({p.columns.shape for p in parts}) > 1 and len(parts) > len(self.stretch.projections):
            return None  # halves of heads are no heads
        scored = [r for r in known if not r.linear and r.part.columns.shape[1] > 1]
        for query in (q for q in scored if not any(q.beyond(r) for r in scored)):
            keys = [r for r in scored if r.beyond(query)]
            values = [r for r in known if r.linear and r.beyond(query)]
            if _fit(query.part, [r.part for r in keys], [r.part for r in values], output):
                heads = self._proved(query, keys, values, output)
                if heads is not None:
                    return heads
        return None

    def _proved(self, query: _Role, keys: list[_Role], values: list[_Role], output: Array) -> Heads | None:
        k, v = tuple(r.part for r in keys), tuple(r.part for r in values)
        bare = HeadSearch(self._without_others((query.part, *k, *v)), self.least)
        if not (bare.apart((query.part, *k, *v), output) and bare.alike(query.part, k, v, output)):
            return None
        causal = bool(query.rows.size and keys[0].rows.min() >= query.rows.min())
        bias = bare.bias(query.part, k) or self._foreign_bias(bare.stretch, query.part)
        return Heads(query.part, k, v, output, causal, bias, max(bare.errors))

    def _without_others(self, parts: tuple[Part, ...]) -> Stretch:
        """The stretch from the projections of these parts alone: what gates, say, are made of stays as recorded."""
        names = {p.projection.output for p in parts}
        return replace(self.stretch, projections=tuple(p for p in self.stretch.projections if p.output in names))

    def _role(self, part: Part) -> _Role | None:
        rows = self._noise[part.projection.output].reshape(-1, part.projection.features).shape[0]
        best = np.zeros(0)
        for row in dict.fromkeys((rows // 2, rows // 3, rows // 5, 0, rows - 1)):
            answer = self._run(self._replaced(part, rows=row))
            size = np.abs(answer - self._seen).max(axis=1)
            size[size <= self._limit * np.abs(self._seen).max()] = 0.0
            if np.count_nonzero(size) > np.count_nonzero(best):
                best = size
            if np.count_nonzero(best) > 1:
                break
        if not best.any():
            return None
        reach = int(np.count_nonzero(best)), float((best**2).sum() ** 2 / (best**4).sum())
        twice, none = (self._run(self._scaled(part, factor)) for factor in (2.0, 0.0))
        linear = relative(twice + none, 2 * self._seen) <= self._limit
        wide = 2 * len(self._changed(self._run(self._replaced(part)), 1)) >= len(self._seen)
        return _Role(part, linear, reach, np.flatnonzero(best), wide)

    # ------------------------------------------------------------ proofs

    def apart(self, parts: tuple[Part, ...], output: Array) -> bool:
        """Whether the first group of heads is made of its own columns, and answers to each of them."""
        fewest = min(p.heads for p in parts)
        groups = [Part(p.projection, p.columns.reshape(fewest, -1)) for p in parts]
        own = output.reshape(fewest, -1)[0]
        rest = [Part(p.projection, p.columns[1:]) for p in groups]
        if not self._equal(self._run(self._replaced(*rest))[:, own], self._seen[:, own]):
            return False
        for part in groups:
            changed = self._changed(self._run(self._replaced(Part(part.projection, part.columns[:1]))), 0)
            if not len(changed) or not np.isin(changed, own).all():
                return False
        return True

    def alike(self, q: Part, k: tuple[Part, ...], v: tuple[Part, ...], output: Array) -> bool:
        """Whether every group of heads becomes what the next one was when it is given that one's columns."""
        groups = k[0].heads
        given: dict[Value, Array] = {}
        for part in (q, *k, *v):
            value, columns = part.projection.output, part.columns.reshape(groups, -1)
            moved = given.setdefault(value, self._noise[value].copy())
            moved[..., columns] = self._noise[value][..., np.roll(columns, -1, axis=0)]
        wished = self._seen.copy()
        columns = output.reshape(groups, -1)
        wished[:, columns] = self._seen[:, np.roll(columns, -1, axis=0)]
        if relative(wished, self._seen) <= self._limit:
            return False
        own = self._own_numbers(q, k, v, output)
        return self._equal(self._run(given), wished) or (bool(own) and self._equal(self._run(given, own), wished))

    def _own_numbers(self, q: Part, k: tuple[Part, ...], v: tuple[Part, ...], output: Array) -> dict[Value, Array]:
        """What enters the stretch with an axis of heads, moved by a group along it."""
        flow, count = self.stretch.flow, len(output)
        starts = {p.projection.output for p in (q, *k, *v)}
        nodes = self.stretch.between(starts)
        made = starts.union(*(n.outputs for n in nodes))
        sizes = {count: 1, output.size: output.shape[1], q.columns.size: q.columns.shape[1]}
        found: dict[Value, Array] = {}
        for value in dict.fromkeys(x for n in nodes for x in n.inputs if x and x not in made):
            array = np.asarray(flow.value(value))
            if np.issubdtype(array.dtype, np.floating):
                moved = self._moved(value, array, sizes, output, count // k[0].heads)
                found |= {} if moved is None else {value: moved}
        return found

    def _moved(self, value: Value, array: Array, sizes: Mapping[int, int], output: Array, group: int) -> Array | None:
        """An array with what it holds of each group of heads at the place of the one before; None if it does not."""
        for axis in range(array.ndim):
            by_head, along, each = array, axis, sizes.get(array.shape[axis], 0)
            if not each and array.ndim > 2 and axis == 0 and array.shape[0] % len(output) == 0:  # sequences times heads
                by_head, along, each = array.reshape(-1, len(output), *array.shape[1:]), 1, 1
            if not each:
                continue
            first = (*(slice(None) for _ in range(along)), slice(0, each * group))
            stirred = by_head.copy()
            stirred[first] += np.random.default_rng(2).normal(size=stirred[first].shape).astype(array.dtype)
            changed = self._changed(self._run({value: stirred.reshape(array.shape)}), 0)
            if len(changed) and np.isin(changed, output[:group]).all():
                return np.roll(by_head, -each * group, axis=along).reshape(array.shape)
        return None

    def bias(self, q: Part, k: tuple[Part, ...]) -> Source:
        """Whether to scores of queries with keys something is added that keys make alone."""
        if not self._joins(q, k):
            return ""
        nothing = self._scaled(q, 0.0)
        without, moved = self._run(nothing), self._replaced(*k)
        for value, array in nothing.items():
            moved[value] = moved.get(value, array).copy()
            moved[value][..., q.columns.reshape(-1)] = 0.0  # one projection may hold both
        return "" if relative(self._run(moved), without) <= self._limit else "keys"

    def _joins(self, q: Part, k: tuple[Part, ...]) -> bool:
        """Whether something that keys make without queries is added to what they make with them."""
        if any(part.projection.output == q.projection.output for part in k):
            return True
        asked, told = ({n.index for n in self.stretch.between(v)} for v in (
            [q.projection.output], [part.projection.output for part in k]
        ))  # fmt: skip
        for node in self.stretch.nodes:
            above = [n.index for v in node.inputs if v and (n := self.stretch.flow.producer(v)) is not None]
            if node.op in {"Add", "Sub"} and any(i in told - asked for i in above) and any(i in asked for i in above):
                return True
        return False

    def _foreign_bias(self, bare: Stretch, q: Part) -> Source:
        """Whether other projections than queries, keys and values make scores."""
        flow, own = self.stretch.flow, {p.output for p in bare.projections}
        others = [p for p in self.stretch.projections if p.output not in own]
        inside = {n.index for n in bare.nodes}
        made = own.union(*(n.outputs for n in bare.nodes))
        hearts = [v for n in bare.nodes if "Softmax" in n.op or "ttention" in n.op for v in n.inputs if v]
        scoring = [n for n in flow.ancestors(*hearts, stop=lambda n: n.index not in inside) if n.index in inside]
        entering = (v for n in scoring for v in n.inputs if v and v not in made)
        if not others or not any(flow.data_dependent(v) for v in entering):
            return ""
        nothing = self._scaled(q, 0.0)
        moved = {p.output: self._other[p.output] for p in others}
        return "" if relative(self._run(nothing, moved), self._run(nothing)) <= self._limit else "hidden"


def _fit(query: Part, keys: list[Part], values: list[Part], output: Array) -> bool:
    """Whether these can be the operands of one attention."""
    dims = {k.columns.shape for k in keys}, {v.columns.shape for v in values}
    if len(dims[0]) != 1 or len(dims[1]) != 1 or len(keys) != len(values) or query.heads != len(output):
        return False
    return keys[0].heads == values[0].heads and query.columns.shape[1] == keys[0].columns.shape[1]


def _ways(features: list[int]) -> list[tuple[int, ...]]:
    """How many operands each of some projections of these widths may hold."""
    if len(features) == 1:
        return [(3,)]
    if len(features) == 2:
        wider_last = features[0] <= features[1]
        return [(1, 2), (2, 1)] if wider_last else [(2, 1), (1, 2)]
    return [(1,) * len(features)]
