"""The attention output where its heads are one axis, in programs that contract them folded or apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Node
from passes.match.operand_view import OperandView
from passes.match.operands import Tokens
from passes.match.scores import ScorePath
from passes.operator_kinds import PASS_THROUGH
from passes.replay import recorded

STEPS = 6
"""Layout operators between heads apart and heads together; more than any program needs."""


def with_heads_together(flow: Flow, path: ScorePath, tokens: Tokens) -> ScorePath | None:
    """The path up to the value in which the output's heads are one axis, or lie side by side in the features.

    `tokens` are the query's. None if they never are, in the query's order.
    """
    wanted = recorded(flow, path.output_view, tokens)
    passed: list[int] = []
    for node in _below(flow, path.output_view.value):
        passed.append(node.index)
        value = node.outputs[0]
        found = _placed(np.asarray(flow.value(value), dtype=np.float64), wanted, tokens)
        if found is not None:
            return replace(path, output_view=replace(found, value=value), nodes=(*path.nodes, *passed))
    return None


def _placed(array: Array, wanted: Array, tokens: Tokens) -> OperandView | None:
    """How `array` holds `wanted` [B, H, S, D]: laid out as replay reads it, or None."""
    by_token = wanted.transpose(0, 2, 1, 3)
    merged = by_token.reshape(*by_token.shape[:2], -1)
    if np.array_equal(array, merged, equal_nan=True):
        return OperandView("", -2, -1, wanted.shape[1])
    lead = tokens.axes[:-2]
    if lead == ("bh",) and array.ndim == 3:
        same = np.array_equal(array.reshape(-1), wanted.reshape(-1), equal_nan=True)
        return OperandView("", -2, -1) if same and array.shape[1:] == wanted.shape[2:] else None
    for order in permutations("bhsd"):
        if array.ndim != 4 or tuple(a for a in order if a in "bh") != lead:
            continue
        laid = wanted.transpose(["bhsd".index(a) for a in order])
        if laid.shape == array.shape and np.array_equal(array, laid, equal_nan=True):
            return OperandView("", order.index("s") - 4, order.index("d") - 4)
    return None


def _below(flow: Flow, value: str) -> Iterator[Node]:
    """The layout operators that a value passes, nearest first."""
    for _ in range(STEPS):
        readers = flow.live_readers(value)
        if len(readers) != 1 or readers[0].op not in LAYOUT | PASS_THROUGH:
            return
        yield readers[0]
        value = readers[0].outputs[0]
