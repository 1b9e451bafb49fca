"""What a command prints: its result on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rewriter import progress as progress_bars
from rewriter.cli.flags import current
from rewriter.errors import CannotWrite, first_line
from rewriter.report.printable import jsonable, printable

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(found: Mapping[str, Any], kind: str) -> None:
    if current().json:
        print_text(json.dumps(jsonable(found), allow_nan=False))
        return
    from rewriter.report import tables

    render: Callable[[Mapping[str, Any]], RenderableType] = getattr(tables, kind)
    text = ""
    with _to_output():  # rich writes to it, too
        text = tables.text(render(found))
    print_text(text)


def print_text(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    with _to_output():
        print(text.encode(encoding, "replace").decode(encoding), flush=True)


@contextlib.contextmanager
def _to_output() -> Iterator[None]:
    """Whoever reads standard output may have seen enough and gone, which is no error; raises CannotWrite for others."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at exit
        if not isinstance(error, BrokenPipeError):
            raise CannotWrite(
                f"standard output cannot be written: {first_line(error)}", hint="free some space, or send it elsewhere"
            ) from error


@contextlib.contextmanager
def working(what: str, memory: AbstractContextManager[None] | None = None) -> Iterator[None]:
    """Progress on standard error, whatever libraries print kept off standard output, and memory within its limits."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(progress_bars.showing(what, asked=current().progress))
        stack.enter_context(memory or contextlib.nullcontext())
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Whatever libraries print is kept off standard output, and their progress bars away."""
    with contextlib.redirect_stdout(sys.stderr), _environment(_quiet_libraries()):
        yield


def _quiet_libraries() -> dict[str, str]:
    """Settings under which libraries keep their progress bars and remarks to themselves, and idle threads sleep."""
    settings = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    if not (sys.stderr.isatty() or current().progress):
        settings["TQDM_DISABLE"] = "1"
    if not current().debug:
        settings |= {"TRANSFORMERS_VERBOSITY": "error", "KINETO_LOG_LEVEL": "6"}
    return {name: value for name, value in settings.items() if name not in os.environ}


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)


def complain(message: str, hint: str = "", *, label: str = "error") -> None:
    print(f"{label}: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"  {'first' if label == 'note' else 'hint'}: {printable(hint)}", file=sys.stderr)
