"""`rewriter demo` on real weights: its checks hold, the README quotes it, and a twin that is not one makes it fail."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from rewriter.demo import run as demo
from rewriter.demo.weights import smollm2_twin
from rewriter.errors import VerificationFailed

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Any]:
    """What ``rewriter demo --json`` prints; run once, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    printed = (base if worker_id == "master" else base.parent) / "demo.json"
    with FileLock(f"{printed}.lock"):
        if not printed.exists():
            done = subprocess.run(
                [sys.executable, "-m", "rewriter", "demo", "--json"],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout, encoding="utf-8")
    result: dict[str, Any] = json.loads(printed.read_text(encoding="utf-8"))
    return result


def test_real_models_are_rewritten_and_nothing_is_refused(shown: dict[str, Any]) -> None:
    steps = [{(s["from"], s["to"], s["exact"]) for s in act["report"]["sites"]} for act in shown["acts"]]
    assert steps == [{("mha9", "gqa3", True)}, *[{("mha12", "gqa6", False)}] * 3]
    assert [len(act["report"]["sites"]) for act in shown["acts"]] == [30, 6, 6, 6]
    assert [act["report"]["refused"] for act in shown["acts"]] == [[]] * 4


def test_the_exact_step_loses_nothing(shown: dict[str, Any]) -> None:
    act = shown["acts"][0]
    assert [c["name"] for c in act["checks"]] == [
        "max |Δlogit|", "perplexity", "K/V bytes per token ÷ 3", "generated tokens equal"
    ]  # fmt: skip
    assert all(check["ok"] for check in act["checks"]), act["checks"]
    moved = re.match(r"(\S+), limit 1e-04", act["checks"][0]["detail"])
    assert moved is not None and float(moved.group(1)) <= 1e-4
    assert 20 < act["before"]["perplexity"] < 60, "the text is English and the model reads it"
    assert act["after"]["perplexity"] == pytest.approx(act["before"]["perplexity"], rel=1e-3)
    kv = act["report"]["kv_bytes_per_token"]
    assert kv["before"] == 30 * 2 * 9 * 64 * 4 and kv["after"] * 3 == kv["before"]


def test_the_lossy_steps_say_that_they_are(shown: dict[str, Any]) -> None:
    for act in shown["acts"][1:]:
        report = act["report"]
        assert 0 < report["fidelity"]["cosine"] < 0.99
        assert all(site["error"] > 0 and site["floor"] == 1 for site in report["sites"])
        assert report["kv_bytes_per_token"]["before"] == 2 * report["kv_bytes_per_token"]["after"]
        assert report["parameters"]["before"] - report["parameters"]["after"] == 6 * 2 * 192 * 385
    sizes = shown["acts"][3]
    assert sizes["after"]["file MB"] < sizes["before"]["file MB"] and sizes["after"]["ms"] > 0


def test_calibration_keeps_what_pooling_loses(shown: dict[str, Any]) -> None:
    pooled, fitted = (act["after"]["sentence cosine"] for act in shown["acts"][1:3])
    assert pooled < 0.8 and 0.9 < fitted < 1
    assert [[c["ok"] for c in act["checks"]] for act in shown["acts"][1:3]] == [[], [True]]


def test_the_readme_quotes_the_demo(shown: dict[str, Any]) -> None:
    rows = re.findall(r"^\| (?:SmolLM2|MiniLM)[^\n]*`gqa[^\n]*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 4
    for row, act in zip(rows, shown["acts"], strict=True):
        report = act["report"]
        assert f"`{report['target']}`, {len(report['sites'])} sites" in row
        assert ("**exact**" in row) == all(site["exact"] for site in report["sites"]) != ("**lossy**" in row)
        for cost in (report["parameters"], report["kv_bytes_per_token"]):
            assert f"{cost['before']:,} → {cost['after']:,}" in row
        for words, value in _quoted(act).items():
            found = re.search(rf"{words} (\d+\.\d+)", row)
            assert found is not None and float(found.group(1)) == pytest.approx(value, rel=0.03), (words, value)
    assert f"max \\|Δlogit\\| 0 (limit {demo.LOGIT_LIMIT:.0e}) ".replace("e-0", "e-") in rows[0]


def _quoted(act: dict[str, Any]) -> dict[str, float]:
    if "perplexity" in act["after"]:
        return {"perplexity": act["before"]["perplexity"], r"perplexity \d+\.\d+ →": act["after"]["perplexity"]}
    if "sentence cosine" in act["after"]:
        return {"sentence cosine": act["after"]["sentence cosine"]}
    return {"output cosine": act["report"]["fidelity"]["cosine"]}


# ------------------------------------------------------------------ controls


def _perturbed(model: Any) -> Any:
    """A twin in which one number of one key head differs from its group's."""
    twin: Any = smollm2_twin(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.k_proj.weight[0, 0] += 0.5
    return twin


@pytest.fixture
def only_the_decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``only_the_decoder(twin_builder)`` shortens the demo to its first act, with another builder of twins."""

    def shorten(build: Any) -> None:
        monkeypatch.setattr(demo, "smollm2_twin", build)
        monkeypatch.setattr(demo, "_minilm", list)
        monkeypatch.setattr(demo, "_onnx", list)
        monkeypatch.setattr(demo, "PERPLEXITY_TOKENS", 128)
        monkeypatch.setattr(demo, "NEW_TOKENS", 4)

    return shorten


def test_a_perturbed_twin_fails_the_demo(
    shown: dict[str, Any], only_the_decoder: Callable[[Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(site["exact"] for site in shown["acts"][0]["report"]["sites"]), "as it is, it does not"
    only_the_decoder(_perturbed)
    with pytest.raises(VerificationFailed, match=r"max \|Δlogit\|"):
        demo.run_demo(json=True)
    act = json.loads(capsys.readouterr().out)["acts"][0]
    assert [site["exact"] for site in act["report"]["sites"]] == [False] + [True] * 29
    failed = next(check for check in act["checks"] if check["name"] == "max |Δlogit|")
    assert not failed["ok"] and math.isfinite(float(failed["detail"].split(",")[0]))
