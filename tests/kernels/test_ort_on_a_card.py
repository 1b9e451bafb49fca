"""The library's operators for cards in onnxruntime's CUDA provider, where there is a card and onnxruntime for it.

Skipped elsewhere, CI included; test_ort_on_cards.py checks what needs no card.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import rewriter
from codegen.device import DType
from codegen.launch.ort_op import build
from codegen.launch.torch_op import graphics_card
from codegen.ops.grouped_query_attention.onnx_body import function_name
from codegen.spec import GroupedQueryAttention
from rewriter.cli import run
from rewriter.kernels.emit import emit
from tests.kernels.test_command import Mixer
from tests.kernels.test_ort_library import _feeds, _model
from tests.kernels.test_ort_on_cards import LIMIT, PAIRS, TYPES, on_card, right

pytest.importorskip("triton")
there = torch.cuda.is_available() and "CUDAExecutionProvider" in ort.get_available_providers()
pytestmark = pytest.mark.skipif(not there, reason="no graphics card, or no onnxruntime for it")

ALL = PAIRS | {
    "real": (GroupedQueryAttention(32, 8, 128, 128, 128**-0.5, causal=True), DType.FLOAT16),
    "one head": (GroupedQueryAttention(12, 1, 64, 64, 0.125), DType.FLOAT32),
    "biased": (GroupedQueryAttention(8, 4, 64, 64, 0.125, bias=True), DType.FLOAT16),
}
LENGTHS = {"prefill": (300, 300), "decode": (1, 3000), "one": (1, 1), "no keys": (3, 0), "no queries": (0, 5)}


@pytest.fixture(scope="module")
def library(kernel_cache: Path) -> Path:
    arch = graphics_card(torch.device("cuda"))[0].arch
    return build([on_card(spec, dtype, arch) for spec, dtype in ALL.values()]).path


def session(model: bytes, library: Path | None, folder: Path, **options: str) -> Any:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.enable_profiling = True
    settings.profile_file_prefix = str(folder / "profile")
    if library is not None:
        settings.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, settings, providers=[("CUDAExecutionProvider", options), "CPUExecutionProvider"])


def placed(made: Any) -> set[tuple[str, str]]:
    """Operators that ran, with their providers; ends the session's profile."""
    events = json.loads(Path(made.end_profiling()).read_text())
    kernels = [e["args"] for e in events if e["name"].endswith("_kernel_time")]
    return {(k["op_name"], k["provider"]) for k in kernels if not k["op_name"].startswith("Memcpy")}


@pytest.mark.parametrize("name", ALL)
def test_numbers(name: str, library: Path, tmp_path: Path) -> None:
    spec, dtype = ALL[name]
    model = _model(spec, TYPES[dtype][0])
    fast, plain = session(model, library, tmp_path), session(model, None, tmp_path, use_tf32="0")
    for length in LENGTHS.values():
        feeds = _feeds(spec, *length, TYPES[dtype][1])
        expected = right(spec, feeds)
        found = fast.run(None, feeds)[0]
        assert found.shape == expected.shape
        if not found.size or not length[1]:
            assert (found == 0).all()
            continue
        assert np.abs(found - expected).max() < LIMIT[dtype]
        assert np.abs(plain.run(None, feeds)[0] - expected).max() < 3 * LIMIT[dtype], "the file's own function"
    other = right(replace(spec, scale=spec.scale * 1.05), _feeds(spec, 300, 300, TYPES[dtype][1]))
    found = fast.run(None, _feeds(spec, 300, 300, TYPES[dtype][1]))[0]
    assert np.abs(found - other).max() > LIMIT[dtype], "the control: another scale"
    assert placed(fast) == {(function_name(spec), "CUDAExecutionProvider")}
    assert function_name(spec) not in {op for op, _ in placed(plain)}, "the control: without the library"


def test_it_runs_on_onnxruntimes_stream_and_in_graphs(library: Path, tmp_path: Path) -> None:
    spec, dtype = ALL["real"]
    made = session(_model(spec, TYPES[dtype][0]), library, tmp_path, enable_cuda_graph="1")
    feeds = _feeds(spec, 1, 3000, np.float16)
    held = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
    out = torch.full((2, 32, 1, 128), float("nan"), dtype=torch.float16, device="cuda")
    binding = made.io_binding()
    for name, x in held.items():
        binding.bind_input(name, "cuda", 0, np.float16, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cuda", 0, np.float16, tuple(out.shape), out.data_ptr())
    for _ in range(3):
        made.run_with_iobinding(binding)
    held["q"].neg_()
    torch.cuda.synchronize()
    made.run_with_iobinding(binding)
    again = out.cpu().numpy()
    assert np.abs(again - right(spec, feeds)).max() > LIMIT[dtype], "the control: the graph read the operands anew"
    assert np.abs(again - right(spec, {**feeds, "q": -feeds["q"]})).max() < LIMIT[dtype]


def test_a_rewritten_file_is_profiled_on_the_card(kernel_cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, before, after = (
        torch.nn.Sequential(Mixer(128, 8), Mixer(128, 8)).eval(),
        tmp_path / "a.onnx",
        tmp_path / "b.onnx",
    )
    torch.onnx.export(
        net, (torch.randn(2, 9, 128),), str(before), dynamo=False, opset_version=17, input_names=["x"],
        output_names=["y"], dynamic_axes={"x": {0: "b", 1: "s"}, "y": {0: "b", 1: "s"}},
    )  # fmt: skip
    assert run(["rewrite", str(before), str(after), "--target", "gqa2"]) == 0
    arch = graphics_card(torch.device("cuda"))[0].arch
    emit(after, tmp_path / "kernels", [arch])
    for more in ({}, {"cuda_graph": True}):
        found = rewriter.profile(
            before, after, provider="cuda", shapes={"x": (2, 64, 128)}, runs=3, kernels=tmp_path / "kernels", **more
        )
        assert found.device == torch.cuda.get_device_name() and found.after.ms.min > 0
        assert any(op.startswith("GroupedQueryAttention") for op in found.after.ops)
        attention = [op for op in found.after.ops if op.startswith("GroupedQueryAttention")]
        assert not any("on the CPU" in op for op in attention), "sizes and shapes are the processor's work, this is not"
        assert found.before.peak_bytes and found.after.peak_bytes
