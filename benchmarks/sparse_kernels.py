"""Rows of `benchmarks.kernels` for sparse attention: the C++ kernel beside torch's ways to compute the same.

Peers are the op's torch body (tiles, or a mask over all scores), sdpa with that mask, and flex_attention compiled for
the pattern's blocks. Attention to all keys is beside them, to show what the pattern saves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch._inductor.exc
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.rows import Clock, Row, Times, interleaved, timed
from codegen.launch.torch_op import attention
from codegen.ops.grouped_query_attention.reference import grouped_query_attention
from codegen.ops.grouped_query_attention.sparse_body import last_positions, shown
from codegen.sight import Sight, visible
from codegen.spec import GroupedQueryAttention

Call = Callable[[], Tensor]

ALL_KEYS = "torch sdpa, all keys"
LIMIT = 2e-6

SIGHTS = {
    "window 128, 4 sinks": Sight(reach=128, sinks=4),
    "fixed 128, 8": Sight(block=128, period=128, first=120, last=128),
    "strided 128": Sight(reach=129, stride=128),
}


@dataclass(frozen=True)
class Case:
    """One problem: a sequence's queries on its own keys, 12 heads of 64 features; causal or symmetric."""

    pattern: str
    tokens: int
    causal: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def spec(self) -> GroupedQueryAttention:
        sight = replace(SIGHTS[self.pattern], ordered=self.causal)
        return GroupedQueryAttention(12, 12, 64, 64, 0.125, causal=self.causal, pattern=(sight,))

    def __str__(self) -> str:
        order, dtype = "causal" if self.causal else "symmetric", str(self.dtype).removeprefix("torch.")
        return f"sparse attention, {self.pattern}, {order}, {self.tokens} tokens, {dtype}"


def cases(*, quick: bool) -> list[Case]:
    if quick:
        return [Case(name, 2048) for name in SIGHTS]
    sizes = (512, 2048, 8192)
    found = [Case(name, tokens) for name in SIGHTS for tokens in sizes]
    found += [Case(name, 2048, causal=False) for name in SIGHTS]
    return found + [Case(name, 2048, dtype=torch.bfloat16) for name in SIGHTS]


def run_case(case: Case, runs: int, threads: int, clock: Clock) -> list[Row]:
    """Rows of one case: beside each peer, and the error of the first head beside double precision."""
    spec, random = case.spec, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, case.tokens, 64, generator=random).to(case.dtype) for _ in range(3))

    def ours() -> Tensor:
        return attention(spec, q, k, v, kernels="cpp")

    peers = _able(_peers(case, q, k, v))
    alone = replace(spec, heads=1, kv_heads=1)
    right = torch.from_numpy(grouped_query_attention(alone, *(x[:, :1].double().numpy() for x in (q, k, v))))
    error = float((ours()[:, :1].double() - right).abs().max() / right.abs().max())
    others = {n: float((call()[:, :1].double() - right).abs().max() / right.abs().max()) for n, call in peers.items()}
    patient = 20 * timed(ours, 2, clock)[0].minimum
    often = [name for name in peers if timed(peers[name], 1, clock)[0].minimum < patient]
    times = dict(zip(["ours", *often], interleaved(runs, ours, *(peers[n] for n in often), clock=clock), strict=True))
    times |= {name: timed(peers[name], 2, clock)[0] for name in peers if name not in often}
    return _rows(case, times, error, others)


def _peers(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    spec, (sight,) = case.spec, case.spec.pattern
    mask = shown(spec.pattern, spec.heads, *last_positions(case.tokens, case.tokens, q.device))
    blocks = create_block_mask(lambda _b, _h, i, j: visible(sight, i, j), 1, 1, case.tokens, case.tokens, device="cpu")
    flex = torch.compile(flex_attention)
    return {
        "torch body": lambda: attention(spec, q, k, v, kernels="off"),
        "torch sdpa, mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale),
        "flex_attention": lambda: flex(q, k, v, block_mask=blocks, scale=spec.scale),
        ALL_KEYS: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=spec.scale),
    }


def _able(peers: Mapping[str, Call]) -> dict[str, Call]:
    """Without those that torch cannot compile: torch 2.13's own code for flex_attention with a modulus does not."""
    found = {}
    for name, call in peers.items():
        try:
            call()
        except torch._inductor.exc.InductorError as error:
            print(f"{name} does not compile: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            found[name] = call
    return found


def _rows(case: Case, times: Mapping[str, Times], error: float, others: Mapping[str, float]) -> list[Row]:
    mine, peers = times["ours"], {name: t for name, t in times.items() if name != "ours"}
    best = min((name for name in peers if name != ALL_KEYS), key=lambda name: peers[name].minimum)
    rows = []
    for name, t in peers.items():
        more = {"kind": "sparse", "error": error, "ours_median": mine.median * 1e3, "peer_median": t.median * 1e3}
        more |= {"best_peer": name == best, "peer_differs_by": others[name]}
        ratio = t.minimum / mine.minimum
        rows.append(Row("time", str(case), mine.minimum * 1e3, t.minimum * 1e3, name, "ms", ratio, None, None, more))
    if case.dtype == torch.float32:
        unit, ratio = "of the largest output", LIMIT / max(error, 1e-30)
        rows.append(Row("error", str(case), error, LIMIT, "limit", unit, ratio, 1.0, error <= LIMIT, {}))
    return rows
