"""What a command may take of memory for a file: a multiple of what the file holds, whatever its nodes ask for.

A few bytes of a stranger's file can ask for a constant of 10^10 numbers, and onnxruntime, or numpy on what it recorded,
would take them. The system refuses memory beyond a limit (RLIMIT_DATA, which counts private memory and no mapped
files), and what was asking fails as if the machine were full. The limit is the process's, so that only commands set it,
which have a process of their own; the library in somebody else's process takes what the machine has.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rewriter.asked_number import asked_number
from rewriter.errors import RewriteError, UnsupportedModel

GB = 10**9
VARIABLE = "REWRITER_MEMORY_LIMIT"
_PROGRAMS = 4 * GB
"""Libraries, buffers, and what the small sizes at which files are recorded and compared take."""
_COPIES = 8
"""Bytes for each byte of a model: read, transformed, written, opened twice by a runtime that packs weights anew."""
_OF_THE_MACHINE = 0.9
_REFUSED = re.compile(r"Failed to allocate memory|bad_alloc|bad allocation|Unable to allocate|out of memory", re.I)


class TakesTooMuch(UnsupportedModel):
    """Memory was refused; trying other sizes would ask for as much."""


@dataclass(frozen=True)
class _Limit:
    """What was granted, in bytes beyond what the process held, and the system's soft and hard limits before."""

    granted: int
    held: int
    before: tuple[int, int]

    def set(self) -> None:
        import resource

        ours = (self.held + self.granted, *self.before)
        soft = min(bound for bound in ours if bound != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, self.before[1]))


_limit: _Limit | None = None
"""None without a limit. The system has one for the whole process, so there is one here."""


def too_much(error: BaseException) -> TakesTooMuch | None:
    """What to raise if an error of a runtime's, or of numpy's, says that it was given no memory; None of another."""
    if not (isinstance(error, MemoryError) or _REFUSED.search(str(error))):
        return None
    if _limit is None:
        return TakesTooMuch(
            "the model asks for more memory than there is",
            hint="check what its nodes compute; if that is meant, take a machine with more memory",
        )
    return TakesTooMuch(
        f"the model asks for more than the {_limit.granted / GB:.1f} GB of memory that it may take",
        hint=f"check what its nodes compute; if that is meant, set {VARIABLE} to more (in GB)",
    )


@contextlib.contextmanager
def limited_memory(models: Sequence[Path] = ()) -> Iterator[None]:
    """Within it this process may take 4 GB and eight times the models' files, or as many GB as the variable says, and
    never more than nine tenths of what the machine has free; without models only the machine counts.

    Systems that tell no such numbers (all but Linux) set no limit.

    Raises:
        UsageError: the variable holds no positive number.
        TakesTooMuch: what ran within it was given no memory.
    """
    global _limit
    asked, most = _asked(), _most()
    if most is None or _limit is not None:
        yield
        return
    import resource

    usual = _PROGRAMS + _COPIES * sum(model.stat().st_size for model in models) if models else most
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        _limit = _Limit(min(most, asked or usual), _held(), before)
        _limit.set()
        yield
    except RewriteError:
        raise
    except Exception as error:  # whatever library was refused
        refused = too_much(error)
        if refused is None:
            raise
        raise refused from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        _limit = None


def grant(size: int) -> None:
    """The model has `size` bytes of weights in other files: the limit grows, if there is one that nobody asked for."""
    global _limit
    most = _most()
    if _limit is None or most is None or _asked() is not None:
        return
    _limit = replace(_limit, granted=max(_limit.granted, min(most, _limit.granted + _COPIES * size)))
    _limit.set()


def _asked() -> int | None:
    size = asked_number(VARIABLE, "GB")
    return None if size is None else int(size * GB)


def _most() -> int | None:
    """Bytes that a process may take of what the machine, or the container, has free; None where nobody says."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    if free is None or _kilobytes("/proc/self/status", "VmData") is None:
        return None
    return int(_OF_THE_MACHINE * min([free, *_left_in_the_container()]))


def _left_in_the_container() -> Iterator[int]:
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield most - used + int(stat.get("file", 0))  # pages of files make room


def _held() -> int:
    """Bytes that count against the limit."""
    return _kilobytes("/proc/self/status", "VmData") or 0


def _kilobytes(file: str, entry: str) -> int | None:
    with contextlib.suppress(OSError), open(file, encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) * 1024
    return None
