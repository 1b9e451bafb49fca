"""Encoders as CoLT5 (`rewriter.optimize(model, "colt5")`) beside themselves, on one thread, batch 1: in torch, and as
files in onnxruntime (`benchmarks/colt5_files.py`).

The goals are for conditional encoders beside dense ones, at the lengths that they are made for. Layers are those of
T5 1.1 base (a bias by distance, gated feed-forward blocks) and of BERT-base (neither), fewer than there, since all are
alike; T5's bias, which is as large as all scores, is worked out once for all of its layers, and not at all for ours.
Weights are random: how fast a model is does not depend on them, and how good it is is not told here. All tokens are
shown; the dense models run with sdpa. T5 is left out where its bias would take more than an eighth of the memory.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import rewriter
from benchmarks import colt5_files
from benchmarks.rows import Clock, Row, interleaved, markdown_table

GOALS: Mapping[int, float] = {4096: 2.5, 16384: 5.0}
"""Ratio of minima, by tokens."""

QUICK = (1024,)


@dataclass(frozen=True)
class Sizes:
    """Of both models' layers."""

    hidden: int = 768
    heads: int = 12
    layers: int = 2

    def t5(self, attention: str = "sdpa") -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        config = T5Config(
            vocab_size=1000, d_model=self.hidden, d_kv=self.hidden // self.heads, d_ff=self.hidden * 8 // 3,
            num_layers=self.layers, num_heads=self.heads, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        config._attn_implementation = attention
        return T5EncoderModel(config)

    def bert(self, longest: int, attention: str = "sdpa") -> nn.Module:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=1000, hidden_size=self.hidden, num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden, num_hidden_layers=self.layers, max_position_embeddings=longest,
        )  # fmt: skip
        config._attn_implementation = attention
        return BertModel(config, add_pooling_layer=False)


def measure(sizes: Sizes, lengths: Sequence[int], runs: int | None, clock: Clock = time.process_time) -> Iterator[Row]:
    """Rows for each model and length."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for tokens in lengths:
                whole_scores = 4 * sizes.heads * tokens**2 * 8 > psutil.virtual_memory().total
                models = {} if whole_scores else {"T5 1.1": sizes.t5()}
                for name, dense in {**models, "BERT": sizes.bert(max(lengths))}.items():
                    yield _row(f"colt5 from {name}, {sizes.layers} layers", dense.eval(), sizes, tokens, runs, clock)
            yield from _in_files(sizes, lengths, runs, clock)
    finally:
        torch.set_num_threads(before)


def _in_files(sizes: Sizes, lengths: Sequence[int], runs: int | None, clock: Clock) -> Iterator[Row]:
    """The fastest dense file carries the goal."""
    builds = {
        "T5 1.1": ("t5", sizes.t5),
        "BERT": ("bert", functools.partial(sizes.bert, max(colt5_files.SHORT, *lengths))),
    }
    for name, (kind, build) in builds.items():
        with tempfile.TemporaryDirectory() as folder:
            pair = colt5_files.made(build, kind, sizes.heads, sizes.hidden, Path(folder))
            case = f"colt5 from {name}, {sizes.layers} layers, in a file"
            for row in colt5_files.rows(case, pair, sizes.heads, lengths, runs or 2, clock):
                goal = GOALS.get(int(row.case.split()[-2])) if sizes == Sizes() and row.more["best_peer"] else None
                yield replace(row, goal=goal, ok=None if goal is None else (row.ratio or 0.0) >= goal)


def _row(case: str, dense: Any, sizes: Sizes, tokens: int, runs: int | None, clock: Clock) -> Row:
    light = rewriter.optimize(dense, "colt5", verify=False)
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    works: list[Callable[[], Any]] = [lambda: light(ids), lambda: dense(ids)]
    works[0]()  # the first call of either reserves memory
    ours, theirs = interleaved(runs or 2, *works, clock=clock)
    ratio = theirs.minimum / ours.minimum
    goal = GOALS.get(tokens) if sizes == Sizes() else None
    more = {"ours_median": ours.median * 1e3, "peer_median": theirs.median * 1e3, "best_peer": True}
    case = f"{case}, {tokens} tokens"
    return Row("colt5", case, ours.minimum * 1e3, theirs.minimum * 1e3, "torch, dense, sdpa", "ms",
               ratio, goal, None if goal is None else ratio >= goal, more)  # fmt: skip


def report(rows: Sequence[Row]) -> str:
    """A table."""
    lines = [[r.case, r.ours, r.peer_name, r.peer, r.ratio, r.goal, r.ok] for r in rows]
    return markdown_table(["case", "ours, min ms", "peer", "min ms", "ratio of minima", "goal", "met"], lines)
