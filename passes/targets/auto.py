"""The target "auto": each site gets what keeps the model's answer best under a budget.

It is no destination of its own. Candidates are measured site by site (`passes.sensitivity`), a mix is solved for
(`passes.budget`), and the plan that comes out names ordinary targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from passes.budget import Budget
from passes.site import AttentionSite
from passes.targets.grouped_query import GroupedQuery, Grouping
from passes.targets.linear_attention import LinearHeads
from passes.weights.merge import Method

if TYPE_CHECKING:
    from passes.targets.catalogue import AttentionTarget


@dataclass(frozen=True)
class Auto:
    """Choose for each site under `budget`.

    Attributes:
        budget: None until it is known; needed before anything can be chosen.
        candidates: what is tried at each site where it fits; every legal number of key/value heads if empty.
        merge, grouping: as in `GroupedQuery`, for candidates that do not say it themselves.
    """

    budget: Budget | None = None
    candidates: tuple[AttentionTarget, ...] = ()
    merge: Method | None = None
    grouping: Grouping = "contiguous"

    def __post_init__(self) -> None:
        self._merged(GroupedQuery(1))  # refuses an unknown merge or grouping
        if any(isinstance(target, LinearHeads) for target in self.candidates):
            raise ValueError("what linear attention does before its training cannot be weighed against other targets")

    @property
    def name(self) -> str:
        return f"auto:{'+'.join(t.name for t in self.candidates)}" if self.candidates else "auto"

    def tried(self, sites: Sequence[AttentionSite]) -> list[AttentionTarget]:
        """Candidates that fit all of some sites and change them, each once."""
        every = [GroupedQuery(n) for n in range(sites[0].kv_heads - 1, 0, -1) if n in GroupedQuery(1).legal(sites[0])]
        named = [self._merged(t) if isinstance(t, GroupedQuery) else t for t in self.candidates or every]
        return [t for t in dict.fromkeys(named) if all(_fits(t, s) for s in sites)]

    def _merged(self, target: GroupedQuery) -> GroupedQuery:
        plain = target.grouping == "contiguous"
        return replace(target, merge=target.merge or self.merge, grouping=self.grouping if plain else target.grouping)


def _fits(target: AttentionTarget, site: AttentionSite) -> bool:
    """Whether the target would change this very site; one that keeps a site for its place among others would not."""
    if target.refuses(site) is not None or target.misfit(site) is not None or target.idle(site) is not None:
        return False
    return not target.keeps([site])
