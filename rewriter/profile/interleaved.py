"""Times two jobs in turn, so that whatever else the machine does falls on both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns, process_time_ns
from typing import Any

from rewriter import progress
from rewriter.errors import RewriteError, UnsupportedModel, first_line
from rewriter.profile.result import Milliseconds

WARM_UP = 3

Clock = Callable[[], int]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Job:
    """What is timed.

    Attributes:
        call: the work; it gets what `prepare` made.
        prepare: runs before each call, and its time does not count.
        pieces: equal pieces of work in one call; times are of one piece.
    """

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = _nothing
    pieces: int = 1

    def run(self) -> None:
        self.call(self.prepare())

    def tried(self, name: str, hint: str) -> Job:
        """The same job, once it has run; raises UnsupportedModel, with this hint, if it does not run."""
        try:
            self.run()
        except (RewriteError, MemoryError):
            raise
        except Exception as error:  # whatever a runtime or a person's own module raises
            raise UnsupportedModel(f"{name} does not run: {first_line(error)}", hint=hint) from error
        return self


@dataclass(frozen=True)
class Timed:
    """Of one piece of work: time on the wall, and time of all processors that this process used."""

    wall: Milliseconds
    cpu: Milliseconds


def time_in_turn(
    before: Job,
    after: Job,
    runs: int,
    clock: Clock = perf_counter_ns,
    cpu_clock: Clock = process_time_ns,
    *,
    warm_up: int = WARM_UP,
) -> tuple[Timed, Timed]:
    """Milliseconds of each job over `runs` runs after a warm-up; who goes first alternates.

    Both clocks give nanoseconds.
    """
    with progress.task("warming up"):
        for _ in range(warm_up):
            before.run()
            after.run()
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    with progress.task("timing", runs, "runs") as advance:
        for run in range(runs):
            for which in (0, 1) if run % 2 == 0 else (1, 0):
                job = (before, after)[which]
                ready = job.prepare()
                start, cpu_start = clock(), cpu_clock()
                job.call(ready)
                cpu_end, end = cpu_clock(), clock()
                wall[which].append((end - start) / 1e6 / job.pieces)
                cpu[which].append((cpu_end - cpu_start) / 1e6 / job.pieces)
            advance(run + 1)
    first, second = (Timed(Milliseconds.of(w), Milliseconds.of(c)) for w, c in zip(wall, cpu, strict=True))
    return first, second
