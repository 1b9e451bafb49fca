"""A trained sentence encoder with fewer K/V heads, and how far its vectors move: in all layers, and layer by layer.

Mean pooling is where uptraining starts (arXiv 2305.13245), not where it ends: with every layer rewritten the vectors
are of no use yet, and some layers bear it much better than others.

    python samples/minilm_to_gqa.py [LAYER...]
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from rewriter import optimize
from rewriter.demo.weights import hamlet, minilm

TARGETS = ("gqa6", "mqa")


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sentences, features], normalised: the mean over real tokens, which is how this model is used."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main(*layers: str) -> None:
    model, tokenizer = minilm()
    sentences = [line.strip() for line in hamlet().splitlines() if 30 < len(line.strip()) < 80][:32]
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    reference = embed(model, batch)
    few = {name: tensor[:4] for name, tensor in batch.items()}  # enough to capture the model with

    single = layers or tuple(str(i) for i in range(model.config.num_hidden_layers))
    print(f"sentence cosine to the original, {len(sentences)} sentences\n")
    print("layers  " + "  ".join(target.rjust(6) for target in TARGETS))
    for selected in ("all", *single):
        cosines = []
        for target in TARGETS:
            small = optimize(model, target, layers=selected, example_inputs=few)
            cosines.append(float((embed(small, batch) * reference).sum(-1).mean()))
        print(selected.ljust(6) + "  " + "  ".join(f"{cosine:.4f}" for cosine in cosines), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
