"""What a rewritten site that keeps the computation it has does not save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rewriter.report.rewrite_report import SiteRow


@dataclass(frozen=True)
class Kept:
    """A site whose K/V projections shrank, and whose attention goes on with repeated heads.

    Attributes:
        projection: its keys and values are still projected to all heads.
        cache: a cache still holds all heads.
        why: the reason for keeping the computation.
    """

    projection: bool
    cache: bool
    why: str

    @property
    def note(self) -> str:
        """One sentence for the report."""
        cache = "a cache holds all heads" if self.cache else "a cache holds each once"
        work = "; they are still projected to all heads" if self.projection else ""
        return f"keeps its own attention, which repeats the shared heads; {cache}{work} ({self.why})"


def noted(row: SiteRow, kept: Mapping[str, Kept]) -> SiteRow:
    """The report's row of a site, with what it does not save if it is among those that were kept."""
    return replace(row, notes=(*row.notes, kept[row.name].note)) if row.name in kept else row
