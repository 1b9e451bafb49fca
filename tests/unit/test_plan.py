"""Plans: which selector names which sites, which head counts are legal, and weights that sites share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.dataflow import Flow
from passes.plan import PlanError, make_plan, select
from passes.site import AttentionSite, Modifier
from passes.targets import GroupedQuery
from tests.match.doors import Seen, through_torch
from tests.zoo.models import ZOO


@cache
def llama() -> Seen:
    """A real site to make others of: 4 query heads over 2 key/value heads."""
    return through_torch(ZOO["llama-gqa-sdpa"])


def flow() -> Flow:
    return llama().flow


def site(name: str, layer: int = 0, *, weight: str | None = None, cross: bool = False, **more: object) -> AttentionSite:
    """A site of its own weights, unless `weight` names shared ones."""
    model = llama().matches.sites[0]
    k, v = (
        replace(o, projection=replace(o.projection, weight=f"{weight or name}.{role}"))
        for role, o in (("k", model.k), ("v", model.v))
    )
    return replace(model, name=name, layer=layer, cross=cross, k=k, v=v, **more)  # type: ignore[arg-type]


def stack(layers: int) -> list[AttentionSite]:
    return [site(f"model.layers.{i}.self_attn", i) for i in range(layers)]


def two_stacks() -> list[AttentionSite]:
    return [
        site("encoder.block.0.attention", 0),
        site("encoder.block.1.attention", 1),
        site("decoder.block.0.attention", 0),
        site("decoder.block.0.cross_attention", 0, cross=True),
    ]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", list(range(12))),
        ("3", [3]),
        ("0-2", [0, 1, 2]),
        ("0-1,5,9-20", [0, 1, 5, 9, 10, 11]),
        ("-4:", [8, 9, 10, 11]),
        (":2", [0, 1]),
        ("2:4", [2, 3]),
        ("-3:-1", [9, 10]),
        (" 0-1 ", [0, 1]),
        (r"layers\.1\.", [1]),
        (r"layers\.(2|10)\b", [2, 10]),
        ("self_attn$", list(range(12))),
    ],
)
def test_selectors(selector: str, expected: list[int]) -> None:
    assert [s.layer for s in select(selector, stack(12))] == expected


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("encoder", ["encoder.block.0.attention", "encoder.block.1.attention"]),
        ("decoder", ["decoder.block.0.attention"]),
        ("cross", ["decoder.block.0.cross_attention"]),
        ("0", ["encoder.block.0.attention", "decoder.block.0.attention", "decoder.block.0.cross_attention"]),
        ("cross_att", ["decoder.block.0.cross_attention"]),
    ],
)
def test_selectors_of_parts(selector: str, expected: list[str]) -> None:
    assert [s.name for s in select(selector, two_stacks())] == expected


BEYOND = [
    "12",
    "20-30",
    "no_such_name",
    "cross",
    "encoder",
    "5-2",
    "5-99999999999",
    pytest.param("9" * 5000, id="digits"),
]


@pytest.mark.parametrize("selector", BEYOND)
def test_a_selector_that_names_nothing_is_an_error_with_the_layers(selector: str) -> None:
    with pytest.raises(PlanError, match="selects no rewritable site") as error:
        select(selector, stack(3))
    assert "0, 1, 2" in error.value.hint


def test_an_empty_selector_does_not_name_all_sites() -> None:
    with pytest.raises(PlanError, match="empty") as error:
        select(" ", stack(2))
    assert "all" in error.value.hint


def test_a_range_takes_no_more_than_there_is() -> None:
    assert [s.layer for s in select("1-99999999999", stack(3))] == [1, 2]


@pytest.mark.parametrize("selector", ["(", "[a", "*"])
def test_a_broken_expression_is_an_error_and_no_crash(selector: str) -> None:
    with pytest.raises(PlanError, match="not a valid regular expression"):
        select(selector, stack(2))


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 40))
def test_a_range_selects_the_layers_inside_it(layers: int, low: int, high: int) -> None:
    expected = [i for i in range(layers) if low <= i <= high]
    if expected:
        assert [s.layer for s in select(f"{low}-{high}", stack(layers))] == expected
    else:
        with pytest.raises(PlanError):
            select(f"{low}-{high}", stack(layers))


@given(st.integers(1, 30), st.integers(1, 40))
def test_counting_from_the_end_never_leaves_the_model(layers: int, last: int) -> None:
    assert [s.layer for s in select(f"-{last}:", stack(layers))] == list(range(layers))[-last:]


def test_the_last_n_counts_rewritable_layers() -> None:
    sites = [s for s in stack(6) if s.layer != 5]
    assert [s.layer for s in select("-2:", sites)] == [3, 4]


# ------------------------------------------------------------------ plans


def test_one_target_for_all_in_execution_order() -> None:
    plan = make_plan(flow(), stack(3), {"all": GroupedQuery(1)})
    assert [s.site.layer for s in plan.steps] == [0, 1, 2]
    assert {s.target.name for s in plan.steps} == {"mqa"} and plan.refused == ()


def test_later_selectors_win_and_unselected_sites_are_left_out() -> None:
    plan = make_plan(flow(), stack(4), {"0-2": GroupedQuery(2), "1": GroupedQuery(1)})
    assert [(s.site.layer, s.target.kv_heads) for s in plan.steps] == [(0, 2), (1, 1), (2, 2)]


def test_an_illegal_head_count_lists_every_site_with_its_legal_counts() -> None:
    many = [replace(s, heads=12, kv_heads=6) for s in stack(2)]
    many.append(replace(many[0], name="odd", heads=10, kv_heads=10))
    with pytest.raises(PlanError, match=r"gqa4 does not fit model.layers.0.self_attn \(12 query heads, 6") as error:
        make_plan(flow(), many, {"all": GroupedQuery(4)})
    assert "1, 2, 3, 6 at model.layers.0.self_attn, model.layers.1.self_attn" in error.value.hint
    assert "1, 2, 5, 10 at odd" in error.value.hint


def test_a_long_list_of_sites_is_cut_short_and_says_so() -> None:
    with pytest.raises(PlanError) as error:
        make_plan(flow(), stack(20), {"all": GroupedQuery(3)})
    assert "and 16 more" in error.value.hint


def test_what_a_target_refuses_is_refused_with_its_reason_and_the_rest_goes_on() -> None:
    good, bad = stack(2)
    bad = replace(bad, k=replace(bad.k, past="past", past_head_axis=None))
    plan = make_plan(flow(), [good, bad], {"all": GroupedQuery(1)})
    assert [s.site.name for s in plan.steps] == [good.name]
    ((name, reason),) = plan.refused
    assert name == bad.name and "no axis of its own" in reason


def test_a_softcap_after_a_mask_is_refused() -> None:
    mask, cap = Modifier("mask", "m", -1e9), Modifier("softcap", number=50.0)
    fine, wrong = site("a", 0, modifiers=(cap, mask)), site("b", 1, modifiers=(mask, cap))
    plan = make_plan(flow(), [fine, wrong], {"all": GroupedQuery(1)})
    assert [s.site.name for s in plan.steps] == ["a"]
    assert "softcap" in plan.refused[0][1]


def test_sites_that_share_weights_go_together_or_not_at_all() -> None:
    shared = [site(f"layers.{i}", i, weight="the-only-one") for i in range(3)]
    together = make_plan(flow(), shared, {"all": GroupedQuery(1)})
    assert len(together.steps) == 3 and together.refused == ()
    for wish in ({"0": GroupedQuery(1)}, {"all": GroupedQuery(1), "2": GroupedQuery(2)}):
        apart = make_plan(flow(), shared, wish)
        assert apart.steps == ()
        assert all("shares its weights" in reason for _, reason in apart.refused)


def test_a_refusal_carries_over_to_all_that_share_the_weights() -> None:
    """Else one of them would be rewritten and weights that the model ties would come apart."""
    first, second = (site(f"layers.{i}", i, weight="the-only-one") for i in range(2))
    second = replace(second, k=replace(second.k, past="past", past_head_axis=None))
    plan = make_plan(flow(), [first, second, site("other", 2)], {"all": GroupedQuery(1)})
    assert [s.site.name for s in plan.steps] == ["other"]
    reasons = dict(plan.refused)
    assert "shares its weights with layers.1" in reasons["layers.0"] and "no axis of its own" in reasons["layers.1"]


def test_sharing_does_not_hold_back_others() -> None:
    sites = [site("a", 0, weight="w"), site("b", 1, weight="w"), site("c", 2)]
    plan = make_plan(flow(), sites, {"0": GroupedQuery(1), "2": GroupedQuery(1)})
    assert [s.site.name for s in plan.steps] == ["c"]
    assert [name for name, _ in plan.refused] == ["a"]


def test_no_sites_make_an_empty_plan() -> None:
    assert make_plan(flow(), [], {"all": GroupedQuery(1)}).steps == ()
