"""Multi-query and grouped-query attention (arXiv 1911.02150, 2305.13245): fewer key/value heads, mean-pooled.

The step is exact where the heads of every group are equal, and lossy elsewhere. Pooling before or after a rotary
embedding is the same thing, since all heads are rotated alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.spec import GroupedQueryAttention
from passes.dataflow import Array, Flow
from passes.site import AttentionSite
from passes.targets.replacement import Replacement
from passes.weights.pooling import legal_head_counts, mean_pool, ties
from passes.weights.projection import operand_bias, operand_weight


@dataclass(frozen=True)
class GroupedQuery:
    """Pool a site's key/value heads to `kv_heads`.

    Attributes:
        kv_heads: 1 is multi-query attention.
        merge: how heads of a group become one; "mean" averages projection weights and biases.
    """

    kv_heads: int
    merge: str = "mean"

    def __post_init__(self) -> None:
        if self.kv_heads < 1:
            raise ValueError(f"kv_heads must be at least 1, not {self.kv_heads}")
        if self.merge != "mean":
            raise ValueError(f"unknown merge {self.merge!r}; this version has 'mean'")

    @property
    def name(self) -> str:
        return "mqa" if self.kv_heads == 1 else f"gqa{self.kv_heads}"

    def legal(self, site: AttentionSite) -> list[int]:
        """Every head count this site can be pooled to."""
        return legal_head_counts(site.heads, site.kv_heads)

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site cannot be pooled at all, or None. Illegal head counts are wrong usage, not a refusal."""
        for role, operand in (("key", site.k), ("value", site.v)):
            if operand.norm is not None and not operand.norm.per_head:
                return f"the {role} norm spans the features of all heads; merged heads would be normalised differently"
            if operand.past is not None and operand.past_head_axis is None and operand.heads > 1:
                return f"the {role} cache has no axis of its own for heads"
        softcaps = [i for i, m in enumerate(site.modifiers) if m.kind == "softcap"]
        if softcaps and softcaps != [0]:
            return "a softcap follows a mask or bias on the scores"
        return None

    def transform(self, flow: Flow, site: AttentionSite) -> Replacement:
        """New key and value projections for one site; weights in the dtype they were stored in."""
        tensors: dict[str, Array] = {}
        exact = True
        for role, operand in (("k", site.k), ("v", site.v)):
            for part, tensor in (("weight", operand_weight(flow, operand)), ("bias", operand_bias(flow, operand))):
                if tensor is not None:
                    exact &= ties(tensor, operand.heads, self.kv_heads)
                    tensors[f"{role}_{part}"] = mean_pool(tensor, operand.heads, self.kv_heads)
        return Replacement(site, specification(site, self.kv_heads), tensors, exact, describe(site), self.name)


def specification(site: AttentionSite, kv_heads: int) -> GroupedQueryAttention:
    """The spec of a site at some number of key/value heads."""
    kinds = [m.kind for m in site.modifiers]
    softcap = next((m.number for m in site.modifiers if m.kind == "softcap"), None)
    return GroupedQueryAttention(
        heads=site.heads,
        kv_heads=kv_heads,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        scale=site.scale,
        causal="causal" in kinds,
        bias=any(k in {"bias", "mask", "unmask"} for k in kinds),
        softcap=softcap,
        masked_rows_are_zero=site.masked_rows_are_zero,
        sinks="sinks" in kinds,
    )


def describe(site: AttentionSite) -> str:
    """ "mha12", "gqa4" or "mqa": what a site is now."""
    if site.kv_heads == site.heads:
        return f"mha{site.heads}"
    return "mqa" if site.kv_heads == 1 else f"gqa{site.kv_heads}"
