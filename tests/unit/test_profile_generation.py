"""Profiles of generation: the same tokens as chained calls give, caches that stay put, bytes that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewriter
from rewriter.capture.onnx_load import load
from rewriter.errors import UnsupportedModel, UsageError
from rewriter.profile.compare import profile
from rewriter.profile.onnx_decode import Generation
from rewriter.profile.onnx_models import _by_operator
from rewriter.profile.providers import open_session
from rewriter.profile.workload import Workload
from rewriter.report import tables
from rewriter.report.html_page import render
from rewriter.report.html_profile import profile_page
from tests.targets.fused_files import DIM, HEADS, LAYERS, group_query, model, multi_head, with_lengths, with_padding
from tests.unit.test_profile import stack
from tests.uptrain.small_models import llama, student_of

WORK = Workload("decode", batch=1, prompt=9, new_tokens=5)
EACH = 2 * LAYERS * DIM * 4
"""Bytes of one token's keys and values in one head of every layer."""


def growing(folder: Path) -> Path:
    """Caches that Concat grows."""
    return model(multi_head(past=True, outside=True, mask=False), folder / "growing.onnx", tied=True)


def in_place(folder: Path, heads: int = HEADS) -> Path:
    """Caches that one operator reads and writes."""
    attend = group_query(past=True, heads=heads, do_rotary=1)
    return model(attend, folder / f"in_place_{heads}.onnx", tied=True, prepare=with_lengths)


FILES = {"growing": growing, "in place": in_place}


def chained(path: Path, generation: Generation) -> dict[str, np.ndarray]:
    """The caches after the same tokens, by plain calls with arrays."""
    session = open_session(path, "cpu", 1)
    names = [value.name for value in session.get_outputs()]
    feeds = {**generation._feeds(generation.workload.prompt, 0)}
    steps = [generation._feeds(1, generation.workload.prompt + i) for i in range(generation.workload.new_tokens)]
    caches: dict[str, np.ndarray] = {}
    for step in (feeds, *steps):
        outputs = dict(zip(names, session.run(None, {**step, **caches}), strict=True))
        caches = {past: outputs[present] for past, present in generation.ports.present.items()}
    return caches


@pytest.mark.parametrize("kind", FILES)
def test_the_caches_at_the_end_are_those_of_chained_calls(tmp_path: Path, kind: str) -> None:
    path = FILES[kind](tmp_path)
    generation = Generation.of(load(path), WORK, "cpu")
    assert generation.shares_buffer is (kind == "in place")
    session = open_session(path, "cpu", 1)
    left = generation.go_on(session, generation.fill(session))
    expected = chained(path, generation)
    assert set(left) == set(expected) and len(left) == 2 * LAYERS
    for name, array in expected.items():
        got = left[name].numpy()
        assert got.shape == array.shape == (1, HEADS, WORK.total, DIM)
        np.testing.assert_allclose(got, array, rtol=1e-5, atol=1e-6)
        assert np.abs(got).max() > 0.01
    spoiled = generation.fill(session)
    first = next(iter(spoiled.values))
    spoiled.values[first].update_inplace(np.ones_like(spoiled.values[first].numpy()))
    moved = generation.go_on(session, spoiled)[first].numpy()
    assert np.abs(moved - expected[first]).max() > 0.1, "the comparison sees a cache that is not handed on"


def test_a_buffer_is_bound_once(tmp_path: Path) -> None:
    generation = Generation.of(load(in_place(tmp_path)), WORK, "cpu")
    session = open_session(tmp_path / f"in_place_{HEADS}.onnx", "cpu", 1)
    cache = generation.fill(session)
    places = {name: value.data_ptr() for name, value in cache.values.items()}
    assert {name: v.data_ptr() for name, v in generation.go_on(session, cache).items()} == places


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_profile_of_generation(tmp_path: Path, mode: str) -> None:
    four, two = in_place(tmp_path), in_place(tmp_path, 2)
    new = {"new_tokens": 5} if mode == "decode" else {}
    found = profile(four, two, mode=mode, prompt=9, batch=1, runs=3, threads=1, **new)
    tokens = 14 if mode == "decode" else 9
    assert (found.before.kv_bytes, found.after.kv_bytes) == (HEADS * tokens * EACH, 2 * tokens * EACH)
    assert found.before.ops["GroupQueryAttention"] > 0 and found.after.ms.min > 0
    assert found.before.peak_bytes is not None and found.workload == Workload(mode, 1, 9, new.get("new_tokens", 0))
    shown = tables.text(tables.profile(found.to_dict()))
    assert ("one new token, of 5 behind a prompt of 1 x 9 tokens" in shown) is (mode == "decode")
    assert "K/V cache MB" in shown and "processor ms" in shown
    assert "K/V cache" in render(profile_page(found))


def test_decoders_of_transformers_are_profiled_alike() -> None:
    teacher = llama()
    small = student_of(teacher)
    found = rewriter.profile(teacher, small, mode="decode", prompt=6, new_tokens=3, batch=2, runs=2, threads=1)
    config = teacher.config
    width = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * width * 4 * 2 * 9
    assert found.before.kv_bytes == config.num_key_value_heads * each
    assert found.after.kv_bytes == small.config.num_key_value_heads * each
    assert found.shapes == {"input_ids": (2, 9)} and found.versions["transformers"]
    assert rewriter.profile(teacher, small, mode="prefill", prompt=6, runs=1, threads=1).before.kv_bytes is not None


def test_operators_are_of_one_new_token() -> None:
    event = {"name": "x_kernel_time", "ts": 1, "dur": 8000, "args": {"op_name": "MatMul", "provider": "CPU"}}
    assert _by_operator([event, event], "cpu", 4) == {"MatMul": pytest.approx(4.0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dream"}, "unknown mode"),
        ({"prompt": 4}, "modes prefill and decode"),
        ({"mode": "decode", "prompt": 0}, "prompt must be at least 1"),
        ({"mode": "prefill", "new_tokens": 3}, "no new tokens"),
        ({"mode": "decode", "shapes": {"h0": (1, 2, 64)}}, "shapes follow"),
    ],
    ids=["mode", "forward", "zero", "prefill", "shapes"],
)
def test_wrong_usage(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = stack(tmp_path / "m.onnx", 1)
    with pytest.raises(UsageError, match=message) as caught:
        profile(path, path, **options)
    assert caught.value.hint


def test_a_prompt_that_is_too_long_for_a_model_is_said(tmp_path: Path) -> None:
    """The rotary table of the file ends before."""
    path = in_place(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"in_place_\d\.onnx does not run: .*cos_cache") as caught:
        profile(path, path, mode="decode", prompt=5000, new_tokens=1, runs=1)
    assert "--prompt" in caught.value.hint
    profile(path, path, mode="decode", prompt=5, new_tokens=1, runs=1)


def test_what_has_no_cache_does_not_generate(tmp_path: Path) -> None:
    path = stack(tmp_path / "m.onnx", 1)
    with pytest.raises(UnsupportedModel, match="key/value cache"):
        profile(path, path, mode="decode", runs=1)
    with pytest.raises(UnsupportedModel, match="input_ids"):
        profile(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), mode="decode", runs=1)
    plain = model(multi_head(), tmp_path / "plain.onnx", tied=True, prepare=with_padding)
    with pytest.raises(UnsupportedModel, match="returns it grown"):
        profile(plain, plain, mode="prefill", runs=1)
