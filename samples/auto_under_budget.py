"""Half the K/V cache, spent where it costs least: "auto" measures every attention of MiniLM and solves for head counts.

Each attention is tried with fewer heads by itself, on texts held back from calibration. A mixed-integer program then
picks one choice for each, so that the budget is kept and the predicted drift is smallest.

    python samples/auto_under_budget.py [FILE.html] [BUDGET] [MERGE]

BUDGET is kv=0.5 by default; speed=1.1 and drift=0.02 are others. MERGE is joint by default, which refines what it
merges; mean takes less time, loses more, and shows the choice just as well.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from passes.targets import Auto, GroupedQuery
from rewriter import optimize
from rewriter.demo.weights import minilm, play

CALIBRATION, UNSEEN = 32, 64


def lines(name: str, count: int) -> list[str]:
    """Every fifth line of a play that is a sentence or so."""
    return [s for line in play(name).splitlines() if 30 < len(s := line.strip()) < 80][::5][:count]


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sentences, features], normalised, as this model is used: the mean over tokens that are not padding."""
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1), dim=-1)


def main(page: str | None = None, budget: str = "kv=0.5", merge: Any = "joint") -> None:
    model, tokenizer = minilm()
    texts = (lines("macbeth", CALIBRATION), tokenizer)
    chosen = optimize(model, Auto(merge=merge), budget=budget, calibration=texts)
    uniform = optimize(model, GroupedQuery(6, merge), calibration=texts)

    print(chosen.rewrite_report)
    if page is not None:
        chosen.rewrite_report.save_html(page)
    batch = dict(tokenizer(lines("hamlet", UNSEEN), padding=True, return_tensors="pt"))
    reference = embed(model, batch)
    print()
    for name, small in (("auto", chosen), ("gqa6", uniform)):
        kv = small.rewrite_report.kv_bytes_per_token
        cosine = float((embed(small, batch) * reference).sum(-1).mean())
        print(f"{name:5} K/V bytes x {kv.after / kv.before:.3f}   sentence cosine {cosine:.4f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
