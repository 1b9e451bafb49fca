"""Profiles two .onnx files in onnxruntime: interleaved times, time by operator, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from codegen.scratch import scratch_folder
from rewriter import progress
from rewriter.capture.bounded_run import OUT_OF_BOUNDS, loop_limit, run_within
from rewriter.capture.feeds import candidate_sizes, make_feeds
from rewriter.capture.input_roles import input_roles
from rewriter.capture.onnx_load import load
from rewriter.errors import UnsupportedModel, first_line
from rewriter.profile.interleaved import Job, Timed, time_in_turn
from rewriter.profile.onnx_call import captured_call, own, session_call
from rewriter.profile.onnx_decode import Generation
from rewriter.profile.providers import PROVIDERS, device_name, open_session
from rewriter.profile.result import Measured, Profile
from rewriter.profile.versions import versions
from rewriter.profile.workload import FORWARD, Workload
from rewriter.report import stored
from rewriter.verify.kv_cache import cache_ports

Feeds = dict[str, NDArray[Any]]
Shapes = Mapping[str, Sequence[int]]

_PROFILED_RUNS = 5
_DEFAULT_LENGTH, _DEFAULT_PAST = 128, 512


@dataclass(frozen=True)
class Conditions:
    """What both models run under; `library` holds operators that their sessions may use."""

    provider: str
    threads: int
    library: Path | None = None

    def open(self, path: Path, *, profile_prefix: Path | None = None, cuda_graph: bool = False) -> Any:
        """A session; raises UnsupportedModel as `open_session` does."""
        return open_session(
            path,
            self.provider,
            self.threads,
            profile_prefix=profile_prefix,
            library=self.library,
            cuda_graph=cuda_graph,
        )


@dataclass(frozen=True)
class _Subject:
    """One model: its file, what it is fed, and how it generates where that is what is measured."""

    path: Path
    feeds: Feeds
    kv_bytes: int | None
    generation: Generation | None = None

    def job(self, conditions: Conditions, cuda_graph: bool) -> Job:
        """What is timed, in a session of its own."""
        session = conditions.open(self.path, cuda_graph=cuda_graph)
        if self.generation is not None:
            hint = "try a shorter --prompt, or fewer --new-tokens"
            return self.generation.job(session).tried(self.path.name, hint)
        if cuda_graph:
            outputs = conditions.open(self.path).run(None, own(session, self.feeds))
            call = captured_call(session, self.feeds, outputs, self.path)
        else:
            call = session_call(session, self.feeds, conditions.provider)
        return Job(lambda _: call()).tried(self.path.name, "give sizes that both files take: --shape input_ids=1x128")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.feeds.items()}


def profile_onnx(
    before: Path,
    after: Path,
    *,
    provider: str,
    shapes: Shapes | None,
    runs: int,
    threads: int,
    library: Path | None = None,
    workload: Workload = FORWARD,
    cuda_graph: bool = False,
) -> Profile:
    """Time `before` and `after` on the same inputs; see `rewriter.profile.compare.profile`.

    `library` holds operators that both sessions may use.
    """
    import onnxruntime as ort

    conditions = Conditions(provider, threads, library)
    if workload.mode == "forward":
        subjects = _subjects(before, after, conditions, shapes)
    else:
        subjects = _generating(before, workload, provider), _generating(after, workload, provider)
    jobs = [subject.job(conditions, cuda_graph) for subject in subjects]
    times = time_in_turn(jobs[0], jobs[1], runs)
    del jobs  # and the sessions that they hold
    measured = []
    with progress.task("operators and memory", len(subjects), "models") as advance:
        for subject, timed in zip(subjects, times, strict=True):
            measured.append(_measure(subject, timed, conditions, workload))
            advance(len(measured))
    made = stored.from_text(load(after).metadata_props.get(stored.PROPERTY))
    return Profile(
        provider, device_name(provider), threads, runs, ort.__version__, measured[0], measured[1], subjects[0].shapes,
        made, workload, versions("onnx"), cuda_graph,
    )  # fmt: skip


def _measure(subject: _Subject, timed: Timed, conditions: Conditions, workload: Workload) -> Measured:
    if subject.generation is None:
        ops = operator_times(subject.path, subject.feeds, conditions)
    else:
        ops = _generation_operators(subject.path, subject.generation, conditions)
    peak = peak_bytes(subject.path, subject.shapes, conditions, workload)
    return Measured(timed.wall, peak, ops, timed.cpu, subject.kv_bytes)


# --- inputs --------------------------------------------------------------------------------------


def _generating(path: Path, workload: Workload, provider: str) -> _Subject:
    generation = Generation.of(load(path), workload, provider)
    return _Subject(path, generation.prompt, generation.cache_bytes, generation)


def _subjects(before: Path, after: Path, conditions: Conditions, shapes: Shapes | None) -> tuple[_Subject, _Subject]:
    """Both models with inputs that the first accepts: the shapes given, else the first usual size that runs."""
    old, new = load(before), load(after)
    session = conditions.open(before)
    trouble = ""
    for size in _sizes(old, shapes):
        feeds = cache_ports(old).neutral(make_feeds(old, batch=size[0], length=size[1], past=size[2], shapes=shapes))
        try:
            run_within(loop_limit(old), session, None, feeds)
        except OUT_OF_BOUNDS:
            raise
        except Exception as error:  # onnxruntime's errors share no public base class
            trouble = trouble or first_line(error)
            continue
        narrowed = cache_ports(new).neutral(feeds)
        return _Subject(before, feeds, _kept(old, feeds)), _Subject(after, narrowed, _kept(new, narrowed))
    raise UnsupportedModel(
        f"{before.name} runs at no size that was tried: {trouble}",
        hint="give the inputs' sizes, e.g. --shape input_ids=1x128",
    )


def _sizes(model: ir.Model, shapes: Shapes | None) -> list[tuple[int, int, int]]:
    """One sentence or, for a model with a cache, one token behind a long past; then whatever the file allows."""
    usual = [(1, 1, _DEFAULT_PAST), (1, 1, 32)] if cache_ports(model).roles else [(1, _DEFAULT_LENGTH, 0), (1, 32, 0)]
    if shapes:
        return [*usual, *candidate_sizes(model)]
    return [*usual, *sorted(candidate_sizes(model), key=lambda size: -size[1])]


def _kept(model: ir.Model, feeds: Feeds) -> int | None:
    """Bytes of the caches behind one call; None without caches."""
    ports = cache_ports(model)
    past = ports.length({name: feeds[name] for name in ports.roles if name in feeds})
    ids = next((feeds[r.name] for r in input_roles(model) if r.kind == "ids" and r.name in feeds), None)
    new = int(ids.shape[-1]) if ids is not None and ids.ndim else 0
    return ports.bytes_at(feeds, past + new) if ports.roles else None


# --- operators -----------------------------------------------------------------------------------


def operator_times(path: Path, feeds: Feeds, conditions: Conditions) -> dict[str, float]:
    """Milliseconds of one run by operator type, slowest first, from an instrumented session of its own.

    Raises:
        UnsupportedModel: not one operator ran on the provider that was asked for.
    """
    with scratch_folder() as folder:
        session = conditions.open(path, profile_prefix=folder / "ort")
        call = session_call(session, feeds, conditions.provider)
        for _ in range(_PROFILED_RUNS + 1):
            call()
        events = json.loads(Path(session.end_profiling()).read_text())
    return _by_operator(_after_first_run(events), conditions.provider, _PROFILED_RUNS)


def _generation_operators(path: Path, generation: Generation, conditions: Conditions) -> dict[str, float]:
    """Milliseconds of one new token by operator type or, where a prefill is measured, of one prompt."""
    with scratch_folder() as folder:
        session = conditions.open(path, profile_prefix=folder / "ort")
        cache = generation.fill(session)
        if generation.workload.new_tokens:
            generation.go_on(session, cache)
        else:
            for _ in range(_PROFILED_RUNS):
                generation.fill(session)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _by_operator(_after_first_run(events), conditions.provider, generation.workload.new_tokens or _PROFILED_RUNS)


def _after_first_run(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernel events behind the first run, which warms up."""
    first = next((e for e in events if e.get("name") == "model_run"), None)
    start = first["ts"] + first["dur"] if first is not None else 0
    return [e for e in events if str(e.get("name", "")).endswith("_kernel_time") and e["ts"] >= start]


def _by_operator(kernels: list[dict[str, Any]], provider: str, runs: int) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    used: set[str] = set()
    for event in kernels:
        arguments = event.get("args", {})
        name, ran_on = str(arguments.get("op_name", "?")), str(arguments.get("provider", ""))
        totals[f"{name}{_place(provider, ran_on)}"] += event["dur"] / 1000 / runs
        used.add(ran_on)
    if PROVIDERS[provider] not in used and provider != "cpu":
        raise UnsupportedModel(
            f"not one operator of the model ran on {provider}", hint="the provider supports none of them; use cpu"
        )
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _place(provider: str, ran_on: str) -> str:
    """Where an operator ran, if it is not where it was asked for."""
    if provider != "cpu" and ran_on == PROVIDERS["cpu"]:
        return " (on the CPU)"
    return " (by CUDA)" if provider == "tensorrt" and ran_on == PROVIDERS["cuda"] else ""


# --- memory --------------------------------------------------------------------------------------


def peak_bytes(path: Path, shapes: Shapes, conditions: Conditions, workload: Workload = FORWARD) -> int | None:
    """Memory that a fresh process needs at most to open and run the model; None if it could not be measured.

    Measured in a child process: on the CPU the growth of its private memory (mapped weight files are not in it),
    on a graphics card the drop of the card's free memory.
    """
    request = {
        "model": str(path),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "provider": conditions.provider,
        "threads": conditions.threads,
        "library": None if conditions.library is None else str(conditions.library),
        "workload": workload.to_dict(),
    }
    command = [sys.executable, "-m", "rewriter.profile.peak_process", json.dumps(request)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        answer = json.loads(done.stdout)["peak_bytes"]
    except (subprocess.CalledProcessError, ValueError, KeyError):
        return None
    return None if answer is None else int(answer)
