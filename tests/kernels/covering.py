"""Which combinations of several lists every run tries: each value of the longest list, and all pairs of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def covering(
    names: Sequence[Any], *others: Sequence[Any], ids: Callable[[Any], str] = str, also: Iterable[tuple[Any, ...]] = ()
) -> list[Any]:
    """Parameters (name, other, ...) of all combinations; those not of every run are marked `exhaustive`.

    Each combination of `others` is tried with one name, and `names` are gone through by turns, so that none is left
    out; `also` names more combinations that every run tries.
    """
    if math.prod(map(len, others)) < len(names):
        raise ValueError("fewer combinations than names: some name would never be tried")
    turns = {rest: names[turn % len(names)] for turn, rest in enumerate(product(*others))}
    made, more = [], set(also)
    for name in names:
        for rest in product(*others):
            soon = turns[rest] == name or (name, *rest) in more
            marks = [] if soon else [pytest.mark.exhaustive]
            made.append(pytest.param(name, *rest, id="-".join(map(ids, (name, *rest))), marks=marks))
    return made
