"""What minutes of uptraining make of MiniLM without the attention that it was trained with.

Fourier mixes for all attentions but the top two, pairs of gated units, experts in mixed layers, light and heavy
branches: each gets a budget of processor time. Sentence embeddings are compared with the original's on a play that
neither calibration nor healing has seen, and on text of another kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import rewriter
from benchmarks.healing import healed, help_sentences, precision, training_plays
from benchmarks.rows import Row
from benchmarks.texts import CALIBRATION, HELD_OUT, cosine, embedded, sentences
from rewriter import Recipe
from rewriter.demo.weights import minilm


@dataclass(frozen=True)
class Case:
    """Attributes: budget: seconds of healing, with all threads at work; goal: for the cosine, where there is one."""

    target: str
    budget: float
    goal: float | None = None


CASES = (Case("fnet-hybrid", 900.0, 0.9), Case("flash:pair", 300.0), Case("sparse-mixer", 300.0), Case("colt5", 300.0))
QUICK = 20
"""Steps with --quick: enough to see that it runs."""


def minilm_mixed(quick: bool) -> Iterator[Row]:
    """A row for each case: cosine before and after; with `quick`, of the first alone."""
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences([HELD_OUT], 64 if quick else 256, 1), padding=True, return_tensors="pt"))
    other = dict(tokenizer(help_sentences(256), padding=True, truncation=True, max_length=64, return_tensors="pt"))
    wished = [(held, embedded(model, held)) for held in (batch, other)]
    calibration = (sentences(CALIBRATION, 64 if quick else 512, 0), tokenizer)
    texts = sentences(training_plays(), 10**9, 3)
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
    recipe = Recipe(batch=64, window=64, learning_rate=5e-4, layer_phase=0.2, precision=precision(), train="all")
    recipe = replace(recipe, steps=QUICK if quick else None)
    for case in CASES[:1] if quick else CASES:
        student = rewriter.optimize(model, case.target, calibration=calibration, verify=False)
        before, away = (cosine(wish, embedded(student, held)) for held, wish in wished)
        found = healed(student, model, rows, recipe, case.budget)
        after, away_after = (cosine(wish, embedded(student, held)) for held, wish in wished)
        goal = None if quick else case.goal
        yield Row(
            "minilm cosine, healed", f"{case.target}, {found.done.steps} steps", after, before, "before healing",
            "cosine", after / before, goal, None if goal is None else after >= goal,
            {
                "steps": found.done.steps, "tokens": found.done.tokens, "cpu_seconds": round(found.cpu_seconds, 1),
                "other_text_before": away, "other_text": away_after,
            },
        )  # fmt: skip
