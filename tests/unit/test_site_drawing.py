"""Drawings of sites: every part is there, names from a model stay text, files are whole or absent."""

from __future__ import annotations

import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as Tree

import pytest
import torch

import rewriter
from passes.picture import Box, Picture
from rewriter.errors import UsageError
from rewriter.report import site_drawing

HOSTILE = "</title><script>alert(1)</script>\x1b[31m&\u202e\"'"
NAMESPACE = {"s": site_drawing.SVG}


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 8).transpose(1, 2) for t in self.qkv(x).split(32, dim=-1))
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        result: torch.Tensor = self.out((weights @ v).transpose(1, 2).reshape(b, s, 32))
        return result


class Refused(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 8).transpose(1, 2) for t in self.qkv(x).split(32, dim=-1))
        weights = (q @ k.transpose(-1, -2) + self.out(x).mean(-1)[:, None, None]).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(b, s, 32)


class Block(torch.nn.Module):
    """A gated feed-forward block behind an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up, self.down = torch.nn.Linear(32, 48), torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = x + self.attention(x)
        result: torch.Tensor = h + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        return result


@pytest.fixture(scope="module")
def inspection() -> rewriter.Inspection:
    return rewriter.inspect(Attention().eval(), example_inputs=(torch.randn(2, 7, 32),))


def texts(document: str) -> list[str]:
    return [t.text or "" for t in Tree.fromstring(document).iter(f"{{{site_drawing.SVG}}}text")]


def test_a_site_is_drawn_whole(inspection: rewriter.Inspection, tmp_path: Path) -> None:
    inspection.save_graph(tmp_path / "site.svg")
    root = Tree.fromstring((tmp_path / "site.svg").read_text())
    roles = [rect.get("class") for rect in root.findall(".//s:g/s:rect", NAMESPACE)]
    assert {"query", "key", "value", "score", "output", "input"} == set(roles)
    shown = texts((tmp_path / "site.svg").read_text())
    assert shown.count("MatMul") == 2 and shown.count("Softmax") == 1 and shown.count("Linear") == 2
    assert any("qkv.weight" in t for t in shown) and any("out.weight" in t for t in shown)
    (picture,) = inspection.pictures
    ends = {key for edge in picture.edges for key in edge}
    assert ends == {box.key for box in picture.boxes}, "a box hangs in the air"


def test_a_feed_forward_block_is_drawn_whole(tmp_path: Path) -> None:
    found = rewriter.inspect(Block().eval(), example_inputs=(torch.randn(2, 7, 32),))
    attention, block = found.pictures
    assert (attention.kind, block.kind) == ("attention", "feed_forward")
    assert [(box.title, box.role) for box in block.boxes if box.role != "input"] == [
        ("Linear", "gate"), ("aten.silu", "activation"), ("Linear", "up"), ("Mul", "activation"), ("Linear", "output"),
    ]  # fmt: skip
    assert block.caption == "gated, silu, 32 → 48 → 32" and len(block.edges) == 6
    assert {key for edge in block.edges for key in edge} == {box.key for box in block.boxes}
    found.save_graph(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 of 1 attention sites can be rewritten" in page and "1 feed-forward blocks are understood" in page
    found.save_graph(tmp_path / "block.svg", site=block.name)
    assert "silu" in (tmp_path / "block.svg").read_text()


def test_a_refusal_is_drawn_with_its_reason(tmp_path: Path) -> None:
    found = rewriter.inspect(Refused().eval(), example_inputs=(torch.randn(2, 7, 32),))
    (refusal,) = found.refusals
    found.save_graph(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"refused: {refusal.reason}" in page and "not understood" in page
    assert "0 of 1 attention sites can be rewritten" in page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]


def hostile(picture: Picture) -> Picture:
    boxes = tuple(replace(box, title=HOSTILE, detail=HOSTILE) for box in picture.boxes)
    return replace(picture, name=HOSTILE, caption=HOSTILE, boxes=boxes)


def test_hostile_names_stay_text(inspection: rewriter.Inspection) -> None:
    picture = hostile(inspection.pictures[0])
    plain, spoiled = Tags(), Tags()
    plain.feed(site_drawing.html("model", inspection.pictures))
    document = site_drawing.html(HOSTILE, [picture])
    spoiled.feed(document)
    assert spoiled.seen == plain.seen and spoiled.attributes == plain.attributes
    assert "script" not in spoiled.seen
    drawing = site_drawing.svg(picture)
    for raw in ("\x1b", "\u202e", "<script"):
        assert raw not in document and raw not in drawing
    assert any("<script>" in t for t in texts(drawing)), "the name is still shown, as text"


def test_nothing_is_loaded_from_elsewhere(inspection: rewriter.Inspection) -> None:
    page = site_drawing.html("model", inspection.pictures)
    assert "http" not in page.replace(site_drawing.SVG, "") and "src=" not in page and "url(" not in page


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [("a.png", None, "cannot draw"), ("no/a.svg", None, "does not exist"), ("a.svg", "nowhere", "no site")],
)
def test_wrong_usage_leaves_nothing(
    inspection: rewriter.Inspection, tmp_path: Path, name: str, site: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        inspection.save_graph(tmp_path / name, site=site)
    assert caught.value.hint and not list(tmp_path.iterdir())


def test_an_old_drawing_survives_a_failure(
    inspection: rewriter.Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.svg"
    target.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        inspection.save_graph(target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"] and target.read_text() == "old"


def test_a_model_without_attention_has_nothing_to_draw(tmp_path: Path) -> None:
    found = rewriter.inspect(torch.nn.Linear(4, 4), example_inputs=(torch.randn(2, 4),))
    with pytest.raises(UsageError, match="nothing to draw"):
        found.save_graph(tmp_path / "a.svg")


def test_boxes_are_as_wide_as_their_text() -> None:
    picture = Picture("n", "c", True, (Box("a", "x" * 80, "", "score"),), ())
    root = Tree.fromstring(site_drawing.svg(picture))
    (rect,) = root.findall(".//s:g/s:rect", NAMESPACE)
    assert float(rect.get("width", "0")) > 80 * 6
