"""Pins threads before torch starts; shares ONNX exports between tests, workers and sessions, programs between tests."""

from __future__ import annotations

import os
import sys

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Or every process that a test starts would compile the sources anew, and every run rewrite all assertions.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc  # noqa: E402
import logging  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402

if TYPE_CHECKING:
    from tests.shared_programs import Programs
    from tests.zoo.case import ZooCase

pytest_plugins = ("tests.time_budget",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run what is marked exhaustive, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked exhaustive, unless it is asked for or named by its own id."""
    if config.getoption("--exhaustive"):
        return
    named = {argument.rpartition("/")[2] for argument in config.args if "[" in argument}
    left = [i for i in items if i.get_closest_marker("exhaustive") and i.nodeid.rpartition("/")[2] not in named]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def pytest_collection_finish() -> None:
    """Look for garbage less often, and not in what was imported: captures make many objects and little garbage.

    Nodes of exports are not told where in a model's source they come from: nothing reads it, and it takes a fifth of an
    export. Nor are traces of compilers written down, which pytest would ask for by listening to a logger that hands
    nothing on, and which print each graph again and again.
    """
    from torch.fx import config

    config.do_not_emit_stack_traces = True
    logging.getLogger("torch.__trace").propagate = True
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or extension modules would report at exit what was never freed


@pytest.fixture(scope="session")
def project_root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[Programs]:
    """What was exported before is not exported again: see tests/shared_programs.py."""
    import torch

    from tests.shared_programs import Programs

    with pytest.MonkeyPatch.context() as patch:
        programs = Programs(torch.export.export)
        patch.setattr(torch.export, "export", programs.shared)
        yield programs


@pytest.fixture(scope="session", autouse=True)
def shared_registries() -> Iterator[None]:
    """The exporter's table of operators is made once for an opset: see tests/shared_registries.py."""
    from tests.shared_registries import ONNXRegistry, Registries

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", Registries(ONNXRegistry.from_torchlib).shared)
        yield


@pytest.fixture(scope="session")
def zoo_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exports are kept: beyond the session where pytest has a cache, keyed by the zoo's sources."""
    from tests.zoo.exports import fingerprint

    cache: Any = getattr(request.config, "cache", None)
    if cache is None:
        return tmp_path_factory.getbasetemp().parent / f"zoo-{fingerprint()}"
    return Path(cache.mkdir(f"zoo-{fingerprint()}"))


@pytest.fixture(scope="session")
def zoo_onnx(zoo_cache: Path) -> Callable[..., Path]:
    """``zoo_onnx(case, exporter, past=False)``: the exported file; skips the test where the exporter cannot.

    Which combinations may skip is itself tested, in tests/zoo/test_exports.py.
    """
    from tests.zoo.exports import ExportSkipped, export, export_with_past

    def path(case: ZooCase, exporter: str, *, past: bool = False) -> Path:
        try:
            return (export_with_past if past else export)(case, exporter, zoo_cache)
        except ExportSkipped as reason:
            pytest.skip(f"{exporter}: {reason}")

    return path
