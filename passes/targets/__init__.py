"""Targets: one file per destination, what it accepts and how it transforms weights."""

from passes.targets.auto import Auto
from passes.targets.colt5 import Colt5
from passes.targets.conditional_attention import ConditionalHeads
from passes.targets.conditional_feed_forward import ConditionalBlocks
from passes.targets.decoupled import DecoupledHeads
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
    "Colt5",
    "ConditionalBlocks",
    "ConditionalHeads",
    "DecoupledHeads",
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
