"""ONNX exports of the zoo by every torch.onnx exporter, cached on disk and safe for parallel test workers."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from tests.zoo.case import ZooCase, main_output

EXPORTERS: Mapping[str, tuple[bool, int]] = {
    "dynamo18": (True, 18),
    "dynamo23": (True, 23),
    "dynamo24": (True, 24),
    "torchscript17": (False, 17),
}
"""Exporter name to (torch.export based?, opset)."""

TRACE_BATCH, TRACE_LENGTH, TRACE_PAST = 2, 7, 5
OTHER = (3, 4, 6)
"""Batch, length and past at which a file with dynamic axes is checked once more."""


class ExportSkipped(Exception):
    """This exporter cannot export this case; the message says why."""


@dataclass(frozen=True)
class Exported:
    """One ONNX file.

    Attributes:
        path: the file; weights inside.
        dynamic: False when batch and sequence had to be fixed at `TRACE_BATCH`, `TRACE_LENGTH`.
    """

    path: Path
    dynamic: bool


class Positional(nn.Module):
    """Calls a model with keyword tensors taken by position and returns its main output, without a cache."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.constants = dict(constants)

    def forward(self, *args: Tensor) -> Tensor:
        return main_output(self.model(**dict(zip(self.names, args, strict=True)), **self.constants))


class WithPast(nn.Module):
    """A decoder that takes ids, mask, key 0, value 0, key 1, ... by position and returns logits and presents."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for index in range(self.layers):
            cache.update(past[2 * index], past[2 * index + 1], index)
        keyword = {cache_argument(self.model): cache}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **keyword)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *present)


def cache_argument(model: nn.Module) -> str:
    """The keyword that takes the cache: transformers renamed it within version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Job:
    """What to export: a positional module, example arguments at two sizes, the names and axes of both ends."""

    module: nn.Module
    args: tuple[Tensor, ...]
    other_args: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]


def _job(case: ZooCase) -> Job:
    inputs, other = case.inputs(TRACE_BATCH, TRACE_LENGTH, 0), case.inputs(*OTHER[:2], 1)
    model = case.build()
    constants = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}
    module = Positional(model, tuple(inputs), constants).eval()
    return Job(module, tuple(inputs.values()), tuple(other.values()), tuple(inputs), ("output",), case.axes)


def _cache_shapes(model: nn.Module, input_ids: Tensor) -> list[tuple[int, int]]:
    """Heads and head width of every cached tensor, key and value by turns: some models repeat K/V before caching."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=True, **{cache_argument(model): cache})
    return [(int(t.shape[1]), int(t.shape[3])) for layer in cache.layers for t in (layer.keys, layer.values)]


def _job_with_past(case: ZooCase) -> Job:
    if not {"hf"} <= case.tags or not case.causal or "encoder-decoder" in case.tags:
        raise ExportSkipped(f"{case.name} is not a causal decoder with a key/value cache")
    model = case.build()
    shapes = _cache_shapes(model, case.inputs(1, 3, 0)["input_ids"])
    generator = torch.Generator().manual_seed(1)

    def arguments(batch: int, length: int, before: int) -> tuple[Tensor, ...]:
        past = [torch.randn(batch, heads, before, width, generator=generator) for heads, width in shapes]
        ids = case.inputs(batch, length, 0)["input_ids"]
        return (ids, torch.ones(batch, before + length, dtype=torch.int64), *past)

    layers = len(shapes) // 2
    slots = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    past_names, present_names = [f"past_key_values.{s}" for s in slots], [f"present.{s}" for s in slots]
    axes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_sequence"},
        **{name: {0: "batch", 2: "past_sequence"} for name in past_names},
    }
    return Job(
        WithPast(model, layers).eval(),
        arguments(TRACE_BATCH, TRACE_LENGTH, TRACE_PAST),
        arguments(*OTHER),
        ("input_ids", "attention_mask", *past_names),
        ("logits", *present_names),
        axes,
    )


# ------------------------------------------------------------------ the exporters


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress, warnings and logs."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _by_dynamo(job: Job, opset: int, path: Path, dynamic: bool) -> None:
    per_argument = tuple(dict(job.axes.get(name, {})) for name in job.inputs)
    named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(job.module.forward).parameters.values())
    rest = per_argument[named:]
    shapes = (*per_argument[:named], *([rest] if rest else []))
    torch.onnx.export(
        job.module,
        job.args,
        str(path),
        dynamo=True,
        opset_version=opset,
        input_names=list(job.inputs),
        output_names=list(job.outputs),
        dynamic_shapes=shapes if dynamic else None,
        external_data=False,
        verbose=False,
    )


def _by_torchscript(job: Job, opset: int, path: Path, dynamic: bool) -> None:
    axes = {name: dict(job.axes[name]) for name in job.inputs if name in job.axes}
    torch.onnx.export(
        job.module,
        job.args,
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=list(job.inputs),
        output_names=list(job.outputs),
        dynamic_axes=axes if dynamic else None,
    )


def _worst_difference(job: Job, path: Path, dynamic: bool) -> float:
    """Largest |onnxruntime - torch| over all outputs and example sizes; raises if the file does not run."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    worst = 0.0
    for args in (job.args, job.other_args)[: 2 if dynamic else 1]:
        got = session.run(None, {n: a.numpy() for n, a in zip(job.inputs, args, strict=True) if n in wanted})
        with torch.no_grad():
            result = job.module(*args)
        expected = result if isinstance(result, tuple) else (result,)
        worst = max(worst, *(float(np.abs(g - e.numpy()).max()) for g, e in zip(got, expected, strict=True)))
    return worst


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause, which is where exporters keep what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _export(job: Job, exporter: str, path: Path) -> bool:
    """Write `path`; returns whether its axes are dynamic. A file that onnxruntime computes wrongly does not count."""
    by_torch_export, opset = EXPORTERS[exporter]
    write: Callable[[Job, int, Path, bool], None] = _by_dynamo if by_torch_export else _by_torchscript
    reasons: list[str] = []
    for dynamic in (True, False):
        try:
            with _quiet():
                write(job, opset, path, dynamic)
            worst = _worst_difference(job, path, dynamic)
            if worst < 1e-3:
                return dynamic
            reasons.append(f"differs from torch by {worst:.1e}")
        except Exception as error:  # exporters raise anything
            reasons.append(_reason(error))
    raise ExportSkipped("; static: ".join(reasons))


# ------------------------------------------------------------------ the cache


def fingerprint() -> str:
    """Changes with the zoo's sources and the exporters' versions: the key of a cache that outlives a session."""
    import onnx
    import onnxscript
    import transformers

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if not source.name.startswith(("test_", "through")):
            digest.update(source.read_bytes())
    digest.update(
        repr([torch.__version__, transformers.__version__, onnx.__version__, onnxscript.__version__]).encode()
    )
    return digest.hexdigest()[:16]


def cached(name: str, folder: Path, make: Callable[[], Job], exporter: str) -> Exported:
    if exporter not in EXPORTERS:
        raise ValueError(f"unknown exporter {exporter!r}; one of {', '.join(EXPORTERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    done, fixed, skipped = (folder / f"{name}.{exporter}.{end}" for end in ("onnx", "static.onnx", "skipped.txt"))
    with FileLock(str(folder / f"{name}.{exporter}.lock")):
        if skipped.exists():
            raise ExportSkipped(skipped.read_text())
        if not done.exists() and not fixed.exists():
            try:
                job = make()
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    path = Path(scratch) / "model.onnx"
                    dynamic = _export(job, exporter, path)
                    os.replace(path, done if dynamic else fixed)
            except ExportSkipped as reason:
                skipped.write_text(str(reason))
                raise
    return Exported(done, True) if done.exists() else Exported(fixed, False)


def exported(case: ZooCase, exporter: str, folder: Path) -> Exported:
    """Export `case` (once per `folder`), checked against torch in onnxruntime; raises `ExportSkipped`.

    The graph's inputs are the case's, its output is ``output``. Axes are dynamic where the exporter allows it.
    """
    return cached(case.name, folder, lambda: _job(case), exporter)


def exported_with_past(case: ZooCase, exporter: str, folder: Path) -> Exported:
    """Export a causal Hugging Face decoder with its cache as inputs and outputs; raises `ExportSkipped`.

    Inputs ``input_ids [batch, sequence]``, ``attention_mask [batch, past + sequence]`` and per layer
    ``past_key_values.N.key|value [batch, kv_heads, past, head_dim]``; outputs ``logits`` and ``present.N.key|value``.
    """
    return cached(f"{case.name}-past", folder, lambda: _job_with_past(case), exporter)


def export(case: ZooCase, exporter: str, folder: Path) -> Path:
    """The path of `exported`."""
    return exported(case, exporter, folder).path


def export_with_past(case: ZooCase, exporter: str, folder: Path) -> Path:
    """The path of `exported_with_past`."""
    return exported_with_past(case, exporter, folder).path
