"""Samples how much memory a process holds while something runs: private pages, not mapped files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")


def private_bytes() -> int:
    """Anonymous memory of this process on Linux; elsewhere its resident set."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return int(psutil.Process().memory_info().rss)


class PeakSampler:
    """Within ``with PeakSampler() as peak:`` a thread looks every 2 ms; ``peak.bytes`` is the growth at most."""

    def __init__(self, read: Callable[[], int] = private_bytes, interval: float = 0.002) -> None:
        self._read = read
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = 0
        self._peak = 0

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._peak = max(self._peak, self._read())

    def __enter__(self) -> PeakSampler:
        self._start = self._peak = self._read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._read())

    @property
    def so_far(self) -> int:
        """The growth at most until now."""
        self._peak = max(self._peak, self._read())
        return self._peak - self._start

    @property
    def bytes(self) -> int:
        return self._peak - self._start
