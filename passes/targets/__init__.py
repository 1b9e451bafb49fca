"""Targets: one file per destination, what it accepts and how it transforms weights."""

from passes.targets.fourier import Fourier
from passes.targets.grouped_query import GroupedQuery
from passes.targets.linear_mixing import LinearMixer

__all__ = ["Fourier", "GroupedQuery", "LinearMixer"]
