"""Options of every command that errors must know too, even where the rest of the line could not be parsed."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Flags:
    """Which of them stand on the command line."""

    json: bool = False
    debug: bool = False
    progress: bool = False

    @staticmethod
    def of(arguments: Sequence[str]) -> Flags:
        options = set(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        return Flags("--json" in options, "--debug" in options, "--progress" in options)


_CURRENT: ContextVar[Flags] = ContextVar("flags")
_NONE = Flags()


def current() -> Flags:
    """Those of the command that runs."""
    return _CURRENT.get(_NONE)


def read(arguments: Sequence[str]) -> None:
    _CURRENT.set(Flags.of(arguments))
