"""Coverage-guided fuzzing for half a minute; `python -m benchmarks.coverage_fuzz` goes on for ten."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import coverage_fuzz


@pytest.mark.slow
@pytest.mark.skipif(not coverage_fuzz.available(), reason=coverage_fuzz.MISSING)
def test_nothing_but_typed_errors_comes_of_it(tmp_path: Path) -> None:
    found = coverage_fuzz.run(tmp_path, 30)
    assert not found.faults, found.said[-3000:]
    assert found.tried > 20 and found.edges > 100, "the control: our code is instrumented, and was reached"
    assert found.corpus > len(list(coverage_fuzz.CORPUS.glob("*.onnx"))), "what reached new code was kept"


def test_the_corpus_is_of_sound_models(tmp_path: Path) -> None:
    files = sorted(coverage_fuzz.CORPUS.glob("*.onnx"))
    assert len(files) >= 2
    for file in files:
        try:
            coverage_fuzz.walk(file, tmp_path / "out.onnx")
        finally:
            (tmp_path / "out.onnx").unlink(missing_ok=True)


def test_an_error_without_a_hint_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rewriter
    from rewriter.errors import UnsupportedModel

    def refuse(path: object) -> None:
        raise UnsupportedModel("no")

    monkeypatch.setattr(rewriter, "inspect", refuse)
    with pytest.raises(AssertionError, match="without a hint"):
        coverage_fuzz.walk(sorted(coverage_fuzz.CORPUS.glob("*.onnx"))[0], tmp_path / "out.onnx")
