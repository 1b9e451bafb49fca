"""Every sample runs, from its own file, in under a minute, and says something that is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(SAMPLES / name), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_every_sample_is_tested() -> None:
    tested = set(re.findall(r'run\("([\w.]+)"', Path(__file__).read_text(encoding="utf-8")))
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
    printed = run("minilm_to_gqa.py")
    rows = {row[0]: (float(row[1]), float(row[2])) for row in re.findall(r"^(all|\d) +(\S+) +(\S+)$", printed, re.M)}
    assert list(rows) == ["all", *"012345"]
    for grouped, single in rows.values():
        assert single < grouped < 1, "fewer heads lose more, and none of it is free"
    assert all(rows["all"][i] < min(rows[layer][i] for layer in "012345") for i in (0, 1))


def test_a_foreign_file_is_inspected_rewritten_verified_and_profiled(tmp_path: Path) -> None:
    from rewriter import inspect
    from rewriter.demo.weights import minilm_int8_onnx

    out = tmp_path / "out.onnx"
    printed = run("onnx_to_onnx.py", str(minilm_int8_onnx()), str(out), "gqa3")
    assert printed.count("12 heads, 12 K/V heads of 32") == 6
    assert "target gqa3: 6 rewritten, 0 refused" in printed
    assert "FAILED" not in printed and re.search(r"^ok +untouched", printed, re.MULTILINE)
    assert re.search(r"median \d+\.\d\d ms before, \d+\.\d\d ms after; x \d", printed)
    assert [site.kv_heads for site in inspect(out).sites] == [3] * 6


def test_a_sample_with_an_impossible_target_fails(tmp_path: Path) -> None:
    from rewriter.demo.weights import minilm_int8_onnx

    run("onnx_to_onnx.py", str(minilm_int8_onnx()), str(tmp_path / "out.onnx"), "gqa5", expect=1)
    assert not list(tmp_path.iterdir())
