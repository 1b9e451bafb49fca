"""The layout of drawings: nothing overlaps, data flows downward, edges end where their boxes are."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.report.layered_layout import Layout, lay_out


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, float], list[tuple[str, str]]]:
    count = draw(st.integers(1, 14))
    widths = {f"b{i}": draw(st.floats(20, 300)) for i in range(count)}
    pairs = [(f"b{i}", f"b{j}") for i in range(count) for j in range(i + 1, count)]
    return widths, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=25)) if pairs else []


def overlaps(layout: Layout, widths: dict[str, float]) -> list[tuple[str, str]]:
    names = list(widths)
    return [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if layout.centres[a][1] == layout.centres[b][1]
        and abs(layout.centres[a][0] - layout.centres[b][0]) < (widths[a] + widths[b]) / 2
    ]


@given(graphs())
def test_boxes_lie_apart_inside_the_drawing_and_edges_run_downward(
    graph: tuple[dict[str, float], list[tuple[str, str]]],
) -> None:
    widths, edges = graph
    layout = lay_out(widths, edges)
    assert not overlaps(layout, widths)
    for name, (x, y) in layout.centres.items():
        assert x - widths[name] / 2 >= 0 and x + widths[name] / 2 <= layout.width
        assert 0 < y < layout.height
    for start, end in edges:
        points = layout.routes[start, end]
        assert (points[0], points[-1]) == (layout.centres[start], layout.centres[end])
        assert all(a[1] < b[1] for a, b in pairwise(points))


def test_the_overlap_check_sees_an_overlap() -> None:
    widths = {"a": 50.0, "b": 50.0}
    layout = Layout({"a": (30.0, 10.0), "b": (60.0, 10.0)}, {}, 100.0, 20.0)
    assert overlaps(layout, widths) == [("a", "b")]


def test_a_source_stands_right_above_its_reader() -> None:
    layout = lay_out(dict.fromkeys("abcm", 40.0), [("a", "b"), ("b", "c"), ("m", "c")])
    assert layout.centres["m"][1] == layout.centres["b"][1]


def test_a_straight_chain_is_drawn_straight() -> None:
    layout = lay_out({"a": 40.0, "b": 90.0, "c": 60.0}, [("a", "b"), ("b", "c")])
    assert len({x for x, _ in layout.centres.values()}) == 1


def test_cycles_are_refused() -> None:
    with pytest.raises(nx.NetworkXUnfeasible):
        lay_out({"a": 40.0, "b": 40.0}, [("a", "b"), ("b", "a")])
