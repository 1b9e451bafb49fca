"""Masks behind the softmax, as JAX, AllenNLP and hand-written code set them: a mask of the scores, or refused.

Every graph is a lossless twin; its control has one head that is not tied. The second sequence is masked everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

import rewriter
from tests.match.graphs_by_hand import SCALE, Graph, by_heads, finished, ints, projections, run

EXACT, MOVED = 1e-5, 1e-3
Weigh = Callable[[Graph, str], str]
"""Attention weights of scores."""


def kept(graph: Graph) -> str:
    """Which keys are no padding, [batch, 1, 1, tokens]: those whose first feature is above zero."""
    first = graph.op("Slice", "y", ints(0), ints(1), ints(2))
    return graph.op("Unsqueeze", graph.op("Transpose", graph.op("Greater", first, 0.0), perm=[0, 2, 1]), ints(1))


def numbers(graph: Graph, mask: str) -> str:
    return graph.op("Cast", mask, to=1)


def softmax(graph: Graph, scores: str) -> str:
    return graph.op("Softmax", scores, axis=-1)


def exponentials(graph: Graph, scores: str) -> str:
    return graph.op("Exp", graph.op("Sub", scores, graph.op("ReduceMax", scores, axes=[-1], keepdims=1)))


def total(graph: Graph, weights: str) -> str:
    return graph.op("ReduceSum", weights, ints(-1), keepdims=1)


def scores_times_mask(graph: Graph, scores: str) -> str:
    """AllenNLP's masked_softmax: hidden scores are made zero, and count for nothing."""
    mask = numbers(graph, kept(graph))
    weights = graph.op("Mul", softmax(graph, graph.op("Mul", scores, mask)), mask)
    return graph.op("Div", weights, graph.op("Add", total(graph, weights), 1e-13))


def rows_kept_from_zero(graph: Graph, scores: str) -> str:
    """jax2onnx's dot_product_attention."""
    weights = graph.op("Mul", softmax(graph, scores), numbers(graph, kept(graph)))
    left = total(graph, weights)
    any_left = graph.op("Greater", left, 0.0)
    even = graph.op("Div", weights, graph.op("Where", any_left, left, 1.0))
    return graph.op("Where", any_left, even, 0.0)


def absolute_sum(graph: Graph, scores: str) -> str:
    """torch's normalize with p=1, of weights that another number stands in for."""
    weights = graph.op("Where", graph.op("Not", kept(graph)), 0.0, softmax(graph, scores))
    left = graph.op("Clip", graph.op("ReduceL1", weights, axes=[-1], keepdims=1), np.array(1e-12, np.float32))
    return graph.op("Div", weights, graph.op("Expand", left, graph.op("Shape", weights)))


def two_masks(graph: Graph, scores: str) -> str:
    """Keys by a factor that is computed otherwise, later tokens by a choice."""
    factor = graph.op("Sub", 1.0, numbers(graph, graph.op("Not", kept(graph))))
    size = graph.op("Slice", graph.op("Shape", scores), ints(2), ints(4))
    earlier = graph.op("Cast", graph.op("Trilu", graph.op("Expand", 1.0, size), upper=0), to=9)
    weights = graph.op("Where", earlier, graph.op("Mul", softmax(graph, scores), factor), 0.0)
    return graph.op("Div", weights, graph.op("Max", total(graph, weights), 1e-9))


def masked_exponentials(graph: Graph, scores: str) -> str:
    """A softmax in parts that leaves keys out of its sum."""
    weights = graph.op("Where", kept(graph), exponentials(graph, scores), 0.0)
    return graph.op("Div", weights, graph.op("Max", total(graph, weights), 1e-9))


def masked_twice(graph: Graph, scores: str) -> str:
    """jax.nn.softmax with `where`: the same mask before and behind."""
    mask = kept(graph)
    return graph.op("Where", mask, softmax(graph, graph.op("Where", mask, scores, -np.inf)), 0.0)


def not_normalised(graph: Graph, scores: str) -> str:
    return graph.op("Mul", softmax(graph, scores), numbers(graph, kept(graph)))


def by_a_float(graph: Graph, scores: str) -> str:
    weights = graph.op("Mul", softmax(graph, scores), graph.op("Slice", "y", ints(0), ints(1), ints(2)))
    return graph.op("Div", weights, total(graph, weights))


def over_queries(graph: Graph, scores: str) -> str:
    weights = softmax(graph, scores)
    return graph.op("Div", weights, graph.op("ReduceSum", weights, ints(-2), keepdims=1))


def by_more_than_the_sum(graph: Graph, scores: str) -> str:
    weights = softmax(graph, scores)
    return graph.op("Div", weights, graph.op("Add", total(graph, weights), 0.5))


def written(weigh: Weigh, perturbed: bool) -> tuple[Graph, onnx.ModelProto]:
    graph = Graph()
    graph.inputs["y"] = np.abs(graph.inputs["x"]) * np.array([1, -1, 1, 1, -1, 1], np.float32)[:, None]
    graph.inputs["y"][1] = -1.0
    q, k, v = (
        by_heads(graph, graph.op("Add", graph.op("MatMul", "x", p.flat[0]), p.flat[1]))
        for p in projections(graph, perturbed)
    )
    scores = graph.op("Mul", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), SCALE)
    return graph, graph.model(finished(graph, graph.op("MatMul", weigh(graph, scores), v)))


WEIGHED: list[Weigh] = [
    scores_times_mask, rows_kept_from_zero, absolute_sum, two_masks, masked_exponentials, masked_twice
]  # fmt: skip


@pytest.mark.parametrize("weigh", WEIGHED)
def test_weights_that_are_masked_are_rewritten_as_scores_that_are(weigh: Weigh) -> None:
    moved = []
    for perturbed in (False, True):
        graph, model = written(weigh, perturbed)
        before, after = (run(m, graph.inputs) for m in (model, rewriter.optimize(model, "gqa2")))
        moved.append(float(np.nanmax(np.abs(before - after))))
        assert np.isfinite(after).all() and np.isfinite(before[0]).all()
    assert moved[0] < EXACT and moved[1] > MOVED


REFUSED: dict[Weigh, str] = {
    not_normalised: "not normalised again, so they add up to less than one",
    by_a_float: "a mask that is an input of floats",
    over_queries: "not over the keys of each query",
    by_more_than_the_sum: "by a sum that more than 1e-06 is added to",
}


@pytest.mark.parametrize("weigh", REFUSED)
def test_weights_that_no_mask_of_scores_gives_are_not_read(weigh: Weigh) -> None:
    _, model = written(weigh, False)
    seen = rewriter.inspect(model)
    assert [
        REFUSED[weigh] in reason for reason in (*(r.reason for r in seen.refusals), *(s.whole for s in seen.sites))
    ] == [True]
