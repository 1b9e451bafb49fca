"""A trained sentence encoder whose lower layers mix tokens by a Fourier transform: what is left without training.

FNet's hybrid (arXiv 2105.03824) keeps attention in the top layers. It was pre-trained from scratch; a trained encoder
gets its structure, and a fit of each feature's scale by calibration, which is a start for uptraining and no more.

    python samples/minilm_to_fnet_hybrid.py
"""

from __future__ import annotations

from typing import Any

import torch

from rewriter import optimize
from rewriter.demo.weights import hamlet, minilm

KEPT = (5, 4, 2)


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sentences, features], normalised."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    return torch.nn.functional.normalize(states.mean(1), dim=-1)


def main() -> None:
    model, tokenizer = minilm()
    words = hamlet().split()
    texts = [" ".join(words[i * 30 : i * 30 + 30]) for i in range(48)]  # of one length: a transform has no mask
    batch = dict(tokenizer(texts, truncation=True, max_length=32, return_tensors="pt"))
    seen, unseen = ({name: t[part] for name, t in batch.items()} for part in (slice(16, None), slice(16)))
    reference = embed(model, unseen)
    few = {name: tensor[:4] for name, tensor in unseen.items()}

    print("attentions kept of 6, sentence cosine to the original on unseen text, flops left\n")
    apart = float((reference * reference.roll(1, 0)).sum(-1).mean())
    print(f"(two different texts of the original: {apart:.3f})\n")
    print("kept  plain   fitted  flops")
    for kept in KEPT:
        target = f"fnet-hybrid:{kept}"
        cosines = []
        for calibration in (None, [seen]):
            mixed = optimize(model, target, example_inputs=few, calibration=calibration)
            cosines.append(float((embed(mixed, unseen) * reference).sum(-1).mean()))
        flops = mixed.rewrite_report.flops
        print(f"{kept:4}  {cosines[0]:6.3f}  {cosines[1]:6.3f}  {flops.after / flops.before:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
