"""What is true of each zoo model's attention, stated by hand: the yardstick of matching through any door."""

from __future__ import annotations

from passes.match.attention import Matches
from tests.zoo.case import ZooCase

REPLAY_LIMIT = 1e-5
"""float32 rounding through a projection, a rotation and a softmax; a wrong description errs by more than 0.05."""

ROTARY = {
    **dict.fromkeys(("llama", "qwen3", "mistral", "gemma2", "phi3", "falcon"), "half"),
    "gpt-neox": "partial",
}
QK_NORM = ("qwen3",)
WIDE_HEADS = {"qwen3": 16}


def rotary(case: ZooCase) -> str | None:
    return next((kind for family, kind in ROTARY.items() if case.name.startswith(family)), None)


def head_dim(case: ZooCase) -> int:
    return next((dim for family, dim in WIDE_HEADS.items() if case.name.startswith(family)), 8)


def check_sites(case: ZooCase, matches: Matches, *, cached: bool = False) -> None:
    """Every site of `matches` is what the model was built to be."""
    for site in matches.sites:
        assert (site.heads, site.kv_heads) == (case.heads, case.kv_heads), site.name
        assert (site.head_dim, site.value_dim) == (head_dim(case), head_dim(case))
        assert site.group == tuple(h * case.kv_heads // case.heads for h in range(case.heads))
        assert (site.k.rotary.kind if site.k.rotary else None) == rotary(case)
        assert (site.q.rotary is None) is (site.k.rotary is None) and site.v.rotary is None
        assert site.qk_norm is case.name.startswith(QK_NORM)
        assert site.cached is cached and (site.v.past is not None) is cached
        assert site.replay_error < REPLAY_LIMIT
        assert site.name in matches.evidence
    assert len({site.name for site in matches.sites}) == len(matches.sites)
    assert [site.anchor for site in matches.sites] == sorted(site.anchor for site in matches.sites)
