"""Attention as Keras, TensorFlow, JAX, Paddle and MXNet exporters write it: found, and rewritten without loss.

Every graph is a lossless twin; its control has one head that is not tied.
"""

from __future__ import annotations

import numpy as np
import pytest

import rewriter
from tests.match.graphs_by_hand import (
    DIM,
    HEADS,
    SCALE,
    WIDTH,
    Graph,
    Writer,
    attended,
    by_heads,
    finished,
    ints,
    projections,
    run,
)

EXACT, MOVED = 1e-5, 1e-3


def keras(graph: Graph, perturbed: bool) -> str:
    """Einsum everywhere: weights [width, heads, features], biases by head, scores of keys with queries."""
    q, k, v = (
        graph.op("Add", graph.op("Einsum", "x", p.weight, equation="abc,cde->abde"), p.bias)
        for p in projections(graph, perturbed)
    )
    scores = graph.op("Einsum", k, graph.op("Mul", q, SCALE), equation="aecd,abcd->acbe")
    mixed = graph.op("Einsum", graph.op("Softmax", scores, axis=-1), v, equation="acbe,aecd->abcd")
    return graph.op("Add", graph.op("Einsum", mixed, graph.matrix(HEADS, DIM, WIDTH), equation="abcd,cde->abe"), "x")


def heads_first(graph: Graph, perturbed: bool) -> str:
    """Einsum to [batch, heads, tokens, features], by weights [heads, width, features]; one bias for all heads."""
    q, k, v = (
        graph.op("Add", graph.op("Einsum", "x", p.weight.transpose(1, 0, 2), equation="btc,hcd->bhtd"), p.bias[0])
        for p in projections(graph, perturbed)
    )
    return finished(graph, attended(graph, q, k, v))


def packed(graph: Graph, perturbed: bool) -> str:
    """One Einsum whose weight [width, 3, heads, features] holds queries, keys and values."""
    weight = np.stack([p.weight for p in projections(graph, perturbed)], axis=1)
    made = graph.op("Einsum", "x", weight, equation="...tc,cnhd->n...htd")
    q, k, v = (graph.op("Gather", made, np.array(i), axis=0) for i in range(3))
    return finished(graph, attended(graph, q, k, v))


def matrices(graph: Graph, perturbed: bool) -> str:
    """Einsum with plain matrices: [in, out], [out, in], and the weight first."""
    q, k, v = projections(graph, perturbed)
    made = (
        graph.op("Add", graph.op("Einsum", "x", q.flat[0], equation="btc,cf->btf"), q.flat[1]),
        graph.op("Add", graph.op("Einsum", "x", k.flat[0].T, equation="btc,fc->btf"), k.flat[1]),
        graph.op("Add", graph.op("Einsum", v.flat[0], "x", equation="cf,btc->btf"), v.flat[1]),
    )
    return finished(graph, attended(graph, *[by_heads(graph, m) for m in made]))


def stacks(graph: Graph, perturbed: bool) -> str:
    """Products with a stack of matrices, one for each head; a stack of one for the values."""
    q, k, v = projections(graph, perturbed)
    alone = graph.op("Unsqueeze", "x", ints(1))
    by_head = [graph.op("Add", graph.op("MatMul", alone, p.weight.transpose(1, 0, 2)), p.bias[:, None]) for p in (q, k)]
    value = graph.op("Add", graph.op("MatMul", "x", v.flat[0][None]), v.flat[1])
    return finished(graph, attended(graph, *by_head, by_heads(graph, value)))


def scaled(graph: Graph, perturbed: bool) -> str:
    """Products that are multiplied by a factor: Gemm on flattened tokens, and what onnxruntime makes of a scale."""
    q, k, v = projections(graph, perturbed)
    flat = graph.op("Reshape", "x", ints(-1, WIDTH))
    key = graph.op("Gemm", flat, k.flat[0].T / 2, k.flat[1], alpha=2.0, transB=1)
    query = graph.op("FusedMatMul", "x", q.flat[0], domain="com.microsoft", alpha=0.5)
    value = graph.op("FusedMatMul", "x", v.flat[0].T, domain="com.microsoft", alpha=3.0, transB=1)
    made = (query, graph.op("Reshape", key, graph.op("Shape", "x")), value)
    return finished(graph, attended(graph, *[by_heads(graph, m) for m in made]))


def rows_flattened(graph: Graph, perturbed: bool) -> str:
    """A softmax of two axes, around which scores are flattened and laid out again."""
    q, k, v = (
        by_heads(graph, graph.op("Add", graph.op("MatMul", "x", p.flat[0]), p.flat[1]))
        for p in projections(graph, perturbed)
    )
    scores = graph.op("Mul", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), SCALE)
    last = graph.op("Slice", graph.op("Shape", scores), ints(3), ints(4))
    rows = graph.op("Reshape", scores, graph.op("Concat", ints(-1), last, axis=0))
    weights = graph.op("Reshape", graph.op("Softmax", rows, axis=1), graph.op("Shape", scores))
    return finished(graph, graph.op("MatMul", weights, v))


WRITERS: dict[str, Writer] = {
    "keras": keras,
    "heads-first": heads_first,
    "packed": packed,
    "matrices": matrices,
    "stacks": stacks,
    "scaled": scaled,
    "rows-flattened": rows_flattened,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_twin_is_rewritten_without_loss(name: str) -> None:
    moved = []
    for perturbed in (False, True):
        graph = Graph()
        model = graph.model(WRITERS[name](graph, perturbed))
        done = rewriter.optimize(model, "gqa2")
        before, after = (run(m, graph.inputs) for m in (model, done))
        moved.append(float(np.abs(before - after).max()))
    assert moved[0] < EXACT
    assert moved[1] > MOVED


@pytest.mark.parametrize("name", WRITERS)
def test_a_site_has_its_heads_and_its_scale(name: str) -> None:
    graph = Graph()
    (site,) = rewriter.inspect(graph.model(WRITERS[name](graph, False))).sites
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (HEADS, HEADS, DIM, DIM)
    assert site.scale == pytest.approx(SCALE)


@pytest.mark.parametrize(("skipped", "found"), [("input", 1), ("another", 0)], ids=["residual", "no-residual"])
def test_a_feed_forward_block_whose_residual_and_biases_are_in_fused_operators(skipped: str, found: int) -> None:
    graph = Graph()
    vector = graph.random.standard_normal(WIDTH)
    source = graph.op("LayerNormalization", "x", vector, axis=-1)
    up = graph.op("MatMul", source, graph.matrix(WIDTH, 48))
    hidden = graph.op("BiasGelu", up, graph.random.standard_normal(48), domain="com.microsoft")
    down = graph.op("MatMul", hidden, graph.matrix(48, WIDTH))
    other = {"input": source, "another": "y"}[skipped]
    graph.inputs["y"] = graph.inputs["x"]
    result = graph.op("SkipLayerNormalization", down, other, vector, vector, vector, domain="com.microsoft")
    blocks = rewriter.inspect(graph.model(result)).feed_forward.sites
    assert [(b.width, b.hidden, b.activation.name) for b in blocks] == [(WIDTH, 48, "gelu")] * found
