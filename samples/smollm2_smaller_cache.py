"""A decoder with a third of the K/V cache: SmolLM2's multi-head twin becomes grouped-query attention.

The twin repeats each of SmolLM2's three K/V heads for its query group, so going back to three loses nothing. A model
that was trained with nine different heads would drift, and need uptraining.

    python samples/smollm2_smaller_cache.py [FOLDER]

With FOLDER the rewritten model is saved there, as a checkpoint that transformers loads by itself.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from rewriter import optimize
from rewriter.demo.weights import smollm2, smollm2_twin

PROMPT = "The three laws of thermodynamics say that"
NEW_TOKENS = 40


def generate(model: Any, tokenizer: Any) -> tuple[str, int]:
    """(greedy continuation, bytes of K/V cache held at the end)."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    return tokenizer.decode(out.sequences[0], skip_special_tokens=True), held


def main(folder: str | None = None) -> None:
    model, tokenizer = smollm2()
    twin = smollm2_twin(model)

    small = optimize(twin, "gqa3")  # a copy; the twin is left as it was

    (before, held_before), (after, held_after) = (generate(m, tokenizer) for m in (twin, small))
    report = small.rewrite_report
    exact = sum(site.exact for site in report.sites)
    print(f"before  {before!r}")
    print(f"after   {after!r}")
    print(f"cache   {held_before:,} -> {held_after:,} bytes")
    print(f"weights {report.parameters.before:,} -> {report.parameters.after:,}")
    print(f"sites   {exact} of {len(report.sites)} exact")
    if before != after:
        sys.exit("the continuations differ")
    if folder is not None:
        small.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"saved   {folder}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:2])
