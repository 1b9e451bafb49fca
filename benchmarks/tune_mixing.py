"""Times ways to cut Fourier mixing on the graphics card at hand; `cuda_kernel.cut_for` holds what won.

    python -m benchmarks.tune_mixing [--size BxSxD]... [--json F]

Each cut is checked against torch's transform in double precision, then timed three ways, L2 cache flushed before each
run: as a call (CUDA events around it), replayed from a CUDA graph (what the card takes alone), and the processor's time
to issue it. torch.fft and the Triton kernel stand beside them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ERROR_LIMIT, Call, Clock, mixing_cases
from codegen.errors import KernelError
from codegen.launch import fourier_cuda, fourier_op
from codegen.launch.torch_op import graphics_card
from codegen.ops.fourier_mixing.cuda_kernel import Cut, cut_for, radices
from codegen.spec import FourierMixing

CALLS = 50
"""Of which the processor's time is the mean."""


def cuts(tokens: int, hidden: int) -> Iterator[Cut]:
    """Over features every number of threads with every number of pairs; over tokens likewise; not all combinations."""
    yield Cut()
    yield Cut(early=False)
    for threads, pairs in itertools.product((32, 48, 64, 96), (1, 2, 4)):
        if hidden // max(radices(hidden) or (1,)) >= threads // 2 and threads * pairs <= 256:
            yield Cut(feature_threads=threads, pairs=pairs)
    own = {tokens // radix for radix in radices(tokens) or ()} | {tokens // 32}
    for threads, columns in itertools.product(sorted(own), (2, 4, 8, 16)):
        if threads and 32 <= threads * columns <= 1024 and tokens * columns * 9 <= 220 << 10:
            yield Cut(token_threads=threads, columns=columns)


def graph_of(work: Call) -> Call:
    """Replays what `work` launches; its operands stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay  # type: ignore[no-any-return]


def issue_time(work: Call) -> float:
    """Milliseconds of the processor for one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * spent / CALLS


def measure(size: tuple[int, int, int], clock: Clock, runs: int) -> list[dict[str, Any]]:
    spec = FourierMixing(size[2])
    x = torch.randn(size, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(torch.bfloat16)
    arch = graphics_card(x.device)[0].arch
    works: dict[str, Call] = {
        "torch.fft": lambda: torch.fft.fft2(x.float()).real.to(x.dtype),
        "Triton": functools.partial(fourier_op.launch, spec, x, arch=arch),
    }
    for cut in cuts(size[1], size[2]):
        works[str(cut_for(spec, size[1], arch, cut))] = functools.partial(
            fourier_cuda.launch, spec, x, arch=arch, cut=cut
        )
    right = torch.fft.fft2(x.double()).real
    usable: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for name, work in works.items():
        try:
            errors[name] = float((work().double() - right).norm() / right.norm())
            usable[name] = work
        except KernelError as error:
            print(f"  {name}: {error}", file=sys.stderr)
    graphs = {name: graph_of(work) for name, work in usable.items()}
    calls, replays = clock.times(runs, *usable.values()), clock.times(runs, *graphs.values())
    return [
        {"size": size, "what": name, "call_ms": min(call), "graph_ms": min(replay),
         "graph_median_ms": statistics.median(replay), "issue_ms": issue_time(usable[name]), "error": errors[name],
         "ok": errors[name] <= ERROR_LIMIT}
        for name, call, replay in zip(usable, calls, replays, strict=True)
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="batch x tokens x features, e.g. 8x512x768")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was measured", file=sys.stderr)
        return 1
    sizes = [tuple(map(int, text.split("x"))) for text in options.size or ()] or mixing_cases(quick=False)[:3]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        clock = Clock()
        for size in sizes:
            found = measure(size, clock, options.runs)  # type: ignore[arg-type]
            peer = next(row for row in found if row["what"] == "torch.fft")
            print(f"{size}")
            for row in sorted(found, key=lambda row: float(row["graph_ms"])):
                ratios = (peer[key] / row[key] for key in ("call_ms", "graph_ms"))
                print("  call {:.4f} ms ({:.2f}x)  graph {:.4f} ms ({:.2f}x)  issue {:.4f} ms  error {:.1e}  {}".format(
                    row["call_ms"], next(ratios), row["graph_ms"], next(ratios), row["issue_ms"], row["error"],
                    row["what"]), flush=True)  # fmt: skip
            rows += found
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
