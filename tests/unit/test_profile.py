"""Profiling: fair times, operators that add up, memory that is really the model's, and no CPU figures as GPU ones."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch

from rewriter.errors import UnsupportedModel, UsageError
from rewriter.optimize import Rewritten
from rewriter.profile.compare import profile
from rewriter.profile.interleaved import WARM_UP, Job, Timed, time_in_turn
from rewriter.profile.memory import PeakSampler, private_bytes
from rewriter.profile.onnx_models import Conditions, _after_first_run, _by_operator, operator_times, peak_bytes
from rewriter.profile.providers import refuse_fallback
from rewriter.profile.result import Measured, Milliseconds, Profile
from rewriter.report.rewrite_report import Change, RewriteReport


def stack(path: Path, layers: int, width: int = 64) -> Path:
    """x [batch, sequence, width] through `layers` matrices and one Tanh."""
    nodes = [oh.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(layers)]
    nodes.append(oh.make_node("Tanh", [f"h{layers}"], ["y"]))
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((width, width)).astype(np.float32) / width for _ in range(layers)]
    shape = ["batch", "sequence", width]
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("h0", onnx.TensorProto.FLOAT, shape)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [nh.from_array(matrix, f"w{i}") for i, matrix in enumerate(matrices)],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), path)
    return path


def cached_decoder(path: Path, heads: int) -> Path:
    """One token's keys appended to a cache of `heads` heads."""
    cache = ["batch", heads, "past", 4]
    graph = oh.make_graph(
        [
            oh.make_node("Gather", ["table", "ids"], ["x"]),
            oh.make_node("Unsqueeze", ["x", "one"], ["x4"]),
            oh.make_node("Expand", ["x4", "to"], ["k"]),
            oh.make_node("Concat", ["past_key", "k"], ["present_key"], axis=2),
            oh.make_node("ReduceSum", ["present_key", "axes"], ["y"]),
        ],
        "g",
        [
            oh.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "sequence"]),
            oh.make_tensor_value_info("past_key", onnx.TensorProto.FLOAT, cache),
        ],
        [
            oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
            oh.make_tensor_value_info("present_key", onnx.TensorProto.FLOAT, ["batch", heads, "total", 4]),
        ],
        [
            nh.from_array(np.ones((9, 4), np.float32), "table"),
            nh.from_array(np.array([1], np.int64), "one"),
            nh.from_array(np.array([1, heads, 1, 4], np.int64), "to"),
            nh.from_array(np.array([1, 2], np.int64), "axes"),
        ],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), path)
    return path


# --- onnx ----------------------------------------------------------------------------------------


def test_a_smaller_model_is_faster_and_lighter(tmp_path: Path) -> None:
    large, small = stack(tmp_path / "large.onnx", 32, 512), stack(tmp_path / "small.onnx", 1, 512)
    found = profile(large, small, runs=9, threads=1, shapes={"h0": (1, 16, 512)})
    assert found.speedup["min"] > 2  # 32 times the work: no noise turns that over
    assert found.before.peak_bytes is not None and found.after.peak_bytes is not None
    assert found.before.peak_bytes - found.after.peak_bytes >= 30 * 512 * 512 * 4
    assert found.before.ops["MatMul"] > found.after.ops["MatMul"] > 0


def test_json_has_the_documented_keys(tmp_path: Path) -> None:
    import onnxruntime

    path = stack(tmp_path / "m.onnx", 1)
    shown = profile(str(path), path, runs=3, threads=1, shapes={"h0": (2, 5, 64)}).to_dict()
    assert {"provider", "device", "threads", "runs", "onnxruntime", "before", "after", "speedup"} <= set(shown)
    for side in ("before", "after"):
        assert set(shown[side]) == {"ms", "cpu_ms", "peak_bytes", "kv_bytes", "ops"}
        assert shown[side]["cpu_ms"]["min"] > 0 and shown[side]["kv_bytes"] is None
        assert shown[side]["ms"]["min"] <= shown[side]["ms"]["median"] <= shown[side]["ms"]["max"]
    assert set(shown["speedup"]) == {"min", "median"}
    assert (shown["provider"], shown["runs"], shown["threads"]) == ("cpu", 3, 1)
    assert shown["onnxruntime"] == onnxruntime.__version__ and shown["device"]
    assert shown["shapes"] == {"h0": [2, 5, 64]}
    assert {"rewriter", "python", "numpy", "onnxruntime"} == set(shown["versions"])
    assert shown["workload"]["mode"] == "forward"


def test_default_sizes_are_a_sentence_or_one_token_behind_a_past(tmp_path: Path) -> None:
    path = stack(tmp_path / "m.onnx", 1)
    assert profile(path, path, runs=1).shapes == {"h0": (1, 128, 64)}
    four, two = cached_decoder(tmp_path / "four.onnx", 4), cached_decoder(tmp_path / "two.onnx", 2)
    found = profile(four, two, runs=1)
    assert found.shapes == {"ids": (1, 1), "past_key": (1, 4, 512, 4)}
    assert (found.before.kv_bytes, found.after.kv_bytes) == (4 * 513 * 4 * 4, 2 * 513 * 4 * 4)


def test_operator_times_are_of_one_run_without_the_first(tmp_path: Path) -> None:
    path = stack(tmp_path / "m.onnx", 3)
    times = operator_times(path, {"h0": np.zeros((1, 8, 64), np.float32)}, Conditions("cpu", 1))
    assert set(times) == {"MatMul", "Tanh"}
    assert list(times.values()) == sorted(times.values(), reverse=True)


def event(name: str, start: int, microseconds: int, op: str = "MatMul", provider: str = "CPUExecutionProvider") -> Any:
    return {"name": name, "ts": start, "dur": microseconds, "args": {"op_name": op, "provider": provider}}


def test_the_first_run_of_a_trace_is_left_out() -> None:
    trace = [event("a_kernel_time", 10, 9000), event("model_run", 0, 9999), event("a_kernel_time", 20000, 500)]
    assert _by_operator(_after_first_run(trace), "cpu", 5) == {"MatMul": pytest.approx(0.1)}


def test_a_trace_without_the_provider_asked_for_is_refused() -> None:
    on_cpu = [event("a_kernel_time", 1, 5)]
    with pytest.raises(UnsupportedModel, match="not one operator"):
        _by_operator(on_cpu, "cuda", 5)
    mixed = [*on_cpu, event("b_kernel_time", 1, 5, "Gemm", "CUDAExecutionProvider")]
    assert set(_by_operator(mixed, "cuda", 5)) == {"MatMul (on the CPU)", "Gemm"}, "what a card does not do is named"


def test_a_silent_fallback_is_refused() -> None:
    refuse_fallback(["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda")
    for active in (["CPUExecutionProvider"], []):
        with pytest.raises(UnsupportedModel, match="fell back") as caught:
            refuse_fallback(active, "cuda")
        assert caught.value.hint and caught.value.exit_code == 1


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_no_gpu_no_figures(tmp_path: Path, provider: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Where there is no graphics card, onnxruntime quietly takes the CPU; we do not."""
    if torch.cuda.is_available() or Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a graphics card")
    path = stack(tmp_path / "m.onnx", 1)
    with pytest.raises(UnsupportedModel):
        profile(path, path, provider=provider)
    assert capfd.readouterr() == ("", "")


def test_peak_memory_counts_activations(tmp_path: Path) -> None:
    path = stack(tmp_path / "m.onnx", 2)
    short = peak_bytes(path, {"h0": (1, 16, 64)}, Conditions("cpu", 1))
    long = peak_bytes(path, {"h0": (1, 1 << 16, 64)}, Conditions("cpu", 1))
    assert short is not None and long is not None
    assert long - short >= (1 << 16) * 64 * 4


def test_peak_memory_of_what_does_not_run_is_unknown(tmp_path: Path) -> None:
    assert peak_bytes(tmp_path / "none.onnx", {}, Conditions("cpu", 1)) is None


# --- torch ---------------------------------------------------------------------------------------


class Stack(torch.nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_modules_are_profiled_alike() -> None:
    threads = torch.get_num_threads()
    found = profile(Stack(24), Stack(1), runs=9, threads=1, example_inputs=torch.randn(1, 64, 256))
    assert found.onnxruntime is None and found.provider == "cpu" and found.versions["torch"]
    assert found.before.cpu_ms is not None and found.after.cpu_ms is not None
    assert found.before.cpu_ms.min > 2 * found.after.cpu_ms.min
    assert found.speedup["min"] > 2
    assert found.before.ops["aten::addmm"] > found.after.ops["aten::addmm"] > 0
    held = 24 * (256 * 256 + 256) * 4
    block = 64 * 256 * 4
    assert found.before.peak_bytes is not None and held + block <= found.before.peak_bytes <= held + 4 * block
    assert found.shapes == {"args[0]": (1, 64, 256)}
    assert torch.get_num_threads() == threads


def test_modules_cannot_be_profiled_on_what_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedModel, match="no CUDA device"):
            profile(Stack(1), Stack(1), provider="cuda", example_inputs=torch.randn(1, 1, 256))
    with pytest.raises(UsageError, match="tensorrt"):
        profile(Stack(1), Stack(1), provider="tensorrt", example_inputs=torch.randn(1, 1, 256))


def test_the_profiler_says_nothing_of_its_own() -> None:
    """In a process of its own: its library reads once how much it is to say."""
    code = "import torch, rewriter; m = torch.nn.Linear(2, 2); rewriter.profile(m, m, example_inputs=torch.ones(1, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == ""


def test_modules_are_left_as_they_were() -> None:
    before, after = Stack(1).train(), Stack(1).eval()
    before.layers[0].eval()
    seen: list[bool] = []
    before.register_forward_hook(lambda module, *_: seen.append(module.training))
    profile(before, after, runs=1, threads=1, example_inputs=torch.randn(1, 4, 256))
    assert seen and not any(seen), "it is measured in evaluation mode"
    assert before.training and not before.layers[0].training and not after.training


def test_a_module_that_does_not_run_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="the second model does not run: ") as caught:
        profile(Stack(1), torch.nn.Linear(3, 3), runs=1, example_inputs=torch.randn(1, 4, 256))
    assert caught.value.hint


def test_exported_programs_are_profiled() -> None:
    x = torch.randn(1, 4, 256)
    programs = [torch.export.export(Stack(n).eval(), (x,)) for n in (2, 1)]
    found = profile(programs[0], programs[1], runs=1, threads=1, example_inputs=x)
    assert found.before.ms.min > 0 and found.shapes == {"args[0]": (1, 4, 256)}


def test_models_in_memory_are_profiled_as_files_are(tmp_path: Path) -> None:
    import onnx_ir

    path = stack(tmp_path / "m.onnx", 2)
    proto, model = onnx.load(path), onnx_ir.load(path)
    report = RewriteReport("gqa2", (), (), Change(0, 0), Change(0, 0), None)
    for before, after in ((proto, model), (Rewritten(model, report), path)):
        found = profile(before, after, runs=1, threads=1)
        assert found.onnxruntime and found.shapes == {"h0": (1, 128, 64)}
        assert set(found.before.ops) == set(found.after.ops) == {"MatMul", "Tanh"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


# --- usage ---------------------------------------------------------------------------------------


def test_wrong_usage(tmp_path: Path) -> None:
    path = stack(tmp_path / "m.onnx", 1)
    with pytest.raises(UsageError, match="unknown provider"):
        profile(path, path, provider="npu")
    with pytest.raises(UsageError, match="no such file"):
        profile(path, tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="different kinds"):
        profile(path, Stack(1))
    with pytest.raises(UsageError, match="a dict cannot be profiled"):
        profile({}, {})
    with pytest.raises(UsageError, match="at least 1"):
        profile(path, path, runs=0)
    with pytest.raises(UsageError, match="no input 'ids'"):
        profile(path, path, shapes={"ids": (1, 2)})


# --- the parts -----------------------------------------------------------------------------------


def test_calls_alternate_and_warm_ups_do_not_count() -> None:
    """On a clock of our own: a warm-up call of either takes 20 ms, a later one 3 ms (before) or 1 ms (after)."""
    order: list[str] = []
    nanoseconds = 0

    def call(name: str, milliseconds: int) -> None:
        nonlocal nanoseconds
        order.append(name)
        nanoseconds += 1_000_000 * (20 if order.count(name) <= WARM_UP else milliseconds)

    clocks = {"clock": lambda: nanoseconds, "cpu_clock": lambda: 2 * nanoseconds}
    timed = time_in_turn(Job(lambda _: call("b", 3)), Job(lambda _: call("a", 1)), 4, **clocks)
    assert "".join(order[2 * WARM_UP :]) == "baabbaab"
    before, after = Milliseconds(3.0, 3.0, 3.0), Milliseconds(1.0, 1.0, 1.0)
    assert timed == (Timed(before, Milliseconds(6.0, 6.0, 6.0)), Timed(after, Milliseconds(2.0, 2.0, 2.0)))


def test_what_prepares_a_call_does_not_count_and_a_call_may_be_of_many_pieces() -> None:
    nanoseconds = 0

    def wait(milliseconds: int) -> int:
        nonlocal nanoseconds
        nanoseconds += 1_000_000 * milliseconds
        return milliseconds

    job = Job(lambda ready: wait(ready + 8), lambda: wait(100), 4)
    timed, _ = time_in_turn(job, job, 2, clock=lambda: nanoseconds, cpu_clock=lambda: 0)
    assert timed.wall == Milliseconds(27.0, 27.0, 27.0)


def test_figures_from_samples() -> None:
    assert Milliseconds.of([3.0, 1.0, 2.0]) == Milliseconds(1.0, 2.0, 3.0)
    sides = [Measured(Milliseconds(low, mid, 9.0), None, {}) for low, mid in ((4.0, 6.0), (2.0, 2.0))]
    found = Profile("cpu", "x", 1, 1, None, *sides, {})
    assert found.speedup == {"min": 2.0, "median": 3.0}


def test_private_bytes_grow_with_what_is_allocated() -> None:
    """Straight from the system: an allocator may serve an array from memory that the process holds already."""
    before = private_bytes()
    with mmap.mmap(-1, 64_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block[::4096] = b"x" * len(range(0, 64_000_000, 4096))
        held = private_bytes() - before
    assert held > 60_000_000 > 20_000_000 > private_bytes() - before


def test_the_sampler_keeps_the_highest_reading_between_its_ends() -> None:
    """The readings are scripted and the test waits for the thread to take one, so no timing can decide."""
    held = 100
    looked = threading.Event()

    def read() -> int:
        looked.set()
        return held

    with PeakSampler(read) as flat:
        pass
    with PeakSampler(read) as peaked:
        held = 900
        looked.clear()
        assert looked.wait(60)
        looked.clear()  # the first look may have begun before the change
        assert looked.wait(60)
        held = 100
    assert (flat.bytes, peaked.bytes) == (0, 800)
