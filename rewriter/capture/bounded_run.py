"""Runs files with loops for a limited time: a stranger's loop may go round for ever, and onnxruntime would, too."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx_ir as ir
import onnxruntime as ort

from passes.dataflow import Array
from rewriter.errors import UnsupportedModel, UsageError

SECONDS = 60.0
VARIABLE = "REWRITER_RUN_TIMEOUT"


class RunsTooLong(UnsupportedModel):
    """A run was stopped; trying other sizes would take as long again."""


def time_limit(model: ir.Model) -> float | None:
    """Seconds that one run of a model may take; None where nothing in it can go round for ever.

    Raises UsageError if the variable that may change them holds no positive number.
    """
    graphs = [*model.graphs(), *model.functions.values()]
    if not any(node.op_type == "Loop" for graph in graphs for node in graph):
        return None
    given = os.environ.get(VARIABLE, str(SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"{VARIABLE}={given!r} is no number of seconds", hint="give a positive one, or unset it")
    return seconds


class Runs(Protocol):
    """A session of onnxruntime, or what answers like one."""

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Array], options: ort.RunOptions | None = None, /
    ) -> Sequence[Any]: ...


def run_within(
    seconds: float | None, session: Runs, names: Sequence[str] | None, feeds: Mapping[str, Array]
) -> list[Any]:
    """As ``session.run``, stopped after some seconds if a number is given; raises RunsTooLong then."""
    if seconds is None:
        return list(session.run(names, dict(feeds)))
    options = ort.RunOptions()
    late = threading.Event()

    def stop() -> None:
        late.set()
        options.terminate = True  # looked at before each node, in bodies of loops too

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        return list(session.run(names, dict(feeds), options))
    except Exception as error:
        if not late.is_set():
            raise
        raise RunsTooLong(
            f"a run of the model, which has a loop, did not end within {seconds:g} seconds",
            hint=f"check the loop's end; if it is only slow, set {VARIABLE} to more seconds",
        ) from error
    finally:
        timer.cancel()
