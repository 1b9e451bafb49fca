"""What choosing the number of heads for each layer is worth: "auto" beside uniform plans with as many K/V bytes.

Both are merged jointly with the same calibration and measured on a play that it has not seen. SmolLM2 has three
key/value heads and can only go to one, so there a uniform plan is which layers become multi-query: the last, or every
n-th.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import rewriter
from benchmarks.rows import Row, markdown_table
from benchmarks.texts import CALIBRATION, HELD_OUT, WINDOW, cosine, embedded, sentences, token_ids
from passes.budget import Budget, Choice, Totals, added, best_mix
from rewriter.demo.perplexity import perplexity
from rewriter.demo.weights import minilm, smollm2


class Measured:
    """Sensitivities that one run of "auto" measured, to plan for further budgets without measuring again."""

    def __init__(self, model: Any) -> None:
        self.report = model.rewrite_report
        found: Mapping[str, Any] = self.report.to_dict()["auto"]
        self.plan = found["plan"]
        self.units: dict[str, list[tuple[str, Choice]]] = {name: [("keep", Choice())] for name in self.plan["targets"]}
        for e in found["sensitivity"]:
            choice = Choice(e["drift"], e["kv_numbers_saved"], e["flops_saved"])
            self.units[e["sites"][0]].append((e["target"], choice))
        saved = sum(c.kv for name, t in self.plan["targets"].items() for n, c in self.units[name] if n == t)
        self.totals = Totals(kv=saved / (1 - self.plan["kv"]), flops=self.report.flops.before)

    def planned(self, kv: float) -> tuple[dict[str, str], float]:
        """(target by selector, predicted drift) of the best mix with at most this part of the K/V bytes."""
        choices = [[c for _, c in unit] for unit in self.units.values()]
        mix = best_mix(choices, Budget(kv=kv), self.totals)
        targets = {f"^{name}$": unit[i][0] for (name, unit), i in zip(self.units.items(), mix, strict=True) if i}
        return targets, added(choices, mix).drift


def minilm_auto(quick: bool) -> Iterator[Row]:
    """Cosine of sentence embeddings."""
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences([HELD_OUT], 64 if quick else 256, 1), padding=True, return_tensors="pt"))
    wished = embedded(model, batch)
    texts = (sentences(CALIBRATION, 64 if quick else 256, 0), tokenizer)
    start = time.perf_counter()
    first = rewriter.optimize(model, "auto", budget="kv=0.5", calibration=texts, verify=False)
    seconds, known = time.perf_counter() - start, Measured(first)
    for label, heads, kv in (("1/2", 6, 1 / 2), ("1/3", 4, 1 / 3), ("1/4", 3, 1 / 4)):
        targets, predicted = known.planned(kv)
        chosen = first if kv == 1 / 2 else rewriter.optimize(model, targets, calibration=texts, verify=False)
        even = rewriter.optimize(model, f"gqa{heads}", calibration=texts, verify=False)
        ours, theirs = (cosine(wished, embedded(m, batch)) for m in (chosen, even))
        more = {"predicted": predicted, "plan": _summary(targets), "seconds": round(seconds, 1)}
        more |= {"measured": known.plan["measured_drift"]} if kv == 1 / 2 else {}
        yield Row(
            "minilm auto, cosine", f"kv {label}", ours, theirs, f"gqa{heads} everywhere", "cosine", ours / theirs,
            theirs, ours > theirs, more,
        )  # fmt: skip


def smollm2_auto(quick: bool) -> Iterator[Row]:
    """Perplexity relative to the original's."""
    model, tokenizer = smollm2()
    held = token_ids(tokenizer, HELD_OUT, 2 if quick else 4)
    base = perplexity(model, held)
    calibration = _calibration(tokenizer, 4 if quick else 8)
    layers = int(model.config.num_hidden_layers)
    start = time.perf_counter()
    first = rewriter.optimize(model, "auto", budget=f"kv={_left(8, layers)}", calibration=calibration, verify=False)
    seconds, known = time.perf_counter() - start, Measured(first)
    for count in (8,) if quick else (8, 15):
        targets, predicted = known.planned(_left(count, layers))
        again = None if count == 8 else rewriter.optimize(model, targets, calibration=calibration, verify=False)
        ours = perplexity(first if again is None else again, held) / base
        more = {"predicted": predicted, "plan": _layers(targets), "seconds": round(seconds, 1), "base": base}
        more |= {"measured": known.plan["measured_drift"]} if count == 8 else {}
        step = layers // count
        for name, selector in (
            (f"the last {count}", f"-{count}:"),
            (f"one in {step}", ",".join(str(step * i + 1) for i in range(count))),
        ):
            even = rewriter.optimize(model, "mqa", layers=selector, calibration=calibration, verify=False)
            theirs = perplexity(even, held) / base
            yield Row(
                "smollm2 auto, perplexity / base", f"{count} of {layers} layers to mqa", ours, theirs, name, "ratio",
                theirs / ours, theirs, ours < theirs, more,
            )  # fmt: skip


def _calibration(tokenizer: Any, windows: int) -> Tensor:
    parts = [token_ids(tokenizer, name, -(-windows // len(CALIBRATION))) for name in CALIBRATION]
    return torch.cat(parts)[: windows * WINDOW]


def _left(changed: int, layers: int) -> float:
    """K/V bytes left if some layers go from three heads to one."""
    return 1 - 2 / 3 * changed / layers


def _summary(targets: Mapping[str, str]) -> str:
    return ", ".join(f"{_layer(name)}: {target}" for name, target in targets.items())


def _layers(targets: Mapping[str, str]) -> str:
    return ", ".join(map(_layer, targets))


def _layer(name: str) -> str:
    return next(part for part in name.replace("\\", "").split(".") if part.isdecimal())


def auto_table(rows: Sequence[Row]) -> str:
    """Markdown: the chosen plan beside the uniform one, and how well its drift was predicted."""
    header = ["what", "case", "auto", "uniform", "which", "better", "predicted drift", "measured", "layers", "s"]
    lines = [
        [
            r.name,
            r.case,
            r.ours,
            r.peer,
            r.peer_name,
            r.ok,
            *map(r.more.get, ("predicted", "measured", "plan", "seconds")),
        ]
        for r in rows
    ]
    return markdown_table(header, lines)
