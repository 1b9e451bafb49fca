"""Runs files for a limited time: a stranger's loop may go round for ever, and onnxruntime would, too."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from typing import Any, Protocol

import onnx_ir as ir
import onnxruntime as ort

from passes.dataflow import Array
from rewriter.asked_number import asked_number
from rewriter.capture.last_resort import leave_if_ours
from rewriter.capture.memory_limit import TakesTooMuch, too_much
from rewriter.errors import UnsupportedModel

SECONDS, SECONDS_WITHOUT_LOOPS = 60.0, 600.0
VARIABLE = "REWRITER_RUN_TIMEOUT"
_BYTES_A_SECOND = 20_000_000
"""Of weights, in a slow run of a model that is merely large."""


_GRACE = 5.0, 60.0
"""Seconds, at least and at most, that the node in hand may still take; as many as the run had, in between."""


class RunsTooLong(UnsupportedModel):
    """A run was stopped; trying other sizes would take as long again."""


OUT_OF_BOUNDS = (RunsTooLong, TakesTooMuch)
"""After these nothing else needs trying."""


def loop_limit(model: ir.Model) -> float | None:
    """As `time_limit`, but None if the model has no loop: for runs at sizes that a user chose."""
    return time_limit(model) if _has_loop(model) else None


def time_limit(model: ir.Model) -> float:
    """Seconds that one run of a model at small sizes may take: a minute, ten without loops, more for large models.

    Raises UsageError if the variable that may change them holds no positive number.
    """
    asked = asked_number(VARIABLE, "seconds")
    if asked is not None:
        return asked
    held = (value.const_value for value in model.graph.initializers.values())
    weights = sum(t.nbytes for t in held if t is not None and t.dtype != ir.DataType.STRING)
    return (SECONDS if _has_loop(model) else SECONDS_WITHOUT_LOOPS) + weights / _BYTES_A_SECOND


def _has_loop(model: ir.Model) -> bool:
    graphs = [*model.graphs(), *model.functions.values()]
    return any(node.op_type == "Loop" for graph in graphs for node in graph)


class Runs(Protocol):
    """A session of onnxruntime, or what answers like one."""

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Array], options: ort.RunOptions | None = None, /
    ) -> Sequence[Any]: ...


def run_within(
    seconds: float | None, session: Runs, names: Sequence[str] | None, feeds: Mapping[str, Array]
) -> list[Any]:
    """As ``session.run``, stopped after some seconds if a number is given.

    Raises:
        RunsTooLong: it was stopped, which happens between two nodes; a command whose node goes on ends instead.
        TakesTooMuch: the runtime was given no memory.
    """
    options = ort.RunOptions()
    late, ended = threading.Event(), threading.Event()

    def watch(limit: float) -> None:
        if ended.wait(limit):
            return
        late.set()
        options.terminate = True  # looked at before each node, in bodies of loops too
        if not ended.wait(min(max(limit, _GRACE[0]), _GRACE[1])):
            leave_if_ours(_too_long(limit))

    if seconds is not None:
        threading.Thread(target=copy_context().run, args=(watch, seconds), daemon=True).start()
    try:
        return list(session.run(names, dict(feeds), options))
    except Exception as error:
        refused = too_much(error)
        if refused is None and not late.is_set():
            raise
        raise refused or _too_long(seconds) from error
    finally:
        ended.set()


def _too_long(seconds: float | None) -> RunsTooLong:
    return RunsTooLong(
        f"a run of the model did not end within {seconds:g} seconds",
        hint=f"check its loops, if it has any; if it is only slow, set {VARIABLE} to more seconds",
    )
