"""The command line: JSON, exit codes, streams, and that nothing half-done is left. The library behind it is faked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter
from rewriter.cli import run
from rewriter.errors import InvalidModelFile, NothingToRewrite, UnknownTarget, UnsupportedModel, VerificationFailed
from rewriter.report.rewrite_report import Change, Refused, RewriteReport, SiteRow
from rewriter.verify.result import Check, Fidelity, Verification

ROOT = Path(__file__).resolve().parents[2]

REWRITE_KEYS = {
    "target", "input", "output", "sites", "refused", "parameters", "kv_bytes_per_token", "flops", "fidelity", "seconds",
}  # fmt: skip

SITE = {
    "name": "layer.0", "kind": "attention", "layer": 0, "status": "rewritable", "reason": None, "heads": 4,
    "kv_heads": 4, "head_dim": 8, "causal": True, "cross": False, "cached": False, "rotary": "half",
    "qk_norm": True, "score_modifiers": ["mask"], "layout": "bhsd", "replay_error": 1e-7, "targets": ["mqa", "gqa2"],
}  # fmt: skip


class Found:
    """Stands for whatever the library returns with a ``to_dict``."""

    def __init__(self, shown: dict[str, Any]) -> None:
        self.shown = shown

    def to_dict(self) -> dict[str, Any]:
        return self.shown


class Rewritten:
    """Stands for `rewriter.optimize`'s result; notes where it was saved."""

    def __init__(self, refused: tuple[Refused, ...] = (), fidelity: Fidelity | None = None) -> None:
        rows = (SiteRow("layer.0", "mha4", "gqa2", False, 0.25, 1.5), SiteRow("layer.1", "mha4", "gqa2", True))
        self.rewrite_report = RewriteReport(
            "gqa2", rows, refused, Change(1000, 900), Change(64, 32), Change(0, 0), fidelity, {"capture": 0.5}
        )
        self.saved: list[tuple[Path, dict[str, Any]]] = []

    def save(self, path: Path, **options: Any) -> None:
        self.saved.append((Path(path), options))
        Path(path).write_text("model")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    path.write_text("never opened: the library is faked")
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], list[tuple[Any, Any]]]:
    """``fake(name, result)`` replaces ``rewriter.<name>``; returns the list of its calls. Exceptions are raised."""

    def replace(name: str, result: Any) -> list[tuple[Any, Any]]:
        calls: list[tuple[Any, Any]] = []

        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(rewriter, name, function, raising=False)
        return calls

    return replace


Fake = Callable[[str, Any], list[tuple[Any, Any]]]
Capture = pytest.CaptureFixture[str]


def only_json(capsys: Capture) -> dict[str, Any]:
    """Standard output, which must be exactly one JSON object."""
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(found, dict)
    return found


# --- inspect -------------------------------------------------------------------------------------


def inspection(**changes: Any) -> Found:
    refused = {**SITE, "name": "layer.1", "status": "refused", "reason": "its bias depends on x", "heads": None}
    shown = {
        "model": "in.onnx",
        "format": "onnx",
        "opset": 18,
        "producer": "p",
        "sites": [{**SITE, **changes}, refused],
    }
    return Found({**shown, "not_attention": [{"name": "router", "reason": "mixes no tokens"}]})


def test_inspect_json(model: Path, fake: Fake, capsys: Capture) -> None:
    calls = fake("inspect", inspection(replay_error=float("nan")))
    assert run(["inspect", str(model), "--json"]) == 0
    found = only_json(capsys)
    assert calls == [((str(model),), {})]
    assert found["sites"][0] == {**SITE, "replay_error": None}, "NaN is no JSON"
    assert found["not_attention"] == [{"name": "router", "reason": "mixes no tokens"}]


def test_inspect_table_names_sites_and_reasons(model: Path, fake: Fake, capsys: Capture) -> None:
    fake("inspect", inspection())
    assert run(["inspect", str(model)]) == 0
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if line.startswith("layer.0"))
    for word in ("rewritable", "causal", "half rotary", "qk-norm", "mask"):
        assert word in line, word
    assert line.rstrip().endswith("A") and "A: mqa, gqa2" in out
    assert "its bias depends on x" in out and "1 of 2 attention sites" in out and "router: mixes no tokens" in out
    assert "\x1b" not in out and err == ""


def test_inspect_draws_a_real_file(tmp_path: Path, capsys: Capture) -> None:
    path, drawing = tmp_path / "m.onnx", tmp_path / "site.svg"
    linear = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(1, 5, 16)
    torch.onnx.export(linear, (x, x, x), str(path), dynamo=True, opset_version=18, verbose=False)
    capsys.readouterr()
    assert run(["inspect", str(path), "--graph", str(drawing), "--json"]) == 0
    (site,) = only_json(capsys)["sites"]
    assert site["name"] in drawing.read_text()
    named = ["inspect", str(path), "--graph", str(tmp_path / "other.svg"), "--site"]
    assert run([*named, site["name"]]) == 0
    assert (tmp_path / "other.svg").read_text() == drawing.read_text()
    assert run([*named[:3], str(tmp_path / "none.svg"), "--site", "nowhere"]) == 2
    assert not (tmp_path / "none.svg").exists() and "no site 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--graph", "a.png"], ["--graph", "no/a.svg"], ["--site", "layer.0"]])
def test_inspect_refuses_a_drawing_before_it_reads_the_model(
    model: Path, options: list[str], fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(model.parent)
    calls = fake("inspect", inspection())
    assert run(["inspect", str(model), *options]) == 2
    assert not calls and "hint: " in capsys.readouterr().err


def test_names_out_of_files_cannot_reach_the_terminal(model: Path, fake: Fake, capsys: Capture) -> None:
    evil = "[red]x[/red]\x1b[2J\r\n\u202eabc"
    fake("inspect", inspection(name=evil))
    assert run(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out and "\\x1b[2J\\r\\n\\u202eabc" in out
    assert not set("\x1b\r\u202e") & set(out)
    fake("inspect", UnsupportedModel(f"bad {evil}", hint=evil))
    assert run(["inspect", str(model)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2 and not set("\x1b\r\u202e") & set(err)


# --- rewrite -------------------------------------------------------------------------------------


def test_rewrite_json(model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    done = Rewritten(fidelity=Fidelity(0.5, 0.9, 0.01))
    calls = fake("optimize", done)
    out = tmp_path / "out.onnx"
    assert run(["rewrite", str(model), str(out), "--target", "gqa2", "--layers", "0-1", "--json"]) == 0
    found = only_json(capsys)
    assert set(found) >= REWRITE_KEYS
    assert (found["target"], found["input"], found["output"]) == ("gqa2", str(model), str(out))
    assert found["sites"][0] == {
        "name": "layer.0", "step": "lossy", "from": "mha4", "to": "gqa2", "exact": False, "error": 0.25, "floor": 1.5,
        "requantised": None, "merge": "mean", "notes": [],
    }  # fmt: skip
    assert found["kv_bytes_per_token"] == {"before": 64, "after": 32}
    assert found["fidelity"] == {"max_abs": 0.5, "cosine": 0.9, "kl": 0.01}
    assert calls[0][0] == (str(model), "gqa2")
    given = {"layers": "0-1", "budget": None, "calibration": None, "kernels": "auto", "verify": True, "streamed": None}
    assert calls[0][1] == given
    assert done.saved == [(out, {"external_data": "auto"})]


def test_rewrite_table(model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    fake("optimize", Rewritten(fidelity=Fidelity(0.5, 0.9)))
    assert run(["rewrite", str(model), str(tmp_path / "o.onnx"), "-t", "gqa2"]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["layer.0", "mha4", "gqa2", "mean", "lossy", "0.25", "1.5"] for line in out.splitlines())
    assert any(line.split() == ["layer.1", "mha4", "gqa2", "mean", "exact", "-", "-"] for line in out.splitlines())
    assert "cosine 0.9" in out and "0.500" in out


def test_rewrite_options_reach_the_library(model: Path, tmp_path: Path, fake: Fake) -> None:
    import numpy as np

    calls = fake("optimize", done := Rewritten())
    texts, ids, arrays = tmp_path / "c.txt", tmp_path / "c.npy", tmp_path / "c.npz"
    texts.write_text("one\n\ntwo\n")
    np.save(ids, np.arange(6).reshape(2, 3))
    np.savez(arrays, input_ids=np.ones((2, 3)))
    common = ["rewrite", str(model), str(tmp_path / "o.onnx"), "-t", "mqa"]
    extra = ["--no-verify", "--kernels", "off", "--external-data", "never"]
    for file in (texts, ids, arrays):
        assert run([*common, "--calibration", str(file), *extra]) == 0
    given = [kwargs["calibration"] for _, kwargs in calls]
    assert given[0] == ["one", "two"] and given[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert given[2][0]["input_ids"].shape == (2, 3)
    assert calls[0][1]["verify"] is False and calls[0][1]["kernels"] == "off"
    assert done.saved[0][1] == {"external_data": "never"}
    assert run([*common, "--calibration", str(tmp_path / "none.txt")]) == 2
    (tmp_path / "bad.npy").write_text("no array")
    assert run([*common, "--calibration", str(tmp_path / "bad.npy")]) == 2


def test_a_merge_becomes_part_of_the_target(model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    from passes.targets import GroupedQuery

    calls = fake("optimize", Rewritten())
    common = ["rewrite", str(model), str(tmp_path / "o.onnx"), "-t", "gqa2"]
    for merge in ("mean", "aligned", "joint"):
        assert run([*common, "--merge", merge]) == 0
    assert [target for (_, target), _ in calls] == [GroupedQuery(2, m) for m in ("mean", "aligned", "joint")]
    assert run([*common, "--merge", "guess"]) == 2
    assert run(["rewrite", str(model), str(tmp_path / "o.onnx"), "-t", "none", "--merge", "joint"]) == 0
    assert calls[-1][0][1] == "none", "unknown names are left for the library to refuse"


def test_a_directory_is_saved_as_one(tmp_path: Path, fake: Fake) -> None:
    (tmp_path / "hf").mkdir()
    done = Rewritten()
    fake("optimize", done)
    assert run(["rewrite", str(tmp_path / "hf"), str(tmp_path / "out"), "-t", "mqa"]) == 0
    assert done.saved == [(tmp_path / "out", {})]


def test_a_page_is_written_where_it_was_asked_for(model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    calls = fake("optimize", Rewritten())
    command = ["rewrite", str(model), str(tmp_path / "out.onnx"), "-t", "gqa2", "--html"]
    assert run([*command, str(tmp_path / "r.html")]) == 0
    assert "layer.0" in (tmp_path / "r.html").read_text()
    (tmp_path / "r.html").unlink()
    for wrong in ("r.pdf", "no/r.html"):
        assert run([*command, str(tmp_path / wrong)]) == 2
    assert len(calls) == 1, "a wrong name is refused before any work"
    fake("optimize", Rewritten(fidelity=Fidelity(9.0, 0.1)))
    assert run([*command, str(tmp_path / "r.html"), "--min-cosine", "0.9"]) == 1
    assert not (tmp_path / "r.html").exists(), "nothing is written when the rewrite is refused"


def test_dry_run_writes_nothing(model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    fake("optimize", done := Rewritten(fidelity=Fidelity(0.5, 0.9)))
    assert run(["rewrite", str(model), str(tmp_path / "o.onnx"), "-t", "gqa2", "--dry-run", "--json"]) == 0
    assert only_json(capsys)["dry_run"] is True
    assert done.saved == [] and not (tmp_path / "o.onnx").exists()


def test_refused_sites(model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    out = tmp_path / "o.onnx"
    command = ["rewrite", str(model), str(out), "-t", "gqa2", "--json"]
    fake("optimize", done := Rewritten(refused=(Refused("layer.2", "bias depends on x"),)))
    assert run(command) == 0 and out.exists()
    shown = capsys.readouterr()
    assert json.loads(shown.out)["refused"] == [{"name": "layer.2", "reason": "bias depends on x"}]
    assert "1 of 3 sites were refused" in shown.err and "layer.2: bias depends on x" in shown.err
    done.saved.clear()
    assert run([*command, "--strict"]) == 1
    assert done.saved == [] and "layer.2" in capsys.readouterr().err
    fake("optimize", Rewritten())
    assert run([*command, "--strict"]) == 0


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (["--max-kl", "0.02"], 0),
        (["--max-kl", "0.005"], 1),
        (["--min-cosine", "0.9"], 0),
        (["--min-cosine", "0.95"], 1),
        (["--max-kl", "0.02", "--min-cosine", "0.95"], 1),
    ],
)
def test_limits_on_drift(
    model: Path, tmp_path: Path, fake: Fake, limits: list[str], code: int, capsys: Capture
) -> None:
    fake("optimize", done := Rewritten(fidelity=Fidelity(0.5, 0.9, 0.01)))
    assert run(["rewrite", str(model), str(tmp_path / "o.onnx"), "-t", "gqa2", *limits]) == code
    assert bool(done.saved) == (code == 0)
    assert ("nothing was written" in capsys.readouterr().err) == (code == 1)


def test_a_limit_on_what_was_not_measured(model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    fake("optimize", done := Rewritten(fidelity=Fidelity(0.5, 0.9, None)))
    command = ["rewrite", str(model), str(tmp_path / "o.onnx"), "-t", "gqa2", "--max-kl", "1"]
    assert run(command) == 1 and done.saved == [] and "not measured" in capsys.readouterr().err
    assert run([*command, "--no-verify"]) == 2


# --- verify, profile, targets --------------------------------------------------------------------


def verification(ok: bool) -> Verification:
    return Verification(Fidelity(0.5, 0.9, 0.01), (Check("valid", True, "fine"), Check("runs", ok, "shape mismatch")))


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_verify(model: Path, fake: Fake, capsys: Capture, ok: bool, code: int) -> None:
    calls = fake("verify", verification(ok))
    assert run(["verify", str(model), "--against", str(model), "--json"]) == code
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["ok"] is ok and found["fidelity"]["cosine"] == 0.9
    assert found["checks"][1] == {"name": "runs", "ok": ok, "detail": "shape mismatch"}
    assert ("runs" in shown.err) == (not ok)
    assert calls == [((str(model), str(model)), {})]
    assert run(["verify", str(model), "--against", str(model)]) == code
    out = capsys.readouterr().out
    assert ("FAILED" in out) == (not ok) and ("not verified" in out) == (not ok)


def test_verify_judges_drift_when_asked(model: Path, fake: Fake, capsys: Capture) -> None:
    fake("verify", verification(True))
    command = ["verify", str(model), "--against", str(model), "--json"]
    assert run([*command, "--max-kl", "1", "--min-cosine", "0.5"]) == 0
    capsys.readouterr()
    assert run([*command, "--min-cosine", "0.99"]) == 1
    found = only_json(capsys)
    assert found["ok"] is False and found["checks"][-1]["name"] == "min-cosine"


def test_profile(model: Path, fake: Fake, capsys: Capture) -> None:
    side = {"ms": {"min": 1.0, "median": 2.0, "max": 3.0}, "peak_bytes": None, "ops": {"MatMul": 0.5}}
    shown = {
        "provider": "cpu",
        "device": "d",
        "threads": 3,
        "runs": 4,
        "onnxruntime": "1",
        "before": side,
        "after": side,
    }
    calls = fake("profile", Found({**shown, "speedup": {"min": 1.0, "median": 1.0}}))
    command = [
        "profile",
        str(model),
        str(model),
        "--runs",
        "4",
        "--threads",
        "3",
        "--shape",
        "a=2x128",
        "--shape",
        "b=1",
    ]
    assert run([*command, "--json"]) == 0
    assert only_json(capsys)["before"] == side
    shapes = {"a": (2, 128), "b": (1,)}
    others = {
        "kernels": None,
        "cuda_graph": False,
        "mode": "forward",
        "prompt": None,
        "new_tokens": None,
        "batch": None,
    }
    assert calls[0][1] == {"provider": "cpu", "shapes": shapes, "runs": 4, "threads": 3, **others}
    assert run(command) == 0
    assert "MatMul" in capsys.readouterr().out
    for wrong in ("p.pdf", "no/p.html"):
        assert run([*command, "--html", wrong]) == 2
    assert run([*command, "--shape", "c=2xy"]) == 2
    assert run([*command, "--shape", "2x128"]) == 2


def test_targets(fake: Fake, capsys: Capture) -> None:
    row = {"name": "mqa", "summary": "one K/V head", "paper": "1911.02150", "rewrites": "attention", "needs": "nothing"}
    fake("targets", [row])
    assert run(["targets", "--json"]) == 0
    assert only_json(capsys) == {"targets": [row]}
    assert run(["targets"]) == 0
    assert "one K/V head" in capsys.readouterr().out


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NothingToRewrite("no attention in it", hint="h"), 1),
        (VerificationFailed("drifts", hint="h"), 1),
        (UnsupportedModel("quantised", hint="h"), 1),
        (UnknownTarget("no target 'x'", hint="h"), 2),
        (InvalidModelFile("cut off", hint="h"), 3),
        (ZeroDivisionError("oops"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(model: Path, tmp_path: Path, fake: Fake, error: BaseException, code: int, capsys: Capture) -> None:
    fake("optimize", error)
    out = tmp_path / "o.onnx"
    assert run(["rewrite", str(model), str(out), "-t", "x"]) == code
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err and not out.exists()
    assert len(shown.err.splitlines()) <= 2
    if isinstance(error, Exception) and error.args:
        assert str(error) in shown.err


def test_errors_in_json_and_debug(model: Path, fake: Fake, capsys: Capture) -> None:
    fake("inspect", InvalidModelFile("cut off", hint="again"))
    assert run(["inspect", str(model), "--json"]) == 3
    expected = {"type": "InvalidModelFile", "message": "cut off", "hint": "again", "exit_code": 3}
    assert only_json(capsys) == {"error": expected}
    assert run(["inspect", str(model), "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err
    assert run(["inspect", str(model)]) == 3
    assert "Traceback" not in capsys.readouterr().err, "--debug outlives its command"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["inspect"],
        ["inspect", "{model}", "--nonsense"],
        ["inspect", "{folder}/none.onnx"],
        ["rewrite", "{model}", "{folder}/o.onnx"],
        ["rewrite", "{folder}/none.onnx", "{folder}/o.onnx", "-t", "mqa"],
        ["rewrite", "{model}", "{folder}/none/o.onnx", "-t", "mqa"],
        ["rewrite", "{model}", "{folder}", "-t", "mqa"],
        ["rewrite", "{folder}", "{model}", "-t", "mqa"],
        ["rewrite", "{model}", "{folder}/o.onnx", "-t", "mqa", "--external-data", "maybe"],
        ["rewrite", "{model}", "{folder}/o.onnx", "-t", "mqa", "--max-kl", "much"],
        ["rewrite", "{model}", "{folder}/o.onnx", "-t", "mqa", "--max-kl", "nan"],
        ["rewrite", "{model}", "{folder}/o.onnx", "-t", "mqa", "--max-kl", "-1"],
        ["rewrite", "{model}", "{folder}/o.onnx", "-t", "mqa", "--min-cosine", "nan"],
        ["rewrite", "{model}", "/dev/stdout", "-t", "mqa"],
        ["verify", "{model}", "--against", "{model}", "--min-cosine", "2"],
        ["verify", "{model}"],
        ["verify", "{model}", "--against", "{folder}/none.onnx"],
        ["profile", "{model}", "{model}", "--provider", "npu"],
        ["profile", "{model}", "{model}", "--runs", "0"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], model: Path, tmp_path: Path, fake: Fake, capsys: Capture) -> None:
    for name in ("inspect", "optimize", "verify", "profile"):
        fake(name, AssertionError("the library was called"))
    filled = [word.format(model=model, folder=tmp_path) for word in arguments]
    assert run(filled) == 2
    shown = capsys.readouterr()
    assert shown.err and shown.out == "" and "Traceback" not in shown.err


def test_libraries_may_print_without_spoiling_the_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def talkative(_: str) -> Found:
        print("loading weights")
        return inspection()

    monkeypatch.setattr(rewriter, "inspect", talkative, raising=False)
    assert run(["inspect", str(model), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) and "loading weights" in shown.err


def test_progress_is_on_standard_error_and_only_when_asked(model: Path, fake: Fake, capsys: Capture) -> None:
    fake("inspect", inspection())
    assert run(["inspect", str(model), "--json"]) == 0
    assert capsys.readouterr().err == ""
    assert run(["inspect", str(model), "--json", "--progress"]) == 0
    assert "inspecting" in capsys.readouterr().err


def test_help_version_and_module_entry() -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rewriter", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )

    assert call("--help").returncode == 0 and "rewrite" in call("--help").stdout
    version = call("--version")
    assert version.returncode == 0 and version.stdout.startswith("rewriter")
    wrong = call("inspect", "none.onnx")
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.startswith("error: no such file")


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """``rewriter targets | head -0`` must not complain."""
    program = (
        "import rewriter, sys; rewriter.targets = lambda: [dict(name='x' * 99, summary='', paper='', rewrites='',"
        " needs='')] * 5000; from rewriter.cli import main; main(['targets', '--json'])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 0
    child.stderr.close()


def _in_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = ["sh", "-c", f'rewriter() {{ "{sys.executable}" -m rewriter "$@"; }}; {line}']
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("rewriter targets --json > /dev/full", 1, "error: standard output cannot be written"),
        ("rewriter targets > /dev/full", 1, "error: standard output cannot be written"),
        ("rewriter targets >&-", 0, ""),
        ("rewriter targets >&- 2>&- <&-", 0, ""),
        ("rewriter inspect none.onnx 2>&-", 2, ""),
        ("mkdir gone; cd gone; rmdir ../gone; rewriter inspect none.onnx", 2, "error: the working directory is gone"),
    ],
    ids=["full_json", "full", "no_output", "nothing_open", "no_errors", "no_folder"],
)
def test_streams_and_places_that_are_not_there(tmp_path: Path, line: str, code: int, words: str) -> None:
    done = _in_shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(words) and "Traceback" not in done.stderr
    assert bool(done.stderr) == bool(words)


def test_what_libraries_print_does_not_reach_a_file(tmp_path: Path) -> None:
    """A file that is opened while standard error is closed would have its number."""
    program = (
        "import os; from rewriter.cli import process; "
        "process.run = lambda words: (open('out', 'w'), os.write(2, b'noise'))[1] * 0; process.main([])"
    )
    line = f'"{sys.executable}" -c "{program}" 2>&-'
    assert _in_shell(line, tmp_path).returncode == 0
    assert (tmp_path / "out").read_text() == ""


# --- the real thing ------------------------------------------------------------------------------


def rewriter_command(*words: object, process: bool = False) -> subprocess.CompletedProcess[str]:
    """A command with nothing faked, here or in a process of its own."""
    told = [str(word) for word in words]
    if process:
        command = [sys.executable, "-m", "rewriter", *told]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(told)
    return subprocess.CompletedProcess(told, code, out.getvalue(), err.getvalue())


def answer(*words: object, code: int = 0, process: bool = False) -> dict[str, Any]:
    """The JSON that a real command prints; its exit code must be `code`."""
    done = rewriter_command(*words, "--json", process=process)
    assert done.returncode == code, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


Zoo = Callable[..., Path]


@pytest.fixture
def export(zoo_onnx: Zoo, tmp_path: Path) -> Callable[..., Path]:
    """``export(name, exporter)``: a copy of an exported zoo model that the test may overwrite."""
    from tests.zoo.models import cases

    def copy(name: str, exporter: str = "dynamo18", **options: Any) -> Path:
        case = next(case for case in cases(without=()) if case.name == name)
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(zoo_onnx(case, exporter, **options).read_bytes())
        return path

    return copy


@pytest.mark.parametrize(
    ("name", "past", "process"),
    [pytest.param("bert-sdpa", False, True, id="in processes"), pytest.param("gpt2-eager", True, False, id="here")],
)
def test_the_whole_job(name: str, past: bool, process: bool, export: Callable[..., Path], tmp_path: Path) -> None:
    model, out = export(name, past=past), tmp_path / "out.onnx"
    ask = partial(answer, process=process)
    found = ask("inspect", model)
    assert found["format"] == "onnx" and found["opset"] == 18 and len(found["sites"]) == 4
    assert [site["kind"] for site in found["sites"]] == ["attention", "feed_forward"] * 2
    for site in found["sites"][::2]:
        assert set(site) >= set(SITE) and site["status"] == "rewritable" and site["cached"] is past
        assert site["replay_error"] < 1e-4 and "gqa2" in site["targets"]

    done = ask("rewrite", model, out, "--target", "gqa2")
    assert set(done) >= REWRITE_KEYS and done["refused"] == []
    assert [(site["from"], site["to"]) for site in done["sites"]] == [("mha4", "gqa2")] * 2
    assert done["kv_bytes_per_token"]["before"] == 2 * done["kv_bytes_per_token"]["after"]
    assert done["parameters"]["after"] < done["parameters"]["before"]

    checked = ask("verify", out, "--against", model)
    assert checked["ok"] and checked["fidelity"]["cosine"] == pytest.approx(done["fidelity"]["cosine"], abs=1e-3)
    assert not ask("verify", out, "--against", model, "--min-cosine", 0.999999, code=1)["ok"]

    timed = ask("profile", model, out, "--runs", 3, "--threads", 1)
    assert timed["before"]["ms"]["min"] > 0 and timed["after"]["ops"] and timed["before"]["peak_bytes"] > 0


def test_selected_layers_and_dry_run(export: Callable[..., Path], tmp_path: Path) -> None:
    model, out = export("bert-sdpa"), tmp_path / "out.onnx"
    assert len(answer("rewrite", model, out, "-t", "mqa", "--layers", "0", "--dry-run")["sites"]) == 1
    assert not out.exists()
    assert len(answer("rewrite", model, out, "-t", "mqa", "--layers", "0")["sites"]) == 1
    assert out.exists()


def test_the_output_may_replace_the_input(export: Callable[..., Path], tmp_path: Path) -> None:
    model = export("bert-sdpa")
    original = tmp_path / "original.onnx"
    original.write_bytes(model.read_bytes())
    for external in ("always", "never", "always"):
        answer("rewrite", model, model, "-t", "gqa2", "--external-data", external)
        assert answer("verify", model, "--against", original)["ok"]
        data = tmp_path / "bert-sdpa.onnx.data"
        assert data.exists() == (external == "always")
        model.write_bytes(original.read_bytes())  # behind the command's back: to it, the data are somebody's now
        data.unlink(missing_ok=True)


def test_refusals_leave_nothing_behind(export: Callable[..., Path], tmp_path: Path) -> None:
    model, out = export("bert-sdpa"), tmp_path / "out.onnx"
    done = rewriter_command("rewrite", model, out, "-t", "gqa3", process=True)
    assert done.returncode == 2 and "1, 2, 4" in done.stderr
    assert rewriter_command("rewrite", model, out, "-t", "nope").returncode == 2
    assert rewriter_command("rewrite", model, out, "-t", "mqa", "--min-cosine", "0.9999").returncode == 1
    assert rewriter_command("profile", model, model, "--provider", "tensorrt").returncode == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bert-sdpa.onnx"}


def test_no_attention_and_broken_files(export: Callable[..., Path], tmp_path: Path) -> None:
    import onnx
    import onnx.helper as oh

    value = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])
    result = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    graph = oh.make_graph([oh.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), tmp_path / "relu.onnx")
    assert answer("inspect", tmp_path / "relu.onnx")["sites"] == []
    done = rewriter_command("rewrite", tmp_path / "relu.onnx", tmp_path / "out.onnx", "-t", "mqa")
    assert done.returncode == 1 and "attention" in done.stderr and "Traceback" not in done.stderr

    content = export("bert-sdpa").read_bytes()
    for name, bad in {"cut": content[: len(content) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / f"{name}.onnx").write_bytes(bad)
        for words in (("inspect",), ("rewrite", tmp_path / "out.onnx", "-t", "mqa")):
            command = (words[0], tmp_path / f"{name}.onnx", *words[1:])
            done = rewriter_command(*command)
            assert done.returncode == 3, (command, done.stderr)
            assert len(done.stderr.splitlines()) == 2 and done.stdout == ""
    assert not (tmp_path / "out.onnx").exists()


def test_ctrl_c(tmp_path: Path) -> None:
    """A real SIGINT in the middle of the work: 130, one line, nothing written."""
    program = (
        "import rewriter, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell starts us deaf to it
        "def slow(*args, **kwargs):\n"
        "    sys.stderr.write('ready\\n'); sys.stderr.flush(); time.sleep(60)\n"
        "rewriter.optimize = slow\n"
        "from rewriter.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    (tmp_path / "in.onnx").write_text("x")
    words = ["rewrite", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "-t", "mqa"]
    child = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stderr is not None and child.stderr.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stderr.read().startswith("error: interrupted") and child.wait() == 130
    child.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_killed_while_rewriting(export: Callable[..., Path], tmp_path: Path) -> None:
    """kill -9 at random moments of a real rewrite over an old output: that stays whole, old or new."""
    model, out = export("bert-sdpa"), tmp_path / "out.onnx"
    answer("rewrite", model, out, "-t", "gqa2")
    old = out.read_bytes()
    answer("rewrite", model, out, "-t", "mqa")
    new = out.read_bytes()
    assert old != new
    out.write_bytes(old)
    rng = random.Random(0)
    for _ in range(5):
        words = ["rewrite", str(model), str(out), "-t", "mqa"]
        child = subprocess.Popen([sys.executable, "-m", "rewriter", *words], stdout=subprocess.DEVNULL, cwd=ROOT)
        time.sleep(rng.uniform(0.1, 2.5))
        child.kill()
        child.wait()
        assert out.read_bytes() in (old, new)
