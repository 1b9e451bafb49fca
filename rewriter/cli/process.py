"""A command as a process: its streams, signals and exit code, and what it says when it fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

import typer

from codegen.errors import KernelError
from rewriter.capture.last_resort import leaving_when_stuck
from rewriter.capture.memory_limit import too_much
from rewriter.cli.commands import app
from rewriter.cli.flags import current, read
from rewriter.cli.output import complain, print_text
from rewriter.errors import RewriteError, UsageError
from rewriter.report.printable import printable

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and leaves with its exit code."""
    _open_streams()
    ended: list[int] = []
    with _ending_signals(ended.append), leaving_when_stuck(_leave):
        code = run(arguments)
    sys.exit(128 + ended[0] if ended and code == _INTERRUPTED else code)


def _open_streams() -> None:
    """Streams that whoever started us had closed lead nowhere: else the next file takes their number, and what
    libraries print goes into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


@contextlib.contextmanager
def _ending_signals(note: Callable[[int], None]) -> Iterator[None]:
    """What asks a process to end (a batch system, a closed terminal) ends a command as Ctrl-C does: tidily.

    A signal that whoever started us has it ignore, as nohup does, stays ignored.
    """

    def end(number: int, frame: object) -> None:
        note(number)
        raise KeyboardInterrupt

    def asked(number: int) -> bool:
        return signal.getsignal(number) is signal.SIG_DFL

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [n for n in numbers if threading.current_thread() is threading.main_thread() and asked(n)]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises."""
    words = list(arguments) if arguments is not None else sys.argv[1:]
    read(words)
    try:
        answer = app(words, prog_name="rewriter", standalone_mode=False)
        code = answer if isinstance(answer, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        return _fail(error)
    if code == _INTERRUPTED:  # typer may turn the interruption into this exit code itself
        complain("interrupted; nothing was left half-written")
    return code


def _fail(error: Exception) -> int:
    """Say what went wrong in one line, with a hint; returns the exit code."""
    message, hint, code = _explain(error)
    if current().debug:
        for line in "".join(traceback.format_exception(error)).splitlines():
            print(printable(line), file=sys.stderr)
    if current().json:
        kind = type(error).__name__
        print_text(json.dumps({"error": {"type": kind, "message": message, "hint": hint, "exit_code": code}}))
    complain(message, hint)
    return code


def _leave(error: RewriteError) -> None:
    """End the process as after a failure, whatever its main thread is at; what is half-written goes at the next run."""
    with contextlib.redirect_stdout(sys.__stdout__):
        code = _fail(error)
    sys.stderr.flush()
    os._exit(code)


def _explain(error: Exception) -> tuple[str, str, int]:
    if isinstance(error, RewriteError):
        return str(error), error.hint, error.exit_code
    if isinstance(error, KernelError):
        return str(error), error.hint, 1
    if hasattr(error, "format_message"):  # click's, whether typer carries a copy of click or imports it
        command = getattr(getattr(error, "ctx", None), "command_path", "rewriter")
        return str(error.format_message()), f"see: {command} --help", UsageError.exit_code
    if (refused := too_much(error)) is not None:
        return str(refused), refused.hint, refused.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", "free some space, or name another disk for temporary files in TMPDIR", 1
    if isinstance(error, FileNotFoundError) and not _stands_somewhere():
        return "the working directory is gone", "change to another one", UsageError.exit_code
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}", "this is a bug in rewriter; --debug shows where", 1


def _stands_somewhere() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
