"""What fifteen minutes of uptraining on two cores make of MiniLM with Fourier mixes for all attentions but the top two.

Sentence embeddings are compared with the original's on a play that neither calibration nor healing has seen, and on
text of another kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import rewriter
from benchmarks.healing import healed, help_sentences, precision, training_plays
from benchmarks.rows import Row
from benchmarks.texts import CALIBRATION, HELD_OUT, cosine, embedded, sentences
from rewriter import Recipe
from rewriter.demo.weights import minilm

TARGET, GOAL = "fnet-hybrid", 0.9
BUDGET = 900.0
"""Seconds of healing, with all threads at work."""
QUICK = 20
"""Steps with --quick: enough to see that it runs."""


def minilm_mixed(quick: bool) -> Iterator[Row]:
    """The one row: cosine before and after."""
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences([HELD_OUT], 64 if quick else 256, 1), padding=True, return_tensors="pt"))
    wished = embedded(model, batch)
    calibration = (sentences(CALIBRATION, 64 if quick else 512, 0), tokenizer)
    student = rewriter.optimize(model, TARGET, calibration=calibration, verify=False)
    before = cosine(wished, embedded(student, batch))
    other = dict(tokenizer(help_sentences(256), padding=True, truncation=True, max_length=64, return_tensors="pt"))
    away = [cosine(embedded(model, other), embedded(student, other))]
    texts = sentences(training_plays(), 10**9, 3)
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
    recipe = Recipe(batch=64, window=64, learning_rate=5e-4, layer_phase=0.2, precision=precision(), train="all")
    found = healed(student, model, rows, replace(recipe, steps=QUICK if quick else None), BUDGET)
    after = cosine(wished, embedded(student, batch))
    away.append(cosine(embedded(model, other), embedded(student, other)))
    yield Row(
        "minilm cosine, healed", f"{TARGET}, {found.done.steps} steps", after, before, "before healing", "cosine",
        after / before, None if quick else GOAL, None if quick else after >= GOAL,
        {
            "steps": found.done.steps, "tokens": found.done.tokens, "cpu_seconds": round(found.cpu_seconds, 1),
            "other_text_before": away[0], "other_text": away[1],
        },
    )  # fmt: skip
