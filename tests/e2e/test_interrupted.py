"""Ctrl-C in the middle of real work: exit code 130, one line, and nothing that was not there before."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.targets.fused_files import VOCAB, model, multi_head, with_padding

ROOT = Path(__file__).resolve().parents[2]
DEAF = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as a background shell starts us
)
PROGRAM = DEAF + "from rewriter.cli import main; main(sys.argv[1:])"
PATIENT = """
import sys, time
write = sys.stderr.write
def patient(text):
    count = write(text)
    sys.stderr.flush()
    if any(line.startswith(AT) for line in text.splitlines()):
        time.sleep(5)
    return count
sys.stderr.write = patient
"""
"""Waits for the signal where it is to come, however soon the work would be done."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, VOCAB, (6, 24)))
    return model(multi_head(), folder / "in.onnx", tied=False, prepare=with_padding)


def interrupted(words: list[str | Path], at: str, by: int = signal.SIGINT) -> tuple[int, str]:
    """(exit code, the rest of standard error) of a command that gets a signal when it prints a line that starts so."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"AT = {at!r}" + PATIENT + PROGRAM, *map(str, words), "--progress"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stderr is not None
    with child.stderr as stream:
        for line in stream:
            if line.startswith(at):
                child.send_signal(by)
                break
        rest = stream.read()
    return child.wait(), rest


@pytest.mark.parametrize(
    ("stage", "by"),
    [
        ("rewriting", signal.SIGINT),
        ("calibrating", signal.SIGINT),
        ("verify", signal.SIGINT),
        ("calibrating", signal.SIGTERM),
        ("verify", signal.SIGHUP),
    ],
    ids=["rewriting-int", "calibrating-int", "verify-int", "calibrating-term", "verify-hup"],
)
def test_a_rewrite_leaves_nothing(file: Path, tmp_path: Path, stage: str, by: signal.Signals) -> None:
    calibration = file.with_name("ids.npy")
    words: list[str | Path] = ["rewrite", file, tmp_path / "out.onnx", "-t", "gqa2", "--html", tmp_path / "r.html"]
    code, rest = interrupted([*words, "--calibration", calibration], stage, by)
    assert code == 128 + by, rest
    assert "error: interrupted" in rest and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_kernels_leave_no_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter import optimize

    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = tmp_path / "small.onnx"
    optimize(file, "gqa2").save(small)
    code, rest = interrupted(["kernels", small, "-o", tmp_path / "kernels"], "building …")
    assert code == 130, rest
    assert not (tmp_path / "kernels").exists()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix == ".so"], "no half-built library either"
