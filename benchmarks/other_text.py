"""Calibrated on text of one kind, measured on another, by KL divergence: help topics, or the model's own, for plays.

What merges keep must not be the calibration text's alone. SmolLM2's layers get one key/value head each, calibrated on
technical English, on what the model writes when nobody gives it text (also on twice as much), and on half of each;
the divergence from the original over a play stands beside that of mean pooling.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

import rewriter
from benchmarks.healing import divergence, encoded, help_text
from benchmarks.rows import Row, markdown_table
from benchmarks.texts import HELD_OUT, WINDOW, token_ids
from passes.targets import GroupedQuery
from rewriter.calibration.sampled import sampled_text
from rewriter.demo.weights import smollm2

GOAL = 10.0
"""How many times nearer than mean pooling."""


def other_text_rows(quick: bool) -> Iterator[Row]:
    model, tokenizer = smollm2()
    held = token_ids(tokenizer, HELD_OUT, 2 if quick else 8)
    windows = 4 if quick else 16
    topics, written = encoded(tokenizer, help_text())[: windows * WINDOW], sampled_text(model, sequences=windows)
    texts = [
        ("of help topics", topics),
        ("that it wrote", written),
        ("of both, half of each", torch.cat([text.flatten()[: windows * WINDOW // 2] for text in (topics, written)])),
        ("that it wrote", sampled_text(model, sequences=2 * windows)),
    ]
    for case, layers in (("last layer", "-1:"),) if quick else (("last 8 layers", "-8:"), ("all 30 layers", "all")):
        pooled = rewriter.optimize(model, GroupedQuery(1, "mean"), layers=layers, verify=False)
        peer = divergence(model, pooled, held)
        del pooled
        for kind, calibration in texts:
            start = time.perf_counter()
            merged = rewriter.optimize(
                model, GroupedQuery(1, "joint"), layers=layers, verify=False, calibration=calibration
            )
            seconds = time.perf_counter() - start
            found = divergence(model, merged, held)
            goal = None if quick else GOAL
            yield Row(
                "smollm2 mqa, KL on another kind of text", f"{case}, {calibration.numel()} tokens {kind}", found,
                peer, "mean pooling", "nats", peer / found, goal, None if goal is None else peer / found >= goal,
                {"seconds": round(seconds, 1)},
            )  # fmt: skip


def other_text_table(rows: Sequence[Row]) -> str:
    """Markdown: the divergence beside mean pooling's."""
    header = ["what", "case", "measured", "mean pooling", "times nearer", "goal", "met", "s"]
    lines = [[r.name, r.case, r.ours, r.peer, r.ratio, r.goal, r.ok, r.more["seconds"]] for r in rows]
    return markdown_table(header, lines)
