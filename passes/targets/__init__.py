"""Targets: one file per destination, what it accepts and how it transforms weights."""

from passes.targets.fourier import Fourier
from passes.targets.grouped_query import GroupedQuery

__all__ = ["Fourier", "GroupedQuery"]
