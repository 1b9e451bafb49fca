"""How far a student is from its teacher on held-out rows, in the parameters' own precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.uptrain.batch import Batch
from rewriter.uptrain.divergence import kl_divergence
from rewriter.uptrain.objective import Plan, counted, next_token_loss, pooled_distance
from rewriter.uptrain.result import Drift

Output = Callable[[Batch], Tensor]
"""A model's main output for a batch."""


@torch.no_grad()
def measure(student: Output, teacher: Output, batches: Sequence[Batch], plan: Plan) -> Drift:
    """Means over all tokens of all batches (over rows for pooled cosines), added up in float64."""
    sums: dict[str, float] = {}

    def add(name: str, value: Tensor, weight: int) -> None:
        sums[name] = sums.get(name, 0.0) + float(value) * weight
        sums[f"#{name}"] = sums.get(f"#{name}", 0.0) + weight

    for batch in batches:
        old, new = teacher(batch), student(batch)
        (a, b), _ = counted(old, new, batch)
        add("cosine", functional.cosine_similarity(a.float(), b.float(), dim=-1).double().mean(), len(a))
        if plan.logits:
            add("kl", kl_divergence(a, b).double().mean(), len(a))
        elif old.dim() == 3:
            add("pooled", 1 - pooled_distance(old, new, batch).double(), batch.rows)
        if plan.logits and plan.causal and old.dim() == 3:
            ahead = batch.tokens - batch.rows
            if ahead:
                add("student", next_token_loss(new, batch).double(), ahead)
                add("teacher", next_token_loss(old, batch).double(), ahead)

    def mean(name: str) -> float | None:
        return sums[name] / sums[f"#{name}"] if name in sums else None

    def perplexity(name: str) -> float | None:
        loss = mean(name)
        return None if loss is None else math.exp(min(loss, 700.0))

    cosine = mean("cosine")
    return Drift(
        mean("kl"),
        math.nan if cosine is None else cosine,
        mean("pooled"),
        perplexity("student"),
        perplexity("teacher"),
    )
