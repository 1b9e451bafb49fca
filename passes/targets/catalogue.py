"""The targets by the names that a person types, in one list."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from passes.targets.grouped_query import GroupedQuery

Target = GroupedQuery
"""Every kind of target there is."""


@dataclass(frozen=True)
class Entry:
    """One line of ``rewriter targets``. `parse` returns the target for a name, or None if the name is another's."""

    name: str
    summary: str
    paper: str
    rewrites: str
    needs: str
    parse: Callable[[str], Target | None]

    def to_dict(self) -> dict[str, str]:
        keys = ("name", "summary", "paper", "rewrites", "needs")
        return {key: str(getattr(self, key)) for key in keys}


def _parse_mqa(name: str) -> Target | None:
    return GroupedQuery(1) if name == "mqa" else None


def _parse_gqa(name: str) -> Target | None:
    found = re.fullmatch(r"gqa(\d{1,6})", name)
    return GroupedQuery(int(found.group(1))) if found and int(found.group(1)) else None


CATALOGUE: tuple[Entry, ...] = (
    Entry(
        "mqa",
        "all query heads share one key/value head",
        "arXiv 1911.02150",
        "key and value projections to one head (merge: mean, aligned, joint)",
        "attention whose score bias comes from masks and positions only",
        _parse_mqa,
    ),
    Entry(
        "gqaN",
        "query heads share N key/value heads",
        "arXiv 2305.13245",
        "key and value projections to N heads, contiguous groups (merge: mean, aligned, joint)",
        "N divides the query heads and the present key/value heads",
        _parse_gqa,
    ),
)


def find(name: str) -> Target | None:
    """The target of this name, None if there is none."""
    return next((t for e in CATALOGUE if (t := e.parse(name.strip().lower())) is not None), None)
