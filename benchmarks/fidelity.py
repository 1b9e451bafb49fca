"""How near a rewritten model stays to its original: merge x ratio x calibration size, beside the zero floor.

``python -m benchmarks.fidelity [--quick] [--json F] [--markdown F] [--only minilm,smollm2,twin,whisper]``

MiniLM: mean cosine of sentence embeddings with the original's, on lines of a play that calibration has not seen.
SmolLM2: perplexity relative to the original's on held-out text, and the largest change of a logit for its twin whose
heads are turned copies of each other. Whisper tiny.en: KL divergence from the original and word error rate
(`benchmarks.speech`). The floor is the same model with every selected attention's output zeroed. Calibration and
held-out text are different plays, and no gradient step is taken; text of another kind is in other-text
(`benchmarks.other_text`), what healing gives back in minilm-healed and smollm2-healed (`benchmarks.healing`), what
choosing for each layer gives in minilm-auto and smollm2-auto (`benchmarks.auto_choice`), what attention transfer gives
linear attention in smollm2-linear (`benchmarks.linear_transfer`), and what Fourier mixes come to after healing in
minilm-mixed (`benchmarks.mixed_healing`). Files are written after every row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rewriter
from benchmarks.auto_choice import auto_table, minilm_auto, smollm2_auto
from benchmarks.healing import healed_table, minilm_healed, smollm2_healed
from benchmarks.linear_transfer import linear_table, smollm2_linear
from benchmarks.machine import machine
from benchmarks.mixed_healing import minilm_mixed
from benchmarks.other_text import other_text_rows, other_text_table
from benchmarks.rows import Row, markdown_table, put_section, write_json
from benchmarks.speech import speech_table, whisper_rows
from benchmarks.texts import CALIBRATION, HELD_OUT, WINDOW, cosine, embedded, sentences, token_ids
from benchmarks.zeroed import zeroed
from passes.targets import GroupedQuery
from rewriter.demo.perplexity import perplexity
from rewriter.demo.weights import minilm, smollm2, smollm2_twin

LOGIT_GOAL = 1e-3
MINILM_CASES = ((6, "1/2", 0.95), (3, "1/4", None), (1, "MQA", 0.82))
"""K/V heads that are left, their share, and the cosine that is aimed at."""
MINILM_QUICK = 256
"""Sentences of calibration with --quick."""


@dataclass(frozen=True)
class Merge:
    """One way to merge: its name in the table, the target's merge, and how much calibration it gets."""

    name: str
    method: str | None
    calibration: int

    @property
    def case(self) -> str:
        return f"{self.name}, {self.calibration} calibration tokens" if self.calibration else self.name


WEIGHT_ONLY = (Merge("mean", "mean", 0), Merge("aligned", "aligned", 0), Merge("joint", "joint", 0))


# ------------------------------------------------------------ MiniLM


def minilm_rows(quick: bool) -> Iterator[Row]:
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences([HELD_OUT], 64 if quick else 256, 1), padding=True, return_tensors="pt"))
    wished = embedded(model, batch)
    sizes = (MINILM_QUICK,) if quick else (128, 512, 2048)
    for heads, ratio, goal in MINILM_CASES:
        if quick and heads == 3:
            continue
        floor = cosine(wished, embedded(zeroed(model, "attention.output.dense"), batch))
        merges = [*WEIGHT_ONLY, *(Merge("mean + refit", "mean", n) for n in sizes[-1:])]
        merges += [Merge("joint + refit", "joint", n) for n in sizes]
        for merge in merges:
            texts = (sentences(CALIBRATION, merge.calibration, 0), tokenizer) if merge.calibration else None
            start = time.perf_counter()
            small = rewriter.optimize(model, _target(heads, merge), calibration=texts, verify=False)
            seconds = time.perf_counter() - start
            found = cosine(wished, embedded(small, batch))
            best = goal if merge.name == "joint + refit" and merge.calibration == sizes[-1] else None
            name = f"{merge.name}, {merge.calibration} sentences" if merge.calibration else merge.name
            yield Row(
                "minilm cosine", f"kv {ratio}, {name}", found, floor, "attention zeroed", "cosine", found / floor,
                best, None if best is None else found >= best, {"seconds": round(seconds, 1)},
            )  # fmt: skip


def _target(heads: int, merge: Merge) -> GroupedQuery:
    return GroupedQuery(heads, merge.method)  # type: ignore[arg-type]


# ------------------------------------------------------------ SmolLM2


def smollm2_rows(quick: bool) -> Iterator[Row]:
    model, tokenizer = smollm2()
    held = token_ids(tokenizer, HELD_OUT, 2 if quick else 8)
    base = perplexity(model, held)
    count = 8 if quick else 16
    calibration = torch.cat([token_ids(tokenizer, name, -(-count // 3)) for name in CALIBRATION])[: count * WINDOW]
    jobs = (
        [("last 8 layers", "-8:", 1.15)] if quick else [("last 8 layers", "-8:", 1.15), ("all 30 layers", "all", 3.0)]
    )
    merges = [WEIGHT_ONLY[0], Merge("joint + refit", "joint", len(calibration))]
    merges = merges if quick else [*WEIGHT_ONLY, Merge("mean + refit", "mean", len(calibration)), merges[1]]
    for case, layers, goal in jobs:
        first = 0 if layers == "all" else 22
        silent = zeroed(model, "o_proj", lambda name, first=first: int(name.split(".")[2]) >= first)
        floor = perplexity(silent, held) / base
        del silent
        for merge in merges:
            start = time.perf_counter()
            small = rewriter.optimize(
                model, _target(1, merge), layers=layers, verify=False,
                calibration=calibration if merge.calibration else None,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            found = perplexity(small, held) / base
            wanted = goal if merge.name == "joint + refit" else None
            yield Row(
                "smollm2 mqa perplexity / base", f"{case}, {merge.case}", found, floor, "attention zeroed", "ratio",
                floor / found, wanted, None if wanted is None else found <= wanted,
                {"base": base, "seconds": round(seconds, 1)},
            )  # fmt: skip


# ------------------------------------------------------------ the turned twin


def twin_rows(quick: bool) -> Iterator[Row]:
    """SmolLM2 with 9 key/value heads, copies of 3, each turned by rotations of its own, undone in q and o."""
    model, tokenizer = smollm2()
    twin = turned_twin(model)
    del model
    ids = token_ids(tokenizer, HELD_OUT, 1)[: 128 if quick else WINDOW][None]
    with torch.no_grad():
        before = twin(ids).logits
        floor = float((twin(ids).logits - zeroed(twin, "o_proj")(ids).logits).abs().max())
    for merge in WEIGHT_ONLY:
        small = rewriter.optimize(twin, _target(3, merge), verify=False, kernels="off")
        with torch.no_grad():
            moved = float((small(ids).logits - before).abs().max())
        exact = merge.name != "mean"
        yield Row(
            "smollm2 turned twin, largest change", f"9 -> 3, {merge.name}", moved, floor, "attention zeroed", "logit",
            floor / max(moved, 1e-12), LOGIT_GOAL if exact else None, moved <= LOGIT_GOAL if exact else None,
            {"exact": all(s.exact for s in small.rewrite_report.sites)},
        )  # fmt: skip


def turned_twin(model: Any, seed: int = 0) -> Any:
    """The multi-head twin with heads turned at random: each rotary frequency of a key by an angle, values by any
    orthogonal matrix. What it computes stays the same up to float32."""
    twin: Any = smollm2_twin(model)
    generator = torch.Generator().manual_seed(seed)
    heads = int(twin.config.num_attention_heads)
    for layer in twin.model.layers:
        attention = layer.self_attn
        dim = attention.head_dim
        with torch.no_grad():
            q, k, v = (p.weight.view(heads, dim, -1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            o = attention.o_proj.weight.view(-1, heads, dim)
            for h in range(heads):
                angles = torch.rand(dim // 2, generator=generator, dtype=torch.float64) * 6.28
                cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
                turn = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
                free = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
                q[h], k[h], v[h] = ((t @ w[h].double()).float() for t, w in ((turn, q), (turn, k), (free, v)))
                o[:, h] = (o[:, h].double() @ free.T).float()
    return twin


# ------------------------------------------------------------ command line


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "minilm": minilm_rows,
    "twin": twin_rows,
    "smollm2": smollm2_rows,
    "whisper": whisper_rows,
    "other-text": other_text_rows,
    "minilm-auto": minilm_auto,
    "smollm2-auto": smollm2_auto,
    "minilm-healed": minilm_healed,
    "minilm-mixed": minilm_mixed,
    "smollm2-healed": smollm2_healed,
    "smollm2-linear": smollm2_linear,
}


MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2", "whisper": "Whisper tiny.en"}
"""Headings, by how the name of what is measured begins."""
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "healed": healed_table,
    "auto": auto_table,
    "linear": linear_table,
    "whisper": speech_table,
    "another kind": other_text_table,
}
"""By words in what is measured; `plain_table` where there is none of them."""


def document(rows: Sequence[Row], quick: bool) -> str:
    """Markdown: what was measured how, then for each model what is met and what is not."""
    where = machine()
    size = "--quick: small samples" if quick else "all cases"
    note = (
        f"{where['processor']}, {where['cores']} cores, {where['torch_threads']} torch threads, load "
        f"{where['load_before'][0]}; {size}. Calibrated on {', '.join(CALIBRATION)}, measured on {HELD_OUT}; no "
        "gradient step but where it says healed, or after transfer."
    )
    parts = [note]
    for first, heading in MODELS.items():
        own = [r for r in rows if r.name.startswith(first)]
        if own:
            tables = [plain_table([r for r in own if _kind(r) is None])]
            tables += [
                table([r for r in own if _kind(r) == kind]) for kind, table in TABLES.items() if kind in map(_kind, own)
            ]
            parts += [f"### {heading}", *filter(None, tables)]
    return "\n\n".join(parts)


def _kind(row: Row) -> str | None:
    return next((kind for kind in TABLES if kind in row.name), None)


def plain_table(rows: Sequence[Row]) -> str:
    """Markdown: no step of training; empty without rows."""
    header = ["what", "case", "measured", "attention zeroed", "goal", "met", "s"]
    lines = [[r.name, r.case, r.ours, r.peer, r.goal, r.ok, r.more.get("seconds")] for r in rows]
    return markdown_table(header, lines) if lines else ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    chosen = [name for name in PARTS if not options.only or name in options.only.split(",")]
    if not chosen:
        print("no such part", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in chosen:
        for row in PARTS[name](options.quick):
            rows.append(row)
            print(f"{row.name} | {row.case} | {row.ours:.4g}", file=sys.stderr, flush=True)
            _write(rows, options)
    print(document(rows, options.quick))
    return 0


def _write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """What is measured so far: a run of hours that is cut short keeps it."""
    if options.markdown:
        put_section(options.markdown, "Fidelity", document(rows, options.quick))
    if options.json:
        write_json(options.json, rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and smaller samples; under 5 minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the file whose section Fidelity is replaced")
    parser.add_argument("--only", default="", help=f"only these parts, by comma: {', '.join(PARTS)}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
