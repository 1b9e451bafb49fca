"""Profiles forward calls of two PyTorch modules under the same conditions as two .onnx files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from rewriter import progress
from rewriter.capture.example_inputs import default_inputs, prepare
from rewriter.capture.own_containers import own
from rewriter.errors import UnsupportedModel, UsageError
from rewriter.profile.interleaved import Job, Timed, time_in_turn
from rewriter.profile.providers import device_name
from rewriter.profile.result import Measured, Profile
from rewriter.profile.torch_decode import cache_bytes, generation
from rewriter.profile.torch_graph import captured
from rewriter.profile.versions import versions
from rewriter.profile.workload import FORWARD, Workload

Shapes = Mapping[str, Sequence[int]]

SILENT_PROFILER = ("KINETO_LOG_LEVEL", "6")
"""Environment variable that the profiler's library reads when it is first used, and a level above all of its lines."""
_PROFILED_RUNS = 5
_HINT = "give inputs that both models take: example_inputs in Python, --shape or a shorter --prompt on the command line"


def profile_torch(
    before: torch.nn.Module,
    after: torch.nn.Module,
    *,
    provider: str,
    shapes: Shapes | None,
    runs: int,
    threads: int,
    example_inputs: Any = None,
    workload: Workload = FORWARD,
    cuda_graph: bool = False,
) -> Profile:
    """Time ``before(...)`` and ``after(...)`` without gradients; see `rewriter.profile.compare.profile`."""
    device = _device(provider)
    forward = workload.mode == "forward"
    args, kwargs = _moved(prepare(before, _given(before, shapes, example_inputs)), device) if forward else ((), {})
    with _threads(threads), _evaluating(before, after, device=device):
        modules = (before, after)
        if forward:
            jobs = [Job(_call(module, args, kwargs, device)) for module in modules]
        else:
            jobs = [generation(module, workload, device) for module in modules]
        jobs = [job.tried(f"the {name} model", _HINT) for job, name in zip(jobs, ("first", "second"), strict=True)]
        replayed = [Job(_call(module, args, kwargs, device, True)) for module in modules] if cuda_graph else jobs
        times = time_in_turn(replayed[0], replayed[1], runs)
        with progress.task("operators and memory"):
            measured = [
                _measure(module, job, timed, device, None if forward else cache_bytes(job))
                for module, job, timed in zip(modules, jobs, times, strict=True)
            ]
    fed = {**{f"args[{i}]": a for i, a in enumerate(args)}, **kwargs}
    used = {name: tuple(value.shape) for name, value in fed.items() if isinstance(value, torch.Tensor)}
    if not forward:
        used = {"input_ids": (workload.batch, workload.total)}
    made = getattr(after, "rewrite_report", None)
    return Profile(
        provider, device_name(provider), threads, runs, None, measured[0], measured[1], used, made, workload,
        versions("torch"), cuda_graph,
    )  # fmt: skip


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _evaluating(*modules: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """On the device and in evaluation mode; what was elsewhere, or in training, is so again afterwards."""
    training = [(part, part.training) for module in modules for part in module.modules()]
    places = [(module, next((t.device for t in module.parameters()), device)) for module in modules]
    try:
        for module in modules:
            module.to(device)
            with contextlib.suppress(NotImplementedError):  # of exported programs: in the mode that they were made in
                module.eval()
        yield
    finally:
        for part, before in training:
            part.training = before
        for module, place in places:
            if place != device:
                module.to(place)


def _device(provider: str) -> torch.device:
    if provider == "cpu":
        return torch.device("cpu")
    if provider != "cuda":
        raise UsageError(f"PyTorch models do not run on {provider!r}", hint="use cpu or cuda")
    if not torch.cuda.is_available():
        raise UnsupportedModel("this PyTorch sees no CUDA device", hint="use --provider cpu")
    return torch.device("cuda", 0)


def _given(module: torch.nn.Module, shapes: Shapes | None, example_inputs: Any) -> Any:
    return example_inputs if example_inputs is not None else _inputs(module, shapes)


def _inputs(module: torch.nn.Module, shapes: Shapes | None) -> dict[str, torch.Tensor]:
    """Default inputs, or inputs of the given [batch, length]."""
    if not shapes:
        return default_inputs(module, 1, 128)
    batch, length = _batch_and_length(shapes)
    inputs = default_inputs(module, batch, length)
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError(f"the model has no input {name!r}", hint=f"its inputs are: {', '.join(inputs)}")
        if tuple(inputs[name].shape) != tuple(shape):
            raise UsageError(
                f"shape {'x'.join(map(str, shape))} does not fit input {name!r}",
                hint=f"its shape would be {tuple(inputs[name].shape)}",
            )
    return inputs


def _batch_and_length(shapes: Shapes) -> tuple[int, int]:
    longest = max(shapes.values(), key=len)
    return longest[0], (longest[1] if len(longest) > 1 else 1)


def _moved(call: Any, device: torch.device) -> Any:
    args, kwargs = call

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return tuple(move(a) for a in args), {name: move(value) for name, value in kwargs.items()}


def _call(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    cuda_graph: bool = False,
) -> Callable[[Any], object]:
    """One call, which waits for the card to finish; or one replay of what it launches there."""

    def forward() -> None:
        with torch.inference_mode():
            module(*own(args), **own(dict(kwargs)))

    work = captured(forward, device) if cuda_graph else forward

    def run(_: Any) -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _measure(module: torch.nn.Module, job: Job, timed: Timed, device: torch.device, kv_bytes: int | None) -> Measured:
    call = job.run
    held = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    grown = _device_growth(call, device) if device.type == "cuda" else _allocated_at_most(call)
    peak = None if grown is None else held + grown
    return Measured(timed.wall, peak, _operators(job, device), timed.cpu, kv_bytes)


def _device_growth(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    base = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - base


def _profiler(*, cuda: bool = False, profile_memory: bool = False) -> Any:
    """torch's profiler, which would write lines of its own to standard error whenever it starts and stops."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault(*SILENT_PROFILER)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    return profile(activities=activities, profile_memory=profile_memory)


def _allocated_at_most(call: Callable[[], object]) -> int | None:
    """Bytes of tensors alive at once during one call, by the allocator's own record; None if there is no record."""
    with _profiler(profile_memory=True) as seen:
        call()
    results = getattr(seen.profiler, "kineto_results", None)
    if results is None:
        return None
    steps = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    alive = peak = 0
    for _, change in steps:
        alive += change
        peak = max(peak, alive)
    return peak


def _operators(job: Job, device: torch.device) -> dict[str, float]:
    """Milliseconds of one piece of the job by operator, slowest first; what prepares it is left out."""
    runs = _PROFILED_RUNS if job.pieces == 1 else 1
    ready = [job.prepare() for _ in range(runs)]
    with _profiler(cuda=device.type == "cuda") as seen:
        for item in ready:
            job.call(item)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, field) / 1000 / (runs * job.pieces) for event in seen.key_averages()}
    return dict(sorted(((k, v) for k, v in times.items() if v > 0), key=lambda item: -item[1]))
