"""Generated kernels beside torch's and onnxruntime's own operators, and beside what the machine can do at most.

    python -m benchmarks.kernels [--quick] [--threads N | --cpu-time] [--json F] [--markdown F]

Everything is timed by turns in one run; --cpu-time takes processor time of one thread, which the machine's other work
disturbs less. Rows "share of the machine's ..." compare with the read bandwidth or the multiply-add rate measured just
before and just after; all others compare times.
"""

from __future__ import annotations

import os

# Before torch starts: threads of one library must not spin while another one works.
for _name, _value in (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0")):
    os.environ.setdefault(_name, _value)

import argparse  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import (  # noqa: E402
    attention_peers,
    build_times,
    file_kernels,
    linear_kernels,
    mixing_kernels,
    peaks,
    routed_kernels,
    sparse_kernels,
)
from benchmarks.machine import machine  # noqa: E402
from benchmarks.rows import Clock, Row, Times, interleaved, markdown_table, put_section, timed, write_json  # noqa: E402
from codegen.device import DType, host  # noqa: E402
from codegen.launch.host import load  # noqa: E402
from codegen.launch.torch_op import launch  # noqa: E402
from codegen.registry import select  # noqa: E402
from codegen.spec import GroupedQueryAttention  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ERROR_LIMIT = 2e-6
CHECKED_QUERIES = 32
MACHINE = "the machine"


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        kind: "decode" (one query per sequence) or "prefill" (causal, as many queries as keys).
    """

    kind: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    keys: int
    dtype: str

    @property
    def spec(self) -> GroupedQueryAttention:
        return GroupedQueryAttention(
            self.heads, self.kv_heads, self.dim, self.dim, self.dim**-0.5, causal=self.kind == "prefill"
        )

    @property
    def queries(self) -> int:
        return self.keys if self.kind == "prefill" else 1

    @property
    def cache_bytes(self) -> int:
        return 2 * self.batch * self.kv_heads * self.keys * self.dim * (4 if self.dtype == "float32" else 2)

    @property
    def flops(self) -> float:
        full = 4.0 * self.batch * self.heads * self.queries * self.keys * self.dim
        return full / 2 if self.kind == "prefill" else full

    def __str__(self) -> str:
        heads = f"{self.heads} heads on {self.kv_heads}"
        return f"{self.kind}, {self.batch} x {self.keys} keys, {heads}, d {self.dim}, {self.dtype}"


def cases(*, quick: bool) -> list[Case]:
    """The grid; the quick one has each kind, head count and format once."""
    decode = [Case("decode", 16, 32, kv, d, 4096, dtype) for dtype in DTYPES for d in (64, 128) for kv in (32, 8, 1)]
    prefill = [Case("prefill", 1, 12, 12, d, 4096, dtype) for dtype in DTYPES for d in (64, 128)]
    prefill += [Case("prefill", 1, 32, 8, 64, 2048, "float32")]
    if not quick:
        return [*decode, *prefill]
    return [replace(c, batch=4) for c in decode if c.dim == 64] + [
        replace(c, keys=1024) for c in prefill if c.dim == 64
    ]


def goal_against_peers(case: Case) -> float | None:
    """How many times as fast as the best peer the kernel should be; None if nothing is asked."""
    if case.kind == "prefill":
        return 1.8 if case.keys >= 4096 and case.dtype == "float32" else None
    if case.dtype == "bfloat16":
        return 4.0
    return {8: 1.6, 1: 4.0}.get(case.kv_heads)


def run_case(case: Case, runs: int, threads: int, clock: Clock) -> list[Row]:
    """Rows of one case: beside each peer, beside the best of them, and beside the machine's limits."""
    q, k, v = _operands(case)
    choice = select(case.spec, host(), DType(case.dtype))
    assert choice is not None
    kernel = load(choice)

    def ours() -> Tensor:
        return launch(kernel, case.spec, q, k, v, None, None)

    make = attention_peers.decode_peers if case.kind == "decode" else attention_peers.prefill_peers
    peers = make(q, k, v, threads)
    error = error_beside_double(case, ours(), q, k, v)
    others = {name: _difference(attention_peers.as_heads(call(), q), ours()) for name, call in peers.items()}
    before = peaks.measure(2, clock)
    slow = {name: timed(call, 1, clock)[0].minimum for name, call in peers.items()}
    often = [name for name in peers if slow[name] < 20 * timed(ours, 1, clock)[0].minimum]
    times = dict(zip(["ours", *often], interleaved(runs, ours, *(peers[n] for n in often), clock=clock), strict=True))
    times |= {name: timed(peers[name], 2, clock)[0] for name in peers if name not in often}
    after = peaks.measure(2, clock)
    return _rows(case, times, error, others, before, after)


def _rows(
    case: Case, times: Mapping[str, Times], error: float, others: Mapping[str, float], *limits: peaks.Peaks
) -> list[Row]:
    mine = times["ours"]
    more: dict[str, Any] = {
        "kind": case.kind, "dtype": case.dtype, "dim": case.dim, "heads": case.heads, "kv_heads": case.kv_heads,
        "ours_median": mine.median * 1e3, "error": error,
    }  # fmt: skip
    rows = []
    peers = {name: t for name, t in times.items() if name != "ours"}
    best = min(peers, key=lambda name: peers[name].minimum)
    for name, t in peers.items():
        goal = goal_against_peers(case) if name == best else None
        ratio = t.minimum / mine.minimum
        extra = {"peer_median": t.median * 1e3, "best_peer": name == best, "peer_differs_by": others[name]}
        ms = (mine.minimum * 1e3, t.minimum * 1e3)
        rows.append(_row("time", case, ms, name, "ms", ratio, goal, {**more, **extra}))
    if case.kind == "decode" and case.kv_heads > 1:
        found, limit = case.cache_bytes / mine.minimum / 1e9, max(p.bandwidth for p in limits) / 1e9
        rows.append(_limit("share of the machine's read bandwidth", case, found, limit, "GB/s", 0.8, more))
    else:
        found = case.flops / mine.minimum / 1e9
        limit = max(p.float32 if case.dtype == "float32" else p.bfloat16 or p.float32 for p in limits) / 1e9
        goal = 0.5 if case.kind == "decode" else None
        rows.append(_limit("share of the machine's multiply-add rate", case, found, limit, "Gflop/s", goal, more))
    if case.kind == "prefill" and case.dtype == "float32":
        pair = (error, ERROR_LIMIT)
        rows.append(_row("error", case, pair, "limit", "of the largest output", ERROR_LIMIT / error, 1.0, more))
    return rows


def _limit(
    name: str, case: Case, found: float, limit: float, unit: str, goal: float | None, more: Mapping[str, Any]
) -> Row:
    return _row(name, case, (found, limit), MACHINE, unit, found / limit, goal, more)


def _row(
    name: str,
    case: Case,
    figures: tuple[float, float],
    peer: str,
    unit: str,
    ratio: float,
    goal: float | None,
    more: Mapping[str, Any],
) -> Row:
    ok = None if goal is None else ratio >= goal
    return Row(name, str(case), figures[0], figures[1], peer, unit, ratio, goal, ok, more)


def _operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        block = torch.randn(1, heads, tokens, case.dim, generator=random).to(DTYPES[case.dtype])
        return block.expand(case.batch, -1, -1, -1).contiguous()  # copies: each sequence has a cache of its own

    return draw(case.heads, case.queries), draw(case.kv_heads, case.keys), draw(case.kv_heads, case.keys)


def error_beside_double(
    case: Case, found: Tensor, q: Tensor, k: Tensor, v: Tensor, *, queries: int = CHECKED_QUERIES
) -> float:
    """Of the last queries of the first sequence, relative to their largest number, beside double precision."""
    last = slice(case.queries - min(case.queries, queries), case.queries)
    group = case.heads // case.kv_heads
    wide = [x[:1].repeat_interleave(group, 1).double() for x in (k, v)]
    scores = q[:1, :, last].double() @ wide[0].transpose(-1, -2) * case.spec.scale
    if case.kind == "prefill":
        rows = scores.shape[2]
        scores.masked_fill_(
            ~torch.ones(rows, case.keys, dtype=torch.bool, device=q.device).tril(case.keys - rows), -torch.inf
        )
    right = scores.softmax(-1) @ wide[1]
    return float((found[:1, :, last].double() - right).abs().max() / right.abs().max())


def _difference(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.float() - ours.float()).abs().max() / ours.float().abs().max())


def report(rows: Sequence[Row], threads: int, *, cpu_time: bool) -> str:
    """The section of docs/benchmarks.md."""
    about = machine()
    measured = "processor time of one thread" if cpu_time else f"wall time on {threads} threads"
    text = (
        f"`python -m benchmarks.kernels{' --cpu-time' * cpu_time}` on {about['processor']}, {host().arch}, torch "
        f"{torch.__version__}. Milliseconds are minima of {measured}, over runs by turns; the load of the machine was "
        f"{about['load_before'][0]} at the end, so read ratios, not times.\n\n"
    )
    timed_rows = [r for r in rows if r.name == "time"]
    best = [r for r in timed_rows if r.more["best_peer"]]
    timings = [[r.case, r.ours, r.peer_name, r.peer, r.ratio, r.goal, r.ok] for r in best]
    text += "Beside the fastest of torch's and onnxruntime's own operators:\n\n"
    text += markdown_table(["case", "ours, ms", "best peer", "peer, ms", "ratio", "goal", "met"], timings)
    text += "\n\nBeside what the machine can do:\n\n"
    limits = [[r.case, r.ours, r.peer, r.unit, r.ratio, r.goal, r.ok] for r in rows if r.peer_name == MACHINE]
    text += markdown_table(["case", "ours", "machine", "unit", "share", "goal", "met"], limits)
    text += "\n\nAll peers:\n\n"
    everything = [
        [r.case, r.peer_name, r.ours, r.more["ours_median"], r.peer, r.more["peer_median"], r.ratio] for r in timed_rows
    ]
    header = ["case", "peer", "ours, min ms", "ours, median", "peer, min ms", "peer, median", "ratio of minima"]
    text += markdown_table(header, everything)
    errors = [[r.case, r.ours, r.peer, r.ok] for r in rows if r.name == "error"]
    text += "\n\nError beside double precision, relative to the largest output:\n\n"
    text += markdown_table(["case", "error", "limit", "met"], errors)
    builds = [[r.case, r.ours, r.peer, r.ok] for r in rows if r.name == "build"]
    text += "\n\nThe compiler's processor time:\n\n"
    return text + markdown_table(["case", "seconds", "limit", "met"], builds)


def _line(row: Row) -> str:
    return f"{row.case}: {row.name} {row.ours:.3g} / {row.peer:.3g} {row.unit} ({row.peer_name}) = {row.ratio:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller problems, fewer runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for machines that others keep busy")
    options = parser.parse_args(arguments)
    if options.cpu_time:
        options.threads = 1
    clock = time.process_time if options.cpu_time else time.perf_counter
    if not host().arch:
        print("this processor has none of the instruction sets that there are kernels for", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    runs = options.runs or (5 if options.quick else 15)
    rows: list[Row] = []
    with torch.no_grad():
        work: list[tuple[Callable[..., list[Row]], Any]] = [(run_case, case) for case in cases(quick=options.quick)]
        work += [(mixing_kernels.run_case, case) for case in mixing_kernels.cases(quick=options.quick)]
        work += [(linear_kernels.run_case, case) for case in linear_kernels.cases(quick=options.quick)]
        work += [(file_kernels.run_case, case) for case in file_kernels.cases(quick=options.quick)]
        work += [(build_times.run_case, case) for case in build_times.cases(quick=options.quick)]
        work += [(sparse_kernels.run_case, case) for case in sparse_kernels.cases(quick=options.quick)]
        work += [(routed_kernels.run_case, case) for case in routed_kernels.cases(quick=options.quick)]
        for run, case in work:
            if options.only in str(case):
                found = run(case, runs, options.threads, clock)
                rows += found
                for row in found:
                    print(_line(row), flush=True)
    if options.json:
        write_json(options.json, rows, threads=options.threads, isa=host().arch, cpu_time=options.cpu_time)
    if options.markdown:
        put_section(options.markdown, "Kernels", report(rows, options.threads, cpu_time=options.cpu_time))
    return 0


if __name__ == "__main__":
    sys.exit(main())
