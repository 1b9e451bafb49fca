"""Which combinations of several lists every run tries: all of the longer side, each with one of the other by turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def named(value: Any) -> str:
    """What a parameter is called: its own short name, its parts, or itself."""
    if isinstance(value, tuple):
        return "-".join(map(named, value))
    return str(getattr(value, "short", None) or getattr(value, "name", None) or value)


def covering(names: Sequence[Any], *others: Sequence[Any], also: Iterable[tuple[Any, ...]] = ()) -> list[Any]:
    """Parameters (name, other, ...) of all combinations; those not of every run are marked `exhaustive`.

    Every run tries each name, and each combination of `others`, with some partner; `also` names more that it tries.
    """
    rests = list(product(*others))
    soon = [(names[turn % len(names)], *rests[turn % len(rests)]) for turn in range(max(len(names), len(rests)))]
    soon += also
    made = []
    for name in names:
        for rest in rests:
            values = (name, *rest)
            marks = [] if values in soon else [pytest.mark.exhaustive]
            made.append(pytest.param(*values, id="-".join(map(named, values)), marks=marks))
    return made
