"""Writes the tables by which ``kernels="auto"`` decides: how much faster a kernel is than torch's own operators.

    python -m benchmarks.tune_kernels [--isa avx512 | --card] [--sparse | --routed | --chunks]
        [--threads N | --cpu-time] [--runs N] [--output DIR]

Every instruction set that this processor has gets its file in codegen/tuning/, or, with --card, the graphics card.
--sparse measures sparse attention instead, on CPUs, --routed feed-forward blocks that route tokens, and --chunks
units of mixed chunk attention, on CPUs, into files of their own. The operators it is compared with are those that run
otherwise: the torch body of the op.
"""

from __future__ import annotations

import os

for _name, _value in (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0")):
    os.environ.setdefault(_name, _value)

import argparse  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402

from benchmarks.machine import machine  # noqa: E402
from benchmarks.routed_kernels import Case as RoutedCase  # noqa: E402
from benchmarks.routed_kernels import card_cases, card_works, tuned_cases  # noqa: E402
from benchmarks.rows import Clock, interleaved, timed  # noqa: E402
from codegen.device import Device, DType, Isa, host  # noqa: E402
from codegen.launch import chunk_host, operands, projection_host, routed_host, torch_op  # noqa: E402
from codegen.ops.mixed_chunk_attention import torch_body as chunk_body  # noqa: E402
from codegen.ops.routed_feed_forward import torch_body as routed_body  # noqa: E402
from codegen.sight import Sight  # noqa: E402
from codegen.spec import GroupedQueryAttention, MixedChunkAttention, PositionBias  # noqa: E402
from codegen.tuning.chunks import Measured as ChunksMeasured  # noqa: E402
from codegen.tuning.routed import Measured as RoutedMeasured  # noqa: E402
from codegen.tuning.table import FOLDER, MARGIN, Measured, Problem, kind, regime, work  # noqa: E402

HEADS = 32
DTYPES = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}

SECONDS, MOST_RUNS = 0.4, 60
"""Short problems are run more often: a busy machine's minimum takes that long to show."""

UNITS = (
    MixedChunkAttention(768, 1536, 128, chunk=256, bias=PositionBias.TOEPLITZ),
    MixedChunkAttention(256, 512, 64, chunk=64, bias=PositionBias.TOEPLITZ, span=64),
)
"""FLASH's at BERT-base's width, and a small one."""

Grid = Sequence[tuple[GroupedQueryAttention, Problem]]
Call = Callable[[], torch.Tensor]


def grid(threads: int) -> Grid:
    """Decode over short and long pasts, prefill of short and long prompts, for each group size and head size."""
    found = []
    for dim in (64, 128):
        for kv_heads in (32, 8, 1):
            decode = GroupedQueryAttention(HEADS, kv_heads, dim, dim, dim**-0.5)
            prefill = GroupedQueryAttention(HEADS, kv_heads, dim, dim, dim**-0.5, causal=True)
            found += [(decode, Problem(b, 1, keys, threads)) for b, keys in ((1, 64), (1, 512), (2, 2048), (8, 2048))]
            found += [(prefill, Problem(1, keys, keys, threads)) for keys in (16, 64, 256, 1024)]
    return found


SIGHTS = {
    "near": Sight(reach=128, sinks=4),
    "columns": Sight(block=128, period=128, first=120, last=128),
    "strided": Sight(reach=129, stride=128),
}


def sparse_grid(threads: int) -> Grid:
    """Each kind of pattern, causal and symmetric, over lengths; and one query over a long past."""
    found = []
    for sight, kv_heads, ordered in itertools.product(SIGHTS.values(), (12, 3), (True, False)):
        pattern = (replace(sight, ordered=ordered),)
        spec = GroupedQueryAttention(12, kv_heads, 64, 64, 0.125, causal=ordered, pattern=pattern)
        found += [(spec, Problem(1, keys, keys, threads)) for keys in (128, 512, 2048)]
        found += [(spec, Problem(4, 1, 2048, threads))]
    return found


def card_grid() -> Grid:
    """The same with and without a mask, on sizes that a card is bought for."""
    found = []
    for dim, kv_heads, bias in itertools.product((64, 128), (32, 8, 1), (False, True)):
        decode = GroupedQueryAttention(HEADS, kv_heads, dim, dim, dim**-0.5, bias=bias)
        prefill = GroupedQueryAttention(HEADS, kv_heads, dim, dim, dim**-0.5, causal=not bias, bias=bias)
        found += [(decode, Problem(b, 1, keys, 0)) for b, keys in ((1, 1024), (8, 4096), (64, 4096))]
        found += [(prefill, Problem(b, keys, keys, 0)) for b, keys in ((1, 256), (4, 1024), (1, 4096))]
    return found


@contextlib.contextmanager
def always(isa: str | None) -> Iterator[None]:
    """Inside, kernels win whatever the present tables say; on CPUs those for `isa`."""
    with (
        mock.patch.object(torch_op, "faster", lambda *_: True),
        mock.patch.object(torch_op, "host", lambda: Device("cpu", isa or host().arch)),
    ):
        torch_op._choice.cache_clear()
        yield
    torch_op._choice.cache_clear()


def calls(spec: GroupedQueryAttention, problem: Problem, dtype: DType, device: str) -> tuple[Call, Call]:
    """The kernel and torch's own operators, through the call that modules make, with all that it costs."""
    random = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int, dim: int) -> torch.Tensor:
        return torch.randn(problem.batch, heads, tokens, dim, generator=random).to(device, DTYPES[dtype])

    q = draw(spec.heads, problem.queries, spec.head_dim)
    k, v = (draw(spec.kv_heads, problem.keys, dim) for dim in (spec.head_dim, spec.value_dim))
    mask = draw(1, problem.queries, problem.keys) if spec.bias else None
    return lambda: torch_op.attention(spec, q, k, v, mask), lambda: torch_op.attention(
        spec, q, k, v, mask, kernels="off"
    )


def measure(spec: GroupedQueryAttention, problem: Problem, dtype: DType, isa: str, runs: int, clock: Clock) -> Measured:
    """Both by turns, best of `runs` or more."""
    ours, theirs = calls(spec, problem, dtype, "cpu")
    first = max(timed(call, 1)[0].minimum for call in (ours, theirs))
    mine, other = interleaved(max(runs, min(MOST_RUNS, int(SECONDS / first))), ours, theirs, clock=clock)
    return measured(spec, problem, dtype, isa, other.minimum / mine.minimum)


def measure_card(arch: str, runs: int) -> list[Measured]:
    """As `measure`, by the card's own clock and without what the host takes to launch."""
    from benchmarks.gpu import Clock as CardClock

    clock = CardClock()
    found = []
    for dtype, (spec, problem) in itertools.product((DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32), card_grid()):
        mine, other = clock.times(runs, *calls(spec, problem, dtype, "cuda"))
        found.append(measured(spec, problem, dtype, arch, min(other) / min(mine)))
    return found


def measure_routed(isa: str, runs: int, clock: Clock) -> list[RoutedMeasured]:
    """Routed feed-forward blocks on the processor, by the kernel for `isa`."""
    found = []
    with mock.patch.object(operands, "host", lambda: Device("cpu", isa)):
        for dtype, case in itertools.product(DTYPES, tuned_cases()):
            x, rows, weights, held = replace(case, dtype=DTYPES[dtype]).operands()
            ours = functools.partial(routed_host.launch, case.spec, x, rows, weights, held)
            theirs = functools.partial(routed_body.routed_feed_forward, case.spec, x, rows, weights, held)
            first = max(timed(call, 1)[0].minimum for call in (ours, theirs))
            mine, other = interleaved(max(runs, min(MOST_RUNS, int(SECONDS / first))), ours, theirs, clock=clock)
            found.append(measured_routed(case, dtype, isa, other.minimum / mine.minimum))
    operands._loaded.cache_clear()
    return found


def measure_routed_card(arch: str, runs: int) -> list[RoutedMeasured]:
    """The same on the card, of few and many places."""
    from benchmarks.gpu import Clock as CardClock

    clock = CardClock()
    found = []
    for dtype, case, share in itertools.product(DTYPES, card_cases(quick=False), (1, 8, 64)):
        own = replace(case, places=case.places // share, dtype=DTYPES[dtype])
        mine, other = clock.times(runs, *card_works(own)[0].values())
        found.append(measured_routed(own, dtype, arch, min(other) / min(mine)))
    return found


def measure_chunks(isa: str, runs: int, clock: Clock) -> list[ChunksMeasured]:
    """Units with their projections, by the kernels for `isa`, in float32, of short and long sequences."""
    found, device = [], Device("cpu", isa)
    with (
        mock.patch.object(operands, "host", lambda: device),
        mock.patch.object(projection_host, "host", lambda: device),
    ):
        for unit, causal, tokens in itertools.product(UNITS, (True, False), (256, 2048)):
            found.append(_measured_chunks(replace(unit, causal=causal), tokens, DType.FLOAT32, isa, runs, clock))
    operands._loaded.cache_clear()
    return found


def _measured_chunks(
    spec: MixedChunkAttention, tokens: int, dtype: DType, isa: str, runs: int, clock: Clock
) -> ChunksMeasured:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(DTYPES[dtype])

    x, weights = draw(1, tokens, spec.hidden), {n: draw(*s) / s[-1] ** 0.5 for n, s in spec.shapes.items()}
    calls = [
        functools.partial(body, spec, x, weights)
        for body in (chunk_host.mixed_chunk_attention, chunk_body.mixed_chunk_attention)
    ]
    first = max(timed(call, 1)[0].minimum for call in calls)
    mine, other = interleaved(max(runs, min(MOST_RUNS, int(SECONDS / first))), *calls, clock=clock)
    sizes = (spec.hidden, spec.expanded, spec.base, spec.chunk, tokens)
    return ChunksMeasured(dtype.value, isa, spec.causal, *sizes, round(other.minimum / mine.minimum, 2))


def measured_routed(case: RoutedCase, dtype: DType, arch: str, ratio: float) -> RoutedMeasured:
    spec = case.spec
    sizes = (spec.experts, spec.hidden, spec.inner, case.places)
    return RoutedMeasured(dtype.value, arch, spec.gated, *sizes, round(ratio, 2))


def measured(spec: GroupedQueryAttention, problem: Problem, dtype: DType, isa: str, ratio: float) -> Measured:
    size = work(spec, problem)
    beside = {"bias": spec.bias, "pattern": kind(spec.pattern)}
    return Measured(dtype.value, isa, regime(problem), spec.group, spec.head_dim, size, round(ratio, 2), **beside)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=[isa.value for isa in Isa], action="append")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread: for busy machines")
    parser.add_argument("--card", action="store_true", help="measure the CUDA card instead of the processor")
    parser.add_argument("--sparse", action="store_true", help="measure sparse attention instead")
    parser.add_argument("--routed", action="store_true", help="measure routed feed-forward blocks instead")
    parser.add_argument("--chunks", action="store_true", help="measure mixed chunk attention instead")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    threads = 1 if options.cpu_time else options.threads
    torch.set_num_threads(threads)
    if options.card:
        return tune_card(options.output, options.runs, routed=options.routed)
    order = [isa.value for isa in Isa]
    able = order[: order.index(host().arch) + 1] if host().arch else []
    for isa in options.isa or able:
        if isa not in able:
            print(f"this processor has no {isa}", file=sys.stderr)
            return 2
        about = {"processor": machine()["processor"], "threads": threads, "torch": torch.__version__}
        if options.routed or options.chunks:
            kind_of, measuring = ("routed", measure_routed) if options.routed else ("chunks", measure_chunks)
            with torch.no_grad():
                found = measuring(isa, options.runs, clock)
            write_table(options.output / f"{kind_of}_cpu_{isa}.json", about, found, kind_of)
            continue
        rows = []
        with torch.no_grad(), always(isa):
            for dtype in DTYPES:
                for spec, problem in (sparse_grid if options.sparse else grid)(threads):
                    rows.append(measure(spec, problem, dtype, isa, options.runs, clock))
        write_table(options.output / f"cpu_{isa}{'_sparse' * options.sparse}.json", about, rows)
    return 0


def tune_card(output: Path, runs: int, *, routed: bool) -> int:
    if not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    arch = torch_op.graphics_card(device)[0].arch
    about: dict[str, object] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    with torch.no_grad(), always(None):
        if routed:
            write_table(output / f"routed_{arch}.json", about, measure_routed_card(arch, runs), "routed")
        else:
            write_table(output / f"{arch}.json", about, measure_card(arch, runs))
    return 0


def write_table(
    path: Path,
    about: dict[str, object],
    rows: Sequence[Measured | RoutedMeasured | ChunksMeasured],
    key: str = "measured",
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_compact(about, key, [json.dumps(asdict(row)) for row in rows]))
    print(f"{path.name}: {len(rows)} problems, faster in {sum(r.speedup > MARGIN for r in rows)}")


def _compact(about: dict[str, object], key: str, rows: Sequence[str]) -> str:
    """One line per measurement, so that changes can be read."""
    lines = ",\n  ".join(rows)
    return f'{{\n "about": {json.dumps(about)},\n "{key}": [\n  {lines}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
