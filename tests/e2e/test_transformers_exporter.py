"""Files that transformers' own ONNX exporter writes: optimised, as they come, and fused for onnxruntime."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

import rewriter
from tests.covering import covering
from tests.targets.lossless_twin import legal_pool, tied
from tests.zoo.models import ZOO

exporters = pytest.importorskip("transformers.exporters")

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {"optimize": False}, "optimised": {}, "fused": {"ort_fusions": "cpu"},
}  # fmt: skip


def exported(name: str, settings: dict[str, Any], path: Path, *, perturbed: bool) -> Path:
    """The twin of a zoo model with tied heads, written with its weights in a file beside."""
    case = ZOO[name]
    config = exporters.OnnxConfig(dynamic=True, **settings)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        made = exporters.OnnxExporter().export(
            tied(case, perturbed=perturbed), dict(case.inputs(2, 7, 0)), config=config
        )
    exporters.OnnxExporter.save_program(made.program, path)
    return path


@pytest.mark.parametrize(("name", "setting"), covering(("llama-sdpa", "gpt2-sdpa", "bert-sdpa"), tuple(SETTINGS)))
def test_a_tied_twin_is_rewritten_without_loss_and_a_perturbed_one_is_not(
    name: str, setting: str, tmp_path: Path
) -> None:
    target = f"gqa{legal_pool(ZOO[name])}"
    drift = {}
    for perturbed in (False, True):
        path = exported(name, SETTINGS[setting], tmp_path / f"{perturbed}.onnx", perturbed=perturbed)
        report = rewriter.optimize(path, target).rewrite_report
        assert [row.exact for row in report.sites] == [not perturbed] * 2 and not report.refused
        assert report.fidelity is not None
        drift[perturbed] = report.fidelity.max_abs
    assert drift[False] < 1e-4 and drift[True] > 1e-3
