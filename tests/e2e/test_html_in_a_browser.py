"""Reports in a real browser: light, dark and on a phone; nothing is loaded, nothing runs, nothing sticks out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rewriter
from rewriter.report.html_page import render
from rewriter.report.html_profile import profile_page
from rewriter.report.rewrite_report import RewriteReport
from tests.e2e.browser import Browser, browser
from tests.unit.test_html_report import HOSTILE, Stack, chosen, hostile_report, profile_of

PHONE, DESKTOP = 390, 1200

STICKING_OUT = """
[...document.querySelectorAll('body *')].filter(e => {
  let inside = e.closest('.scroll'); const box = e.getBoundingClientRect();
  return (!inside || inside === e) && box.width > 0 && box.right > document.documentElement.clientWidth + 1;
}).map(e => e.tagName + '.' + e.className).slice(0, 5)
"""


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report() -> RewriteReport:
    torch.manual_seed(0)
    found: RewriteReport = rewriter.optimize(
        Stack().eval(), "gqa2", example_inputs=(torch.randn(2, 9, 32),)
    ).rewrite_report
    long_name = ".".join(["encoder"] * 12)
    sites = [replace(row, name=f"{row.name}.{long_name}") for row in found.sites]
    return replace(found, sites=tuple(sites * 12), choice=chosen(sites[0].name, sites[1].name))


@pytest.fixture(scope="module")
def page(report: RewriteReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    path.write_text(render(profile_page(profile_of("MatMul", report))))
    return path


def brightness(window: Browser, selector: str) -> float:
    """Mean of the three channels of an element's background, 0 to 255."""
    channels = window.value(
        f"getComputedStyle(document.querySelector('{selector}')).backgroundColor.match(/[0-9.]+/g).map(Number)"
    )
    return sum(channels[:3]) / 3


def test_light_and_dark(window: Browser, page: Path, tmp_path: Path) -> None:
    shots = {}
    for dark in (False, True):
        window.open(page, width=DESKTOP, dark=dark)
        assert (brightness(window, "body") < 60) is dark and (brightness(window, "#sites") < 60) is dark
        shots[dark] = window.screenshot(tmp_path / f"{dark}.png").read_bytes()
        assert shots[dark].startswith(b"\x89PNG") and len(shots[dark]) > 20_000
    assert shots[True] != shots[False]


@pytest.mark.parametrize("width", [PHONE, 768, DESKTOP])
def test_nothing_sticks_out(window: Browser, page: Path, width: int) -> None:
    window.open(page, width=width)
    assert window.value("document.documentElement.scrollWidth") <= width
    assert window.value(STICKING_OUT) == []
    assert window.value("[...document.querySelectorAll('section')].every(s => s.getBoundingClientRect().height > 40)")


def test_a_table_that_is_too_wide_would_be_seen(window: Browser, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    wide.write_text('<meta name="viewport" content="width=device-width"><div style="width: 900px">wide</div>')
    window.open(wide, width=PHONE)
    assert window.value(STICKING_OUT)


def test_charts_are_drawn(window: Browser, page: Path) -> None:
    window.open(page, width=DESKTOP)
    lengths = window.value("[...document.querySelectorAll('svg.chart path.line')].map(p => p.getTotalLength())")
    assert len(lengths) == 9 and sorted(lengths)[2] > 50, "the plan, predicted and measured, is two points"
    bars = window.value("[...document.querySelectorAll('.fill')].map(f => f.getBoundingClientRect().width)")
    assert len(bars) == 16 and max(bars) > 100, "of times, operators and flops"


def test_hostile_names_do_no_harm(window: Browser, report: RewriteReport, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(render(profile_page(profile_of(HOSTILE, hostile_report(report)))))
    window.open(path, width=PHONE)
    assert window.requested == [path.absolute().as_uri()], "no image, no font, no script was asked for"
    assert window.value("document.querySelectorAll('script, img').length") == 0
    assert not [event for event in window.events if event["method"] == "Page.javascriptDialogOpening"]
    assert window.value(STICKING_OUT) == [] and window.value("document.documentElement.scrollWidth") <= PHONE


def test_the_policy_stops_what_escaping_might_miss(window: Browser, report: RewriteReport, tmp_path: Path) -> None:
    """The second lock: a script planted in a finished page. The same page without its policy runs it."""
    planted = "<script>window.harmed = 1</script><img src='x.png' onerror='window.harmed = 1'></body>"
    whole = render(profile_page(profile_of("MatMul", report))).replace("</body>", planted)
    open_page = whole.replace("default-src 'none'; style-src 'unsafe-inline'", "")
    assert open_page != whole
    for name, text, harmed in (("locked", whole, None), ("open", open_page, 1)):
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        window.open(path, width=DESKTOP)
        assert window.value("window.harmed") == harmed
