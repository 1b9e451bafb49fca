"""Builds, checks and times every kernel for graphics cards, beside torch's own, in one run.

    python -m benchmarks.gpu [--quick] [--only PART …] [--json F] [--markdown F]

Needs a CUDA device and Triton; without them it says so and measures nothing (exit code 1). Each kernel is first held
against attention in double precision. Times are CUDA events around single calls with the L2 cache flushed before each;
the copy bandwidth and the bfloat16 matrix rate of the card are measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks import card_files
from benchmarks.kernels import Case, error_beside_double
from benchmarks.machine import machine
from benchmarks.routed_kernels import Case as RoutedCase
from benchmarks.routed_kernels import card_cases, card_works
from benchmarks.rows import Row, markdown_table, put_section, write_json
from codegen.errors import KernelError
from codegen.ops.fourier_mixing import torch_body as fourier_body
from codegen.ops.grouped_query_attention import torch_body
from codegen.ops.grouped_query_attention.sparse_body import shown
from codegen.ops.linear_attention import torch_body as linear_body
from codegen.sight import Pattern, Sight, visible
from codegen.spec import FeatureMap, FourierMixing, GroupedQueryAttention, LinearAttention, MixedChunkAttention

DECODE_GOAL, PREFILL_GOAL, MIXING_GOAL = 0.85, 0.6, 4.0
CHECKED_QUERIES = 64
DTYPE = "bfloat16"
ERROR_LIMIT = 2e-2
"""Of bfloat16 results, relative to the largest: two roundings of the result and one of the weights."""

PARTS = ("attention", "sparse", "linear", "chunks", "routed", "fourier", "onnxruntime")

Call = Callable[[], Tensor]


def cases(*, quick: bool) -> list[Case]:
    """Decode steps read at least 1 GB of keys and values (64 MB when quick)."""
    small = 16 if quick else 1
    decode = [Case("decode", batch // small, 32, kv, 128, 8192, DTYPE) for batch, kv in ((16, 32), (32, 8), (256, 1))]
    decode.append(Case("decode", 64 // small, 32, 8, 64, 8192, DTYPE))
    keys = 2048 if quick else 8192
    return [*decode, *(Case("prefill", 1, 32, kv, d, keys, DTYPE) for kv, d in ((32, 128), (8, 128), (8, 64)))]


# ---------------------------------------------------------------------- timing


class Clock:
    """Times single calls on the current device."""

    def __init__(self) -> None:
        # a third of a millisecond of writing, so that all that follows has been issued before it ends
        self._flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def times(self, runs: int, *works: Callable[[], Any]) -> list[list[float]]:
        """Milliseconds of each work, by turns, after three calls that do not count."""
        for work in works:
            for _ in range(3):
                work()
        found: list[list[float]] = [[] for _ in works]
        for _ in range(runs):
            for own, work in zip(found, works, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                work()
                end.record()
                end.synchronize()
                own.append(start.elapsed_time(end))
        return found


def limits(clock: Clock) -> tuple[float, float]:
    """(bytes per second that a copy moves, counting reads and writes; bfloat16 operations per second of a product)."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = clock.times(20, lambda: target.copy_(source), lambda: a @ b)
    return 2.0 * source.numel() / (min(copy) / 1e3), 2.0 * 8192**3 / (min(product) / 1e3)


# ---------------------------------------------------------------------- one case


def run_case(case: Case, clock: Clock, runs: int, bandwidth: float, rate: float) -> list[Row]:
    q, k, v = draw_operands(case)
    ours = _ours(case, q, k, v)
    error = error_beside_double(case, ours(), q, k, v, queries=CHECKED_QUERIES)
    peers = _usable(_peers(case, q, k, v))
    times = clock.times(runs, ours, *peers.values())
    mine, others = times[0], dict(zip(peers, times[1:], strict=True))
    more: dict[str, Any] = {"ours_median": statistics.median(mine), "error": error}
    rows = [
        Row("time", str(case), min(mine), min(t), name, "ms", min(t) / min(mine), None, None,
            {**more, "peer_median": statistics.median(t)})
        for name, t in others.items()
    ]  # fmt: skip
    if case.kind == "decode":
        reached, limit, unit, goal = case.cache_bytes / min(mine) * 1e3, bandwidth, "B/s", DECODE_GOAL
    else:
        reached, limit, unit, goal = (
            case.flops / min(mine) * 1e3,
            rate,
            "flop/s",
            PREFILL_GOAL if case.dim == 128 else None,
        )
    share = reached / limit
    rows.append(Row("share of the card's limit", str(case), reached, limit, "the card", unit, share, goal,
                    None if goal is None else share >= goal, more))  # fmt: skip
    rows.append(Row("error", str(case), error, ERROR_LIMIT, "limit", "of the largest output", ERROR_LIMIT / error, 1.0,
                    error <= ERROR_LIMIT, more))  # fmt: skip
    return rows


def draw_operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        shape = (case.batch, heads, tokens, case.dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    return draw(case.heads, case.queries), draw(case.kv_heads, case.keys), draw(case.kv_heads, case.keys)


def _ours(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    from codegen.launch.torch_op import graphics_card
    from codegen.launch.triton_op import launch

    device, processors = graphics_card(q.device)
    return functools.partial(launch, case.spec, q, k, v, arch=device.arch, processors=processors)


def _peers(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from codegen.launch import attention_cuda
    from codegen.launch.torch_op import graphics_card

    causal, grouped = case.kind == "prefill", case.kv_heads != case.heads

    def with_backend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=causal, enable_gqa=grouped)

    found: dict[str, Call] = {
        "torch sdpa": lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=grouped),
        "torch sdpa, flash": lambda: with_backend(SDPBackend.FLASH_ATTENTION),
        "torch sdpa, cuDNN": lambda: with_backend(SDPBackend.CUDNN_ATTENTION),
    }
    if not causal:
        rows = q.reshape(case.batch, case.kv_heads, -1, case.dim)
        found["torch sdpa, group in rows"] = lambda: sdpa(rows, k, v).view_as(q)
        device, processors = graphics_card(q.device)
        card: dict[str, Any] = {"arch": device.arch, "processors": processors}
        found["ours in CUDA C++"] = functools.partial(attention_cuda.launch, case.spec, q, k, v, **card)
    compiled: Any = torch.compile(flex_attention)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.queries, case.keys) if causal else None
    found["FlexAttention"] = lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)
    return found


def _usable(peers: dict[str, Call]) -> dict[str, Call]:
    """Those that take the problem; torch's backends each refuse some."""
    kept = {}
    for name, call in peers.items():
        try:
            call()
        except (KernelError, RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"  {name} does not take it: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            kept[name] = call
    return kept


# ---------------------------------------------------------------------- sparse attention


def sparse_cases(*, quick: bool) -> list[tuple[str, int]]:
    """(pattern, tokens); blocks and strides are the root of the length."""
    names = ("window", "sparse-fixed", "sparse-fixed, both ways", "sparse-fixed by head", "sparse-strided")
    return [(name, tokens) for tokens in ((4096,) if quick else (4096, 16384)) for name in names]


def sparse_pattern(name: str, tokens: int) -> Pattern:
    root = math.isqrt(tokens)
    fixed = Sight(block=root, period=root, first=root - 8, last=root, ordered=True)
    shifted = tuple(replace(fixed, first=root - 8 * n - 8, last=root - 8 * n) for n in range(root // 8))
    found: dict[str, Pattern] = {
        "window": (Sight(reach=128, sinks=4, ordered=True),),
        "sparse-fixed": (fixed,),
        "sparse-fixed, both ways": (replace(fixed, ordered=False),),
        "sparse-fixed by head": shifted[:32],
        "sparse-strided": (Sight(reach=root + 1, stride=root, ordered=True),),
    }
    return found[name]


def run_sparse(case: tuple[str, int], clock: Clock, runs: int) -> list[Row]:
    """The kernel beside FlexAttention with a block mask of the same pattern, and torch's attention to all keys."""
    from codegen.launch.torch_op import graphics_card
    from codegen.launch.triton_op import launch

    name, tokens = case
    pattern = sparse_pattern(name, tokens)
    spec = GroupedQueryAttention(32, 8, 128, 128, 128**-0.5, pattern=pattern, masked_rows_are_zero=True)
    q, k, v = draw_operands(Case("prefill", 1, 32, 8, 128, tokens, DTYPE))
    device, processors = graphics_card(q.device)
    works: dict[str, Call] = {
        "ours": functools.partial(launch, spec, q, k, v, arch=device.arch, processors=processors),
        **_usable({"FlexAttention, block mask": _flex(spec, q, k, v)}),
        "torch sdpa, all keys": lambda: sdpa(q, k, v, is_causal=pattern[0].ordered, enable_gqa=True),
        "the torch body": lambda: torch_body.grouped_query_attention(spec, q, k, v),
    }
    rows = slice(tokens // 2, tokens // 2 + CHECKED_QUERIES)  # in the middle, so that there is something behind
    places = torch.arange(tokens, device=q.device)
    seen = shown(pattern, 32, places[rows], places)
    right = sdpa(q[:, :, rows].double(), k.double().repeat_interleave(4, 1), v.double().repeat_interleave(4, 1), seen)
    error = float((works["ours"]()[:, :, rows].double() - right).abs().max() / right.abs().max())
    return _beside(f"{name}, {tokens} tokens, 32 heads on 8, d 128, {DTYPE}", works, error, clock, runs)


def _flex(spec: GroupedQueryAttention, q: Tensor, k: Tensor, v: Tensor) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    apart, tokens = len(spec.pattern), q.shape[2]
    firsts = torch.tensor([s.first for s in spec.pattern], device=q.device)
    sight = spec.pattern[0]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if apart == 1:
            seen: Tensor = visible(sight, i, j)
            return seen
        first = firsts[h % apart]
        within = j % sight.period
        near = (i // sight.block == j // sight.block) | (
            (within >= first) & (within < first + sight.last - sight.first)
        )
        return near & (j <= i)

    compiled: Any = torch.compile(flex_attention)
    blocks = functools.cache(
        lambda: create_block_mask(mask, None, spec.heads if apart > 1 else None, tokens, tokens, _compile=True)
    )
    return lambda: compiled(q, k, v, block_mask=blocks(), enable_gqa=True)


def _beside(case: str, works: dict[str, Call], error: float, clock: Clock, runs: int) -> list[Row]:
    """Rows of "ours" among the works beside each other one, and of its error."""
    return _times_beside(case, dict(zip(works, clock.times(runs, *works.values()), strict=True)), error)


def _times_beside(case: str, times: dict[str, list[float]], error: float) -> list[Row]:
    mine = times.pop("ours")
    more: dict[str, Any] = {"ours_median": statistics.median(mine), "error": error}
    rows = [
        Row("time", case, min(mine), min(t), name, "ms", min(t) / min(mine), None, None,
            {**more, "peer_median": statistics.median(t)})
        for name, t in times.items()
    ]  # fmt: skip
    ok = error <= ERROR_LIMIT
    return [*rows, Row("error", case, error, ERROR_LIMIT, "limit", "of the largest output", ERROR_LIMIT / error, 1.0,
                       ok, more)]  # fmt: skip


# ---------------------------------------------------------------------- linear and mixed chunk attention


def chunked_cases(*, quick: bool) -> list[int]:
    """Tokens."""
    return [4096] if quick else [4096, 16384]


def run_linear(tokens: int, clock: Clock, runs: int) -> list[Row]:
    """Learned features and a causal window of two chunks of 64, beside the torch body and torch's causal attention."""
    from codegen.launch import linear_triton
    from codegen.launch.torch_op import graphics_card

    plain = GroupedQueryAttention(32, 8, 128, 128, 128**-0.5, causal=True, masked_rows_are_zero=True)
    spec = LinearAttention(plain, 64, FeatureMap.LEARNED)
    q, k, v = draw_operands(Case("prefill", 1, 32, 8, 128, tokens, DTYPE))
    random = torch.Generator("cuda").manual_seed(1)
    drawn = {n: torch.randn(s, device="cuda", generator=random) / s[-1] ** 0.5 for n, s in spec.shapes.items()}
    parameters = {name: t.to(q.dtype) for name, t in drawn.items()}
    arch = graphics_card(q.device)[0].arch
    works: dict[str, Call] = {
        "ours": lambda: linear_triton.launch(spec, q, k, v, parameters, arch=arch),
        "the torch body": lambda: linear_body.linear_attention(spec, q, k, v, parameters),
        "torch sdpa, all keys": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
    }
    wide = {name: t.double() for name, t in parameters.items()}
    right = linear_body.linear_attention(spec, q.double(), k.double(), v.double(), wide)
    error = float((works["ours"]().double() - right).abs().max() / right.abs().max())
    return _beside(f"linear attention, {tokens} tokens, 32 heads on 8, d 128, {DTYPE}", works, error, clock, runs)


def run_chunks(tokens: int, clock: Clock, runs: int) -> list[Row]:
    """What is between the projections of a FLASH layer, beside the torch body's, and a whole layer beside its own."""
    from codegen.launch import chunk_operator, chunk_triton
    from codegen.launch.torch_op import graphics_card

    spec = MixedChunkAttention(768, 1536, 128, 256, causal=True)
    random = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=random).to(torch.bfloat16)

    gate, value = draw(4, tokens, 1536), draw(4, tokens, 1536)
    heads = [4 * draw(4, tokens, 128) for _ in range(4)]
    arch = graphics_card(gate.device)[0].arch
    q, k, v = (draw(4, 12, tokens, 64) for _ in range(3))
    numbers = (spec.chunk, spec.causal, spec.averaged)
    works: dict[str, Call] = {
        "ours": lambda: chunk_triton.launch(spec, gate, value, heads, arch=arch),
        "the same by torch": lambda: chunk_operator.by_torch([gate, value, *heads, None, None], *numbers),
        "torch sdpa, causal, 12 heads of 64": lambda: sdpa(q, k, v, is_causal=True),
    }
    wide = [x.double() for x in (gate[:1], value[:1], *(h[:1] for h in heads))]
    right = chunk_operator.by_torch([*wide, None, None], *numbers)
    error = float((works["ours"]()[:1].double() - right).abs().max() / right.abs().max())
    return _beside(f"mixed chunk attention, 4 x {tokens} tokens, 1536 values, {DTYPE}", works, error, clock, runs)


# ---------------------------------------------------------------------- routed feed-forward blocks


def run_routed(case: RoutedCase, clock: Clock, runs: int) -> list[Row]:
    """What is behind a router, beside the torch body."""
    works, error = card_works(case)
    return _beside(str(case), works, error, clock, runs)


# ---------------------------------------------------------------------- Fourier mixing


def mixing_cases(*, quick: bool) -> list[tuple[int, int, int]]:
    """(batch, tokens, features)."""
    return [(8, 512, 768)] if quick else [(8, 512, 768), (1, 2048, 768), (8, 128, 768), (32, 512, 768), (4, 4096, 1024)]


def run_mixing(size: tuple[int, int, int], clock: Clock, runs: int) -> list[Row]:
    """The kernel beside torch's transform, which takes no 16-bit numbers, and beside products with full matrices."""
    from codegen.launch.fourier_op import mix

    batch, tokens, features = size
    spec = FourierMixing(features)
    x = torch.randn(size, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(torch.bfloat16)
    works: dict[str, Call] = {
        "ours": lambda: mix(spec, x, kernels="cuda"),
        "Triton": lambda: mix(spec, x, kernels="triton"),
        "torch.fft": lambda: torch.fft.fft2(x.float()).real.to(x.dtype),
        "half-spectrum products by torch": lambda: fourier_body.by_matrices(spec, x),
    }
    right = torch.fft.fft2(x.double()).real
    error = float((works["ours"]().double() - right).norm() / right.norm())
    times = dict(zip(works, clock.times(runs, *works.values()), strict=True))
    mine = times.pop("ours")
    case = f"Fourier mixing, {batch} x {tokens} x {features}, {DTYPE}"
    more: dict[str, Any] = {"ours_median": statistics.median(mine), "error": error}
    rows = []
    for name, t in times.items():
        goal, ratio = MIXING_GOAL if name == "torch.fft" else None, min(t) / min(mine)
        ok = None if goal is None else ratio >= goal
        rows.append(Row("time", case, min(mine), min(t), name, "ms", ratio, goal, ok,
                        {**more, "peer_median": statistics.median(t)}))  # fmt: skip
    rows.append(Row("error", case, error, ERROR_LIMIT, "limit", "relative, in norm", ERROR_LIMIT / error, 1.0,
                    error <= ERROR_LIMIT, more))  # fmt: skip
    return rows


# ---------------------------------------------------------------------- files


def run_file(case: Case, runs: int) -> list[Row]:
    """onnxruntime's CUDA provider with our library, beside the file's own function and onnxruntime's operator."""
    works, error = card_files.works(case)
    return _times_beside(f"onnxruntime, {case}", card_files.times(works, runs), error)


# ---------------------------------------------------------------------- report


def report(rows: Sequence[Row], bandwidth: float, rate: float) -> str:
    """The section of docs/benchmarks.md."""
    about = machine()
    text = (
        f"`python -m benchmarks.gpu` on {about['accelerator']}, torch {torch.__version__}: copies move "
        f"{bandwidth / 1e9:.0f} GB/s, bfloat16 products reach {rate / 1e12:.0f} Tflop/s.\n\n"
    )
    lines = [[r.case, r.name, r.ours, r.peer_name, r.peer, r.unit, r.ratio, r.goal, r.ok] for r in rows]
    return text + markdown_table(["case", "what", "ours", "beside", "theirs", "unit", "ratio", "goal", "met"], lines)


def _works(
    parts: Sequence[str], quick: bool, clock: Clock, runs: int, bandwidth: float, rate: float
) -> list[Callable[[], list[Row]]]:
    found: dict[str, list[Callable[[], list[Row]]]] = {
        "attention": [functools.partial(run_case, c, clock, runs, bandwidth, rate) for c in cases(quick=quick)],
        "sparse": [functools.partial(run_sparse, c, clock, runs) for c in sparse_cases(quick=quick)],
        "linear": [functools.partial(run_linear, t, clock, runs) for t in chunked_cases(quick=quick)],
        "chunks": [functools.partial(run_chunks, t, clock, runs) for t in chunked_cases(quick=quick)],
        "routed": [functools.partial(run_routed, c, clock, runs) for c in card_cases(quick=quick)],
        "fourier": [functools.partial(run_mixing, size, clock, runs) for size in mixing_cases(quick=quick)],
        "onnxruntime": [functools.partial(run_file, c, runs) for c in card_files.cases(quick=quick)],
    }
    return [work for part in PARTS if part in parts for work in found[part]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller problems, fewer runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; all of them by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was measured", file=sys.stderr)
        return 1
    runs = 10 if options.quick else 30
    rows: list[Row] = []
    with torch.no_grad():
        clock = Clock()
        bandwidth, rate = limits(clock)
        works = _works(options.only, options.quick, clock, runs, bandwidth, rate)
        for row in (row for work in works for row in work()):
            rows.append(row)
            print(f"{row.case}: {row.name} {row.ours:.4g} / {row.peer:.4g} {row.unit} ({row.peer_name})", flush=True)
    if options.json:
        write_json(options.json, rows, copy_bytes_per_s=bandwidth, bfloat16_flop_per_s=rate)
    if options.markdown:
        put_section(options.markdown, "Graphics cards", report(rows, bandwidth, rate))
    return 0 if all(row.ok is not False for row in rows if row.name == "error") else 1


if __name__ == "__main__":
    sys.exit(main())
