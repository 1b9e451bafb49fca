"""Stacks of layers: sites whose names differ in nothing but numbers, each stack in the order of execution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Named(Protocol):
    """What a site of any kind has: a name, and where in the order of execution it stands."""

    @property
    def name(self) -> str: ...

    @property
    def anchor(self) -> int: ...


Site = TypeVar("Site", bound=Named)


def stacks(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites, stack by stack; stacks in the order of their first sites."""
    found: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda s: s.anchor):
        found.setdefault(re.sub(r"\d+", "#", site.name), []).append(site)
    return list(found.values())
