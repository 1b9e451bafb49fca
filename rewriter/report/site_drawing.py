"""Draws matched subgraphs: one site as SVG, or every site on one self-contained HTML page.

Built as an element tree, so that names from a model are text and never markup.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as Tree

from passes.picture import Box, Picture
from rewriter.drafts import require_place
from rewriter.errors import UsageError
from rewriter.report.layered_layout import lay_out
from rewriter.report.printable import printable
from rewriter.whole_file import write_whole

SVG = "http://www.w3.org/2000/svg"
_CHARACTER = 6.7
_BOX_HEIGHT = 38.0
_TOP = 56.0
_LEGEND = {
    "query": "query", "key": "key", "value": "value", "score": "score and softmax", "gate": "gate", "up": "up",
    "activation": "activation", "mask": "mask or bias",
    "output": "output", "input": "comes in", "unread": "not understood",
}  # fmt: skip
STYLE = """
svg { font: 11px ui-monospace, Menlo, Consolas, monospace; }
.paper { fill: #ffffff } .ink { fill: #1f2430 } .faint { fill: #5b6270 }
.edge { fill: none; stroke: #8a91a0; stroke-width: 1.2 } .tip { fill: #8a91a0 }
rect { rx: 6px; stroke: #0002 }
.query { fill: #cfe3ff } .key { fill: #d3f2d6 } .value { fill: #fde9bf } .score { fill: #f6cfd9 }
.gate { fill: #cfe3ff } .up { fill: #d3f2d6 } .activation { fill: #f6cfd9 }
.mask { fill: #e3d7f7 } .output { fill: #cdeef0 } .input { fill: #eceef2 } .unread { fill: #f2ddd0 }
@media (prefers-color-scheme: dark) {
  .paper { fill: #14171d } .ink { fill: #e8eaf0 } .faint { fill: #a3a9b8 }
  .edge { stroke: #6b7385 } .tip { fill: #6b7385 } rect { stroke: #fff2 }
  .query { fill: #1f4272 } .key { fill: #1f5a2b } .value { fill: #6a4f12 } .score { fill: #752a42 }
  .gate { fill: #1f4272 } .up { fill: #1f5a2b } .activation { fill: #752a42 }
  .mask { fill: #4a3479 } .output { fill: #15575c } .input { fill: #2a2f3a } .unread { fill: #63402a }
}
"""
_PAGE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem;
       background: #fff; color: #1f2430 }
h2 { font-size: 1rem; overflow-wrap: anywhere; margin: 2rem 0 0 } p { margin: 0 0 .5rem; color: #5b6270 }
.scroll { overflow-x: auto; border: 1px solid #8884; border-radius: 8px }
@media (prefers-color-scheme: dark) { body { background: #14171d; color: #e8eaf0 } p { color: #a3a9b8 } }
"""


def write(path: Path, title: str, pictures: Sequence[Picture], site: str | None) -> None:
    """Draw to an .html or .svg file, written beside and then moved into place.

    Raises UsageError for another ending, a missing folder, an unknown site, or nothing to draw.
    """
    require_drawable(path)
    chosen = [p for p in pictures if site is None or p.name == site]
    if not chosen:
        names = ", ".join(p.name for p in pictures[:8])
        missing = "there is nothing to draw" if site is None else f"there is no site {site!r}"
        raise UsageError(missing, hint=f"sites are: {names}" if names else "inspect lists what was found")
    content = svg(chosen[0]) if path.suffix == ".svg" else html(title, chosen)
    write_whole(content, path)


def require_drawable(path: Path) -> None:
    """Raises UsageError unless `path` ends in .svg or .html and its folder exists."""
    if path.suffix not in {".svg", ".html"}:
        raise UsageError(f"cannot draw to {path.name}", hint="end the name in .svg (one site) or .html (all of them)")
    if not os.path.isdir(path.absolute().parent):
        raise UsageError(f"the output folder {path.absolute().parent} does not exist", hint="create it first")
    require_place(path)


def svg(picture: Picture) -> str:
    """One site as an SVG document, light or dark as the viewer prefers."""
    root = drawing(picture)
    root.insert(0, _text_element("style", STYLE))
    return _document(root)


def html(title: str, pictures: Sequence[Picture]) -> str:
    """All sites of a model on one page that loads nothing from anywhere."""
    page = Tree.Element("html", lang="en")
    head = Tree.SubElement(page, "head")
    Tree.SubElement(head, "meta", charset="utf-8")
    Tree.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    head.append(_text_element("title", f"{printable(title)}: sites"))
    head.append(_text_element("style", _PAGE + STYLE))
    body = Tree.SubElement(page, "body")
    body.append(_text_element("h1", printable(title)))
    sites = [p for p in pictures if p.kind == "attention"]
    good = sum(p.rewritable for p in sites)
    body.append(_text_element("p", f"{good} of {len(sites)} attention sites can be rewritten"))
    if blocks := len(pictures) - len(sites):
        body.append(_text_element("p", f"{blocks} feed-forward blocks are understood"))
    for picture in pictures:
        section = Tree.SubElement(body, "section")
        section.append(_text_element("h2", printable(picture.name)))
        section.append(_text_element("p", verdict(picture)))
        Tree.SubElement(section, "div", {"class": "scroll"}).append(drawing(picture))
    return "<!DOCTYPE html>\n" + Tree.tostring(page, encoding="unicode", method="html")


def verdict(picture: Picture) -> str:
    return printable(picture.caption) if picture.rewritable else f"refused: {printable(picture.caption)}"


def _document(root: Tree.Element) -> str:
    root.set("xmlns", SVG)
    return Tree.tostring(root, encoding="unicode")


def drawing(picture: Picture) -> Tree.Element:
    """The <svg> element of one site; a page that holds it needs `STYLE`."""
    widths = {box.key: _width(box) for box in picture.boxes}
    layout = lay_out(widths, picture.edges)
    width = max(layout.width, _legend_width([box.role for box in picture.boxes]))
    height = layout.height + _TOP
    root = Tree.Element("svg", viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}", height=f"{height:.0f}")
    root.set("role", "img")
    root.append(_text_element("title", f"{printable(picture.name)}: {verdict(picture)}"))
    Tree.SubElement(root, "rect", {"class": "paper", "width": "100%", "height": "100%"})
    _legend(root, [box.role for box in picture.boxes])
    for edge in picture.edges:
        _edge(root, layout.routes[edge])
    for box in picture.boxes:
        _box(root, box, *layout.centres[box.key], widths[box.key])
    return root


def _legend_width(roles: Sequence[str]) -> float:
    return 36 + sum(34 + _CHARACTER * len(label) for role, label in _LEGEND.items() if role in roles)


def _legend(root: Tree.Element, roles: Sequence[str]) -> None:
    x = 18.0
    for role, label in _LEGEND.items():
        if role in roles:
            Tree.SubElement(root, "rect", {"class": role, "x": f"{x:.0f}", "y": "14", "width": "14", "height": "14"})
            _label(root, x + 19, 25, label, "ink", anchor="start")
            x += 34 + _CHARACTER * len(label)


def _edge(root: Tree.Element, points: Sequence[tuple[float, float]]) -> None:
    """From the bottom of one box to the top of another, vertical at every layer it passes."""
    (x, y), *others = [(a, b + _TOP) for a, b in points]
    y += _BOX_HEIGHT / 2
    path = f"M{x:.1f},{y:.1f}"
    for index, (a, b) in enumerate(others):
        end = b - (_BOX_HEIGHT / 2 + 5 if index == len(others) - 1 else 0)
        middle = (y + end) / 2
        path += f" C{x:.1f},{middle:.1f} {a:.1f},{middle:.1f} {a:.1f},{end:.1f}"
        x, y = a, end
    Tree.SubElement(root, "path", {"class": "edge", "d": path})
    Tree.SubElement(root, "path", {"class": "tip", "d": f"M{x - 4:.1f},{y:.1f} h8 l-4,5 z"})


def _box(root: Tree.Element, box: Box, x: float, y: float, width: float) -> None:
    group = Tree.SubElement(root, "g")
    group.append(_text_element("title", printable(f"{box.title}  {box.detail}")))
    top = y + _TOP - _BOX_HEIGHT / 2
    place = {"x": f"{x - width / 2:.1f}", "y": f"{top:.1f}", "width": f"{width:.1f}", "height": f"{_BOX_HEIGHT:.0f}"}
    Tree.SubElement(group, "rect", {"class": box.role, **place})
    _label(group, x, top + (16 if box.detail else 23), box.title, "ink")
    if box.detail:
        _label(group, x, top + 30, box.detail, "faint")


def _label(parent: Tree.Element, x: float, y: float, text: str, kind: str, *, anchor: str = "middle") -> None:
    place = {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    Tree.SubElement(parent, "text", place).text = printable(text)


def _text_element(tag: str, text: str) -> Tree.Element:
    element = Tree.Element(tag)
    element.text = text
    return element


def _width(box: Box) -> float:
    return max(64.0, _CHARACTER * max(len(printable(box.title)), len(printable(box.detail))) + 18)
