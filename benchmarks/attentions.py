"""One zoo case through one door: attentions expected, found, explained, and rewritten without loss in a twin."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

import rewriter
from benchmarks import peers
from benchmarks.peers import PeerResult, quiet
from rewriter.errors import RewriteError
from tests.targets.lossless_twin import distance, legal_pool, tied, twin_file
from tests.zoo.case import ZooCase, main_output
from tests.zoo.exports import EXPORTERS, TRACE_BATCH, TRACE_LENGTH, TRACE_PAST, exported, exported_with_past
from tests.zoo.exports import ExportSkipped as ExportSkipped
from tests.zoo.feeds import WIDTH
from tests.zoo.models import ZOO
from tests.zoo.vision_library import timm_cases

EXACT = 1e-4
SIZES = (TRACE_BATCH, TRACE_LENGTH, 0)
PAST = "+past"
DOORS = ("torch", "graph", *EXPORTERS, *(name + PAST for name in EXPORTERS))
"""Ways into the library: a module, an exported program, and ONNX files by four exporters, also with a cache."""


@dataclass(frozen=True)
class Outcome:
    """What happened to the attentions of one case behind one door.

    Attributes:
        expected: attentions that the model was built with; refusable: those of them that must be refused.
        found, explained: rewritable sites, and refusals with a reason.
        verified: sites rewritten in a tied twin that computes the same to `EXACT`.
        error: largest difference of that twin; None if nothing was rewritten.
        seconds: capture and matching.
        peers: by name; empty for torch.
        note: why fewer were verified than found, if so.
    """

    case: str
    door: str
    expected: int
    refusable: int
    found: int
    explained: int
    verified: int
    error: float | None
    seconds: float
    peers: Mapping[str, PeerResult]
    note: str = ""

    @property
    def ok(self) -> bool:
        """Every attention is accounted for, and all but those that must be refused survived being rewritten."""
        return self.found + self.explained == self.expected and self.verified == self.expected - self.refusable


def measure(name: str, door: str, cache: Path) -> Outcome:
    """Raises ExportSkipped where the exporter cannot export the case."""
    case = (ZOO | timm_cases())[name]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        if door in ("torch", "graph"):
            return _in_torch(case, door)
        return _in_file(case, door, _file(case, door, cache), Path(scratch))


def _outcome(case: ZooCase, door: str, inspection: rewriter.Inspection, seconds: float, **more: Any) -> Outcome:
    refusable = case.sites if "refuse" in case.tags else case.refused
    if len(inspection.refusals) > refusable:
        more["note"] = "; ".join(dict.fromkeys(r.reason for r in inspection.refusals))
    return Outcome(
        case=case.name,
        door=door,
        expected=case.sites,
        refusable=refusable,
        found=len(inspection.sites),
        explained=len(inspection.refusals),
        seconds=seconds,
        **more,
    )


# ------------------------------------------------------------ torch


def _in_torch(case: ZooCase, door: str) -> Outcome:
    inputs = case.inputs(*SIZES)
    module = case.build()
    subject = module if door == "torch" else _exported(module, inputs)
    start = time.perf_counter()
    inspection = rewriter.inspect(subject, **({"example_inputs": inputs} if door == "torch" else {}))
    seconds = time.perf_counter() - start
    verified, error, note = 0, None, ""
    if inspection.sites:
        try:
            verified, error, note = _rewritten_in_torch(case, door)
        except Exception as failure:  # a benchmark reports failures of any kind
            note = _line(failure)
    return _outcome(case, door, inspection, seconds, verified=verified, error=error, peers={}, note=note)


def _rewritten_in_torch(case: ZooCase, door: str) -> tuple[int, float, str]:
    inputs = case.inputs(*SIZES)
    module, target = tied(case), f"gqa{legal_pool(case)}"
    expected = case.run(module, inputs)
    if door == "torch":
        new = rewriter.optimize(module, target, example_inputs=inputs)
        result = case.run(new, inputs)
    else:
        new = rewriter.optimize(_exported(module, inputs), target)
        with torch.no_grad():
            result = main_output(new.module()(**inputs, **_constants(module)))
    report = new.rewrite_report
    return _verdict(len(report.sites), distance(result, expected), (r.reason for r in report.refused))


def _constants(module: torch.nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if getattr(getattr(module, "config", None), "use_cache", False) else {}


def _exported(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (), {**inputs, **_constants(module)}, strict=False)


def _verdict(sites: int, error: float, reasons: Iterable[str]) -> tuple[int, float, str]:
    note = "; ".join(dict.fromkeys(reasons))
    return (sites, error, note) if error <= EXACT else (0, error, f"differs by {error:.1e}")


def _line(failure: Exception) -> str:
    text = str(failure).strip().partition("\n")[0]
    return text if isinstance(failure, RewriteError) else f"{type(failure).__name__}: {text}"


# ------------------------------------------------------------ files


def _file(case: ZooCase, door: str, cache: Path) -> Path:
    make = exported_with_past if door.endswith(PAST) else exported
    return make(case, door.removesuffix(PAST), cache).path


def _in_file(case: ZooCase, door: str, path: Path, scratch: Path) -> Outcome:
    start = time.perf_counter()
    inspection = rewriter.inspect(path)
    seconds = time.perf_counter() - start
    verified, error, note = 0, None, ""
    if inspection.sites:
        try:
            verified, error, note = _rewritten_file(case, path, scratch)
        except (Exception, AssertionError) as failure:  # a benchmark reports failures of any kind
            note = _line(failure)
    feeds = _feeds(case, path)
    kind = peers.model_type(case.name)
    beside = {
        "onnxruntime": peers.by_onnxruntime(path, scratch / "by-ort.onnx", kind, case.heads, WIDTH, feeds),
        "onnxscript": peers.by_onnxscript(path, scratch / "by-script.onnx", feeds),
    }
    return _outcome(case, door, inspection, seconds, verified=verified, error=error, peers=beside, note=note)


def _rewritten_file(case: ZooCase, path: Path, scratch: Path) -> tuple[int, float, str]:
    twin, out = _twin(case, path, scratch), scratch / "rewritten.onnx"
    done = rewriter.optimize(twin, f"gqa{legal_pool(case)}")
    done.save(out)
    pooled = _feeds(case, out)
    full = {n: _spread(a, s) for (n, a), s in zip(pooled.items(), _shapes(twin, pooled), strict=True)}
    error = distance(peers.run(out, pooled)[0], peers.run(twin, full)[0])
    report = done.rewrite_report
    return _verdict(len(report.sites), error, (r.reason for r in report.refused))


def _twin(case: ZooCase, path: Path, scratch: Path) -> Path:
    """The file with tied heads; exported anew where the exporter folded the weights into others."""
    try:
        return twin_file(case, path, scratch / "twin.onnx")
    except AssertionError:
        exporter = path.name.removesuffix(".onnx").removesuffix(".static").rpartition(".")[2]
        again = exported_with_past if path.name.startswith(f"{case.name}-past.") else exported
        return again(replace(case, build=lambda: tied(case)), exporter, scratch).path


def _shapes(path: Path, feeds: Mapping[str, NDArray[Any]]) -> list[list[int]]:
    """Fixed sizes of a file's inputs, 0 where dynamic, in the order of `feeds`."""
    inputs = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in _inputs(path)}
    return [inputs[name] for name in feeds]


def _inputs(path: Path) -> list[onnx.ValueInfoProto]:
    return list(onnx.load(path, load_external_data=False).graph.input)


def _feeds(case: ZooCase, path: Path) -> dict[str, NDArray[Any]]:
    """Inputs by name; a cache holds random numbers of the shape that the file asks for."""
    random = np.random.default_rng(0)
    own = {name: tensor.numpy() for name, tensor in case.inputs(*SIZES).items()}
    feeds: dict[str, NDArray[Any]] = {}
    inputs = _inputs(path)
    cached = any(i.name.startswith("past_key_values") for i in inputs)
    for value in inputs:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.name.startswith("past_key_values"):
            shape = (TRACE_BATCH, dims[1], TRACE_PAST, dims[3])
            feeds[value.name] = random.standard_normal(shape).astype(np.float32)
        elif cached and value.name == "attention_mask":
            feeds[value.name] = np.ones((TRACE_BATCH, TRACE_PAST + TRACE_LENGTH), np.int64)
        else:
            feeds[value.name] = own[value.name]
    return feeds


def _spread(array: NDArray[Any], shape: list[int]) -> NDArray[Any]:
    """A pooled cache as the twin's equal heads hold it."""
    heads = shape[1] if array.ndim == 4 and len(shape) == 4 else 0
    return array if heads in (0, array.shape[1]) else np.repeat(array, heads // array.shape[1], axis=1)
