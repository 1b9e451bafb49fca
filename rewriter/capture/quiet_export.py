"""torch.export without what it says and notes down meanwhile: failing, it prints the graph so far and logs tracebacks,
and what fails here is tried otherwise, or told in one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

STACK_TRACES_OFF = "do_not_emit_stack_traces"
"""The setting of torch.fx by which nodes are not told where in a model's source they come from."""


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """What runs inside prints nothing to stderr, logs nothing (torch's handlers hold the stream that stderr was), and
    makes nodes without stack traces, which nothing here reads and which take long to write."""
    with _without_stack_traces(), unlogged(logging.CRITICAL), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def unlogged(level: int) -> Iterator[None]:
    """Nobody logs records of this level or below."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    from torch.fx import config

    before = getattr(config, STACK_TRACES_OFF, None)
    if before is None:  # torch before this setting
        yield
        return
    setattr(config, STACK_TRACES_OFF, True)
    try:
        yield
    finally:
        setattr(config, STACK_TRACES_OFF, before)
