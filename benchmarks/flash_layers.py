"""Two gated attention units beside the Transformer layer that they replace (arXiv 2202.10447); part of `end_to_end`.

The Transformer's layer has norms before, softmax attention and a GELU feed-forward; its attention is torch's
scaled_dot_product_attention, or one that holds all its scores, as the paper's baseline did. Weights are random, batch
1, float32. A training step is a forward and a backward pass. The mixing core is what is left of a layer without its
projections: attention from queries, keys and values on, and both units' mixing from theirs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rows import Clock, Row, interleaved, markdown_table
from codegen.ops.gated_attention.torch_body import mix
from codegen.ops.mixed_chunk_attention.torch_body import (
    ChunkState,
    by_chunk,
    divisors,
    plus_product,
    products,
    running_sums,
    within_chunks,
)
from codegen.spec import GatedAttention, MixedChunkAttention
from rewriter.architectures.flash import FlashConfig, GatedAttentionUnit, ScaleNorm

PAPER: Mapping[str, Mapping[int, float]] = {
    "flash-quad": {1024: 2.18, 2048: 3.29, 4096: 3.59, 8192: 5.23},
    "flash": {1024: 1.66, 2048: 3.85, 4096: 6.75, 8192: 12.12},
}
"""Training speed-ups that the paper reports, of whole causal models on TPUs, over its augmented Transformer."""

SDPA, WHOLE = "torch sdpa", "attention that holds its scores"
LAYER_GOALS = {SDPA: {8192: 2.0, 16384: 3.5}, WHOLE: {8192: 12.0}}
CORE_GOALS = {WHOLE: {8192: 12.0}}
FLAT = 1.15
"""Largest time per token from 2,048 to 16,384 tokens, over the smallest."""

LENGTHS = (1024, 2048, 4096, 8192, 16384)
QUICK = (1024, 2048, 4096)


@dataclass(frozen=True)
class Sizes:
    """Of one layer; `context` is where decoding is measured."""

    hidden: int = 768
    heads: int = 12
    feed_forward: int = 3072
    context: int = 65_536


class TransformerLayer(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual."""

    def __init__(self, sizes: Sizes, *, causal: bool, whole_scores: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.whole_scores = sizes.heads, causal, whole_scores
        self.first, self.second = nn.LayerNorm(sizes.hidden), nn.LayerNorm(sizes.hidden)
        self.project = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.out = nn.Linear(sizes.hidden, sizes.hidden)
        self.up, self.down = nn.Linear(sizes.hidden, sizes.feed_forward), nn.Linear(sizes.feed_forward, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(self.first(x)).chunk(3, dim=-1)
        )
        mixed = attention(query, key, value, causal=self.causal, whole_scores=self.whole_scores)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        added: Tensor = self.down(F.gelu(self.up(self.second(x))))
        return x + added


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, whole_scores: bool) -> Tensor:
    if not whole_scores:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1) @ value


def config(sizes: Sizes, form: str, tokens: int, *, causal: bool) -> FlashConfig:
    chunk = 256 if form == "flash" else None
    return FlashConfig(1, sizes.hidden, 2, 2 * sizes.hidden, 128, chunk=chunk, length=tokens, causal=causal)


def units(sizes: Sizes, form: str, tokens: int, *, causal: bool) -> nn.Module:
    """The pair that takes a layer's place."""
    spec = config(sizes, form, tokens, causal=causal).spec
    return nn.Sequential(
        *(GatedAttentionUnit(spec, ScaleNorm() if causal else nn.LayerNorm(sizes.hidden)) for _ in range(2))
    )


# ------------------------------------------------------------ what is timed


def layers(sizes: Sizes, tokens: int, *, causal: bool, training: bool) -> dict[str, Callable[[], Any]]:
    """One call each of the two forms and of the peers that fit into memory."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, sizes.hidden, requires_grad=training)
    made: dict[str, nn.Module] = {form: units(sizes, form, tokens, causal=causal) for form in PAPER}
    made[SDPA] = TransformerLayer(sizes, causal=causal, whole_scores=False)
    if fits(sizes, tokens, copies=5 if training else 3):
        made[WHOLE] = TransformerLayer(sizes, causal=causal, whole_scores=True)
    return {name: _step(module, x) if training else _inference(module, x) for name, module in made.items()}


def _inference(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return module(x)

    return call


def _step(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    def call() -> None:
        module.zero_grad()
        with torch.enable_grad():
            module(x).square().mean().backward()

    return call


def cores(sizes: Sizes, tokens: int, *, causal: bool) -> dict[str, Callable[[], Any]]:
    """Without projections, in inference."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, sizes.heads, tokens, sizes.hidden // sizes.heads).unbind(0)
    made: dict[str, Callable[[], Any]] = {form: _core(sizes, form, tokens, causal=causal) for form in PAPER}
    peers = {SDPA: False} | ({WHOLE: True} if fits(sizes, tokens, copies=3) else {})
    for name, whole in peers.items():
        made[name] = _attending(query, key, value, causal=causal, whole_scores=whole)
    return made


def _attending(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, whole_scores: bool) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return attention(query, key, value, causal=causal, whole_scores=whole_scores)

    return call


def _core(sizes: Sizes, form: str, tokens: int, *, causal: bool) -> Callable[[], Any]:
    """Both units' mixing."""
    spec = config(sizes, form, tokens, causal=causal).spec
    weights = {role: torch.randn(shape) * 0.02 for role, shape in spec.shapes.items() if "weight" not in role}
    quad_query, lin_query, quad_key, lin_key = torch.randn(4, 1, tokens, spec.base).unbind(0)
    value = torch.randn(1, tokens, spec.expanded)

    @torch.no_grad()
    def call() -> None:
        for _ in range(2):
            if isinstance(spec, GatedAttention):
                mix(spec, quad_query, quad_key, value, weights)
            else:
                _mixed(spec, quad_query, lin_query, quad_key, lin_key, value, weights)

    return call


def _mixed(
    spec: MixedChunkAttention,
    quad_query: Tensor,
    lin_query: Tensor,
    quad_key: Tensor,
    lin_key: Tensor,
    value: Tensor,
    weights: Mapping[str, Tensor],
) -> Tensor:
    within = within_chunks(spec, quad_query, quad_key, value, weights)
    if not spec.causal:
        return torch.baddbmm(within, lin_query, products(lin_key, value) / value.shape[1])
    shifted, _ = running_sums(spec, lin_key, value, None)
    queries = by_chunk(spec, lin_query) / divisors(spec, shifted, 0)
    return plus_product(by_chunk(spec, within), queries, shifted)


def fits(sizes: Sizes, tokens: int, *, copies: int) -> bool:
    """Whether so many copies of all scores take at most half of what memory is free."""
    return bool(copies * 4 * sizes.heads * tokens**2 <= psutil.virtual_memory().available / 2)


# ------------------------------------------------------------ rows


def measure(sizes: Sizes, lengths: Sequence[int], runs: int | None, clock: Clock) -> Iterator[Row]:
    """Rows as they are measured; goals stand at the lengths that have one."""
    per_token: dict[str, dict[int, float]] = {}
    for causal in (True, False):
        order = "causal" if causal else "bidirectional"
        for tokens in lengths:
            for what in ("training step", "inference", "mixing core"):
                calls = _calls(sizes, tokens, what, causal=causal)
                goals = CORE_GOALS if what == "mixing core" else LAYER_GOALS
                found = _timed(calls, runs or (2 if tokens > 4096 else 4), clock)
                yield from _rows(found, tokens, f"{order}, {what}", goals, causal=causal)
                if what != "mixing core":
                    per_token.setdefault(f"{order}, {what}", {})[tokens] = found["flash"] / tokens
    yield from _flat(per_token)
    yield from decoding(sizes, clock)


def _calls(sizes: Sizes, tokens: int, what: str, *, causal: bool) -> dict[str, Callable[[], Any]]:
    if what == "mixing core":
        return cores(sizes, tokens, causal=causal)
    return layers(sizes, tokens, causal=causal, training=what == "training step")


def _timed(calls: Mapping[str, Callable[[], Any]], runs: int, clock: Clock) -> dict[str, float]:
    """Smallest seconds by name, after one call that does not count."""
    for call in calls.values():
        call()
    times = interleaved(runs, *calls.values(), clock=clock)
    return {name: t.minimum for name, t in zip(calls, times, strict=True)}


def _rows(
    found: Mapping[str, float], tokens: int, what: str, goals: Mapping[str, Mapping[int, float]], *, causal: bool
) -> Iterator[Row]:
    for form in PAPER:
        for peer in (SDPA, WHOLE):
            if peer not in found:
                continue
            ratio = found[peer] / found[form]
            goal = goals.get(peer, {}).get(tokens) if form == "flash" else None
            paper = PAPER[form].get(tokens) if causal and "training" in what else None
            more = {"form": form, "what": what, "tokens": tokens, "paper": paper}
            case, met = f"{form}, {what}, {tokens} tokens", None if goal is None else ratio >= goal
            yield Row("flash", case, found[form] * 1e3, found[peer] * 1e3, peer, "ms", ratio, goal, met, more)


def _flat(per_token: Mapping[str, Mapping[int, float]]) -> Iterator[Row]:
    for what, times in per_token.items():
        long = [seconds for tokens, seconds in times.items() if tokens >= 2048]
        if len(long) > 1:
            spread = max(long) / min(long)
            case = f"flash, {what}, {min(t for t in times if t >= 2048)} to {max(times)} tokens"
            yield Row("time per token", case, max(long) * 1e6, min(long) * 1e6, "the fastest length", "us", 1 / spread,
                      FLAT, spread <= FLAT)  # fmt: skip


@torch.no_grad()
def decoding(sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """One more token behind a long context, behind a short one, and beside attention to a cache."""
    pair = [m for m in units(sizes, "flash", 1, causal=True).modules() if isinstance(m, GatedAttentionUnit)]
    torch.manual_seed(0)
    text = torch.randn(1, sizes.context, sizes.hidden)
    behind = {tokens: _behind(pair, text[:, :tokens]) for tokens in (sizes.context // 64, sizes.context)}
    head = sizes.hidden // sizes.heads
    query, cache = torch.randn(1, sizes.heads, 1, head), torch.randn(2, 1, sizes.heads, sizes.context, head)
    short, long = behind

    def steps(states: Sequence[ChunkState]) -> Callable[[], Any]:
        def call() -> None:
            for _ in range(16):
                x = text[:, :1]
                for unit, state in zip(pair, states, strict=True):
                    x = unit(x, state=state)

        return call

    def attend() -> None:
        for _ in range(16):
            F.scaled_dot_product_attention(query, cache[0], cache[1])

    times = _timed({"short": steps(behind[short]), "long": steps(behind[long]), "sdpa": attend}, 8, clock)
    case = f"flash, a token more behind {long} tokens"
    spread = times["long"] / times["short"]
    yield Row("decoding", case, times["long"] / 16 * 1e3, times["short"] / 16 * 1e3, f"behind {short} tokens", "ms",
              1 / spread, FLAT, spread <= FLAT)  # fmt: skip
    mebibytes = {tokens: sum(s.nbytes for s in states) / 2**20 for tokens, states in behind.items()}
    short_size, long_size = mebibytes[short], mebibytes[long]
    yield Row("decoding", f"flash, state behind {long} tokens", long_size, short_size, f"behind {short} tokens",
              "MiB", short_size / long_size, 1.0, long_size == short_size)  # fmt: skip
    cached = cache.numel() * 4 / 2**20
    yield Row("decoding", f"flash, state behind {long} tokens", long_size, cached, "a layer's keys and values",
              "MiB", cached / long_size, None, None)  # fmt: skip
    yield Row("decoding", case, times["long"] / 16 * 1e3, times["sdpa"] / 16 * 1e3,
              "attention alone, without projections", "ms", times["sdpa"] / times["long"], None, None)  # fmt: skip


def _behind(pair: Sequence[GatedAttentionUnit], text: Tensor) -> list[ChunkState]:
    states = []
    for unit in pair:
        state = unit.start(1)
        assert isinstance(state, ChunkState)
        text = unit(text, state=state)
        states.append(state)
    return states


def report(rows: Sequence[Row]) -> str:
    """Tables of the section in docs/benchmarks.md."""
    about = "Two units beside the layer they replace; `paper` is the speed-up that it reports for whole models on TPUs."
    lines = [
        [r.case, r.ours, r.peer_name, r.peer, r.ratio, r.more["paper"], r.goal, r.ok] for r in rows if r.name == "flash"
    ]
    table = markdown_table(["case", "ours, min ms", "peer", "min ms", "ratio", "paper", "goal", "met"], lines)
    others = [
        [r.case, r.ours, r.peer_name, r.peer, r.unit, r.ratio, r.ok]
        for r in rows
        if r.name in {"time per token", "decoding"}
    ]
    return f"{about}\n\n{table}\n\n" + markdown_table(["case", "ours", "peer", "peer", "unit", "ratio", "met"], others)
