"""A site must read the same at two sizes, or it is refused with what differed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from passes.match.attention import Matches
from passes.match.confirm import confirm
from passes.site import AttentionSite, Refusal, Rotary
from tests.match.doors import through_torch
from tests.match.expected import REPLAY_LIMIT
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO
from tests.zoo.through import one_of_each_family


@cache
def found(batch: int, length: int) -> Matches:
    return through_torch(ZOO["llama-gqa-sdpa"], batch, length).matches


def test_two_sizes_of_one_program_confirm_each_other() -> None:
    first, second = found(2, 7), found(3, 9)
    confirmed = confirm(first, second)
    assert [s.name for s in confirmed.sites] == [s.name for s in first.sites]
    assert confirmed.refusals == ()
    for site, a, b in zip(confirmed.sites, first.sites, second.sites, strict=True):
        assert site.replay_error == max(a.replay_error, b.replay_error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", one_of_each_family(c for c in ZOO.values() if c.sites > c.refused and "refuse" not in c.tags)
)
def test_every_site_replays_and_reads_the_same_at_two_sizes_of_a_module(case: ZooCase) -> None:
    first, second = (through_torch(case, *size).matches for size in ((2, 7), (3, 10)))
    confirmed = confirm(first, second)
    assert [s.name for s in confirmed.sites] == [s.name for s in first.sites] != []
    assert confirmed.refusals == first.refusals
    assert all(site.replay_error < REPLAY_LIMIT for site in confirmed.sites)


def _operand(role: str, **changes: Any) -> Callable[[AttentionSite], AttentionSite]:
    return lambda site: replace(site, **{role: replace(getattr(site, role), **changes)})


def _rolled(site: AttentionSite) -> AttentionSite:
    return replace(site, k=replace(site.k, columns=site.k.columns[::-1]))


DIFFERENCES: dict[str, Callable[[AttentionSite], AttentionSite]] = {
    "heads": lambda site: replace(site, heads=8),
    "kv heads": lambda site: replace(site, kv_heads=1),
    "head dim": lambda site: replace(site, head_dim=4),
    "group": lambda site: replace(site, group=(0, 1, 0, 1)),
    "output axes": lambda site: replace(site, output_axes=("b", "s", "h", "d")),
    "scale": lambda site: replace(site, scale=site.scale * 1.001),
    "key row map": _rolled,
    "key rotary": _operand("k", rotary=Rotary("interleaved", (1, 0, 3, 2, 5, 4, 7, 6))),
    "query seam": _operand("q", seam="elsewhere"),
    "value stem axes": _operand("v", stem_axes=("b", "s", "h", "d")),
    "value past": _operand("v", past="cache"),
    "query batch first": _operand("q", batch_first=False),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_site_that_reads_differently_is_refused_with_the_difference(what: str) -> None:
    first, second = found(2, 7), found(3, 9)
    other = replace(second, sites=(DIFFERENCES[what](second.sites[0]), *second.sites[1:]))
    confirmed = confirm(first, other)
    assert [s.name for s in confirmed.sites] == [s.name for s in first.sites[1:]]
    (refusal,) = confirmed.refusals
    assert (refusal.name, refusal.anchor, refusal.heads) == (first.sites[0].name, first.sites[0].anchor, 4)
    assert f"its {what} differs" in refusal.reason


def test_a_site_that_is_refused_at_the_second_size_is_refused_for_that_reason() -> None:
    first, second = found(2, 7), found(3, 9)
    gone = second.sites[1]
    other = replace(
        second, sites=second.sites[:1], refusals=(Refusal(gone.name, gone.layer, "blocked keys", gone.anchor),)
    )
    confirmed = confirm(first, other)
    assert [s.name for s in confirmed.sites] == [first.sites[0].name]
    assert "second size: blocked keys" in confirmed.refusals[0].reason


def test_causality_must_hold_at_both_sizes() -> None:
    first, second = found(2, 7), found(3, 9)
    assert all(s.causal for s in first.sites)
    other = replace(second, sites=tuple(replace(s, causal=False) for s in second.sites))
    assert not any(s.causal for s in confirm(first, other).sites)
