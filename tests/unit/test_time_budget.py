"""Where time has run out slow tests are skipped and say why, in workers too; the others run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import time_budget

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_slow(number): pass

@pytest.mark.parametrize("number", range(3))
def test_quick(number): pass
"""


@pytest.mark.parametrize(("minutes", "counts"), [("0", "3 passed, 2 skipped"), (None, "5 passed")])
def test_slow_tests_end_with_the_time(tmp_path: Path, minutes: str | None, counts: str) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    given = [] if minutes is None else ["--slow-minutes", minutes]
    shared = [
        "-p",
        "tests.time_budget",
        "-p",
        "no:cacheprovider",
        "-ra",
        "-p",
        "xdist",
        "-n",
        "2",
        "--dist",
        "worksteal",
    ]
    about = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *shared, *given],
        cwd=tmp_path, env=about, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and f" {counts} in " in done.stdout, done.stdout + done.stderr
    said = "slow, and the session's 0 minutes for slow tests are over (--slow-minutes)"
    assert (said in done.stdout) is (minutes == "0")


def test_this_session_has_it(request: pytest.FixtureRequest) -> None:
    assert request.config.pluginmanager.has_plugin(time_budget.__name__)
    assert request.config.getoption("--slow-minutes") >= 0
