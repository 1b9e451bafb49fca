"""Targets: one file per destination, what it accepts and how it transforms weights."""

from passes.targets.auto import Auto
from passes.targets.experts import Experts
from passes.targets.fourier import Fourier
from passes.targets.gated_unit import GatedUnit
from passes.targets.grouped_query import GroupedQuery
from passes.targets.linear_attention import LinearHeads
from passes.targets.linear_mixing import LinearMixer
from passes.targets.sparse import SparseFixed, SparseStrided, Window
from passes.targets.sparse_mixer import SparseMixer

__all__ = [
    "Auto",
    "Experts",
    "Fourier",
    "GatedUnit",
    "GroupedQuery",
    "LinearHeads",
    "LinearMixer",
    "SparseFixed",
    "SparseMixer",
    "SparseStrided",
    "Window",
]
