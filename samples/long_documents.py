"""A decoder reads a long text with a bounded cache: a third of SmolLM2's layers see a window, or sum up what is past.

`window` keeps all weights: queries see the last 128 tokens and the first four, and the cache holds no more than these.
`linear` sees its chunk and the one before with softmax, and everything beyond through a product of features, which
start as they are drawn: uptraining teaches them what attention gave. `flash` puts a gated unit with a state of fixed
size in the place of the attention: a start for uptraining and no more. All three take time linear in the length.

    python samples/long_documents.py [TOKENS] [TARGET...]
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from rewriter import bounded_cache, optimize
from rewriter.demo.weights import hamlet, smollm2

LAYERS, PIECE = "-10:", 128
TARGETS = ("window:128,4", "linear:64", "flash:64")


def read(model: Any, ids: torch.Tensor, cache: Any) -> tuple[float, int]:
    """(perplexity of the second half behind the first, bytes of keys and values held at the end), piece by piece."""
    loss, count = 0.0, 0
    for start in range(0, ids.shape[1] - 1, PIECE):
        piece = ids[:, start : start + PIECE]
        with torch.no_grad():
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
        following = ids[0, start + 1 : start + PIECE + 1]
        if start >= ids.shape[1] // 2:
            loss += float(torch.nn.functional.cross_entropy(logits[0, : len(following)], following, reduction="sum"))
            count += len(following)
    return math.exp(loss / count), sum(tensor.nbytes for layer in cache.layers for tensor in held(layer))


def held(layer: Any) -> list[torch.Tensor]:
    """Every tensor that a cache keeps for a layer."""
    return [value for value in vars(layer).values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def main(tokens: int = 1024, *targets: str) -> None:
    from transformers import DynamicCache

    model, tokenizer = smollm2()
    ids = tokenizer(hamlet(), return_tensors="pt", verbose=False).input_ids[:, :tokens]
    print(f"{ids.shape[1]} tokens of Hamlet, {PIECE} at a time; a third of the layers rewritten\n")
    print("target        perplexity  cache, bytes")
    for target in (None, *(targets or TARGETS)):
        small = model if target is None else optimize(model, target, layers=LAYERS)
        own = target is None or target.startswith("flash")  # a unit's state goes into transformers' own cache
        cache = DynamicCache(config=model.config) if own else bounded_cache(small)
        perplexity, size = read(small, ids, cache)
        print(f"{target or 'as it is':12}  {perplexity:10.2f}  {size:12,}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
