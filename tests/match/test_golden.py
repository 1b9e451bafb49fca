"""Golden dumps of what matching sees. They are meant to be read: each is one model through one door, in words.

``REWRITER_UPDATE_GOLDEN=1 pytest tests/match/test_golden.py`` writes them anew; review the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.match.doors import Seen, through_onnx, through_torch
from tests.match.site_dump import columns, dump
from tests.zoo.models import ZOO

FOLDER = Path(__file__).parent / "golden"
UPDATE = "REWRITER_UPDATE_GOLDEN"
CASES = ["bert-sdpa", "gpt2-eager", "llama-gqa-sdpa", "qwen3-eager", "nanogpt-softmax", "mha-sequence-first"]
DOORS = ["torch", "dynamo18", "torchscript17"]
WITH_PAST = [("llama-gqa-sdpa", "dynamo18"), ("gpt2-sdpa", "torchscript17")]
ALONE = [("deberta-eager", "torch"), ("router", "torch"), ("llama-gqa-sdpa", "dynamo24")]
JOBS = [(c, d, False) for c in CASES for d in DOORS] + [(c, d, False) for c, d in ALONE]
JOBS += [(c, d, True) for c, d in WITH_PAST]


def _name(name: str, door: str, past: bool) -> str:
    return f"{name}{'-past' * past}.{door}"


@pytest.mark.parametrize(("name", "door", "past"), [pytest.param(*job, id=_name(*job)) for job in JOBS])
def test_golden(name: str, door: str, past: bool, zoo_onnx: Callable[..., Path]) -> None:
    case = ZOO[name]
    seen = through_torch(case) if door == "torch" else through_onnx(zoo_onnx(case, door, past=past))
    title = f"{name}{' with a key/value cache' * past} through {door}"
    text = dump(title, seen)
    path = FOLDER / f"{_name(name, door, past)}.txt"
    if os.environ.get(UPDATE):
        path.write_text(text)
    assert path.exists(), f"no golden file; write it with {UPDATE}=1"
    assert text == path.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {_name(*job) for job in JOBS}


def test_a_dump_differs_wherever_meaning_does() -> None:
    """The control: goldens that could not fail would prove nothing."""
    seen = through_torch(ZOO["llama-gqa-sdpa"])
    site = seen.matches.sites[0]
    swapped = site.k.columns.copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    wrong = [
        replace(site, scale=site.scale * 1.1),
        replace(site, causal=not site.causal),
        replace(site, group=(0, 1, 0, 1)),
        replace(site, modifiers=()),
        replace(site, k=replace(site.k, columns=swapped)),
        replace(site, k=replace(site.k, rotary=None)),
        replace(site, k=replace(site.k, gain=2.0)),
        replace(site, v=replace(site.v, past="cache", past_head_axis=1)),
        replace(site, out=None),
    ]
    texts = {dump("", Seen(seen.flow, replace(seen.matches, sites=(one,)))) for one in [site, *wrong]}
    assert len(texts) == len(wrong) + 1


def test_columns_are_written_as_runs() -> None:
    table = np.arange(8, 16).reshape(2, 4)
    assert columns(table) == "columns 8..15"
    assert columns(table[::-1]) == "columns by head 12..15 | 8..11"
    assert columns(np.array([[0, 1, 6, 7], [2, 3, 4, 5]])) == "columns by head 0..1 6..7 | 2..5"
