"""Times ways to cut attention into tiles on the graphics card at hand; `triton_kernel.tiling` holds what won.

    python -m benchmarks.tune_gpu [--kind decode|prefill] [--json F]

Each cut is built in a process of its own, checked against torch's attention, and timed as in benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.gpu import DTYPE, ERROR_LIMIT, Clock, draw_operands
from benchmarks.kernels import Case
from codegen.launch.torch_op import graphics_card
from codegen.launch.triton_op import launch
from codegen.ops.grouped_query_attention.triton_kernel import Tiling, block

SHARED = 227 << 10
"""Bytes of shared memory that a program may take on the cards with tensor descriptors."""
BUILDERS = 12


@dataclass(frozen=True)
class Trial:
    case: Case
    cut: Tiling
    waves: int

    @property
    def label(self) -> str:
        c = self.cut
        how = "descriptors" if c.descriptors else "pointers"
        return f"{c.row_tile} x {c.key_tile}, {c.warps} warps, {c.stages} stages, {how}, {self.waves} waves"


DECODE, PREFILL = ((16, 32, 128), (32, 8, 128), (256, 1, 128), (64, 8, 64)), ((32, 128), (8, 128), (8, 64))


def cases(kind: str | None) -> list[Case]:
    decode = [Case("decode", batch, 32, kv, d, 8192, DTYPE) for batch, kv, d in DECODE]
    prefill = [Case("prefill", 1, 32, kv, d, 8192, DTYPE) for kv, d in PREFILL]
    return [c for c in (*decode, *prefill) if kind in (None, c.kind)]


def trials(case: Case) -> Iterator[Trial]:
    """Cuts whose tiles fit the shared memory."""
    if case.kind == "decode":
        rows: Sequence[int] = (min(64, block(case.heads // case.kv_heads)),)
        grid = itertools.product(rows, (32, 64, 128), (2, 4, 8), (2, 3, 4), (False, True), (1, 2, 4))
    else:
        grid = itertools.product((64, 128), (64, 128), (4, 8), (2, 3), (False, True), (2,))
    for row_tile, key_tile, warps, stages, descriptors, waves in grid:
        tiles = 2 * stages * key_tile * case.dim * 2 + row_tile * case.dim * 2
        if tiles <= SHARED and not (case.kind == "prefill" and row_tile == 128 and warps == 4):
            yield Trial(case, Tiling(row_tile, key_tile, warps, stages, descriptors), waves)


def run(trial: Trial, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    device, processors = graphics_card(operands[0].device)
    q, k, v = operands
    return launch(trial.case.spec, q, k, v, arch=device.arch, processors=trial.waves * processors // 2, cut=trial.cut)


def build(trial: Trial) -> str | None:
    """Compile by running once on a short problem; why it does not work, or None."""
    short = Case(trial.case.kind, 1, trial.case.heads, trial.case.kv_heads, trial.case.dim, 512, DTYPE)
    try:
        with torch.no_grad():
            run(Trial(short, trial.cut, 2 * trial.waves), draw_operands(short))
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler says: this cut is out
        return f"{type(error).__name__}: {error}"[:200]
    return None


def measure(case: Case, clock: Clock, runs: int, working: Sequence[Trial]) -> list[dict[str, object]]:
    operands = draw_operands(case)
    q, k, v = operands
    right = sdpa(q, k, v, is_causal=case.kind == "prefill", enable_gqa=True).float()
    found: list[dict[str, object]] = []
    for trial in working:
        error = float((run(trial, operands).float() - right).abs().max() / right.abs().max())
        (times,) = clock.times(runs, lambda trial=trial: run(trial, operands))
        found.append({
            "case": str(case), "cut": asdict(trial.cut), "label": trial.label, "waves": trial.waves, "error": error,
            "min": min(times), "median": statistics.median(times), "ok": error < ERROR_LIMIT,
        })  # fmt: skip
    return sorted(found, key=lambda row: float(str(row["min"])))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["decode", "prefill"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--best", type=int, default=8, help="how many cuts to print per problem")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was measured", file=sys.stderr)
        return 1
    every = [t for case in cases(options.kind) for t in trials(case)]
    # one build serves all numbers of waves
    builds = {(t.case, t.cut): t for t in every}
    workers = min(BUILDERS, max(1, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        reasons = dict(zip(builds, pool.map(build, builds.values(), chunksize=2), strict=True))
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        clock = Clock()
        for case in cases(options.kind):
            working = [t for t in every if t.case == case and reasons[t.case, t.cut] is None]
            failed = {r for (c, _), r in reasons.items() if c == case and r is not None}
            found = measure(case, clock, options.runs, working)
            print(f"{case}: {len(found)} cuts, {len(failed)} reasons why others do not build", flush=True)
            for reason in sorted(failed)[:3]:
                print(f"    {reason}")
            for row in found[: options.best]:
                print(f"    {row['min']:.4f} ms (median {row['median']:.4f}, error {row['error']:.1e}): {row['label']}")
            rows += found
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
