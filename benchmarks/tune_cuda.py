"""Times ways to cut the CUDA C++ kernels' work on the graphics card at hand; `cut_for` of each op holds what won.

    python -m benchmarks.tune_cuda mixing|decode [--size BxSxD]... [--runs N] [--json F]

Each cut is checked (Fourier mixing against torch's transform in double precision, attention against the Triton
kernel), then timed three ways, L2 cache flushed before each run: as a call (CUDA events around it), replayed from a
CUDA graph (what the card takes alone), and the processor's time to issue it. torch's operators and the Triton kernels
stand beside them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.gpu import ERROR_LIMIT, Call, Clock, cases, draw_operands, mixing_cases
from benchmarks.kernels import Case
from codegen.errors import KernelError
from codegen.launch import attention_cuda, fourier_cuda, fourier_op, triton_op
from codegen.launch.torch_op import graphics_card
from codegen.ops.fourier_mixing.cuda_kernel import IN_REGISTERS, Cut, cut_for, radices
from codegen.ops.grouped_query_attention import cuda_kernel as attention_cut
from codegen.spec import FourierMixing

CALLS = 50
"""Of which the processor's time is the mean."""


def cuts(tokens: int, hidden: int) -> Iterator[Cut]:
    """Bundles with threads of the first kernel, then ways of the second; not all combinations."""
    yield Cut()
    yield Cut(early=False)
    for bundle, threads in itertools.product((4, 8, 16), (32, 48, 64, 96, 128)):
        if tokens % bundle == 0 and bundle // 2 * threads <= 1024:
            yield Cut(bundle=bundle, feature_threads=threads)
    for bundle in (8, 16):
        rest = tokens // bundle
        if tokens % bundle == 0 and rest in IN_REGISTERS:
            yield from (Cut(bundle=bundle, columns=columns) for columns in (64, 256))
        elif tokens % bundle == 0:
            own = sorted({rest // radix for radix in radices(rest) or ()})
            sizes = [(n, c) for n in own for c in (8, 16, 32) if n * c <= 1024]
            yield from (Cut(bundle=bundle, token_threads=n, columns=c) for n, c in sizes)


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


@dataclass(frozen=True)
class Problem:
    """Works by name, the first being the one to beat, and how far off the result of a work is."""

    name: str
    works: dict[str, Call]
    error: Callable[[Tensor], float]


def mixing(size: tuple[int, int, int]) -> Problem:
    spec = FourierMixing(size[2])
    x = torch.randn(size, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(torch.bfloat16)
    arch = graphics_card(x.device)[0].arch
    works: dict[str, Call] = {
        "torch.fft": lambda: torch.fft.fft2(x.float()).real.to(x.dtype),
        "Triton": functools.partial(fourier_op.launch, spec, x, arch=arch),
    }
    for cut in cuts(size[1], size[2]):
        whole = cut_for(spec, size[1], arch, cut)
        works[str(whole)] = functools.partial(fourier_cuda.launch, spec, x, arch=arch, cut=whole)
    right = torch.fft.fft2(x.double()).real
    return Problem(f"mixing {size}", works, lambda found: float((found.double() - right).norm() / right.norm()))


def decode(case: Case) -> Problem:
    q, k, v = draw_operands(case)
    device, processors = graphics_card(q.device)
    card: dict[str, Any] = {"arch": device.arch, "processors": processors}
    grouped = case.kv_heads != case.heads
    works: dict[str, Call] = {
        "torch sdpa": lambda: sdpa(q, k, v, enable_gqa=grouped),
        "Triton": functools.partial(triton_op.launch, case.spec, q, k, v, **card),
    }
    for warps, stages, waves in itertools.product((2, 4, 8), (2, 3, 4), (2, 4, 8)):
        cut = attention_cut.Cut(warps, stages, waves)
        if attention_cut.shared_memory(case.spec, cut) <= 220 << 10:
            works[str(cut)] = functools.partial(attention_cuda.launch, case.spec, q, k, v, cut=cut, **card)
    right = works["Triton"]().float()
    return Problem(str(case), works, lambda found: float((found.float() - right).abs().max() / right.abs().max()))


def measure(problem: Problem, clock: Clock, runs: int) -> list[dict[str, Any]]:
    usable: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for name, work in problem.works.items():
        try:
            errors[name] = problem.error(work())
            usable[name] = work
        except KernelError as error:
            print(f"  {name}: {error}", file=sys.stderr)
    graphs = {name: graph_of(work) for name, work in usable.items()}
    calls, replays = clock.times(runs, *usable.values()), clock.times(runs, *graphs.values())
    return [
        {"case": problem.name, "what": name, "call_ms": min(call), "graph_ms": min(replay),
         "graph_median_ms": statistics.median(replay), "issue_ms": issue_time(usable[name]), "error": errors[name],
         "ok": errors[name] <= ERROR_LIMIT}
        for name, call, replay in zip(usable, calls, replays, strict=True)
    ]  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    peer = rows[0]
    print(peer["case"])
    for row in sorted(rows, key=lambda row: float(row["graph_ms"])):
        ratios = [peer[key] / row[key] for key in ("call_ms", "graph_ms")]
        print(f"  call {row['call_ms']:.4f} ms ({ratios[0]:.2f}x)  graph {row['graph_ms']:.4f} ms ({ratios[1]:.2f}x)  "
              f"issue {row['issue_ms']:.4f} ms  error {row['error']:.1e}  {row['what']}", flush=True)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=("mixing", "decode"))
    parser.add_argument("--size", action="append", help="of mixing: batch x tokens x features, e.g. 8x512x768")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was measured", file=sys.stderr)
        return 1
    sizes = [tuple(map(int, text.split("x"))) for text in options.size or ()] or mixing_cases(quick=False)[:3]
    problems: list[Callable[[], Problem]] = [functools.partial(mixing, size) for size in sizes]  # type: ignore[arg-type]
    if options.op == "decode":
        problems = [functools.partial(decode, case) for case in cases(quick=False) if case.kind == "decode"]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        clock = Clock()
        for made in problems:
            found = measure(made(), clock, options.runs)
            show(found)
            rows += found
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
