"""Times two calls in turn, so that whatever else the machine does falls on both."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns

from rewriter.profile.result import Milliseconds

Call = Callable[[], object]

WARM_UP = 3


def time_in_turn(
    before: Call, after: Call, runs: int, clock: Callable[[], int] = perf_counter_ns
) -> tuple[Milliseconds, Milliseconds]:
    """Milliseconds of each call over `runs` runs after a warm-up; who goes first alternates.

    `clock` gives nanoseconds.
    """
    for _ in range(WARM_UP):
        before()
        after()
    samples: tuple[list[float], list[float]] = ([], [])
    for run in range(runs):
        for which in (0, 1) if run % 2 == 0 else (1, 0):
            start = clock()
            (before, after)[which]()
            samples[which].append((clock() - start) / 1e6)
    return Milliseconds.of(samples[0]), Milliseconds.of(samples[1])
