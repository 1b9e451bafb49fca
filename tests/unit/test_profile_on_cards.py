"""What profiling does on a graphics card, seen without one: where tensors go, when it waits, whom it asks.

onnxruntime's real bindings work on the processor, so that is where values are compared. Only the card is made up: names
of devices and calls that wait are recorded. What a card answers is not tested here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from rewriter.errors import UnsupportedModel, UsageError
from rewriter.profile import torch_models
from rewriter.profile.compare import profile
from rewriter.profile.onnx_call import bound_call, captured_call, session_call
from rewriter.profile.onnx_models import _by_operator
from rewriter.profile.providers import GRAPH_OPTIONS, open_session
from rewriter.profile.result import Measured, Milliseconds, Profile
from rewriter.profile.torch_graph import captured
from rewriter.report import tables
from rewriter.report.html_page import render
from rewriter.report.html_profile import profile_page
from tests.unit.test_profile import Stack, event, stack

FEEDS = {"h0": np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return stack(tmp_path / "m.onnx", 2)


# --- sessions ------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a session: what is bound where, and in which order it is run and waited for."""

    def __init__(self, session: Any, *, breaks: bool = False) -> None:
        self.session, self.breaks, self.log = session, breaks, list[str]()
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def io_binding(self) -> Recorder:
        return self

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.log.append(f"input {name} {value}")

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.log.append(f"place {name} {value}")

    def bind_output(self, name: str, device: str, number: int) -> None:
        self.log.append(f"output {name} {device}")

    def run_with_iobinding(self, binding: Recorder) -> None:
        assert binding is self
        self.log.append("run")
        if self.breaks:
            raise RuntimeError("This session cannot use the graph capture feature\nmore")

    def synchronize_outputs(self) -> None:
        self.log.append("wait")


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OrtValue is no more than the name of its device and its shape."""
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", lambda array, device, number: f"{device} {array.shape}")


def test_inputs_and_outputs_stay_on_the_card_and_the_clock_waits(path: Path, placed: None) -> None:
    seen = Recorder(open_session(path, "cpu", 1))
    call = session_call(seen, {**FEEDS, "no input of the file": FEEDS["h0"]}, "cuda")
    assert seen.log == ["input h0 cuda (2, 3, 64)", "output y cuda"], "bound before the clock starts"
    call()
    call()
    assert seen.log[2:] == ["run", "wait"] * 2, "nothing is copied from call to call, and each is waited for"


def test_a_graph_has_places_that_never_change(path: Path, placed: None) -> None:
    seen = Recorder(open_session(path, "cpu", 1))
    captured_call(seen, FEEDS, [np.zeros((2, 3, 64), np.float32)], path)
    assert seen.log == ["input h0 cuda (2, 3, 64)", "place y cuda (2, 3, 64)", "run", "wait"]


def test_what_cannot_be_captured_says_so(path: Path, placed: None) -> None:
    broken = Recorder(open_session(path, "cpu", 1), breaks=True)
    with pytest.raises(UnsupportedModel, match=r"m\.onnx cannot be captured .* graph capture feature$") as caught:
        captured_call(broken, FEEDS, [np.zeros((2, 3, 64), np.float32)], path)
    assert caught.value.hint


@pytest.mark.parametrize("fixed", [False, True], ids=["made each time", "fixed places"])
def test_bound_calls_compute_what_plain_ones_do(path: Path, fixed: bool) -> None:
    """With onnxruntime's own bindings, on the processor."""
    session, results = open_session(path, "cpu", 1), []
    outputs = [np.zeros((2, 3, 64), np.float32)] if fixed else None

    class Keeping:
        """The session, whose bindings are kept."""

        get_inputs, get_outputs, run_with_iobinding = (
            session.get_inputs, session.get_outputs, session.run_with_iobinding,
        )  # fmt: skip

        def io_binding(self) -> Any:
            results.append(session.io_binding())
            return results[0]

    call = bound_call(Keeping(), FEEDS, "cpu", outputs)
    places = set()
    for _ in range(3):
        call()
        (value,) = results[0].get_outputs()
        np.testing.assert_array_equal(value.numpy(), session.run(None, FEEDS)[0])
        places.add(value.data_ptr())
    assert not fixed or len(places) == 1
    other = session.run(None, {"h0": FEEDS["h0"] + 1})[0]
    assert np.abs(value.numpy() - other).max() > 1e-3, "the comparison sees other inputs"


# --- providers -----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Providers that sessions are asked for, where onnxruntime claims to have all and quietly takes the processor."""
    real, wanted = ort.InferenceSession, list[Any]()
    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: every)

    def opened(path: str, options: Any, *, providers: Any, **more: Any) -> Any:
        wanted.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", opened)
    return wanted


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_providers_in_order(path: Path, asked: list[Any], graph: bool) -> None:
    for provider, names in {
        "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
        "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    }.items():
        with pytest.raises(UnsupportedModel, match="fell back"):
            open_session(path, provider, 1, cuda_graph=graph)
        expected: list[Any] = list(names)
        if graph:
            expected[0] = (names[0], GRAPH_OPTIONS[provider])
        assert asked.pop() == expected
    open_session(path, "cpu", 1)
    assert asked.pop() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_a_whole_profile_is_refused_where_onnxruntime_falls_back(
    tmp_path: Path, asked: list[Any], provider: str, mode: str
) -> None:
    from tests.unit.test_profile_generation import in_place

    file = in_place(tmp_path)
    more: dict[str, Any] = {"runs": 1, "threads": 1, "mode": mode}
    if mode == "decode":
        more |= {"prompt": 4, "new_tokens": 2}
    profile(file, file, **more)
    with pytest.raises(UnsupportedModel, match=f"could not start its {provider} provider and fell back to CPU"):
        profile(file, file, provider=provider, **more)


def test_operators_that_tensorrt_leaves_over_are_named() -> None:
    trace = [
        event("a_kernel_time", 1, 5, "TRTKernel_1", "TensorrtExecutionProvider"),
        event("b_kernel_time", 1, 5, "TopK", "CUDAExecutionProvider"),
        event("c_kernel_time", 1, 5, "Gather"),
    ]
    assert set(_by_operator(trace, "tensorrt", 1)) == {"TRTKernel_1", "TopK (by CUDA)", "Gather (on the CPU)"}
    with pytest.raises(UnsupportedModel, match="not one operator"):
        _by_operator(trace[1:], "tensorrt", 1)
    assert set(_by_operator(trace[1:], "cuda", 1)) == {"TopK", "Gather (on the CPU)"}


# --- torch ---------------------------------------------------------------------------------------


def test_a_module_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait for {device}"))
    module = Stack(1)
    module.register_forward_hook(lambda *_: log.append("call"))
    x = torch.randn(1, 4, 256)
    for device, expected in (("cuda:0", ["call", "wait for cuda:0"]), ("cpu", ["call"])):
        log.clear()
        torch_models._call(module, (x,), {}, torch.device(device))(None)
        assert log == expected


class Graph:
    """Stands in for a CUDA graph: replays what was called while it was captured."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        log.append("replay")


log: list[str] = []


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The parts of torch.cuda that a capture calls, by what they are called for."""

    class Stream:
        def __init__(self, device: object = None) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            log.append("streams meet")

    @contextlib.contextmanager
    def inside(name: str) -> Iterator[None]:
        log.append(f"{name} (")
        yield
        log.append(")")

    log.clear()
    for name, value in {
        "Stream": Stream, "CUDAGraph": Graph, "current_stream": lambda device: Stream(),
        "stream": lambda stream: inside("beside"), "graph": lambda graph: inside("capture"),
        "synchronize": lambda device: log.append("wait"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    yield log
    log.clear()


def test_a_call_is_warmed_beside_captured_once_and_replayed(card: list[str]) -> None:
    module = Stack(1)
    module.register_forward_hook(lambda *_: card.append("call"))
    run = torch_models._call(module, (torch.randn(1, 4, 256),), {}, torch.device("cuda:0"), True)
    made = ["streams meet", "beside (", "call", "call", "call", ")", "streams meet", "capture (", "call", ")"]
    assert card == made
    run(None)
    run(None)
    assert card[len(made) :] == ["replay", "wait"] * 2, "the module itself is not called again"


def test_a_call_that_cannot_be_captured_says_so(card: list[str]) -> None:
    def work() -> None:
        if "capture (" in card:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(UnsupportedModel, match=r"cannot be captured .* is capturing$") as caught:
        captured(work, torch.device("cuda:0"))
    assert caught.value.hint


# --- usage and outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "of a graphics card"),
        ({"provider": "cuda", "mode": "decode"}, "in mode decode a cache grows"),
        ({"provider": "tensorrt", "mode": "prefill"}, "in mode prefill a cache grows"),
    ],
    ids=["cpu", "decode", "prefill"],
)
def test_no_graph_where_there_can_be_none(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        profile(path, path, cuda_graph=True, **options)
    assert caught.value.hint


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_every_output_says_whether_a_graph_was_replayed(graph: bool) -> None:
    side = Measured(Milliseconds(1.0, 2.0, 3.0), None, {"MatMul": 1.0})
    found = Profile("cuda", "a card", 2, 5, "1.2", side, side, {"x": (1, 2)}, cuda_graph=graph)
    assert found.to_dict()["cuda_graph"] is graph
    assert ("a CUDA graph, replayed" in tables.text(tables.profile(found.to_dict()))) is graph
    assert ("a CUDA graph replayed" in render(profile_page(found))) is graph
