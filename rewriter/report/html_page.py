"""Renders a report as one self-contained HTML file: no scripts, nothing loaded, names from models as text only.

Three things keep a hostile name harmless: templates escape every expression, every string that they print loses its
control and formatting characters first, and the page forbids itself scripts and loading by its own policy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Tree

import jinja2
from markupsafe import Markup

from passes.picture import Drawing
from rewriter.drafts import require_place
from rewriter.errors import UsageError
from rewriter.report import site_drawing
from rewriter.report.printable import printable
from rewriter.whole_file import write_whole

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Page:
    """What a report shows.

    Attributes:
        title: of the page.
        lead: one sentence that says what came out.
        sections: names of templates, without ending, in the order shown; the contents list is made of them.
        values: what those templates read.
    """

    title: str
    lead: str
    sections: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)

    def joined(self, other: Page) -> Page:
        """This page followed by the sections of another that it does not have."""
        more = tuple(name for name in other.sections if name not in self.sections)
        return Page(self.title, self.lead, (*self.sections, *more), {**other.values, **self.values})


def save(page: Page, path: Path) -> None:
    """Write the page beside its place and move it there; raises UsageError as `require_page` does."""
    require_page(path)
    write_whole(render(page), path)


def require_page(path: Path) -> None:
    """Raises UsageError unless `path` ends in .html and its folder exists."""
    if path.suffix not in {".html", ".htm"}:
        raise UsageError(f"{path.name} is no name of a page", hint="end it in .html")
    if not os.path.isdir(path.absolute().parent):
        raise UsageError(f"the output folder {path.absolute().parent} does not exist", hint="create it first")
    require_place(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="name a file, e.g. report.html")


def render(page: Page) -> str:
    """The page as text."""
    import rewriter

    values = {**page.values, "title": page.title, "lead": page.lead, "sections": page.sections}
    return environment().get_template("page.html.j2").render(values, version=rewriter.__version__)


@functools.cache
def environment() -> jinja2.Environment:
    """The one environment of reports: everything is escaped, and an undefined name is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"count": _count, "short": short, "percent": _percent, "times": times, "drawing": _drawing}
    made.globals["drawing_style"] = Markup(site_drawing.STYLE)  # ours, and without "<"
    return made


def _harmless(value: object) -> object:
    """What an expression prints: markup that templates made as it is, other text without control characters."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _count(value: int) -> str:
    return f"{value:,}"


def short(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix, e.g. ``1.23 G``; a dash for what was not measured."""
    if value is None:
        return "–"
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip() if unit else f"{value:.3g}"


def _percent(part: float) -> str:
    """For a style: between nothing and the whole width."""
    return f"{100 * min(max(part, 0.0), 1.0):.2f}%"


def times(before: float | None, after: float | None) -> str:
    """``× 0.50``; a dash where there is nothing to divide by."""
    return "–" if not before or after is None else f"× {after / before:.2f}"


def _drawing(shown: Drawing) -> Markup:
    """An element tree holds names as text, so what it is written as is safe."""
    return Markup(Tree.tostring(site_drawing.drawing(shown.picture), encoding="unicode", method="html"))
