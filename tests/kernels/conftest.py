"""Kernels that tests build are kept beyond the session where pytest has a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache: Any = getattr(request.config, "cache", None)
    folder = tmp_path_factory.getbasetemp() / "kernels" if cache is None else Path(cache.mkdir("kernels"))
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWRITER_CACHE", str(folder))
        yield folder
