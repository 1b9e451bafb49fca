"""Slow tests, as long as there is time: a pytest plugin, which tests/conftest.py takes.

A session that takes longer than planned skips the slow tests that are left and says so, instead of being cut off and
saying nothing. Tests keep their order: neighbours share models and programs, also the slow ones.
"""

from __future__ import annotations

import time

import pytest

DEFAULT = 60.0
"""Minutes: more than twice what a session takes on two cores."""

_BEGUN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-minutes",
        type=float,
        default=DEFAULT,
        metavar="MINUTES",
        help="start no slow test later than this in a session, but skip it ('inf': start all; default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGUN] = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes: float = item.config.getoption("--slow-minutes")
    if item.get_closest_marker("slow") and time.monotonic() - item.config.stash[_BEGUN] > 60 * minutes:
        pytest.skip(f"slow, and the session's {minutes:g} minutes for slow tests are over (--slow-minutes)")
