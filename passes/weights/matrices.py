"""Fits two mixing matrices by alternating least squares: one over tokens, one over features, and a constant.

Of hidden states X_b and outputs Y_b, each [S, E], it minimises

    Σ_b ‖Y_b - T X_b F - 1 cᵀ‖²

over matrices of one structure, with a ridge towards zero: with T fixed the rest is a linear least squares problem, and
so is T with the rest fixed. Outputs of padded tokens are left out; in the step over tokens, whose equations would
differ from row to row without them, what the fit so far gives stands in. Positions that no batch has stay at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from codegen.ops.linear_mixing.reference import linear_mixing, matrix
from codegen.spec import LinearMixing, Structure
from passes.dataflow import Array
from passes.weights.refit import RIDGE

ROUNDS = 12
"""At most so many times each matrix is solved for."""

ENOUGH = 1e-4
"""A round that explains less than this part of the energy more is the last."""

TRIED = 2
"""Rounds after which the better of both beginnings goes on."""


@dataclass(frozen=True)
class MatrixFit:
    """``T x F + bias``.

    Attributes:
        spec: with a bias.
        sequence, features: what both matrices are made of, `LinearMixing.shapes`, float64; bias: [E].
        explained: the part of Σ ‖y‖² that the fit accounts for; constant: the part that a constant alone would.
    """

    spec: LinearMixing
    sequence: Array
    features: Array
    bias: Array
    explained: float
    constant: float

    @property
    def tensors(self) -> dict[str, Array]:
        """By role."""
        return {"sequence": self.sequence, "features": self.features, "bias": self.bias}

    def output(self, prepared: Array) -> Array:
        """Of hidden states [B, S, E]."""
        return linear_mixing(self.spec, prepared, **self.tensors)


@dataclass
class MatrixFitting:
    """Holds the hidden states and outputs of all batches; `spec` has a bias."""

    spec: LinearMixing
    batches: list[tuple[Array, Array, Array]] = field(default_factory=list)

    def add(self, hidden: Array, output: Array, asking: Array) -> None:
        """[B, S, E] twice, and [B, S]: which tokens count."""
        self.batches.append((hidden, output, asking))

    def solve(self) -> MatrixFit:
        """From the identity over tokens and from their mean, on with what explains more."""
        data = _Data.of(self.batches)
        starts = [_begun(self.spec, data, over) for over in ("own", "mean")]
        for _ in range(TRIED):
            starts = [_improved(self.spec, data, state) for state in starts]
        best = min(starts, key=lambda state: state.error)
        for _ in range(ROUNDS - TRIED):
            before, best = best, _improved(self.spec, data, best)
            if before.error - best.error < ENOUGH * data.energy:
                break
        energy = max(data.energy, 1e-300)
        sequence, features = _evened(best.sequence, best.features)
        constant = len(data.wished) * float(np.sum(data.mean**2)) / energy
        return MatrixFit(self.spec, sequence, features, best.bias, 1 - best.error / energy, constant)


@dataclass(frozen=True)
class _Data:
    """hidden, output: [B, L, E], padded with zeros to the longest batch; asking [B, L]; wished: outputs that count."""

    hidden: Array
    output: Array
    asking: Array
    wished: Array

    @classmethod
    def of(cls, batches: list[tuple[Array, Array, Array]]) -> _Data:
        longest = max(asking.shape[1] for _, _, asking in batches)

        def padded(arrays: list[Array]) -> Array:
            rows = [np.pad(a, [(0, 0), (0, longest - a.shape[1]), *[(0, 0)] * (a.ndim - 2)]) for a in arrays]
            return np.concatenate(rows)

        hidden, output = (padded([b[i].astype(np.float64) for b in batches]) for i in (0, 1))
        asking = padded([b[2].astype(bool) for b in batches])
        return cls(hidden, output, asking, output[asking])

    @property
    def mean(self) -> Array:
        return np.asarray(self.wished.mean(axis=0))

    @property
    def energy(self) -> float:
        return float(np.sum(self.wished**2))


@dataclass(frozen=True)
class _State:
    sequence: Array
    features: Array
    bias: Array
    error: float


def _begun(spec: LinearMixing, data: _Data, over: str) -> _State:
    """Each token by itself, or the mean over all."""
    size = spec.tokens
    value = 1.0 if over == "own" else 1 / data.hidden.shape[1]
    if spec.structure is Structure.DENSE:
        sequence = np.eye(size) if over == "own" else np.full((size, size), value)
    elif over == "own":
        sequence = np.zeros(spec.stored(size))
        sequence[0 if spec.structure is Structure.CIRCULANT else size - 1] = value
    else:
        sequence = np.full(spec.stored(size), value)
    return _over_features(spec, data, sequence)


def _improved(spec: LinearMixing, data: _Data, state: _State) -> _State:
    return _over_features(spec, data, _over_tokens(spec, data, state))


def _over_features(spec: LinearMixing, data: _Data, sequence: Array) -> _State:
    """The best matrix over features and constant, given that over tokens."""
    longest = data.hidden.shape[1]
    mixed = (matrix(spec.structure, sequence)[:longest, :longest] @ data.hidden)[data.asking]
    centre, mean = mixed.mean(axis=0), data.mean
    mixed -= centre
    features = _solved(spec.structure, mixed.T @ mixed, (data.wished - mean).T @ mixed)
    acting = matrix(spec.structure, features)
    bias = mean - acting @ centre
    error = float(np.sum((data.wished - mean - mixed @ acting.T) ** 2))
    return _State(sequence, features.T if spec.structure is Structure.DENSE else features, bias, error)


def _over_tokens(spec: LinearMixing, data: _Data, state: _State) -> Array:
    """The best matrix over tokens, given all else."""
    longest = data.hidden.shape[1]
    acting = matrix(spec.structure, state.features)
    given = data.hidden @ (acting if spec.structure is Structure.DENSE else acting.T)
    now = matrix(spec.structure, state.sequence)[:longest, :longest] @ given
    wished = np.where(data.asking[..., None], data.output - state.bias, now)
    gram, cross = np.zeros((spec.tokens, spec.tokens)), np.zeros((spec.tokens, spec.tokens))
    flat = given.transpose(1, 0, 2).reshape(longest, -1)
    gram[:longest, :longest] = flat @ flat.T
    cross[:longest, :longest] = wished.transpose(1, 0, 2).reshape(longest, -1) @ flat.T
    return _solved(spec.structure, gram, cross)


def _solved(structure: Structure, gram: Array, cross: Array) -> Array:
    """What the matrix M is made of that minimises ‖Y - M Z‖² with a ridge; gram is Z Zᵀ, cross Y Zᵀ, [N, N] each."""
    if structure is Structure.DENSE:
        return np.asarray(_ridged(gram, cross.T).T)
    size = len(gram)
    normal, right = np.zeros((2 * size - 1, 2 * size - 1)), np.zeros(2 * size - 1)
    for row in range(size):
        diagonals = slice(size - 1 - row, 2 * size - 1 - row)
        normal[diagonals, diagonals] += gram
        right[diagonals] += cross[row]
    if structure is Structure.CIRCULANT:
        fold = (size - 1 - np.arange(2 * size - 1)) % size
        folded = np.zeros((size, 2 * size - 1))
        np.add.at(folded, fold, normal)
        normal, diagonals_right = np.zeros((size, size)), right
        np.add.at(normal.T, fold, folded.T)
        right = np.zeros(size)
        np.add.at(right, fold, diagonals_right)
    return _ridged(normal, right)


def _ridged(normal: Array, right: Array) -> Array:
    used = np.diag(normal) > 0
    weight = RIDGE * float(np.trace(normal)) / max(int(used.sum()), 1)
    return np.asarray(np.linalg.solve(normal + max(weight, 1e-30) * np.eye(len(normal)), right))


def _evened(sequence: Array, features: Array) -> tuple[Array, Array]:
    """Both of equal mean square, which their product does not decide."""
    sizes = [float(np.sqrt(np.mean(a**2))) for a in (sequence, features)]
    factor = np.sqrt(sizes[1] / sizes[0]) if min(sizes) > 0 else 1.0
    return sequence * factor, features / factor
