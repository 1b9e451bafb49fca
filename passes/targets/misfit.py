"""A number in a target that a site cannot have: wrong usage, unlike a site that no number would make rewritable."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Misfit:
    """What does not fit and what would.

    Attributes:
        present: what the site has, e.g. "12 query heads, 12 key/value heads".
        wanted: what `legal` lists, e.g. "legal numbers of key/value heads".
        legal: the choices, e.g. "1, 2, 3, 4, 6".
    """

    present: str
    wanted: str
    legal: str
