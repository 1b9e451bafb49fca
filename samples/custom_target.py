"""A target of one's own in one file: of each group keep the key/value head with the largest weights.

The grouped-query paper (arXiv 2305.13245) compares the mean of each group with its first head. This target is a third
choice, and is measured beside the mean on MiniLM. A target that shares heads derives from GroupedQuery and says which
weights each group gets; matching, installing and verifying are the library's.

    python samples/custom_target.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from passes.dataflow import Array, Flow
from passes.site import AttentionSite
from passes.targets import GroupedQuery
from passes.targets.grouped_query import describe, specification
from passes.targets.replacement import Replacement
from passes.weights.projection import operand_bias, operand_weight
from rewriter import optimize
from rewriter.demo.weights import hamlet, minilm


@dataclass(frozen=True)
class StrongestHead(GroupedQuery):
    """Keep one key/value head of each group: the one whose key and value weights have the largest norm."""

    @property
    def name(self) -> str:
        return f"strongest{self.kv_heads}"

    def pooled(self, flow: Flow, site: AttentionSite) -> Replacement:
        """New projections for one site; rows are head-major, as the site's own."""
        heads = [self._by_head(operand_weight(flow, operand), site) for operand in (site.k, site.v)]
        energy = sum(np.square(h).sum(axis=(1, 2)) for h in heads)
        group = site.kv_heads // self.kv_heads
        chosen = np.arange(self.kv_heads) * group + energy.reshape(self.kv_heads, group).argmax(axis=1)
        tensors: dict[str, Array] = {}
        for role, operand in (("k", site.k), ("v", site.v)):
            for part, tensor in (("weight", operand_weight(flow, operand)), ("bias", operand_bias(flow, operand))):
                if tensor is not None:
                    kept = self._by_head(tensor, site)[chosen]
                    tensors[f"{role}_{part}"] = kept.reshape(-1, *tensor.shape[1:])
        spec = specification(site, self.kv_heads)
        return Replacement(site, spec, tensors, False, describe(site), self.name, merge="strongest")

    def _by_head(self, tensor: Array, site: AttentionSite) -> Array:
        """[heads * dim, ...] to [heads, dim, ...]."""
        return tensor.reshape(site.kv_heads, -1, *tensor.shape[1:])


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sentences, features], normalised."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    model, tokenizer = minilm()
    sentences = [line.strip() for line in hamlet().splitlines() if 30 < len(line.strip()) < 80][:32]
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    reference = embed(model, batch)
    few = {name: tensor[:4] for name, tensor in batch.items()}
    for target in (GroupedQuery(6), StrongestHead(6), {"0-2": StrongestHead(6), "3-5": "gqa6"}):
        small = optimize(model, target, example_inputs=few)
        cosine = float((embed(small, batch) * reference).sum(-1).mean())
        print(f"{small.rewrite_report.target:28} sentence cosine {cosine:.4f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
