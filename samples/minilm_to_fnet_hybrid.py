"""A trained sentence encoder whose lower layers mix tokens by a Fourier transform: what is left without training.

FNet's hybrid (arXiv 2105.03824) keeps attention in the top layers. It was pre-trained from scratch; a trained encoder
gets its structure, and a fit of each feature's scale by calibration, which is a start for uptraining and no more.

    python samples/minilm_to_fnet_hybrid.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rewriter import optimize
from rewriter.demo.weights import hamlet, minilm

KEPT = (5, 4, 2)


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sentences, features], normalised: the mean over tokens that are no padding."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    shown = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * shown).sum(1) / shown.sum(1), dim=-1)


def of_one_length(texts: Sequence[str], tokenizer: Any) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches without padding, each with the places of its texts: a transform has no mask, and would mix padding in."""
    places = defaultdict(list)
    for place, ids in enumerate(tokenizer(list(texts))["input_ids"]):
        places[len(ids)].append(place)
    for found in places.values():
        yield found, dict(tokenizer([texts[i] for i in found], return_tensors="pt"))


def padding_cosine(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """How near sentences in one padded batch come to the same sentences in batches of one length; 1 without mixes."""
    padded = embed(model, dict(tokenizer(list(texts), padding=True, return_tensors="pt")))
    alone = torch.empty_like(padded)
    for places, batch in of_one_length(texts, tokenizer):
        alone[places] = embed(model, batch)
    return float((padded * alone).sum(-1).mean())


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
        plain, fitted = (optimize(model, target, example_inputs=few, calibration=c) for c in (None, [seen]))
        cosines = [float((embed(mixed, unseen) * reference).sum(-1).mean()) for mixed in (plain, fitted)]
        flops = fitted.rewrite_report.flops
        print(f"{kept:4}  {cosines[0]:6.3f}  {cosines[1]:6.3f}  {flops.after / flops.before:.2f}", flush=True)

    lines = [" ".join(words[9000 + 40 * i :][: 4 + i]) for i in range(24)]
    print("\nsentences of many lengths, in one padded batch beside batches of one length, cosine:")
    for name, encoder in (("original", model), ("plain", plain), ("fitted", fitted)):
        print(f"{name:9}  {padding_cosine(encoder, tokenizer, lines):.4f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
