"""Files that transformers' own ONNX exporter writes: optimised, as they come, and fused for onnxruntime."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

import rewriter
from tests.targets.lossless_twin import legal_pool, tied
from tests.zoo.models import ZOO

exporters = pytest.importorskip("transformers.exporters")

pytestmark = pytest.mark.slow

AS_IT_COMES: dict[str, Any] = {"optimize": False}
OPTIMISED: dict[str, Any] = {}
FUSED: dict[str, Any] = {"ort_fusions": "cpu"}


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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert-sdpa", OPTIMISED), ("bert-sdpa", AS_IT_COMES), ("bert-sdpa", FUSED),
        ("gpt2-sdpa", OPTIMISED), ("gpt2-sdpa", AS_IT_COMES), ("gpt2-sdpa", FUSED),
        ("llama-sdpa", OPTIMISED), ("llama-sdpa", AS_IT_COMES), ("llama-sdpa", FUSED),
    ],
)  # fmt: skip
def test_a_tied_twin_is_rewritten_without_loss_and_a_perturbed_one_is_not(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    target = f"gqa{legal_pool(ZOO[name])}"
    drift = {}
    for perturbed in (False, True):
        path = exported(name, settings, tmp_path / f"{perturbed}.onnx", perturbed=perturbed)
        report = rewriter.optimize(path, target).rewrite_report
        assert [row.exact for row in report.sites] == [not perturbed] * 2 and not report.refused
        assert report.fidelity is not None
        drift[perturbed] = report.fidelity.max_abs
    assert drift[False] < 1e-4 and drift[True] > 1e-3
