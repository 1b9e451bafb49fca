"""``rewriter uptrain``: from folders and files to an ordinary checkpoint; JSON, exit codes, resuming, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewriter
from rewriter.cli import run
from tests.uptrain.small_models import equal, llama, student_of, token_ids, weights

ROOT = Path(__file__).resolve().parents[2]

KEYS = {
    "student", "teacher", "data", "output", "checkpoints", "steps", "tokens", "before", "after", "drift", "curve",
    "compared", "trained_parameters", "recipe", "device", "processes", "precision", "resumed_from", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(student, teacher, data)."""
    base = tmp_path_factory.mktemp("models")
    teacher = llama()
    rewriter.save(teacher, base / "teacher")
    rewriter.save(student_of(teacher), base / "student")
    (base / "student" / "LICENSE").write_text("free")
    np.save(base / "ids.npy", token_ids())
    return base / "student", base / "teacher", base / "ids.npy"


def arguments(folders: tuple[Path, Path, Path], *more: str | Path) -> list[str]:
    student, teacher, data = folders
    small = ["--batch", "4", "--window", "16", "--learning-rate", "0.003", "--save-every", "2"]
    return ["uptrain", str(student), "--teacher", str(teacher), "--data", str(data), *small, *map(str, more)]


def test_a_run_writes_an_ordinary_checkpoint(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    call = [sys.executable, "-m", "rewriter", *arguments(folders, "--steps", "40", "-o", out, "--json")]
    done = subprocess.run(call, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert set(found) == KEYS
    assert found["after"]["kl"] < found["before"]["kl"] and found["steps"] == 40 and len(found["curve"]) == 40
    assert found["output"] == str(out) and found["checkpoints"] == str(tmp_path / "out.run")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_key_value_heads == 1 and (out / "LICENSE").is_file()
    student = rewriter.load(folders[0])
    assert not equal(weights(model), weights(student))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.run"]


def test_a_resumed_run_needs_no_more_than_the_folder_and_is_the_same(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert run(arguments(folders, "--steps", "6", "-o", tmp_path / "a")) == 0
    assert "teacher perplexity" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "a.run" / "step-000000006")
    assert run([*arguments(folders, "-o", tmp_path / "b"), "--resume", str(tmp_path / "a.run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 4
    one, other = (weights(rewriter.load(tmp_path / name)) for name in ("a", "b"))
    assert equal(one, other)
    assert run([*arguments(folders, "--steps", "7", "--resume", tmp_path / "a.run", "-o", tmp_path / "c")]) == 2
    assert "another run" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_data_may_be_several_files_after_one_option_or_after_each(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "more.npy", token_ids(seed=1))
    more = str(tmp_path / "more.npy")
    found = []
    for given in ([more], ["--data", more]):
        call = ["uptrain", str(folders[0]), "--teacher", str(folders[1]), "--data", str(folders[2]), *given]
        where = ["-o", str(tmp_path / "out"), "--checkpoints", str(tmp_path / f"run{len(found)}")]
        assert run([*call, *where, "--steps", "2", "--batch", "4", "--window", "16", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["data"] == found[1]["data"] == [str(folders[2]), more]
    assert found[0]["curve"] == found[1]["curve"]


def test_the_papers_budget(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--fraction", "0.05", "--pretraining-tokens", "6400", "-o", str(tmp_path / "out"), "--json"]
    assert run(arguments(folders, *budget)) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5


def test_progress_is_shown_where_it_was_asked_for(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(folders, "--steps", "2", "-o", tmp_path / "out", "--progress")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in lines] == ["step 1/2", "step 2/2"]


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        pytest.param([], 2, "how long", id="no length"),
        pytest.param(["--fraction", "0.05"], 2, "how many tokens", id="no pre-training tokens"),
        pytest.param(["--steps", "2", "--data", "missing.npy"], 2, "missing.npy", id="missing data"),
        pytest.param(["--steps", "2", "--window", "9999"], 2, "less than one window", id="short data"),
        pytest.param(["--steps", "2", "--resume", "nowhere"], 2, "no checkpoint", id="nothing to resume"),
        pytest.param(["--steps", "2", "-o", "/nowhere/out"], 2, "does not exist", id="no folder"),
        pytest.param(["--steps", "2", "--train", "some"], 2, "some", id="unknown choice"),
    ],
)
def test_wrong_usage(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    change: list[str],
    code: int,
    what: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    output = [] if "-o" in change else ["-o", str(tmp_path / "out")]
    assert run(arguments(folders, *output, *change)) == code
    streams = capsys.readouterr()
    assert what in streams.err and "Traceback" not in streams.err and not streams.out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing_half_written(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = arguments(folders, "--steps", "5000", "-o", out, "--progress")
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell starts us deaf to it
        f"from rewriter.cli import run\nsys.exit(run({call!r}))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None
    while not (line := child.stderr.readline()).startswith("step 100/"):
        assert line, "it ended by itself"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    rest = child.stderr.read()
    assert child.wait() == 130 and "interrupted" in rest
    assert not out.exists() and not list((tmp_path / "out.run").glob(".draft*"))
    whole = list((tmp_path / "out.run").glob("step-*"))
    assert whole and all((step / "run.json").is_file() and (step / "model.safetensors").is_file() for step in whole)


def test_an_onnx_student_without_a_twin_is_refused_with_the_reason(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.onnx.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),), tmp_path / "student.onnx", verbose=False)
    capsys.readouterr()
    call = ["uptrain", str(tmp_path / "student.onnx"), "--teacher", str(folders[1]), "--data", str(folders[2])]
    assert run([*call, "--steps", "2"]) == 1
    error = capsys.readouterr().err
    assert "torch" in error and "hint" in error
    assert not (tmp_path / "student-uptrained.onnx").exists()
