"""Decoupled-head attention (DHA, arXiv 2406.06567): keys and values with different numbers of heads.

As grouped-query attention, with groups of one size for keys and of another for values; query head h goes on reading
the key head and the value head that stand for what it read. The paper fuses heads by learned weights, one number for
each head that goes into a new one, and learns them by gradient. Here a new head is a matrix on the stacked heads of its
group (passes/weights/joint.py), which includes any such weights and has a closed form; the merge "mean" is the paper's
with all weights equal. Uptraining goes on from there, without the fusion, as fused heads are ordinary projections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from codegen.spec import DecoupledAttention, GroupedQueryAttention
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.targets.freedom import freedom_of
from passes.targets.grouped_query import GroupedQuery, as_tensors, describe, shared_alone, specification
from passes.targets.misfit import Misfit
from passes.targets.replacement import Replacement
from passes.weights.group import Moments
from passes.weights.grouping import Groups
from passes.weights.merge import METHODS, Freedom, Merged, Method, contiguous, merge_heads
from passes.weights.pooling import mean_pool, ties
from passes.weights.projection import operand_bias, operand_rows, site_weights


@dataclass(frozen=True)
class DecoupledHeads:
    """Merge a site's keys to `key_heads` and its values to `value_heads`.

    Attributes:
        key_heads, value_heads: None for a quarter of the present heads, and half of them, or as few more as fit.
        merge: as in `GroupedQuery`.
    """

    key_heads: int | None = None
    value_heads: int | None = None
    merge: Method | None = None

    def __post_init__(self) -> None:
        if (self.key_heads is None) != (self.value_heads is None):
            raise ValueError("give both numbers of heads, or none")
        for name in ("key_heads", "value_heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.merge is not None and self.merge not in METHODS:
            raise ValueError(f"unknown merge {self.merge!r}; there are {', '.join(METHODS)}")

    @property
    def name(self) -> str:
        return "dha" if self.key_heads is None else f"dha:{self.key_heads},{self.value_heads}"

    def method(self, calibrated: bool) -> Method:
        """The merge, the default resolved."""
        return self.merge or ("joint" if calibrated else "mean")

    def heads(self, site: AttentionSite) -> tuple[int, int]:
        """(of keys, of values) at a site."""
        if self.key_heads is not None and self.value_heads is not None:
            return self.key_heads, self.value_heads
        legal = GroupedQuery(1).legal(site)
        return next(n for n in legal if 4 * n >= site.kv_heads), next(n for n in legal if 2 * n >= site.kv_heads)

    def refuses(self, site: AttentionSite) -> str | None:
        """As `GroupedQuery.refuses`; the door may find more."""
        if (reason := shared_alone(site)) is not None:
            return reason
        if site.temperature is not None:
            return "each head's scores have a temperature of their own, which only shared heads can keep"
        if any(o.norm is not None and (o.norm.gains is not None or not o.norm.per_head) for o in (site.k, site.v)):
            return "a norm treats its heads apart, and those of keys and values would differ in number: ask for gqaN"
        return GroupedQuery(1).refuses(site)

    def misfit(self, site: AttentionSite) -> Misfit | None:
        """What to ask for instead at a site whose heads these counts do not divide."""
        wrong = (GroupedQuery(n).misfit(site) for n in self.heads(site))
        return next((misfit for misfit in wrong if misfit is not None), None)

    def idle(self, site: AttentionSite) -> str | None:
        """Why there is nothing to do at a site, or None."""
        same = set(self.heads(site)) == {site.kv_heads}
        return f"it has {site.kv_heads} key/value heads already" if same else None

    def keeps(self, sites: Sequence[AttentionSite]) -> dict[str, str]:
        """No site is left as it is by definition."""
        return {}

    def spec(self, site: AttentionSite) -> DecoupledAttention | GroupedQueryAttention:
        """Grouped attention where both numbers are the same."""
        return decoupled_specification(site, *self.heads(site))

    def groups(self, site: AttentionSite) -> tuple[Groups, Groups]:
        """Heads of each new key head, and of each new value head: neighbours."""
        keys, values = self.heads(site)
        return contiguous(site.kv_heads, keys), contiguous(site.kv_heads, values)

    def transform(
        self,
        flow: Flow,
        site: AttentionSite,
        evidence: Evidence | None = None,
        sharing: Sequence[AttentionSite] = (),
    ) -> Replacement:
        """New projections for one site without calibration; `evidence` is needed by merges other than the mean."""
        if self.method(False) == "mean" or self.tied(flow, site):
            return self.pooled(flow, site)
        if evidence is None:
            raise ValueError(f"merge {self.merge!r} needs the site's evidence")
        freedom = freedom_of(flow, site, evidence, sharing)
        return self.merged(flow, site, merge_apart(flow, site, self, freedom), self.method(False))

    def tied(self, flow: Flow, site: AttentionSite) -> bool:
        """Whether the heads of every group are equal bit for bit."""
        return all(
            ties(tensor, operand.heads, count)
            for operand, count in zip((site.k, site.v), self.heads(site), strict=True)
            for tensor in (operand_rows(flow, operand), operand_bias(flow, operand))
            if tensor is not None
        )

    def pooled(self, flow: Flow, site: AttentionSite) -> Replacement:
        """The mean of each group; exact where its heads are equal."""
        tensors: dict[str, Array] = {}
        for role, operand, count in zip(("k", "v"), (site.k, site.v), self.heads(site), strict=True):
            for part, tensor in (("weight", operand_rows(flow, operand)), ("bias", operand_bias(flow, operand))):
                if tensor is not None:
                    tensors[f"{role}_{part}"] = mean_pool(tensor, operand.heads, count)
        return Replacement(site, self.spec(site), tensors, self.tied(flow, site), describe(site), self._after(site))

    def merged(self, flow: Flow, site: AttentionSite, merged: Merged, method: Method) -> Replacement:
        """A replacement out of merged weights."""
        notes = tuple(f"{part} are averaged: {reason}" for part, reason in merged.notes.items())
        tensors = as_tensors(flow, site, merged)
        return Replacement(
            site, self.spec(site), tensors, merged.exact, describe(site), self._after(site), merge=method, notes=notes
        )

    def _after(self, site: AttentionSite) -> str:
        return replace(self, key_heads=self.heads(site)[0], value_heads=self.heads(site)[1]).name


def merge_apart(
    flow: Flow,
    site: AttentionSite,
    target: DecoupledHeads,
    freedom: Freedom,
    moments: tuple[Sequence[Moments], Sequence[Moments]] | None = None,
    *,
    method: Method | None = None,
) -> Merged:
    """Keys merged by their groups and values by theirs, by statistics of each if there are any."""
    weights = site_weights(flow, site)
    chosen = method or target.method(moments is not None)
    keys, values = (
        merge_heads(weights, site.group, groups, chosen, freedom, None if moments is None else moments[i])
        for i, groups in enumerate(target.groups(site))
    )
    joined = replace(keys.weights, v=values.weights.v, out=values.weights.out, out_bias=values.weights.out_bias)
    return replace(keys, weights=joined, lost_values=values.lost_values)


def decoupled_specification(
    site: AttentionSite, key_heads: int, value_heads: int
) -> DecoupledAttention | GroupedQueryAttention:
    """The spec of a site at these numbers of heads."""
    if key_heads == value_heads:
        return specification(site, key_heads)
    return DecoupledAttention(specification(site, math.lcm(key_heads, value_heads)), key_heads, value_heads)
