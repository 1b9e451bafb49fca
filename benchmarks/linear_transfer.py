"""What ten minutes of attention transfer on two cores do for linear attention, beside doing without far keys at all.

The last half of SmolLM2's layers become linear; only their feature maps and gains are trained, to give what the
original's attentions gave (arXiv 2410.10254). The floor is the same model with gains of zero: every query then sees the
65 to 128 nearest keys of 512, and nothing else. Budget and text are those of `benchmarks.healing`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

import rewriter
from benchmarks.healing import BUDGET, divergence, healed, precision, training_plays
from benchmarks.rows import Row, markdown_table
from benchmarks.texts import HELD_OUT, WINDOW, token_ids
from passes.targets import LinearHeads, Window
from rewriter import Recipe
from rewriter.demo.perplexity import perplexity
from rewriter.demo.weights import play, smollm2
from rewriter.install.torch_module import mixers

LAYERS = "-15:"
SILENT = -1e4
"""The logarithm of a gain that is zero in every precision."""
QUICK = 4
"""Steps with --quick: enough to see that it runs."""


def smollm2_linear(quick: bool) -> Iterator[Row]:
    """Rows of held-out perplexity relative to the original's: before the transfer, after it, and both floors."""
    model, tokenizer = smollm2()
    held = token_ids(tokenizer, HELD_OUT, 2 if quick else 8)
    base = perplexity(model, held)
    target = LinearHeads()
    student = rewriter.optimize(model, target, layers=LAYERS, verify=False)
    floor = perplexity(without_far_keys(student), held) / base
    window = rewriter.optimize(model, Window(2 * target.chunk, 0), layers=LAYERS, verify=False)
    wide = perplexity(window, held) / base
    del window
    more: dict[str, Any] = {"base": base, "window": wide}
    before = perplexity(student, held) / base
    kl = None if quick else divergence(model, student, held)
    yield _row("before transfer", before, floor, more | {"kl": kl})
    ids = np.concatenate([tokenizer(play(n), verbose=False)["input_ids"] for n in training_plays()])
    recipe = Recipe(batch=1, window=WINDOW, learning_rate=5e-3, layer_phase=1.0, train="rewritten", validation=2)
    recipe = replace(recipe, precision=precision(), steps=QUICK if quick else None)
    found = healed(student, model, ids, recipe, BUDGET)
    after = perplexity(student, held) / base
    losses = [point.loss for point in found.done.curve]
    more |= {"steps": found.done.steps, "tokens": found.done.tokens, "cpu_seconds": round(found.cpu_seconds, 1)}
    more |= {"first_losses": float(np.mean(losses[:3])), "last_losses": float(np.mean(losses[-3:]))}
    kl = None if quick else divergence(model, student, held)
    yield _row("after transfer", after, floor, more | {"kl": kl, "gain": _mean_gain(student)})


def without_far_keys(student: nn.Module) -> nn.Module:
    """A copy whose queries see the keys that stay under the softmax, and no others."""
    near = copy.deepcopy(student)
    with torch.no_grad():
        for mixer in mixers(near).values():
            if mixer.linear_term is not None:
                mixer.linear_term.log_gain.fill_(SILENT)
    return near


def _mean_gain(student: nn.Module) -> float:
    """The geometric mean of all gains."""
    terms = [m.linear_term for m in mixers(student).values()]
    return float(torch.cat([t.log_gain.detach() for t in terms if t is not None]).mean().exp())


def _row(case: str, found: float, floor: float, more: dict[str, Any]) -> Row:
    return Row(
        "smollm2 linear perplexity / base", f"last 15 layers, {case}", found, floor, "near keys only", "ratio",
        floor / found, None, None, more,
    )  # fmt: skip


def linear_table(rows: Sequence[Row]) -> str:
    """Markdown: perplexity relative to the original's, beside both floors."""
    facts = {"window:128,0": "window", "base": "base", "KL": "kl", "steps": "steps", "CPU s": "cpu_seconds"}
    lines = [[r.case, r.ours, r.peer, *map(r.more.get, facts.values())] for r in rows]
    return markdown_table(["case", "perplexity / base", "near keys only", *facts], lines)
