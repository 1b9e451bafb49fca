"""What a rewritten site that keeps the computation it has does not save."""

from __future__ import annotations

from dataclasses import dataclass


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
