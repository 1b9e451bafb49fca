"""How sparse attention grows with the length, beside causal attention over all keys, in torch and onnxruntime.

    python -m benchmarks.sparse_attention [--quick] [--json F] [--markdown F] [--svg F]

Fixed blocks have l = sqrt(n), for which their work is n * sqrt(n); the window has 128 keys and 4 sinks. Processor time
of one thread, all by turns in one run. Growth is the exponent of n between the shortest and the longest length; --svg
draws the times, in which it is the slope.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts: its threads must not spin

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import options as shared_options
from benchmarks.curves import svg
from benchmarks.machine import machine
from benchmarks.rows import Row, interleaved, markdown_table, put_section, write_json
from codegen.ops.grouped_query_attention import torch_body
from codegen.ops.grouped_query_attention.onnx_body import DOMAIN, attributes
from codegen.ops.grouped_query_attention.onnx_tiles import functions
from codegen.sight import Pattern, Sight
from codegen.spec import GroupedQueryAttention

HEADS, DIM, SUMMARY = 8, 64, 8
GOALS = {"fixed": 1.5}
SLACK = 0.05
"""Of an exponent: lengths are no squares, and overheads do not grow."""

Call = Callable[[], object]


def patterns(length: int) -> Mapping[str, Pattern]:
    block = math.isqrt(length)
    return {
        "fixed": (Sight(block=block, period=block, first=block - SUMMARY, last=block, ordered=True),),
        "window": (Sight(reach=128, sinks=4, ordered=True),),
    }


def calls(length: int) -> dict[str, Call]:
    """By "runtime, pattern"; "all keys" is torch's fused attention, and onnxruntime's is left out: it has no causal one
    of comparable speed for float32 on CPUs."""
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=torch.Generator().manual_seed(s)) for s in range(3))
    found: dict[str, Call] = {
        "torch, all keys": lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    for name, pattern in patterns(length).items():
        spec = GroupedQueryAttention(HEADS, HEADS, DIM, DIM, DIM**-0.5, pattern=pattern)
        found[f"torch, {name}"] = lambda spec=spec: torch_body.grouped_query_attention(spec, q, k, v)  # type: ignore[misc]
        found[f"onnxruntime, {name}"] = in_onnxruntime(spec, {"q": q, "k": k, "v": v})
    return found


def in_onnxruntime(spec: GroupedQueryAttention, feeds: Mapping[str, Tensor]) -> Call:
    """One call of the portable function."""
    bodies = functions(spec, 17)
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * 4)) for n in feeds]
    node = ir.Node(DOMAIN, bodies[0].name, inputs, attributes(spec, ir.DataType.FLOAT), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * 4)
    graph = ir.Graph(inputs, [output], nodes=[node], name="sparse", opset_imports={"": 17, DOMAIN: 1})
    whole = ir.serde.serialize_model(ir.Model(graph, ir_version=8, functions=bodies)).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    given = {n: x.numpy() for n, x in feeds.items()}
    return lambda: session.run(None, given)


def measure(lengths: Sequence[int], runs: int) -> list[Row]:
    """Times at each length, then how they grow."""
    seconds: dict[str, list[float]] = {}
    rows: list[Row] = []
    for length in lengths:
        work = calls(length)
        times = interleaved(runs, *work.values(), clock=time.process_time)
        found = {name: t.minimum for name, t in zip(work, times, strict=True)}
        for name, taken in found.items():
            seconds.setdefault(name, []).append(taken)
            whole = found["torch, all keys"]
            case = f"{name}, {length} tokens, {HEADS} heads, d {DIM}"
            rows.append(Row("time", case, taken * 1e3, whole * 1e3, "torch, all keys", "ms", whole / taken, None, None))
    for name, taken in seconds.items():
        growth = math.log(taken[-1] / taken[0]) / math.log(lengths[-1] / lengths[0])
        goal = GOALS.get(name.partition(", ")[2])
        ok = None if goal is None else growth <= goal + SLACK
        case = f"{name}, {lengths[0]} to {lengths[-1]} tokens"
        ratio = None if goal is None else goal / growth
        rows.append(Row("growth", case, growth, goal, "work", "exponent of n", ratio, goal, ok))
    return rows


def times(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Milliseconds by what is run and by tokens."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.name == "time":
            name, _, length = row.case.removesuffix(f" tokens, {HEADS} heads, d {DIM}").rpartition(", ")
            found.setdefault(name, {})[int(length)] = row.ours
    return found


def report(rows: Sequence[Row], drawn: str | None) -> str:
    """The section in docs/benchmarks.md: milliseconds by length, and how they grow; `drawn` is a picture beside it."""
    about, taken = machine(), times(rows)
    lengths = list(next(iter(taken.values())))
    grown = {r.case.rpartition(", ")[0]: r for r in rows if r.name == "growth"}
    lines = [
        [name, *curve.values(), grown[name].ours, grown[name].goal, grown[name].ok] for name, curve in taken.items()
    ]
    text = (
        f"`python -m benchmarks.sparse_attention` on {about['processor']}, load {about['load_before'][0]}: "
        f"milliseconds of processor time of one thread, {HEADS} heads of {DIM} features, causal. Fixed blocks have "
        "l = √n, the window 128 keys and 4 sinks. Growth is the exponent of n.\n\n"
    )
    table = markdown_table(["attention", *(f"{n:,} tokens" for n in lengths), "growth", "goal", "met"], lines)
    return text + table + (f"\n\n![Time over length, both on logarithmic scales]({drawn})" if drawn else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = shared_options.parser(__doc__, quick="up to 8,192 tokens, fewer runs", markdown=True)
    parser.add_argument("--svg", type=Path, metavar="F", help="draw the curves there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lengths = (2048, 4096, 8192) if options.quick else (2048, 4096, 8192, 16384)
    with torch.no_grad():
        rows = measure(lengths, 2 if options.quick else 5)
    for row in rows:
        figures = " / ".join(f"{x:.3g}" for x in (row.ours, row.peer) if x is not None)
        ratio = "" if row.ratio is None else f" = {row.ratio:.2f}"
        print(f"{row.name}: {row.case}: {figures} {row.unit}{ratio}{'' if row.ok is None else f', met: {row.ok}'}")
    if options.json:
        write_json(options.json, rows, threads=1, cpu_time=True)
    if options.svg:
        note = f"tokens, {lengths[0]:,} to {lengths[-1]:,}; milliseconds; both logarithmic"
        options.svg.write_text(svg(times(rows), note, powers=True))
    if options.markdown:
        put_section(options.markdown, "Sparse attention", report(rows, options.svg.name if options.svg else None))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
