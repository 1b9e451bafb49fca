"""How far long work has come, for whoever wants to see it: a bar on a terminal, lines where asked for, else nothing.

Work says what it does with `task`; it need not know who looks. The command line looks with `showing`. What is shown
goes to standard error, so that output that is piped stays what it is.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from rewriter.report.printable import printable

LINES = 20
"""Lines that one task prints, at most, where there is no terminal."""

Advance = Callable[[float], None]
"""Call it with how much is done so far, in the task's unit."""


class Watcher(Protocol):
    """Somebody who looks."""

    def begin(self, what: str, total: float | None, unit: str) -> Advance: ...

    def end(self) -> None: ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def task(what: str, total: float | None = None, unit: str = "") -> Iterator[Advance]:
    """A piece of work, inside whatever is going on already.

    Args:
        total: how much there is to do; None if that is not known.
        unit: what is counted, e.g. "sites"; "B" for bytes.
    """
    watcher = _watcher.get()
    if watcher is None:
        yield lambda done: None
        return
    try:
        yield watcher.begin(what, total, unit)
    finally:
        watcher.end()


@contextlib.contextmanager
def showing(what: str, *, asked: bool) -> Iterator[None]:
    """Show the tasks of the work inside: as bars on a terminal, as lines if `asked`, else not at all."""
    with contextlib.ExitStack() as stack:
        watcher: Watcher | None = None
        if sys.stderr.isatty():
            watcher = _Bars(stack.enter_context(_rich_progress()))
        elif asked:
            watcher = _Lines()
        token = _watcher.set(watcher)
        stack.callback(_watcher.reset, token)
        with task(what):
            yield


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}"),
        rate_column(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # a redraw takes processor time from what is being measured
    return Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)


def rate_column() -> Any:
    """A column of `rich.progress`: how much is done in a second, or how long one takes."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(rate(speed, str(task.fields.get("unit", ""))) if speed else "")

    return Rate()


def rate(speed: float, unit: str) -> str:
    """``2.5 sites/s``, or ``4.0 s each`` for slow work; megabytes for bytes."""
    if unit == "B":
        return f"{speed / 1e6:.0f} MB/s"
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


@dataclass
class _Bars:
    """On a terminal: one line for each task that is going on."""

    progress: Any
    open: list[Any] = field(default_factory=list)

    def begin(self, what: str, total: float | None, unit: str) -> Advance:
        row = self.progress.add_task(printable(what), total=total, amount="", unit=unit)
        self.open.append(row)
        return lambda done: self.progress.update(row, completed=done, amount=_amount(done, total, unit))

    def end(self) -> None:
        self.progress.remove_task(self.open.pop())


@dataclass
class _Lines:
    """Where there is no terminal: a line when a task begins, and some while it goes on."""

    def begin(self, what: str, total: float | None, unit: str) -> Advance:
        started, printed = time.monotonic(), 0
        _print(f"{what} …")

        def advance(done: float) -> None:
            nonlocal printed
            due = int(done * LINES / total) if total else 0
            if due > printed and total:
                printed = due
                seconds = max(time.monotonic() - started, 1e-9)
                left = seconds / done * (total - done)
                _print(f"{what}: {_amount(done, total, unit)}, {rate(done / seconds, unit)}, {left:.0f} s left")

        return advance

    def end(self) -> None:
        pass


def _print(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == "B":
        return f"{done / 1e6:.0f}" + (f" of {total / 1e6:.0f} MB" if total else " MB")
    return f"{done:.0f}" + (f" of {total:.0f}" if total else "") + (f" {unit}" if unit else "")
