"""Targets: one file per destination, what it accepts and how it transforms weights."""

from passes.targets.grouped_query import GroupedQuery

__all__ = ["GroupedQuery"]
