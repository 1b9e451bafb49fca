"""Every sample runs, from its own file, in under a minute, and says something that is true.

Most run in this process, which has torch and transformers already; the one for files, in a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> str:
    """What a sample prints, run here as ``python samples/NAME`` would."""
    printed, threads, words = io.StringIO(), torch.get_num_threads(), sys.argv
    sys.argv = [str(SAMPLES / name), *arguments]
    try:
        with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT), torch.random.fork_rng():
            torch.manual_seed(0)
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = words
        torch.set_num_threads(threads)
        gc.collect()
    return printed.getvalue()


def run_alone(name: str, *arguments: str, expect: int = 0) -> str:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SAMPLES / name), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_every_sample_is_tested() -> None:
    files = (Path(__file__), Path(__file__).with_name("test_genai.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    tested = set(re.findall(r'(?:run\(|run_alone\(|SAMPLES / )"(\w+\.py)"', text))
    assert {path.name for path in SAMPLES.glob("*.py")} == tested


def test_a_decoder_keeps_its_words_and_a_third_of_its_cache(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "smollm2-gqa3"
    printed = run("smollm2_smaller_cache.py", str(folder))
    before, after = (re.search(rf"^{word} +'(.*)'$", printed, re.MULTILINE) for word in ("before", "after"))
    assert before is not None and after is not None and before.group(1) == after.group(1)
    held = re.search(r"^cache +([\d,]+) -> ([\d,]+) bytes$", printed, re.MULTILINE)
    assert held is not None and number(held.group(1)) == 3 * number(held.group(2))
    assert "30 of 30 exact" in printed
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)


def test_an_encoder_drifts_more_the_more_of_it_is_rewritten() -> None:
    printed = run("minilm_to_gqa.py", "0", "5")
    rows = {row[0]: (float(row[1]), float(row[2])) for row in re.findall(r"^(all|\d) +(\S+) +(\S+)$", printed, re.M)}
    assert list(rows) == ["all", "0", "5"]
    for grouped, single in rows.values():
        assert single < grouped < 1, "fewer heads lose more, and none of it is free"
    assert all(rows["all"][i] < min(rows[layer][i] for layer in "05") for i in (0, 1))


def test_a_foreign_file_is_inspected_rewritten_verified_and_profiled(tmp_path: Path) -> None:
    from rewriter import inspect
    from rewriter.demo.weights import minilm_int8_onnx

    out = tmp_path / "out.onnx"
    printed = run_alone("onnx_to_onnx.py", str(minilm_int8_onnx()), str(out), "gqa3")
    assert printed.count("12 heads, 12 K/V heads of 32") == 6
    assert "target gqa3: 6 rewritten, 0 refused" in printed
    assert "FAILED" not in printed and re.search(r"^ok +untouched", printed, re.MULTILINE)
    assert re.search(r"median \d+\.\d\d ms before, \d+\.\d\d ms after; x \d", printed)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert all(f'id="{part}"' in page for part in ("times", "operators", "sites", "growth", "drawings"))
    assert [site.kv_heads for site in inspect(out).sites] == [3] * 6


def test_a_sample_with_an_impossible_target_fails(tmp_path: Path) -> None:
    from rewriter.demo.weights import minilm_int8_onnx

    run_alone("onnx_to_onnx.py", str(minilm_int8_onnx()), str(tmp_path / "out.onnx"), "gqa5", expect=1)
    assert not list(tmp_path.iterdir())


def test_a_hybrid_loses_more_the_fewer_attentions_stay() -> None:
    printed = run("minilm_to_fnet_hybrid.py")
    rows = [tuple(map(float, row)) for row in re.findall(r"^ +(\d) +(\S+) +(\S+) +(\S+)$", printed, re.M)]
    assert [row[0] for row in rows] == [5, 4, 2] and "two different texts" in printed
    assert rows[0][2] > rows[-1][2] and rows[0][3] > rows[-1][3]
    assert all(fitted > plain for _, plain, fitted, _ in rows), "calibration is a better start"
    padded = {name: float(cosine) for name, cosine in re.findall(r"^(original|plain|fitted) +(\S+)$", printed, re.M)}
    assert padded["original"] > 0.999 and padded["plain"] < 0.9, "padding is mixed in, unless lengths are sorted"


def test_a_target_of_ones_own_is_worse_than_the_mean_as_the_paper_says() -> None:
    printed = run("custom_target.py")
    cosines = dict(re.findall(r"^(.*?) +sentence cosine (\S+)$", printed, re.M))
    assert list(cosines) == ["gqa6", "strongest6", "0-2: strongest6, 3-5: gqa6"]
    mean, own, mixed = map(float, cosines.values())
    assert own < mixed < mean


def test_a_budget_is_spent_where_it_costs_least(tmp_path: Path) -> None:
    page = tmp_path / "auto.html"
    printed = run("auto_under_budget.py", str(page), "kv=0.5", "mean")
    lines = re.findall(r"^(auto|gqa6) +K/V bytes x (\S+) +sentence cosine (\S+)$", printed, re.M)
    (auto, kv, chosen), (uniform, same, even) = lines
    assert (auto, uniform) == ("auto", "gqa6") and float(kv) <= 0.5 == float(same)
    assert float(chosen) > float(even) + 0.02
    assert re.search(r"^plan for kv=0.5: .* predicted, .* measured", printed, re.M)
    assert 'id="choice"' in page.read_text(encoding="utf-8")


TOKENS = 256
"""A long text for a window of 128 tokens, and a short one to read."""


def test_a_long_text_is_read_with_a_bounded_cache() -> None:
    printed = run("long_documents.py", str(TOKENS), "window:128,4", "linear:64")
    rows = {name.strip(): (float(p), number(size)) for name, p, size in re.findall(
        r"^(as it is|\S+:\S+) +(\S+) +([\d,]+)$", printed, re.M)}  # fmt: skip
    whole, window, linear = (rows[name] for name in ("as it is", "window:128,4", "linear:64"))
    assert whole[0] < window[0] < 2 * whole[0], "the window forgets, and not everything"
    assert window[1] * 3 * TOKENS == whole[1] * (2 * TOKENS + 128 - 1 + 4), (
        "a third of the layers hold window and sinks"
    )
    assert linear[1] < window[1], "two chunks and a sum"
    assert window[0] < linear[0], "what replaces a softmax has to be taught"


def test_every_architecture_learns_from_scratch(tmp_path: Path) -> None:
    printed = run("train_from_scratch.py", str(tmp_path / "curves.svg"), "2.5")
    lines = re.findall(r"^(?:masked|next  )  .* ([\d.]+)  ([\d.]+)  ([\d.]+)  ([\d.]+)$", printed, re.M)
    assert len(lines) == 7
    for course in lines:
        first, *_, last = map(float, course)
        assert last < first + 0.1 and last < 4.7, "no worse than early on, and better than guessing (4.86)"
    assert (tmp_path / "curves.svg").read_text(encoding="utf-8").count("<polyline") == 7


def test_two_processes_heal(tmp_path: Path) -> None:
    printed = run("uptrain_two_processes.py", str(tmp_path))
    assert "processes 2, steps 8" in printed
    before, after = map(float, re.findall(r"sentence cosine (\S+)", printed))
    assert after > before
    page = (tmp_path / "healing.html").read_text(encoding="utf-8")
    parts = [f'id="{part}"' in page for part in ("training", "sites", "arithmetic", "drawings")]
    assert all(parts), "how the student was made came with its checkpoint, and the original was drawn"
    assert (tmp_path / "healed").is_dir()


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((SAMPLES / "first_look.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, object] = {"__name__": "notebook"}
    printed = io.StringIO()
    for number, cell in enumerate(cells):
        with contextlib.redirect_stdout(printed):
            exec(compile(cell, f"first_look.ipynb, cell {number}", "exec"), names)
    cosines = names["cosines"]
    assert isinstance(cosines, dict) and len(cosines) == 3 and all(0 < c < 1 for c in cosines.values())
    assert {"site.svg", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert "of the flops are left" in printed.getvalue()
