"""What passes may ask of a model beyond its graph: to be run on calibration batches, step by step, with sites replaced.

Each door implements both protocols. A run never touches the original; it keeps only the values that later nodes read,
so that memory is bounded by what lies between two sites, for each batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from passes.dataflow import Array, Value


class Trial(Protocol):
    """One run of the program on one batch that stops where it is told to, so that sites can be replaced on the way."""

    def advance(self, until: Value, wanted: Collection[Value]) -> Mapping[Value, Array]:
        """Run on until `until` is computed, and return the `wanted` values (half floats widened to float32).

        Raises KeyError if a wanted value was neither computed now nor is read later.
        """

    def put(self, value: Value, array: Array) -> None:
        """Let everything that follows read `array` in place of a value that was computed; shape and dtype stay."""

    def fork(self) -> Trial:
        """Another run that stands where this one stands, and goes on by itself."""


class Probe(Protocol):
    """Calibration batches, ready to be run."""

    def trials(self) -> Sequence[Trial]:
        """A fresh run for each batch, at its beginning."""
