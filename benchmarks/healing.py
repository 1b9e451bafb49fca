"""What ten minutes of uptraining on two cores give back; on plays, all but the one that is measured on.

The budget is CPU time of this process, ten minutes times two threads, so that a busy machine does not shorten it: a
few steps are timed on a copy, and as many are taken as fit. Plays may teach a model plays, so beside the student's
perplexity stand its KL divergence from the original, its perplexity on text of another kind (Python's own help topics),
and that of the original, fine-tuned on the same sequences for as many steps.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rewriter
from benchmarks.rows import Row, markdown_table
from benchmarks.texts import CALIBRATION, HELD_OUT, WINDOW, cosine, embedded, sentences, token_ids
from passes.targets import GroupedQuery
from rewriter import Recipe
from rewriter.demo.packaged_files import packaged_file
from rewriter.demo.perplexity import perplexity
from rewriter.demo.weights import PLAYS, minilm, play, smollm2
from rewriter.uptrain.divergence import kl_divergence

BUDGET = 600.0
"""Seconds of healing, with all threads at work."""
MINILM_QUICK, SMOLLM2_QUICK = 40, 6
"""Steps with --quick: enough to see that it runs, and whither it goes."""
PROBE = 6
"""Steps that are timed to see how many fit."""


def training_plays() -> list[str]:
    """Every work but the one that is measured on, in modern spelling."""
    folder = packaged_file(*PLAYS, f"shksprdata/texts/{HELD_OUT}_gut.txt").parent
    names = sorted(f.name.removesuffix("_gut.txt") for f in folder.glob("*_gut.txt"))
    return [name for name in names if name != HELD_OUT]


@dataclass(frozen=True)
class Healing:
    """One run: the student, what it took in CPU seconds of all threads, and the report."""

    done: rewriter.Uptrained
    cpu_seconds: float


def healed(student: nn.Module, teacher: nn.Module, data: Any, recipe: Recipe, budget: float) -> Healing:
    """Uptrain `student` in place for `budget` seconds of all threads; the recipe's steps, if given, decide instead."""
    if recipe.steps is None:
        probe = copy.deepcopy(student)
        spent = []
        for steps in (2, 2 + PROBE):
            start = time.process_time()
            rewriter.uptrain(copy.deepcopy(probe), teacher, data, recipe=replace(recipe, steps=steps, validation=1))
            spent.append(time.process_time() - start)
        each = max((spent[1] - spent[0]) / PROBE, 1e-6)
        recipe = replace(recipe, steps=max(1, int(budget * torch.get_num_threads() / each)))
    start = time.process_time()
    done = rewriter.uptrain(student, teacher, data, recipe=recipe)
    return Healing(done, time.process_time() - start)


def _more(found: Healing, **others: Any) -> dict[str, Any]:
    done = found.done
    return {
        "steps": done.steps, "tokens": done.tokens, "seconds": round(done.seconds, 1),
        "cpu_seconds": round(found.cpu_seconds, 1), "precision": done.precision, "batch": done.recipe.batch, **others,
    }  # fmt: skip


def precision() -> str:
    """bfloat16 where the processor multiplies in it."""
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


# ------------------------------------------------------------ MiniLM


def minilm_healed(quick: bool) -> Iterator[Row]:
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences([HELD_OUT], 256, 1), padding=True, return_tensors="pt"))
    wished = embedded(model, batch)
    texts = sentences(training_plays(), 10**9, 3)
    calibration = sentences(CALIBRATION, 128 if quick else 512, 0)
    student = rewriter.optimize(model, GroupedQuery(6, "joint"), calibration=(calibration, tokenizer), verify=False)
    before = cosine(wished, embedded(student, batch))
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
    recipe = Recipe(batch=64, window=64, learning_rate=3e-4, layer_phase=0.0, precision=precision(), validation=64)
    other = dict(tokenizer(help_sentences(256), padding=True, truncation=True, max_length=64, return_tensors="pt"))
    away = [cosine(embedded(model, other), embedded(student, other))]
    found = healed(student, model, rows, replace(recipe, steps=MINILM_QUICK if quick else None), BUDGET)
    after = cosine(wished, embedded(student, batch))
    away.append(cosine(embedded(model, other), embedded(student, other)))
    goal = None if quick else 0.985
    yield Row(
        "minilm cosine, healed", f"kv 1/2, joint + refit, {found.done.steps} steps", after, before, "before healing",
        "cosine", after / before, goal, None if goal is None else after >= goal,
        _more(found, other_text_before=away[0], other_text=away[1]),
    )  # fmt: skip


# ------------------------------------------------------------ SmolLM2


def smollm2_healed(quick: bool) -> Iterator[Row]:
    model, tokenizer = smollm2()
    held = token_ids(tokenizer, HELD_OUT, 2 if quick else 8)
    other = encoded(tokenizer, help_text())[: len(held)]
    base, away = perplexity(model, held), perplexity(model, other)
    ids = np.concatenate([encoded(tokenizer, play(name)).numpy() for name in training_plays()])
    calibration = torch.cat([token_ids(tokenizer, n, 2 if quick else 6) for n in CALIBRATION])
    recipe = Recipe(batch=4, window=256, learning_rate=4e-5, layer_phase=0.0, precision=precision(), validation=4)
    recipe = replace(recipe, steps=SMOLLM2_QUICK if quick else None)
    steps = 0
    for case, layers, goal in [("last 8 layers", "-8:", None)] if quick else [("all 30 layers", "all", 1.5)]:
        student = rewriter.optimize(
            model, GroupedQuery(1, "joint"), layers=layers, calibration=calibration, verify=False
        )
        before, before_other = perplexity(student, held), perplexity(student, other) / away
        found = healed(student, model, ids, recipe, BUDGET)
        after, steps = perplexity(student, held), found.done.steps
        yield Row(
            "smollm2 mqa perplexity / base, healed", f"{case}, joint + refit, {steps} steps",
            after / base, before / base, "before healing", "ratio", before / after,
            None if quick else goal, None if quick or goal is None else after / base <= goal,
            _more(
                found, base=base, kl=divergence(model, student, held), other_text_before=before_other,
                other_text=perplexity(student, other) / away, other_text_kl=divergence(model, student, other),
            ),
        )  # fmt: skip
        del student
    tuned = copy.deepcopy(model)
    alone = replace(recipe, train="all", steps=steps, distillation=0.0, hidden=0.0, language_model=1.0)
    found = healed(tuned, model, ids, alone, BUDGET)
    yield Row(
        "smollm2 perplexity / base, healed", f"the original itself, fine-tuned on the same text, {steps} steps",
        perplexity(tuned, held) / base, 1.0, "before", "ratio", base / perplexity(tuned, held), None, None,
        _more(
            found, base=base, kl=divergence(model, tuned, held), other_text=perplexity(tuned, other) / away,
            other_text_kl=divergence(model, tuned, other),
        ),
    )  # fmt: skip


def divergence(teacher: nn.Module, student: nn.Module, ids: Tensor) -> float:
    """Mean over tokens of KL(teacher ‖ student), nats, in windows that do not overlap."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in ids.split(WINDOW):
            old, new = (m(window[None], use_cache=False).logits[0] for m in (teacher, student))
            total += float(kl_divergence(old, new).double().sum())
            count += len(window)
    return total / count


def encoded(tokenizer: Any, text: str) -> Tensor:
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def healed_table(rows: Sequence[Row]) -> str:
    """Markdown: what healing reached, beside what tells healing from getting used to plays."""
    facts = {
        "steps": "steps", "tokens": "tokens", "CPU s": "cpu_seconds", "KL": "kl",
        "other text, before": "other_text_before", "after": "other_text", "its KL": "other_text_kl",
    }  # fmt: skip
    header = ["what", "case", "before", "after", "goal", "met", *facts]
    measured = [[f"{number:.4f}" for number in (r.peer, r.ours)] for r in rows]
    lines = [
        [r.name, r.case, *m, r.goal, r.ok, *map(r.more.get, facts.values())]
        for r, m in zip(rows, measured, strict=True)
    ]
    return markdown_table(header, lines)


# ------------------------------------------------------------ text of another kind


def help_text() -> str:
    """Technical English that is on every machine: what Python's ``help()`` says about its language."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


def help_sentences(count: int) -> Sequence[str]:
    lines = [s for line in help_text().splitlines() if 30 < len(s := line.strip()) < 80 and s[0].isupper()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(5))[:count]
    return [lines[i] for i in order]
