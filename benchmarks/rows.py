"""The rows that every benchmark reports, as JSON and as Markdown; and timing by minimum and median.

Files are replaced whole, so that a benchmark may write them again after each row.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from rewriter.whole_file import write_whole


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what is measured; case: on what.
        ours, peer: the two figures in `unit`; None where there is none.
        ratio: oriented so that larger is better for us; None without two figures.
        goal: the figure (or ratio, for timings) that an issue names; None if it names none.
        ok: whether the goal is met; None without a goal.
        more: further columns, beside those that the interface names.
    """

    name: str
    case: str
    ours: float | None
    peer: float | None
    peer_name: str | None
    unit: str
    ratio: float | None
    goal: float | None
    ok: bool | None
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        row = asdict(self)
        return {**row.pop("more"), **row}


@dataclass(frozen=True)
class Times:
    """Seconds of several runs."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


Clock = Callable[[], float]


def timed(work: Callable[[], Any], runs: int, clock: Clock = time.perf_counter) -> tuple[Times, Any]:
    """Times of `runs` runs, and the last result."""
    seconds = []
    result: Any = None
    for _ in range(runs):
        start = clock()
        result = work()
        seconds.append(clock() - start)
    return Times(tuple(seconds)), result


def interleaved(runs: int, *works: Callable[[], Any], clock: Clock = time.perf_counter) -> list[Times]:
    """Times of several things, run by turns, so that a busy moment hits all of them."""
    rounds = [[timed(work, 1, clock)[0].minimum for work in works] for _ in range(runs)]
    return [Times(column) for column in zip(*rounds, strict=True)]


def write_json(path: Path, rows: Sequence[Row], **more: Any) -> None:
    document = {"machine": machine(), "rows": [row.to_dict() for row in rows], **more}
    write_whole(json.dumps(document, indent=1) + "\n", path)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    cells = [list(header), ["---"] * len(header), *([_cell(c) for c in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


HEAD = (
    "# Benchmarks\n\nTables are written by `make bench` and the commands named at them; what stands around them is "
    "written by hand.\n"
)
"""What docs/benchmarks.md begins with."""


def put_section(path: Path, title: str, text: str) -> None:
    """Replace the section ``## title`` of a Markdown file, or append it; other sections stay."""
    before = path.read_text() if path.exists() else HEAD
    head, *sections = before.split("\n## ")
    kept = [s for s in sections if s.splitlines()[0] != title]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = "\n## ".join([head.rstrip() + "\n", *(s.rstrip() + "\n" for s in kept), f"{title}\n\n{text}\n"])
    write_whole(whole, path)


def put_lines(path: Path, title: str, text: str, table: str, keys: int) -> None:
    """Put `text` and `table` into the section ``## title``; its lines with other keys stay (`merged_table`)."""
    sections = path.read_text().split("\n## ") if path.exists() else []
    before = next((s for s in sections if s.splitlines()[0] == title), "")
    old = "\n".join(line for line in before.splitlines() if line.startswith("|"))
    put_section(path, title, f"{text}\n\n{merged_table(old, table, keys)}")


def put_between(path: Path, mark: str, text: str) -> None:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- end of mark -->``; raises ValueError without these."""
    head, _, tail = _parts(path, mark)
    write_whole(f"{head}{text}\n{tail}", path)


def between(path: Path, mark: str) -> str:
    """What `put_between` would replace; raises ValueError as it does."""
    return _parts(path, mark)[1]


def _parts(path: Path, mark: str) -> tuple[str, str, str]:
    """(up to the place, what stands there, all behind), with the marks in the first and the last."""
    before = path.read_text()
    start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    if before.count(start) != 1 or before.count(end) != 1 or before.index(end) < before.index(start):
        raise ValueError(f"{path} has no place for {mark!r}")
    first, last = before.index(start) + len(start), before.index(end)
    return before[:first], before[first:last], before[last:]


def merged_table(old: str, new: str, keys: int) -> str:
    """A Markdown table with the lines of both, `new` taking the place of `old` where the first `keys` cells agree.

    Lines of a table with other columns are dropped.
    """
    was, now = old.strip().splitlines(), new.strip().splitlines()
    kept = {_key(line, keys): line for line in was[2:]} if was[:1] == now[:1] else {}
    return "\n".join([*now[:2], *{**kept, **{_key(line, keys): line for line in now[2:]}}.values()])


def _key(line: str, keys: int) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|")[:keys])
