"""Random architectures through both doors: twins exact, pooled models as predicted, refusals alike.

    python -m benchmarks.campaign [--first SEED] [--count N] [--json F] [--markdown F]

Each seed is an architecture (benchmarks/random_attention.py). It must be found in PyTorch and in its ONNX export alike;
a twin with equal heads must come back with the same outputs; and the rewritten original must compute what the original
computes once its heads are replaced by their means. What is refused must be refused by both for one reason; some seeds
hold what must be. A failing seed is printed with all its choices: `--first SEED --count 1` repeats it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

import rewriter
from benchmarks.fuzzing import put_counts
from benchmarks.options import parser, quick_or, seeds
from benchmarks.random_attention import Architecture, Net, draw, inputs
from benchmarks.rows import Row, write_json

BATCH, TOKENS = 2, 11
OPSET = 17
LIMIT = 1e-4
"""Of the largest output; both sides are computed in single precision."""

Array = NDArray[Any]
Feeds = dict[str, Any]
"""A call of the net by keyword; \"past\" is a list."""


@dataclass(frozen=True)
class Finding:
    """What one door made of one architecture.

    Attributes:
        status: "rewritable", "refused" or "not found".
        reason: of a refusal.
        twin, pooled: largest relative difference from what they must equal; None if not rewritten.
    """

    status: str
    reason: str = ""
    twin: float | None = None
    pooled: float | None = None


@dataclass(frozen=True)
class Outcome:
    architecture: Architecture
    torch: Finding
    onnx: Finding
    problem: str = ""


def run(seed: int) -> Outcome:
    """One seed through both doors."""
    warnings.simplefilter("ignore")
    a = draw(seed)
    empty = Finding("not found")
    try:
        found = {door.__name__: door(a) for door in (in_torch, in_file)}
    except Exception as error:  # anything but a finding is a fault of ours
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Outcome(a, empty, empty, f"{type(error).__name__} at {where}: {str(error)[:300]}")
    outcome = Outcome(a, found["in_torch"], found["in_file"])
    return Outcome(a, outcome.torch, outcome.onnx, problem(outcome))


def problem(outcome: Outcome) -> str:
    """What is wrong, or nothing. A refusal is not, if both doors refuse for the same reason."""
    here, there = outcome.torch, outcome.onnx
    wrong = []
    if (here.status, here.reason) != (there.status, there.reason):
        wrong.append(f"torch: {here.status} {here.reason} / onnx: {there.status} {there.reason}")
    wrong += [f"{door}: {f.reason}" for door, f in (("torch", here), ("onnx", there)) if f.status == "not found"]
    errors = {
        "torch twin": here.twin,
        "torch pooled": here.pooled,
        "onnx twin": there.twin,
        "onnx pooled": there.pooled,
    }
    if outcome.architecture.odd not in ("", "clamped") and here.status == "rewritable":
        wrong.append(f"rewritten, though its scores are odd ({outcome.architecture.odd})")
    wrong += [f"{what} is off by {e:.1e}" for what, e in errors.items() if e is not None and not e < LIMIT]
    return "; ".join(wrong)


# ---------------------------------------------------------------------- doors


def in_torch(a: Architecture) -> Finding:
    given = inputs(a, BATCH, TOKENS)
    net = Net(a).eval()
    finding = _found(rewriter.inspect(net, example_inputs=given).to_dict())
    if finding.status != "rewritable":
        return finding
    kv_heads = _wanted(a)
    other = inputs(a, BATCH + 1, TOKENS + 4, seed=1)
    errors = []
    for mean in (False, True):
        before, right = _pair(a, kv_heads, mean)
        after = rewriter.optimize(before, _target(kv_heads), example_inputs=given)
        same = _equal(a, other, kv_heads)  # a module that is handed its cache goes on being handed all heads of it
        errors.append(_distance(_torch(after, same), _torch(right, same)))
    return Finding("rewritable", "", *errors)


def in_file(a: Architecture) -> Finding:
    kv_heads = _wanted(a)
    other = inputs(a, BATCH + 1, TOKENS + 4, seed=1)
    errors = []
    with tempfile.TemporaryDirectory() as scratch:
        for mean in (False, True):
            before, right = _pair(a, kv_heads, mean)
            path = Path(scratch) / f"{'pooled' if mean else 'twin'}.onnx"
            export(a, before, path)
            finding = _found(rewriter.inspect(path).to_dict())
            if finding.status != "rewritable":
                return finding
            done = path.with_suffix(".out.onnx")
            rewriter.optimize(path, _target(kv_heads)).save(done)
            output, *present = _torch(right, _equal(a, other, kv_heads))
            held_once = [t[:, :: a.kv_heads // kv_heads] for t in present]
            errors.append(_distance(_onnx(done, _narrow(a, other, kv_heads)), [output, *held_once]))
    return Finding("rewritable", "", *errors)


def _pair(a: Architecture, kv_heads: int, mean: bool) -> tuple[Net, Net]:
    """(what is rewritten, what it must equal then): a twin of equal heads and itself, or the net and its means."""
    before = Net(a).eval()
    if not mean:
        before.pool(kv_heads, mean=False)
        return before, before
    return before, Net(a).eval().pool(kv_heads, mean=True)


def _wanted(a: Architecture) -> int:
    counts = a.pooled_counts()
    return counts[a.seed % len(counts)]


def _target(kv_heads: int) -> str:
    return "mqa" if kv_heads == 1 else f"gqa{kv_heads}"


def _found(inspection: dict[str, Any]) -> Finding:
    sites = [s for s in inspection["sites"] if s["kind"] == "attention"]
    if len(sites) != 2:
        return Finding("not found", f"{len(sites)} sites; not attention: {inspection['not_attention']}")
    refused = [s["reason"] for s in sites if s["status"] != "rewritable"]
    return Finding("refused", str(refused[0])) if refused else Finding("rewritable")


def _narrow(a: Architecture, given: Feeds, kv_heads: int) -> Feeds:
    """A call of a rewritten file: what is cached has as many heads as it has now."""
    if "past" not in given:
        return given
    return {**given, "past": [t[:, :: a.kv_heads // kv_heads] for t in given["past"]]}


def _equal(a: Architecture, given: Feeds, kv_heads: int) -> Feeds:
    """The same call of a net whose heads are equal, group by group."""
    if "past" not in given:
        return given
    once = _narrow(a, given, kv_heads)["past"]
    return {**given, "past": [t.repeat_interleave(a.kv_heads // kv_heads, 1) for t in once]}


def export(a: Architecture, net: Net, path: Path) -> None:
    """By the TorchScript exporter: it takes a second a file."""
    given = inputs(a, BATCH, TOKENS)
    axes = {name: {0: "batch", 1: "keys" if a.cross and name != "x" else "tokens"} for name in given if name != "past"}
    if a.padding and a.cached:
        axes["padding"][1] = "total"
    past = given.get("past", [])
    kinds = [f"{i}.{kind}" for i in range(len(past) // 2) for kind in ("key", "value")]
    names, presents = [f"past_key_values.{x}" for x in kinds], [f"present.{x}" for x in kinds]
    axes |= {name: {0: "batch", 2: "past"} for name in names} | {name: {0: "batch", 2: "total"} for name in presents}
    buffer = io.BytesIO()
    arguments = (given["x"], given.get("padding"), given.get("context"), given.get("past"))
    with contextlib.redirect_stdout(io.StringIO()):  # where it cannot, the exporter prints the whole graph
        torch.onnx.export(
            net,
            arguments,
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[*(name for name in given if name != "past"), *names],
            output_names=["y", *presents],
            dynamic_axes=axes,
        )
    path.write_bytes(buffer.getvalue())


def _torch(net: Any, given: Feeds) -> list[Array]:
    with torch.no_grad():
        found = net(**given)
    return [t.numpy() for t in ([found] if isinstance(found, torch.Tensor) else found)]


def _onnx(path: Path, given: Feeds) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    past = given.get("past", [])
    fed = {k: v for k, v in given.items() if k != "past"}
    fed |= {f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}": t for i, t in enumerate(past)}
    names = {i.name for i in session.get_inputs()}
    return [np.asarray(x) for x in session.run(None, {k: v.numpy() for k, v in fed.items() if k in names})]


def _distance(found: Sequence[Array], right: Sequence[Array]) -> float:
    """The largest difference, as a part of the largest number of the output or cache."""
    if [f.shape for f in found] != [r.shape for r in right]:
        return float("inf")
    return max(float(np.abs(f - r).max() / np.abs(r).max()) for f, r in zip(found, right, strict=True))


# ---------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    options = seeds(parser(__doc__, quick="60 seeds", markdown=True), count=500).parse_args(arguments)
    torch.set_num_threads(1)
    failed: list[Outcome] = []
    count = quick_or(options, 60, options.count)
    refusals: collections.Counter[str] = collections.Counter()
    rewritten = 0
    for seed in range(options.first, options.first + count):
        outcome = run(seed)
        refusals.update([outcome.torch.reason] if outcome.torch.status == "refused" else [])
        rewritten += not outcome.problem and outcome.torch.status == "rewritable"
        if outcome.problem:
            failed.append(outcome)
            print(f"seed {seed}: {outcome.problem}\n    {outcome.architecture}", flush=True)
    print(f"{count} architectures: {rewritten} rewritten alike through both doors, {len(failed)} problems; refused:")
    for reason, times in refusals.most_common():
        print(f"{times:5}  {reason}")
    if options.json:
        case = f"seeds {options.first} to {options.first + count - 1}"
        row = Row("campaign", case, rewritten, count, "all", "architectures", rewritten / count, None, not failed)
        write_json(options.json, [row])
    if options.markdown:
        case = f"seeds {options.first} to {options.first + count - 1}"
        counts = {"rewritten alike": rewritten, "refused alike": count - rewritten - len(failed), "fault": len(failed)}
        put_counts(options.markdown, "campaign", case, count, counts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
