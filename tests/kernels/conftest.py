"""Kernels that tests build are kept beyond the session where pytest has a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache: Any = getattr(request.config, "cache", None)
    folder = tmp_path_factory.getbasetemp() / "kernels" if cache is None else Path(cache.mkdir("kernels"))
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWRITER_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def triton_worker(
    tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path
) -> Iterator[Callable[..., torch.Tensor]]:
    """``run(op, spec's fields, operands, **options)`` in Triton's interpreter, in a process of its own."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.triton_worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None

        def run(
            op: str, spec: Mapping[str, Any], operands: Sequence[torch.Tensor | None], **options: Any
        ) -> torch.Tensor:
            given, output = folder / "operands.pt", folder / "output.pt"
            torch.save(tuple(operands), given)
            task = {"op": op, "spec": dict(spec), "operands": str(given), "output": str(output), **options}
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(json.dumps(task) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline().strip()
            assert answer == "done", answer
            found: torch.Tensor = torch.load(output, weights_only=True)
            return found

        yield run
        worker.stdin.close()
