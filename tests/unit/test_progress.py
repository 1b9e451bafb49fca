"""Progress of long work: bars on a terminal, lines where asked for, otherwise silence."""

from __future__ import annotations

import io
import sys

import pytest

from rewriter import progress
from rewriter.progress import LINES, rate, showing, task

Capture = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def work() -> None:
    with task("capture"):
        pass
    with task("calibrating", 100, "sites") as advance:
        for done in range(101):
            advance(done)


def test_nothing_is_shown_unless_somebody_looks(capsys: Capture) -> None:
    work()
    with showing("rewriting", asked=False):
        work()
    assert capsys.readouterr() == ("", "")


def test_lines_where_asked_for(capsys: Capture) -> None:
    with showing("rewriting \x1b[31m", asked=True):
        work()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[:3] == ["rewriting \\x1b[31m …", "capture …", "calibrating …"]
    counted = lines[3:]
    assert len(counted) == LINES and counted[-1].startswith("calibrating: 100 of 100 sites, ")
    assert all(line.endswith("s left") and ("sites/s" in line or "s each" in line) for line in counted)


def test_bars_on_a_terminal_are_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with showing("rewriting", asked=False), task("writing", 4e6, "B") as advance:
        advance(1e6)
        bars = progress._watcher.get()
        assert isinstance(bars, progress._Bars)
        assert [row.description for row in bars.progress.tasks] == ["rewriting", "writing"]
        assert bars.progress.tasks[1].fields["amount"] == "1 of 4 MB" and bars.progress.tasks[1].completed == 1e6
        bars.progress.refresh()
    assert "writing" in terminal.getvalue() and not bars.progress.tasks
    shown = terminal.getvalue().rstrip("\r")
    assert shown.endswith("\x1b[2K\x1b[?25h"), "the last things done are to erase the lines and show the cursor"


def test_an_interruption_ends_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt), showing("rewriting", asked=False), task("capture"):
        bars = progress._watcher.get()
        raise KeyboardInterrupt
    assert isinstance(bars, progress._Bars) and not bars.open and bars.progress.finished
    assert progress._watcher.get() is None


@pytest.mark.parametrize(
    ("speed", "unit", "shown"),
    [(2.5, "sites", "2.5 sites/s"), (0.25, "sites", "4.0 s each"), (3e8, "B", "300 MB/s")],
    ids=["fast", "slow", "bytes"],
)
def test_rates(speed: float, unit: str, shown: str) -> None:
    assert rate(speed, unit) == shown
