"""Places the boxes of a directed acyclic graph in layers, top to bottom (after Sugiyama, 1981)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

Edge = tuple[str, str]

SWEEPS = 8
BEND_WIDTH = 14.0


@dataclass(frozen=True)
class Layout:
    """Where everything goes, in pixels.

    Attributes:
        centres: (x, y) of each box.
        routes: for each edge the points it passes through, from box centre to box centre.
        width, height: of the whole drawing.
    """

    centres: dict[str, tuple[float, float]]
    routes: dict[Edge, tuple[tuple[float, float], ...]]
    width: float
    height: float


def lay_out(
    widths: Mapping[str, float], edges: Sequence[Edge], *, row_height: float = 64.0, gap: float = 18.0
) -> Layout:
    """Layers by longest path; sources stand right above their first reader; order by neighbours' median places.

    Raises:
        networkx.NetworkXUnfeasible: if the edges form a cycle.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(widths)
    graph.add_edges_from(edges)
    layer = _layers(graph)
    chains = {edge: _chain(edge, layer) for edge in graph.edges}
    rows = _ordered(_rows(layer, chains), chains)
    sizes = {name: widths.get(name, BEND_WIDTH) for row in rows for name in row}
    x = _columns(rows, chains, sizes, gap)
    left = min((x[n] - sizes[n] / 2 for n in x), default=0.0)
    places = {n: (x[n] - left + gap, (i + 0.5) * row_height) for i, row in enumerate(rows) for n in row}
    width = max((places[n][0] + sizes[n] / 2 for n in places), default=0.0) + gap
    routes = {edge: tuple(places[n] for n in chain) for edge, chain in chains.items()}
    return Layout({n: places[n] for n in widths}, routes, width, len(rows) * row_height)


def _layers(graph: nx.DiGraph[str]) -> dict[str, int]:
    order = list(nx.topological_sort(graph))
    layer: dict[str, int] = {}
    for name in order:
        layer[name] = max((layer[p] + 1 for p in graph.predecessors(name)), default=0)
    for name in reversed(order):
        if graph.in_degree(name) == 0 and graph.out_degree(name):
            layer[name] = min(layer[s] for s in graph.successors(name)) - 1
    return layer


def _chain(edge: Edge, layer: Mapping[str, int]) -> tuple[str, ...]:
    """The edge as a path with one bend per layer that it crosses."""
    start, end = edge
    bends = (f"{start}>{end}:{i}" for i in range(layer[start] + 1, layer[end]))
    return start, *bends, end


def _rows(layer: Mapping[str, int], chains: Mapping[Edge, tuple[str, ...]]) -> list[list[str]]:
    rows: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for name, index in layer.items():
        rows[index].append(name)
    for (start, _), chain in chains.items():
        for step, name in enumerate(chain[1:-1], 1):
            rows[layer[start] + step].append(name)
    return rows


def _neighbours(chains: Mapping[Edge, tuple[str, ...]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for chain in chains.values():
        for start, end in pairwise(chain):
            above.setdefault(end, []).append(start)
            below.setdefault(start, []).append(end)
    return above, below


def _ordered(rows: list[list[str]], chains: Mapping[Edge, tuple[str, ...]]) -> list[list[str]]:
    above, below = _neighbours(chains)
    rows = [list(row) for row in rows]
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        table = above if down else below
        for index in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            fixed = {name: i for i, name in enumerate(rows[index - 1 if down else index + 1])}
            own = {name: i for i, name in enumerate(rows[index])}
            rows[index].sort(key=lambda n: (_mean([fixed[m] for m in table.get(n, ())], own[n]), own[n]))
    return rows


def _columns(
    rows: Sequence[Sequence[str]],
    chains: Mapping[Edge, tuple[str, ...]],
    sizes: Mapping[str, float],
    gap: float,
) -> dict[str, float]:
    """x of every box: pulled towards its neighbours, pushed apart where boxes would overlap."""
    above, below = _neighbours(chains)
    x: dict[str, float] = {}
    for row in rows:
        x.update(_apart({n: _mean([x[m] for m in above.get(n, ())], 0.0) for n in row}, sizes, gap))
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            wish = {n: _mean([x[m] for m in (*above.get(n, ()), *below.get(n, ()))], x[n]) for n in row}
            x.update(_apart(wish, sizes, gap))
    return x


def _apart(wish: Mapping[str, float], sizes: Mapping[str, float], gap: float) -> dict[str, float]:
    """Places in the given order without overlap, close to what was wished: blocks that collide share their shift."""
    blocks: list[tuple[list[str], float]] = []  # names, and the mean left edge their first member would like
    for name, centre in wish.items():
        names, start = [name], centre - sizes[name] / 2
        while blocks:
            before, left = blocks[-1]
            width = sum(sizes[n] + gap for n in before)
            if left + width <= start:
                break
            blocks.pop()
            start = (left * len(before) + (start - width) * len(names)) / (len(before) + len(names))
            names = before + names
        blocks.append((names, start))
    placed: dict[str, float] = {}
    for names, start in blocks:
        for name in names:
            placed[name] = start + sizes[name] / 2
            start += sizes[name] + gap
    return placed


def _mean(numbers: Sequence[float], default: float) -> float:
    return sum(numbers) / len(numbers) if numbers else default
