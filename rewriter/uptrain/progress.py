"""Progress of a run on standard error: a bar on a terminal, or lines where they were asked for, else nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping

from rewriter.progress import rate, rate_column
from rewriter.uptrain.loop import Progress

LINES = 50
"""Lines that a whole run prints, at most, where there is no terminal."""


@contextlib.contextmanager
def shown(asked: bool) -> Iterator[Progress | None]:
    """What to call after each step; None where nothing is to be shown (also in all processes but the first)."""
    if int(os.environ.get("RANK", "0")):
        yield None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines() if asked else None


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        rate_column(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, unit="steps")

        def show(step: int, total: int, terms: Mapping[str, float]) -> None:
            bar.update(task, completed=step, total=total, description=_terms(terms))

        yield show


def _lines() -> Progress:
    started = time.monotonic()
    first: int | None = None  # a resumed run begins in the middle

    def show(step: int, total: int, terms: Mapping[str, float]) -> None:
        nonlocal first
        first = step - 1 if first is None else first
        if step % max(1, total // LINES) == 0 or step == total:
            each = (time.monotonic() - started) / (step - first)
            pace = f"{rate(1 / max(each, 1e-9), 'steps')}, {each * (total - step):.0f} s left"
            print(f"step {step}/{total}: {_terms(terms)}; {pace}", file=sys.stderr, flush=True)

    return show


def _terms(terms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
