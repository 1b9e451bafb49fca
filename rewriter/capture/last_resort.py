"""How a run ends that cannot be stopped: one node of a stranger's file can take days, and only with its process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rewriter.errors import RewriteError

_leave: Callable[[RewriteError], None] | None = None
"""None in somebody else's process, which is not ours to end."""


@contextlib.contextmanager
def leaving_when_stuck(leave: Callable[[RewriteError], None]) -> Iterator[None]:
    """Within it `leave` is called, from another thread, if a run goes on after it was stopped."""
    global _leave
    before, _leave = _leave, leave
    try:
        yield
    finally:
        _leave = before


def leave_if_ours(error: RewriteError) -> None:
    if _leave is not None:
        _leave(error)
