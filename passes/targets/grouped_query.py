"""Multi-query and grouped-query attention (arXiv 1911.02150, 2305.13245): fewer key/value heads.

Heads of a group are merged by their mean, by their mean after alignment (2412.20677), or jointly (best low rank). The
step is exact where the heads of every group are equal (or, merged otherwise than by the mean, turned copies), and
lossy elsewhere. Pooling before or after a rotary embedding is the same thing, since all heads are rotated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from codegen.spec import GroupedQueryAttention
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.match.verdicts import BIAS_NOT_ASKED_FOR
from passes.site import AttentionSite
from passes.targets.freedom import freedom_of
from passes.targets.misfit import Misfit
from passes.targets.replacement import Replacement
from passes.weights.group import Moments
from passes.weights.grouping import Groups, pair_losses, pairs, similar
from passes.weights.head_gains import operand_gains
from passes.weights.merge import METHODS, Freedom, Merged, Method, contiguous, merge_heads, readers
from passes.weights.pooling import legal_head_counts, mean_pool, ties
from passes.weights.projection import SiteWeights, operand_bias, operand_rows, site_weights

Grouping = Literal["contiguous", "similar"]

GROUPINGS: tuple[Grouping, ...] = ("contiguous", "similar")

JOINED = "its tokens are joined from several projections, whose heads can be shared (gqaN) and nothing else"
INTERLEAVED = "query heads that share a key/value head are no neighbours; gqaN brings them together first"
BY_BLOCKS = (
    "it attends within blocks of tokens, which have an axis of their own; only gqaN keeps that as it is (or give the "
    "weights to an attention between all tokens, which target window makes local again)"
)
HIDDEN_BIAS = "its scores get a bias that is computed from hidden states, which only gqaN keeps"


def shared_alone(site: AttentionSite) -> str | None:
    """Why a site's heads can be shared (gqaN) and nothing else done with it, None if more can."""
    if site.joined:
        return JOINED
    if site.interleaved:
        return INTERLEAVED
    if site.hidden_bias:
        return HIDDEN_BIAS
    if site.stays:
        return f"{site.stays}; only gqaN keeps that as it is"
    return BY_BLOCKS if site.by_blocks else None


def keeps_hidden_biases(target: Any) -> bool:
    """Whether a target, or one of those by layer, is to share heads whose scores get a bias of hidden states."""
    asked = target.values() if isinstance(target, Mapping) else (target,)
    return any(isinstance(t, GroupedQuery) and t.keep_hidden_bias for t in asked)


@dataclass(frozen=True)
class GroupedQuery:
    """Merge a site's key/value heads to `kv_heads`.

    Attributes:
        kv_heads: 1 is multi-query attention.
        merge: how heads of a group become one. "mean" averages projection weights and biases; "aligned" turns heads
            towards each other first and turns queries and output projection back; "joint" is the best shared head for
            scores and outputs, and refits the output projection where there is calibration. None stands for "mean"
            without calibration and "joint" with it.
        grouping: which heads share one: "contiguous", neighbours as in the paper, or "similar", those that cost least
            to merge; where they are not neighbours query heads change places. Where those cannot be moved, neighbours
            are grouped, and the report says so.
        keep_hidden_bias: also where scores get a bias that is computed from hidden states (relative positions by
            content as in DeBERTa, Transformer-XL and Conformers, pairs of tokens), which stays as it is.
    """

    kv_heads: int
    merge: Method | None = None
    grouping: Grouping = "contiguous"
    keep_hidden_bias: bool = False

    def __post_init__(self) -> None:
        if self.kv_heads < 1:
            raise ValueError(f"kv_heads must be at least 1, not {self.kv_heads}")
        if self.merge is not None and self.merge not in METHODS:
            raise ValueError(f"unknown merge {self.merge!r}; there are {', '.join(METHODS)}")
        if self.grouping not in GROUPINGS:
            raise ValueError(f"unknown grouping {self.grouping!r}; there are {', '.join(GROUPINGS)}")

    def method(self, calibrated: bool) -> Method:
        """The merge, the default resolved."""
        return self.merge or ("joint" if calibrated else "mean")

    @property
    def name(self) -> str:
        return "mqa" if self.kv_heads == 1 else f"gqa{self.kv_heads}"

    def legal(self, site: AttentionSite) -> list[int]:
        """Every head count this site can be pooled to."""
        return legal_head_counts(site.heads, site.kv_heads)

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site cannot be pooled at all, or None. Illegal head counts are wrong usage, not a refusal."""
        if site.hidden_bias and not self.keep_hidden_bias:
            return BIAS_NOT_ASKED_FOR
        if site.joined and site.interleaved:
            return "tokens are joined from several projections, and query heads that share a head are no neighbours"
        for role, operand in (("key", site.k), ("value", site.v)):
            if operand.past is not None and operand.past_head_axis is None and operand.heads > 1:
                return f"the {role} cache has no axis of its own for heads"
        return misplaced(site)

    def misfit(self, site: AttentionSite) -> Misfit | None:
        """What to ask for instead at a site whose heads this count does not divide; None where it fits."""
        legal = self.legal(site)
        if self.kv_heads in legal:
            return None
        heads = f"{site.heads} query heads, {site.kv_heads} key/value heads"
        return Misfit(heads, "legal numbers of key/value heads", ", ".join(map(str, legal)))

    def idle(self, site: AttentionSite) -> str | None:
        """Why there is nothing to do at a site, or None."""
        same = site.kv_heads == self.kv_heads
        return f"it has {site.kv_heads} key/value heads already" if same else None

    def keeps(self, sites: Sequence[AttentionSite]) -> dict[str, str]:
        """Sites that the target by its definition leaves as they are, with the reason; here none."""
        return {}

    def transform(
        self,
        flow: Flow,
        site: AttentionSite,
        evidence: Evidence | None = None,
        sharing: Sequence[AttentionSite] = (),
    ) -> Replacement:
        """New projections for one site without calibration; weights in the dtype they were stored in.

        `evidence` is needed by merges other than the mean; raises ValueError without. `sharing` are the sites that use
        the same weights.
        """
        plain = site.joined or (self.method(False) == "mean" and self.grouping == "contiguous")
        if plain or tied(flow, site, self.kv_heads):
            if not site.interleaved:
                return self.pooled(flow, site)
            if evidence is None:
                return self.gathered(flow, site, "nothing was recorded of it")
            return self.gathered(flow, site, freedom_of(flow, site, evidence, sharing).order)
        if evidence is None:
            raise ValueError(f"merge {self.merge!r} and grouping {self.grouping!r} need the site's evidence")
        freedom = freedom_of(flow, site, evidence, sharing)
        if site.interleaved and freedom.order is not None:
            return self.gathered(flow, site, freedom.order)
        return self.merged(flow, site, merge_site(flow, site, self, freedom), self.method(False))

    def pooled(self, flow: Flow, site: AttentionSite) -> Replacement:
        """The mean of each group; exact where its heads are equal."""
        tensors: dict[str, Array] = {}
        exact = True
        for role, operand in site.shared:
            for part, tensor in (("weight", operand_rows(flow, operand)), ("bias", operand_bias(flow, operand))):
                if tensor is not None:
                    exact &= ties(tensor, operand.heads, self.kv_heads)
                    tensors[f"{role}_{part}"] = mean_pool(tensor, operand.heads, self.kv_heads)
            exact &= all(ties(g, operand.heads, self.kv_heads) for g in operand_gains(flow, operand).values())
        tensors |= pooled_gains(flow, site, self.kv_heads)
        return Replacement(site, specification(site, self.kv_heads), tensors, exact, describe(site), self.name)

    def gathered(self, flow: Flow, site: AttentionSite, obstacle: str | None) -> Replacement:
        """The same, with query heads of a group brought together where they are no neighbours, if nothing (`obstacle`)
        keeps them from changing places."""
        pooled = self.pooled(flow, site)
        return gathering(flow, pooled, obstacle) if site.interleaved and self.kv_heads > 1 else pooled

    def groups(
        self,
        weights: SiteWeights,
        site: AttentionSite,
        freedom: Freedom,
        measured: Callable[[Groups], Sequence[Moments]] | None = None,
    ) -> Groups:
        """Key/value heads of each group; by statistics of pairs of heads, if there are any."""
        neighbours = contiguous(site.kv_heads, self.kv_heads)
        if self.grouping == "contiguous" or freedom.order is not None or self.kv_heads in (1, site.kv_heads):
            return neighbours
        moments = None if measured is None else measured(pairs(site.kv_heads))
        return similar(pair_losses(weights, site.group, freedom, moments), self.kv_heads)

    def merged(self, flow: Flow, site: AttentionSite, merged: Merged, method: Method) -> Replacement:
        """A replacement out of merged weights."""
        return Replacement(
            site,
            specification(site, self.kv_heads),
            as_tensors(flow, site, merged) | pooled_gains(flow, site, self.kv_heads),
            merged.exact,
            describe(site),
            self.name,
            merge=method,
            combined=merged.combined,
            may_average=self.merge in (None, "mean"),
            notes=tuple(
                f"neighbouring heads are grouped: {reason}" if part == "order" else f"{part} are averaged: {reason}"
                for part, reason in merged.notes.items()
            ),
        )


def merge_site(
    flow: Flow,
    site: AttentionSite,
    target: GroupedQuery,
    freedom: Freedom,
    moments: Sequence[Moments] | None = None,
    *,
    method: Method | None = None,
    groups: Groups | None = None,
) -> Merged:
    """One site's heads merged as the target (or `method`) says, by statistics of each group if there are any.

    `groups` are those that the statistics are of; without statistics they are found by the weights.
    """
    weights = site_weights(flow, site)
    found = target.groups(weights, site, freedom) if groups is None else groups
    chosen = method or target.method(moments is not None)
    merged = merge_heads(weights, site.group, found, chosen, freedom, moments)
    if target.grouping == "similar" and freedom.order is not None:
        return replace(merged, notes={**merged.notes, "order": freedom.order})
    return merged


def averaged(flow: Flow, replacement: Replacement, why: str) -> Replacement:
    """The heads of a replacement merged by their mean instead, which no queries and no output have to follow."""
    mean = GroupedQuery(replacement.grouped.kv_heads).pooled(flow, replacement.site)
    return replace(mean, notes=(f"heads are averaged: {why}",))


def gathering(flow: Flow, pooled: Replacement, obstacle: str | None) -> Replacement:
    """With what brings query heads of one group together, if nothing (`obstacle`) keeps them from changing places."""
    site, kv_heads = pooled.site, pooled.grouped.kv_heads
    if obstacle is None and (weights := site_weights(flow, site)).out is None:
        obstacle = "no output projection reads the heads in order"
    if obstacle is not None:
        return replace(pooled, scattered=obstacle)
    order = [h for heads in readers(contiguous(site.kv_heads, kv_heads), site.group) for h in heads]
    assert weights.out is not None
    moved = replace(weights, q=weights.q[order], out=weights.out[order])
    found = as_tensors(flow, site, Merged(moved, tuple(order), None, None))
    return replace(pooled, gathered={role: found[role] for role in found if role.startswith(("q_", "out_"))})


def as_tensors(flow: Flow, site: AttentionSite, merged: Merged) -> dict[str, Array]:
    """Parameters by role, in the stored dtype; without those that are absent from the site or stay as they are."""
    tensors: dict[str, Array] = {}
    weights = merged.weights
    for role, operand, heads in (("q", site.q, weights.q), ("k", site.k, weights.k), ("v", site.v, weights.v)):
        if role == "q" and merged.lost_keys is None and merged.in_place:
            continue
        rows = heads.reshape(-1, heads.shape[-1])
        tensors[f"{role}_weight"] = rows[:, :-1].astype(flow.value(operand.projection.weight).dtype, order="C")
        if operand.projection.bias is not None:
            tensors[f"{role}_bias"] = rows[:, -1].astype(flow.value(operand.projection.bias).dtype)
    if weights.out is None or site.out is None or (not merged.moves_output and merged.in_place):
        return tensors
    columns = weights.out.transpose(1, 0, 2).reshape(weights.out.shape[1], -1)
    tensors["out_weight"] = columns.astype(flow.value(site.out.weight).dtype, order="C")
    if weights.out_bias is not None and site.out.bias is not None:
        tensors["out_bias"] = weights.out_bias.astype(flow.value(site.out.bias).dtype)
    return tensors


def tied(flow: Flow, site: AttentionSite, groups: int) -> bool:
    """Whether the heads of every group are equal bit for bit."""
    tensors = [(o, t(flow, o)) for _, o in site.shared for t in (operand_rows, operand_bias)]
    tensors += [(o, g) for _, o in site.shared for g in operand_gains(flow, o).values()]
    return all(ties(tensor, operand.heads, groups) for operand, tensor in tensors if tensor is not None)


def pooled_gains(flow: Flow, site: AttentionSite, kv_heads: int) -> dict[str, Array]:
    """What norms multiply the heads of each group by, and add to them, averaged: ``k_gain`` and so on, as
    `operand_gains`. Heads behind a norm are averaged with their neighbours, whatever the merge."""
    return {
        f"{role}_{part}": mean_pool(numbers, operand.heads, kv_heads)
        for role, operand in (("k", site.k), ("v", site.v))
        for part, numbers in operand_gains(flow, operand).items()
    }


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


def misplaced(site: AttentionSite) -> str | None:
    """Why what happens to a site's scores happens in an order that no spec has; None if it does not."""
    if "temperature" in site.steps:
        return "a temperature for each head follows another step on the scores"
    if "softcap" in site.steps[1:]:
        return "a softcap follows a mask or bias on the scores"
    return None


def describe(site: AttentionSite) -> str:
    """ "mha12", "gqa4" or "mqa": what a site is now."""
    if site.kv_heads == site.heads:
        return f"mha{site.heads}"
    return "mqa" if site.kv_heads == 1 else f"gqa{site.kv_heads}"
