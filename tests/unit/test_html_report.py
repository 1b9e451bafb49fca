"""Reports as pages: every number is there and adds up, text from models stays text, files are whole or absent."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import rewriter
from codegen.spec import LinearMixing
from passes.arithmetic import LENGTHS, lengths
from passes.budget import Budget
from passes.choose import Chosen, Mix
from passes.picture import Box, Drawing, Picture, distinct
from passes.sensitivity import Effect
from passes.targets import GroupedQuery
from rewriter.errors import UsageError
from rewriter.profile.result import Measured, Milliseconds, Profile
from rewriter.report import charts, stored
from rewriter.report.choice import ChoiceReport
from rewriter.report.html_choice import choice_values
from rewriter.report.html_page import Page, render
from rewriter.report.html_profile import profile_page
from rewriter.report.html_rewrite import rewrite_page
from rewriter.report.html_uptrain import uptrain_page
from rewriter.report.rewrite_report import Change, Refused, RewriteReport
from rewriter.uptrain.recipe import Recipe
from rewriter.uptrain.result import Drift, Point, Uptrained
from tests.targets.test_sparse_mixer import blocks_only, encoder
from tests.unit.test_site_drawing import Attention
from tests.unit.test_site_drawing import Refused as RefusedAttention

HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m&\u202e\u2066\"'{{7*7}}"
RAW = ("<script", "<img", "\x1b", "\u202e", "\u2066", "onerror=alert(1)>")


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention(), Attention(), RefusedAttention()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def report() -> RewriteReport:
    torch.manual_seed(0)
    done = rewriter.optimize(Stack().eval(), "gqa2", example_inputs=(torch.randn(2, 9, 32),))
    found: RewriteReport = done.rewrite_report
    return found


class Tags(HTMLParser):
    """Tags with the names of their attributes, and the text between."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(" ".join(data.split()))


# --- the arithmetic ------------------------------------------------------------------------------


def test_the_terms_add_up_to_the_totals(report: RewriteReport) -> None:
    found = report.arithmetic
    assert found is not None
    for side, total in enumerate((report.kv_bytes_per_token.before, report.kv_bytes_per_token.after)):
        assert sum(term.numbers[side] for term in found.cache) * found.bytes_per_number == total
    assert found.recorded.total == (report.flops.before, report.flops.after)
    assert (found.recorded.batch, found.recorded.tokens) == (2, 9)
    assert found.recorded.mixing == (2 * 2 * 2 * 4 * 9 * 9 * (8 + 8),) * 2, "two sites of four heads of 8, 2 x 9 tokens"
    assert [(t.sites, t.kv_before, t.kv_after) for t in found.cache] == [(2, 4, 2)]


def test_mixing_grows_with_the_square_and_the_rest_with_the_length(report: RewriteReport) -> None:
    assert report.arithmetic is not None
    first, second = report.arithmetic.curve[:2]
    assert second.tokens == 2 * first.tokens
    assert second.mixing[0] == 4 * first.mixing[0] and second.projections[0] == 2 * first.projections[0]


def test_the_curve_ends_where_a_mixing_matrix_does() -> None:
    assert lengths([]) == LENGTHS
    assert lengths([LinearMixing(8, 512), LinearMixing(8, 300)]) == (128, 256, 300)
    assert lengths([LinearMixing(8, 9)]) == (4, 9) and lengths([LinearMixing(8, 1)]) == (1, 2)
    torch.manual_seed(0)
    done = rewriter.optimize(Stack().eval(), "toeplitz:200", example_inputs=(torch.randn(2, 9, 32),))
    found = done.rewrite_report.arithmetic
    assert found is not None and [work.tokens for work in found.curve] == [128, 200]
    assert found.recorded.total == (done.rewrite_report.flops.before, done.rewrite_report.flops.after)


def test_what_experts_save_is_in_the_arithmetic() -> None:
    found = rewriter.optimize(encoder(3), blocks_only(work=0.5)).rewrite_report
    assert found.arithmetic is not None and found.flops.after < found.flops.before
    assert found.arithmetic.recorded.total == (found.flops.before, found.flops.after)
    assert found.arithmetic.recorded.mixing[0] == found.arithmetic.recorded.mixing[1]
    assert render(rewrite_page(found))


def test_a_transform_grows_more_slowly_than_attention() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(Attention(), Attention()).eval()
    found = rewriter.optimize(net, {"0": "fnet", "1": "gqa2"}, example_inputs=(torch.randn(2, 9, 32),)).rewrite_report
    assert found.arithmetic is not None
    assert {(t.kv_before, t.kv_after) for t in found.arithmetic.cache} == {(4, 0), (4, 2)}
    assert found.arithmetic.recorded.total == (found.flops.before, found.flops.after)
    (a, b), (c, d) = (found.arithmetic.curve[i].mixing for i in (0, -1))
    assert d / c < 0.51 < b / a, "of two attentions one is left, and what took the other's place hardly counts"


# --- pages ---------------------------------------------------------------------------------------


def test_a_rewrites_page_says_everything(report: RewriteReport, tmp_path: Path) -> None:
    report.save_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    shown = Tags(page).words
    for row in report.sites:
        assert row.name in shown and f"{row.error:.3g}" in shown
    (refused,) = report.refused
    assert refused.name in shown and any(refused.reason in word for word in shown)
    for change in (report.kv_bytes_per_token, report.flops):
        assert f"{change.before:,}" in shown and f"{change.after:,}" in shown
    assert page.count('class="chart"') == 3 and page.count("<details") == len(report.drawings) == 2
    assert "and 1 more of the same structure" in shown


def test_a_chosen_plan_is_shown_with_what_it_was_chosen_from(report: RewriteReport) -> None:
    page = render(rewrite_page(replace(report, choice=chosen())))
    shown = Tags(page).words
    assert {"layers.0", "layers.1", "0.04", "0.08", "keep", "mqa", "gqa2"} <= set(shown)
    assert any("0.04 predicted, 0.05 measured on 1 of 4 batches" in word for word in shown)
    assert re.findall(r'cell chosen" style="[^"]*">([^<]*)', page) == ["0.04", "0"]
    assert 'id="choice"' not in render(rewrite_page(report)), "only where there was a choice"


def test_a_page_loads_nothing_and_runs_nothing(report: RewriteReport) -> None:
    page = render(rewrite_page(report))
    assert "http" not in page.replace("http-equiv", "") and "src=" not in page and "url(" not in page
    tags = [tag for tag, _ in Tags(page).tags]
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(tags)
    assert "default-src 'none'" in page


def hostile_report(report: RewriteReport) -> RewriteReport:
    """The same report with every text replaced by one that would do harm as markup."""
    picture = report.drawings[0].picture
    boxes = tuple(replace(box, title=HOSTILE, detail=HOSTILE) for box in picture.boxes)
    drawing = Drawing(replace(picture, name=HOSTILE, caption=HOSTILE, boxes=boxes), (HOSTILE,))
    return replace(
        report,
        target=HOSTILE,
        sites=tuple(replace(row, name=HOSTILE, before=HOSTILE, after=HOSTILE + "2", merge=HOSTILE, notes=(HOSTILE,))
                    for row in report.sites),
        refused=tuple(Refused(HOSTILE, HOSTILE) for _ in report.refused),
        drawings=(drawing, report.drawings[1]),
        seconds={HOSTILE: 1.0},
        choice=chosen(HOSTILE, HOSTILE + "2"),
    )  # fmt: skip


def chosen(first: str = "layers.0", second: str = "layers.1", kv: tuple[int, int] = (8, 4)) -> ChoiceReport:
    """Two units and two targets, as "auto" would report them."""
    targets = (GroupedQuery(1), GroupedQuery(2))
    effects = [
        Effect((name,), target, drift, drift, saved, 100, 10)
        for name, drifts in ((first, (0.04, 0.01)), (second, (0.08, 0.02)))
        for target, drift, saved in zip(targets, drifts, kv, strict=True)
    ]
    mixes = [
        Mix(drift, left if any(kv) else 1.0, 1 / left, names)
        for drift, left, names in (
            (0.0, 1.0, ("keep", "keep")), (0.04, 0.75, ("mqa", "keep")), (0.12, 0.5, ("mqa", "mqa")),
        )
    ]  # fmt: skip
    return ChoiceReport(
        Chosen(
            Budget(kv=0.75), "kl", ((first,), (second,)), tuple(effects), mixes[1], {first: targets[0]}, 0.05,
            tuple(mixes), 1, 4, (),
        )
    )  # fmt: skip


def measured(name: str) -> Measured:
    return Measured(Milliseconds(1.0, 2.0, 3.0), 4_000_000, {name: 1.5, "Softmax": 0.5})


def profile_of(name: str, rewrite: RewriteReport | None = None) -> Profile:
    return Profile("cpu", name, 2, 5, name, measured(name), measured(name), {name: (1, 128)}, rewrite)


def uptrained(name: str) -> Uptrained:
    before, after = Drift(0.5, 0.9, None, 30.0, 20.0), Drift(0.25, 0.95, None, 25.0, 20.0)
    curve = tuple(Point(i, "layers" if i < 4 else "output", 2.0 / (i + 1), {name: 1.0}) for i in range(12))
    return Uptrained(
        None, replace(Recipe(), steps=12), 12, 4096, curve, {0: before, 12: after}, (name,), 10, name, 1, name, 3.0
    )


PAGES: dict[str, Callable[[str, RewriteReport], Page]] = {
    "rewrite": lambda name, report: rewrite_page(replace(report, choice=report.choice or chosen())),
    "profile": lambda name, report: profile_page(profile_of(name, report)),
    "uptrain": lambda name, report: uptrain_page(uptrained(name), report),
}


@pytest.mark.parametrize("kind", PAGES)
def test_hostile_names_stay_text(report: RewriteReport, kind: str) -> None:
    plain = Tags(render(PAGES[kind]("MatMul", report)))
    page = render(PAGES[kind](HOSTILE, hostile_report(report)))
    spoiled = Tags(page)
    plain_kinds, kinds = ({t for t in found.tags if t[0] != "title"} for found in (plain, spoiled))
    assert kinds <= plain_kinds | {("li", ()), ("ul", ("class",))}, "no tag and no attribute that a plain page lacks"
    assert not [raw for raw in RAW if raw in page]
    assert "49" not in re.findall(r"\{\{?(\d+)", page) and "{{7*7}}" in page, "a template in a name is no template"
    assert any("<script>alert(1)</script>" in word for word in spoiled.words), "the name is still shown, as text"


def test_the_check_for_hostile_names_can_fail() -> None:
    page = f"<p>{HOSTILE}</p>"
    assert [raw for raw in RAW if raw in page] == list(RAW)
    assert ("script", ()) in Tags(page).tags


def test_a_profile_shows_how_the_second_model_was_made(report: RewriteReport) -> None:
    page = profile_page(profile_of("MatMul", report))
    assert page.sections[:4] == ("summary", "machine", "times", "operators")
    assert {"sites", "refused", "arithmetic", "growth"} <= set(page.sections)
    assert "sites" not in profile_page(profile_of("MatMul")).sections


def test_an_uptraining_page_shows_the_course(report: RewriteReport) -> None:
    shown = Tags(render(uptrain_page(uptrained("cpu"))))
    assert {"0.5 before", "KL divergence, nats", "perplexity"} <= set(shown.words)
    assert {"blocks alone", "outputs and blocks"} <= set(shown.words), "which part of the curve is which"
    assert "sites" not in uptrain_page(uptrained("cpu")).sections


def test_pages_about_a_model_that_was_made_earlier_draw_its_sites(report: RewriteReport) -> None:
    """What travels with a model has no drawings; those of the original's sites take their place."""
    back = stored.from_text(stored.to_text(report))
    assert back is not None and not back.drawings
    pictures = [drawn.picture for drawn in report.drawings]
    other = replace(pictures[0], name="of another model")
    for with_them, without in (
        (profile_page(profile_of("MatMul", back), [*pictures, other]), profile_page(profile_of("MatMul", back))),
        (uptrain_page(uptrained("cpu"), back, [*pictures, other]), uptrain_page(uptrained("cpu"), back)),
    ):
        assert "drawings" not in without.sections and "drawings" in with_them.sections
        page = render(with_them)
        assert page.count("<details") == len(pictures) and "of another model" not in page


def test_flops_are_drawn_as_bars(report: RewriteReport) -> None:
    assert report.flops is not None
    page = render(rewrite_page(report))
    ratio = f"{report.flops.before / report.flops.after:.2f}×"
    assert {"projections, feed-forward", "token mixing", "flops", ratio} <= set(Tags(page).words)
    assert page.count('class="bar"') == 3


@pytest.mark.parametrize(
    "empty", [RewriteReport("gqa2", (), (), Change(0, 0), Change(0, 0), Change(0, 0))], ids=["nothing at all"]
)
def test_a_report_with_nothing_in_it_is_a_page_too(empty: RewriteReport) -> None:
    shown = Tags(render(rewrite_page(empty))).words
    assert "No site was rewritten." in shown and "Nothing was refused." in shown


@pytest.mark.parametrize(("name", "message"), [("a.svg", "no name of a page"), ("no/a.html", "does not exist")])
def test_wrong_places_are_usage_errors(report: RewriteReport, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        report.save_html(tmp_path / name)
    assert caught.value.hint and not list(tmp_path.iterdir())


def test_an_old_page_survives_a_failure(report: RewriteReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.html"
    target.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.save_html(target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"] and target.read_text() == "old"


# --- charts --------------------------------------------------------------------------------------


def test_bars_are_parts_of_the_longest_and_the_rest_is_summed_up() -> None:
    found = charts.bars({"a": (4.0, 2.0), "b": (1.0, 0.0), "c": (0.5, 0.5), "d": (0.5, 0.25)}, most=3)
    assert [bar.label for bar in found] == ["a", "b", "2 others"]
    assert (found[0].before_width, found[0].after_width, found[0].ratio) == (1.0, 0.5, 2.0)
    assert found[1].ratio is None and (found[2].before, found[2].after) == (1.0, 0.75)


def test_curves_lie_inside_their_plot_and_in_the_right_order() -> None:
    chart = charts.growth(
        "t", (128, 256, 512), {"x": ("before", (1e3, 4e3, 9e3)), "y": ("after", (1e3, 2e3, 3e3))}, "B"
    )
    assert chart is not None
    (_, high), (_, low) = (line.end for line in chart.lines)
    assert chart.top <= high < low <= chart.bottom
    assert charts.growth("t", (128, 256), {"x": ("before", (0.0, 0.0))}, "B") is None
    assert charts.course("t", [0], [1.0]) is None and charts.course("t", [0, 1], [1.0, float("nan")]) is None


def test_a_frontier_rises_as_less_is_left() -> None:
    mixes = [(1.0, 0.0), (0.75, 0.1), (0.5, 0.4)]
    chart = charts.tradeoff("t", "left", mixes, mixes[1], 0.2)
    assert chart is not None
    curve, predicted, measured_at = (line.end for line in chart.lines)
    assert curve == pytest.approx((chart.right, chart.top)), "all that is saved, all the drift"
    assert predicted[0] == measured_at[0] == pytest.approx((chart.left + chart.right) / 2)
    assert chart.top < measured_at[1] < predicted[1] < chart.bottom
    assert [tick.label for tick in chart.up] == ["0", "0.1", "0.2", "0.3", "0.4"]
    assert charts.tradeoff("t", "left", mixes[:1], mixes[0], 0.0) is None


@pytest.mark.parametrize(("kv", "label"), [((8, 4), "K/V bytes left"), ((0, 0), "flops left")], ids=["kv", "flops"])
def test_what_cannot_be_saved_is_no_axis(kv: tuple[int, int], label: str) -> None:
    chart = choice_values(chosen(kv=kv).to_dict()).chart
    assert chart is not None and chart.x_label == label and len({tick.at for tick in chart.across}) == 5


def test_structures_that_are_alike_are_drawn_once() -> None:
    def picture(name: str, title: str) -> Picture:
        return Picture(name, "c", True, (Box(name, title, name, "score"),), ())

    found = distinct([picture("a", "Softmax"), picture("b", "Softmax"), picture("c", "MatMul")])
    assert [(d.picture.name, d.also) for d in found] == [("a", ("b",)), ("c", ())]


# --- what travels with a model -------------------------------------------------------------------


def test_a_stored_report_says_the_same(report: RewriteReport) -> None:
    text = stored.to_text(report)
    back = stored.from_text(text)
    assert back is not None and stored.to_text(back) == text and "\n" not in text
    assert [(r.name, r.before, r.after, r.exact) for r in back.sites] == [
        (r.name, r.before, r.after, r.exact) for r in report.sites
    ]
    assert back.refused == report.refused and back.arithmetic == report.arithmetic
    assert (back.kv_bytes_per_token, back.flops) == (report.kv_bytes_per_token, report.flops)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda found: [found],
    "sites are numbers": lambda found: {**found, "sites": [1, 2]},
    "a name is a number": lambda found: {**found, "target": 3},
    "a count is negative": lambda found: {**found, "flops": {"before": -1, "after": 2}},
    "a count is a truth": lambda found: {**found, "flops": {"before": True, "after": 2}},
    "the work is cut off": lambda found: {**found, "arithmetic": {**found["arithmetic"], "work": [[1, 2]]}},
    "no curve": lambda found: {**found, "arithmetic": {**found["arithmetic"], "work": [[0, 1, 1, 1, 1, 1]] * 3}},
    "a number is infinite": lambda found: {**found, "fidelity": {"max_abs": float("inf"), "cosine": 1.0, "kl": None}},
    "no work": lambda found: {**found, "arithmetic": {**found["arithmetic"], "work": []}},
    "a part is missing": lambda found: {k: v for k, v in found.items() if k != "refused"},
}


def test_a_stored_choice_is_shown_as_it_was(report: RewriteReport) -> None:
    made = replace(report, choice=chosen())
    back = stored.from_text(stored.to_text(made))
    assert back is not None and back.choice is not None and made.choice is not None
    assert stored.to_text(back) == stored.to_text(made), "up to the digits that are kept"
    assert back.choice.to_dict()["plan"]["targets"] == made.choice.to_dict()["plan"]["targets"]
    for page in (profile_page(profile_of("MatMul", back)), uptrain_page(uptrained("cpu"), back)):
        assert "choice" in page.sections and "0.04 predicted, 0.05 measured on 1 of 4 batches" in render(page)
    assert str(back) == str(replace(back, choice=made.choice))


BROKEN_CHOICE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda auto: [auto],
    "a drift is a text": lambda auto: {**auto, "plan": {**auto["plan"], "measured_drift": "<b>"}},
    "nothing is left": lambda auto: {**auto, "plan": {**auto["plan"], "speed": 0}},
    "more is left than there was": lambda auto: {**auto, "frontier": [{**auto["frontier"][0], "kv": 7}]},
    "an effect of no site": lambda auto: {**auto, "sensitivity": [{**auto["sensitivity"][0], "sites": []}]},
    "a target is a number": lambda auto: {**auto, "sensitivity": [{**auto["sensitivity"][0], "target": 1}]},
    "a part is missing": lambda auto: {key: part for key, part in auto.items() if key != "batches"},
}


@pytest.mark.parametrize("how", BROKEN_CHOICE)
def test_what_is_no_choice_makes_no_report(report: RewriteReport, how: str) -> None:
    found = json.loads(stored.to_text(replace(report, choice=chosen())))
    assert stored.from_text(json.dumps(found)) is not None
    assert stored.from_text(json.dumps({**found, "auto": BROKEN_CHOICE[how](found["auto"])})) is None


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_report_is_none(report: RewriteReport, how: str) -> None:
    found = json.loads(stored.to_text(report))
    assert stored.from_text(json.dumps(found)) is not None
    assert stored.from_text(json.dumps(BROKEN[how](found))) is None


@pytest.mark.parametrize(
    "text", [None, "", "{", "[" * 100_000, "null", "3"], ids=["none", "empty", "cut off", "deep", "null", "number"]
)
def test_any_text_may_stand_there(text: str | None) -> None:
    assert stored.from_text(text) is None


def test_a_checkpoint_keeps_its_report(report: RewriteReport, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = rewriter.optimize(Stack().eval(), "gqa2", example_inputs=(torch.randn(2, 9, 32),))
    rewriter.save(small, tmp_path / "m")
    back = rewriter.load(tmp_path / "m", module=Stack())
    assert stored.to_text(back.rewrite_report) == stored.to_text(small.rewrite_report)
    rewriter.save(rewriter.load(tmp_path / "m", module=Stack()), tmp_path / "n")
    assert (tmp_path / "n" / stored.FILE).read_text() == (tmp_path / "m" / stored.FILE).read_text()
