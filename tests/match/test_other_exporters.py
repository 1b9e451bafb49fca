"""Attention as Keras, TensorFlow, JAX, Paddle and MXNet exporters write it: found, and rewritten without loss.

Every graph is a lossless twin; its control has one head that is not tied.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import rewriter
from passes.match.verdicts import TURNED
from rewriter.errors import UnsupportedModel
from tests.match.graphs_by_hand import (
    DIM,
    HEADS,
    SCALE,
    WIDTH,
    Array,
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


def keras_by_matrices(graph: Graph, perturbed: bool) -> str:
    """The same numbers as linear layers."""
    q, k, v = (
        by_heads(graph, graph.op("Add", graph.op("MatMul", "x", p.flat[0]), p.flat[1]))
        for p in projections(graph, perturbed)
    )
    mixed = graph.op("Transpose", attended(graph, q, k, v), perm=[0, 2, 1, 3])
    last = graph.matrix(HEADS, DIM, WIDTH).reshape(WIDTH, WIDTH)
    return graph.op("Add", graph.op("MatMul", graph.op("Reshape", mixed, ints(0, 0, WIDTH)), last), "x")


def keras_along_an_axis(graph: Graph, perturbed: bool) -> str:
    """Keras' `attention_axes`: tokens attend within blocks, whose axis no operator joins with another."""
    alone = graph.op("Unsqueeze", "x", ints(1))
    blocks = graph.op("Concat", alone, graph.op("Mul", alone, 0.5), axis=1)
    q, k, v = (
        graph.op("Add", graph.op("Einsum", blocks, p.weight, equation="abcd,def->abcef"), p.bias)
        for p in projections(graph, perturbed)
    )
    scores = graph.op("Mul", graph.op("Einsum", k, q, equation="abgef,abcef->abecg"), SCALE)
    mixed = graph.op("Einsum", graph.op("Softmax", scores, axis=-1), v, equation="abecg,abgef->abcef")
    out = graph.op("Einsum", mixed, graph.matrix(HEADS, DIM, WIDTH), equation="abcef,efd->abcd")
    first, second = (graph.op("Gather", out, np.array(i), axis=1) for i in (0, 1))
    return graph.op("Add", graph.op("Add", first, second), "x")


def heads_first(graph: Graph, perturbed: bool) -> str:
    """Einsum to [batch, heads, tokens, features], by weights [heads, width, features]; one bias for all heads."""
    q, k, v = (
        graph.op("Add", graph.op("Einsum", "x", p.weight.transpose(1, 0, 2), equation="btc,hcd->bhtd"), p.bias[0])
        for p in projections(graph, perturbed)
    )
    return finished(graph, attended(graph, q, k, v))


def letters_left_out(graph: Graph, perturbed: bool) -> str:
    """Equations without an output, and with axes that are not named."""
    q, k, v = projections(graph, perturbed)
    query = graph.op("Add", graph.op("Einsum", "x", q.weight, equation="abc,cde"), q.bias)
    key, value = (
        graph.op("Add", graph.op("Einsum", "x", p.weight, equation="...W, Whd -> ...hd"), p.bias) for p in (k, v)
    )
    scores = graph.op("Mul", graph.op("Einsum", query, key, equation="...Thd,...Shd->...hTS"), SCALE)
    mixed = graph.op("Einsum", graph.op("Softmax", scores, axis=-1), value, equation="...hTS,...Shd->...Thd")
    return graph.op("Add", graph.op("Einsum", mixed, graph.matrix(HEADS, DIM, WIDTH), equation="btyz,yzw"), "x")


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


def _linear(graph: Graph, perturbed: bool, x: str = "x") -> list[str]:
    return [graph.op("Add", graph.op("MatMul", x, p.flat[0]), p.flat[1]) for p in projections(graph, perturbed)]


def heads_before_batch(graph: Graph, perturbed: bool) -> str:
    """Heads are split off, joined on the axis of sequences, and so is a mask that is repeated for each of them."""
    parts = []
    for flat in _linear(graph, perturbed):
        cut = [graph.op("Slice", flat, ints(h * DIM), ints(h * DIM + DIM), ints(2)) for h in range(HEADS)]
        parts.append(graph.op("Concat", *cut, axis=0))
    q, k, v = parts
    scores = graph.op("Div", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1])), DIM**0.5)
    graph.inputs["y"] = graph.inputs["x"]
    kept = graph.op("Greater", graph.op("Slice", "y", ints(0), ints(1), ints(2)), 0.0)
    keys = graph.op("Transpose", graph.op("Tile", kept, ints(HEADS, 1, 1)), perm=[0, 2, 1])
    mixed = graph.op("MatMul", graph.op("Softmax", graph.op("Where", keys, scores, -1e9), axis=-1), v)
    batch = graph.op("Slice", graph.op("Shape", "x"), ints(0), ints(1))
    back = graph.op("Reshape", mixed, graph.op("Concat", ints(HEADS), batch, ints(-1, DIM), axis=0))
    joined = graph.op("Reshape", graph.op("Transpose", back, perm=[1, 2, 0, 3]), ints(0, 0, WIDTH))
    return graph.op("Add", graph.op("MatMul", joined, graph.matrix(WIDTH, WIDTH)), "x")


def softmax_over_rows(graph: Graph, perturbed: bool) -> str:
    """Scores of keys with queries; the softmax runs over the last axis but one."""
    q, k, v = (by_heads(graph, flat) for flat in _linear(graph, perturbed))
    scores = graph.op("Mul", graph.op("MatMul", k, graph.op("Transpose", q, perm=[0, 1, 3, 2])), SCALE)
    weights = graph.op("Transpose", graph.op("Softmax", scores, axis=2), perm=[0, 1, 3, 2])
    return finished(graph, graph.op("MatMul", weights, v))


def scores_transposed(graph: Graph, perturbed: bool) -> str:
    """Scores of keys with queries, transposed before they are masked."""
    q, k, v = (by_heads(graph, flat) for flat in _linear(graph, perturbed))
    scores = graph.op("Mul", graph.op("MatMul", k, graph.op("Transpose", q, perm=[0, 1, 3, 2])), SCALE)
    length = graph.op("Squeeze", graph.op("Slice", graph.op("Shape", "x"), ints(1), ints(2)))
    place = graph.op("Range", np.array(0), length, np.array(1))
    later = graph.op("Greater", place, graph.op("Unsqueeze", place, ints(1)))
    masked = graph.op("Where", later, -1e9, graph.op("Transpose", scores, perm=[0, 1, 3, 2]))
    return finished(graph, graph.op("MatMul", graph.op("Softmax", masked, axis=-1), v))


def one_sequence(graph: Graph, perturbed: bool) -> str:
    """No axis for a batch: [tokens, heads, features] to [heads, features, tokens] in one step."""
    graph.inputs["x"] = graph.inputs["x"][:1]
    split = [
        graph.op("Reshape", flat, ints(-1, HEADS, DIM))
        for flat in _linear(graph, perturbed, graph.op("Squeeze", "x", ints(0)))
    ]
    q, k, v = (graph.op("Transpose", s, perm=p) for s, p in zip(split, ([1, 0, 2], [1, 2, 0], [1, 0, 2]), strict=True))
    weights = graph.op("Softmax", graph.op("Mul", graph.op("MatMul", q, k), SCALE), axis=-1)
    joined = graph.op("Reshape", graph.op("Transpose", graph.op("MatMul", weights, v), perm=[1, 0, 2]), ints(-1, WIDTH))
    return graph.op("Unsqueeze", graph.op("MatMul", joined, graph.matrix(WIDTH, WIDTH)), ints(0))


WRITERS: dict[str, Writer] = {
    "keras": keras,
    "keras-along-an-axis": keras_along_an_axis,
    "heads-first": heads_first,
    "letters-left-out": letters_left_out,
    "packed": packed,
    "matrices": matrices,
    "stacks": stacks,
    "scaled": scaled,
    "rows-flattened": rows_flattened,
    "heads-before-batch": heads_before_batch,
    "softmax-over-rows": softmax_over_rows,
    "scores-transposed": scores_transposed,
    "one-sequence": one_sequence,
}


def _distances(writer: Writer, target: str) -> list[float]:
    """How far the result moves when the twin is rewritten, and when the perturbed twin is."""
    moved = []
    for perturbed in (False, True):
        graph = Graph()
        model = graph.model(writer(graph, perturbed))
        done = rewriter.optimize(model, target)
        before, after = (run(m, graph.inputs) for m in (model, done))
        moved.append(float(np.abs(before - after).max()))
    return moved


@pytest.mark.parametrize("name", WRITERS)
def test_a_twin_is_rewritten_without_loss(name: str) -> None:
    exact, moved = _distances(WRITERS[name], "gqa2")
    assert exact < EXACT
    assert moved > MOVED


@pytest.mark.parametrize("name", WRITERS)
def test_a_site_has_its_heads_and_its_scale(name: str) -> None:
    graph = Graph()
    (site,) = rewriter.inspect(graph.model(WRITERS[name](graph, False))).sites
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (HEADS, HEADS, DIM, DIM)
    assert site.scale == pytest.approx(SCALE)


def test_a_fused_operator_whose_mask_of_no_declared_shape_counts_tokens() -> None:
    """Optimum's O2 of BERT."""
    moved = []
    for perturbed in (False, True):
        graph = Graph()
        made = projections(graph, perturbed)
        weight, bias = np.concatenate([p.flat[0] for p in made], axis=1), np.concatenate([p.flat[1] for p in made])
        lengths = graph.op("ReduceSum", graph.op("Cast", "mask", to=6), ints(1), keepdims=0)
        mixed = graph.op("Attention", "x", weight, bias, lengths, domain="com.microsoft", num_heads=HEADS)
        result = graph.op("Add", graph.op("MatMul", mixed, graph.matrix(WIDTH, WIDTH)), "x")
        model = graph.model(result, checked=False)
        mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, ["batch", "tokens"])
        model.graph.input.append(mask)
        inputs = graph.inputs | {"mask": np.arange(6)[None] < np.array([[6], [4]])}
        inputs["mask"] = inputs["mask"].astype(np.int64)
        before, after = (run(m, inputs) for m in (model, rewriter.optimize(model, "gqa2")))
        moved.append(float(np.abs(after - before).max()))
    assert moved[0] < EXACT and moved[1] > MOVED


def test_a_length_that_is_read_off_keys_whose_heads_lie_on_the_axis_of_the_batch() -> None:
    """BLOOM with a cache cuts a bias to as many keys as there are behind a layout that counts heads.

    Caches are cast as they come in and as they go out (float16 whose inputs and outputs are not), with heads declared.
    """
    moved = []
    for perturbed in (False, True):
        graph = Graph()
        q, *new = (by_heads(graph, flat) for flat in _linear(graph, perturbed))
        cast = [graph.op("Cast", name, to=1) for name in PAST]
        k, v = (graph.op("Concat", past, heads, axis=2) for past, heads in zip(cast, new, strict=True))
        batch = graph.op("Slice", graph.op("Shape", "x"), ints(0), ints(1))
        flattened = graph.op("Concat", graph.op("Mul", batch, ints(HEADS)), ints(-1, DIM), axis=0)
        rows, keys, values = (graph.op("Reshape", heads, flattened) for heads in (q, k, v))
        turned = graph.op("Transpose", keys, perm=[0, 2, 1])
        length = graph.op("Slice", graph.op("Shape", turned), ints(2), ints(3))
        bias = graph.op("Slice", graph.random.standard_normal((1, 1, 64)), ints(0), length, ints(2))
        weights = graph.op("Softmax", graph.op("Add", graph.op("MatMul", rows, turned), bias), axis=-1)
        back = graph.op("Concat", batch, ints(HEADS, -1, DIM), axis=0)
        mixed = graph.op("Reshape", graph.op("MatMul", weights, values), back)
        presents = (graph.op("Cast", k, to=1), graph.op("Cast", v, to=1))
        model = _with_cache(graph, finished(graph, mixed), presents, cast)
        cache = {
            name: np.repeat(graph.random.standard_normal((2, 2, 3, DIM)).astype(np.float32), 2, 1) for name in PAST
        }
        before = run(model, graph.inputs | cache)
        done = run(rewriter.optimize(model, "gqa2"), graph.inputs | {n: a[:, ::2] for n, a in cache.items()})
        moved.append(float(np.abs(done - before).max()))
    assert moved[0] < EXACT and moved[1] > MOVED


PAST = ("past_key", "past_value")


def _with_cache(graph: Graph, result: str, presents: tuple[str, str], cast: list[str]) -> onnx.ModelProto:
    def tensor(name: str, length: str) -> onnx.ValueInfoProto:
        shape: list[str | int | None] = ["batch", HEADS, length, DIM]
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    model = graph.model(result, checked=False)
    model.graph.input.extend(tensor(name, "past") for name in PAST)
    model.graph.output.extend(tensor(name, "total") for name in presents)
    model.graph.value_info.extend(tensor(name, "past") for name in cast)
    onnx.checker.check_model(model)
    return model


def repeated_in_parts(graph: Graph, perturbed: bool) -> str:
    """Two key/value heads, taken apart and joined again twice each."""
    query, *pair = (by_heads(graph, flat) for flat in _linear(graph, perturbed))
    repeated = []
    for heads in pair:
        two = graph.op("Slice", heads, ints(2), ints(4), ints(1))
        first, second = (graph.op("Slice", two, ints(i), ints(i + 1), ints(1)) for i in (0, 1))
        repeated.append(graph.op("Concat", first, first, second, second, axis=1))
    return finished(graph, attended(graph, query, repeated[0], repeated[1]))


def test_heads_that_are_repeated_by_joining_their_parts() -> None:
    graph = Graph()
    (site,) = rewriter.inspect(graph.model(repeated_in_parts(graph, False))).sites
    assert (site.heads, site.kv_heads, site.group) == (HEADS, 2, (0, 0, 1, 1))
    exact, moved = _distances(repeated_in_parts, "mqa")
    assert exact < EXACT
    assert moved > MOVED


def test_projections_within_one_contraction_of_all_factors_are_refused_with_what_to_do() -> None:
    graph = Graph()
    q, k, v = projections(graph, False)
    scores = graph.op("Einsum", "x", q.weight, "x", k.weight, equation="btw,whd,buv,vhd->bhtu")
    mixed = graph.op("Einsum", graph.op("Softmax", scores, axis=-1), "x", v.weight, equation="bhtu,buw,whd->bthd")
    out = graph.op("Einsum", mixed, graph.matrix(HEADS, DIM, WIDTH), equation="bthd,hdw->btw")
    seen = rewriter.inspect(graph.model(graph.op("Add", out, "x")))
    assert ["contracts 4 factors at once" in r.reason for r in seen.refusals] == [True]


def test_masks_where_scores_are_keys_by_queries_are_refused() -> None:
    graph = Graph()
    q, k, v = (by_heads(graph, flat) for flat in _linear(graph, False))
    scores = graph.op("MatMul", k, graph.op("Transpose", q, perm=[0, 1, 3, 2]))
    masked = graph.op("Add", scores, graph.random.standard_normal((1, 1, 1, 1, 6))[0])
    weights = graph.op("Softmax", graph.op("Transpose", masked, perm=[0, 1, 3, 2]), axis=-1)
    seen = rewriter.inspect(graph.model(finished(graph, graph.op("MatMul", weights, v))))
    assert [r.reason for r in seen.refusals] == [TURNED]


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


@pytest.mark.parametrize("target", ["gqa1", "fnet"])
def test_an_output_projection_that_sums_over_heads_and_features_is_a_matrix_too(target: str) -> None:
    errors = []
    for writer in (keras, keras_by_matrices):
        graph = Graph()
        model = graph.model(writer(graph, True))
        done = rewriter.optimize(model, target, calibration=[graph.inputs])
        errors.append(float(np.abs(run(done, graph.inputs) - run(model, graph.inputs)).max()))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert errors[0] > MOVED


@pytest.mark.parametrize("equation", ["abc,cd->abd", "abc,dc->abd"])
def test_a_feed_forward_block_of_einsums(equation: str) -> None:
    graph = Graph()
    turned = "dc" in equation
    up, down = (graph.matrix(*shape[::-1] if turned else shape) for shape in ((WIDTH, 48), (48, WIDTH)))
    hidden = graph.op("Relu", graph.op("Einsum", "x", up, equation=equation))
    result = graph.op("Einsum", hidden, down, equation=equation)
    (block,) = rewriter.inspect(graph.model(graph.op("Add", result, "x"))).feed_forward.sites
    assert (block.width, block.hidden, block.activation.name) == (WIDTH, 48, "relu")


def test_integer_convolutions_are_projections_too() -> None:
    graph = Graph()
    turned = graph.op("Transpose", "x", perm=[0, 2, 1])
    quantised = graph.op("DynamicQuantizeLinear", turned)
    graph.nodes[-1].output.extend(["scale", "zero"])
    heads = []
    for _ in "qkv":
        weight = graph.random.integers(-99, 99, (WIDTH, DIM, 1)).astype(np.int8)
        whole = graph.op("Cast", graph.op("ConvInteger", quantised, weight, "zero", group=HEADS), to=1)
        made = graph.op("Mul", whole, graph.op("Mul", "scale", 0.01))
        heads.append(graph.op("Transpose", graph.op("Reshape", made, ints(0, HEADS, DIM, -1)), perm=[0, 1, 3, 2]))
    seen = rewriter.inspect(graph.model(finished(graph, attended(graph, heads[0], heads[1], heads[2]))))
    assert ["a convolution in 4 groups" in r.reason for r in seen.refusals] == [True]


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
def test_norms_whose_ones_are_spread_over_heads_get_those_of_one(perturbed: bool) -> None:
    """What torch's exporter writes for a root mean square without a gain."""
    graph = Graph(opset=23)
    q, k, v = (by_heads(graph, x) for x in _linear(graph, perturbed))
    ones = graph.op("ConstantOfShape", graph.op("Shape", q), value=onnx.numpy_helper.from_array(np.ones(1, np.float32)))
    q, k = (graph.op("RMSNormalization", x, ones, axis=-1) for x in (q, k))
    model = graph.model(finished(graph, attended(graph, q, k, v)))
    moved = np.abs(run(rewriter.optimize(model, "gqa2"), graph.inputs) - run(model, graph.inputs)).max()
    assert moved > MOVED if perturbed else moved < EXACT


def test_scores_that_are_written_into_a_band_are_refused_with_what_to_do() -> None:
    graph = Graph()
    q, k, v = (by_heads(graph, x) for x in _linear(graph, False))
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    empty = graph.op("ConstantOfShape", graph.op("Shape", scores))
    weights = graph.op(
        "Softmax",
        graph.op("ScatterND", empty, ints(0).reshape(1, 1), graph.op("Slice", scores, ints(0), ints(1), ints(0))),
    )
    seen = rewriter.inspect(graph.model(finished(graph, graph.op("MatMul", weights, v))))
    assert ["with a mask, which is the same" in r.reason for r in seen.refusals] == [True]


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
def test_scores_with_heads_behind_the_keys_are_run_whole(perturbed: bool) -> None:
    graph = Graph()
    q, k, v = (graph.op("Reshape", x, ints(0, 0, HEADS, DIM)) for x in _linear(graph, perturbed))
    weights = graph.op("Softmax", graph.op("Einsum", q, k, equation="bshd,bthd->bsth"), axis=2)
    mixed = graph.op("Einsum", weights, v, equation="bsth,bthd->bshd")
    last = graph.op("MatMul", graph.op("Reshape", mixed, ints(0, 0, WIDTH)), graph.matrix(WIDTH, WIDTH))
    model = graph.model(last)
    assert ["write it so that heads come before them" in s.whole for s in rewriter.inspect(model).sites] == [True]
    moved = np.abs(run(rewriter.optimize(model, "gqa2"), graph.inputs) - run(model, graph.inputs)).max()
    assert moved > MOVED if perturbed else moved < EXACT


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
def test_keys_that_learned_queries_of_a_fixed_batch_meet_are_found(perturbed: bool) -> None:
    """Scores are then a product of hidden states and a constant, as a projection is."""
    graph = Graph()
    latents = graph.constant(np.tile(graph.matrix(1, 5, WIDTH), (2, 1, 1)))
    q, k, v = projections(graph, perturbed)
    query = by_heads(graph, graph.op("Add", graph.op("MatMul", latents, q.flat[0]), q.flat[1]))
    key, value = (by_heads(graph, graph.op("Add", graph.op("MatMul", "x", p.flat[0]), p.flat[1])) for p in (k, v))
    mixed = graph.op("Transpose", attended(graph, query, key, value), perm=[0, 2, 1, 3])
    last = graph.op("MatMul", graph.op("Reshape", mixed, ints(0, 0, WIDTH)), graph.matrix(WIDTH, WIDTH))
    model = graph.model(last)
    moved = np.abs(run(rewriter.optimize(model, "gqa2"), graph.inputs) - run(model, graph.inputs)).max()
    assert moved > MOVED if perturbed else moved < EXACT


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
def test_heads_that_are_normed_side_by_side_with_tokens(perturbed: bool) -> None:
    """[batch, tokens * heads, features] by [0, -1, features], behind a rotation: that axis is no number of heads."""
    graph = Graph()
    angles = np.arange(32)[:, None] / 5.0 ** np.arange(DIM // 2)
    tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]

    def normed(x: str) -> str:
        turned = graph.op("RotaryEmbedding", x, ints(0), *tables, domain="com.microsoft")
        side_by_side = graph.op("Reshape", turned, ints(0, -1, DIM))
        mean = graph.op("ReduceMean", graph.op("Mul", side_by_side, side_by_side), axes=[-1])
        scaled = graph.op("Div", side_by_side, graph.op("Sqrt", graph.op("Add", mean, 1e-5)))
        return by_heads(graph, graph.op("Reshape", scaled, ints(0, -1, WIDTH)))

    q, k, v = _linear(graph, perturbed)
    model = graph.model(finished(graph, attended(graph, normed(q), normed(k), by_heads(graph, v))))
    small = rewriter.optimize(model, "gqa2")
    for length in (6, 9):
        x = {"x": graph.random.standard_normal((2, length, WIDTH)).astype(np.float32)}
        moved = np.abs(run(small, x) - run(model, x)).max()
        assert moved > MOVED if perturbed else moved < EXACT


@pytest.mark.parametrize("drawn", ["dropout", "noise", "none"])
def test_a_file_that_draws_random_numbers_is_refused_for_that(drawn: str) -> None:
    graph = Graph()
    q, k, v = (by_heads(graph, x) for x in _linear(graph, False))
    mixed = finished(graph, attended(graph, q, k, v))
    dropped = graph.op("Dropout", mixed, 0.1, np.array(drawn == "dropout"))
    last = graph.op("Add", dropped, graph.op("RandomNormalLike", mixed)) if drawn == "noise" else dropped
    model = graph.model(last)
    if drawn == "none":
        assert np.abs(run(rewriter.optimize(model, "gqa2"), graph.inputs) - run(model, graph.inputs)).max() < EXACT
        return
    with pytest.raises(UnsupportedModel, match=r"draws random numbers at .*(Dropout|RandomNormalLike)") as error:
        rewriter.optimize(model, "gqa2")
    assert "model.eval()" in error.value.hint


def test_projections_in_a_packing_that_is_not_read_are_refused_as_attention() -> None:
    """bitsandbytes' four bits: [out * in / 2] bytes without rows and columns."""
    graph = Graph()

    def packed(x: str, rows: int = WIDTH) -> str:
        codes = graph.random.integers(0, 256, WIDTH * rows // 2).astype(np.uint8)
        scales = np.full(WIDTH * rows // 16, 0.2, np.float32)
        return graph.op(
            "MatMulBnb4", x, codes, scales, domain="com.microsoft", K=WIDTH, N=rows, block_size=16, quant_type=1
        )

    mixed = attended(graph, *(by_heads(graph, packed("x")) for _ in range(3)))
    hidden = finished(graph, mixed)
    out = graph.op("MatMul", graph.op("Relu", packed(hidden, 2 * WIDTH)), graph.matrix(2 * WIDTH, WIDTH))
    seen = rewriter.inspect(graph.model(graph.op("Add", out, hidden)))
    assert seen.not_attention == ()
    assert ["stored for MatMulBnb4; rewrite the float model" in r.reason for r in seen.refusals] == [True]


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
def test_weights_dequantised_by_microsofts_operator_are_those_of_the_standard_one(perturbed: bool) -> None:
    graph = Graph()

    def stored(flat: Array) -> str:
        scale = np.abs(flat).max() / 127  # the largest number keeps its code where weights are stored anew
        codes = np.round(flat / scale).astype(np.int8)
        return graph.op("DequantizeLinear", codes, scale, np.array(0, np.int8), domain="com.microsoft")

    q, k, v = (by_heads(graph, graph.op("MatMul", "x", stored(p.flat[0]))) for p in projections(graph, perturbed))
    model = graph.model(finished(graph, attended(graph, q, k, v)))
    moved = np.abs(run(rewriter.optimize(model, "gqa2"), graph.inputs) - run(model, graph.inputs)).max()
    assert moved > MOVED if perturbed else moved < EXACT


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
def test_a_softmax_whose_rows_are_spread_out_and_biases_that_count_nothing(perturbed: bool) -> None:
    """As JAX lowers a mapped softmax (each row's largest and sum, expanded to all keys), and Gemm's beta of 0."""
    graph = Graph()
    flat = graph.op("Reshape", "x", ints(-1, WIDTH))
    q, k, v = projections(graph, perturbed)
    made = [
        graph.op("Gemm", flat, q.flat[0], beta=0.0),
        graph.op("Gemm", flat, k.flat[0], 100 * k.flat[1], beta=0.0),
        graph.op("Gemm", flat, v.flat[0], v.flat[1]),
    ]
    shape = graph.op("Shape", "x")
    q_, k_, v_ = (by_heads(graph, graph.op("Reshape", m, shape)) for m in made)
    scores = graph.op("Mul", graph.op("MatMul", q_, graph.op("Transpose", k_, perm=[0, 1, 3, 2])), SCALE)

    def spread(row: str) -> str:
        return graph.op("Expand", graph.op("Unsqueeze", row, ints(3)), graph.op("Shape", scores))

    largest = graph.op("Max", np.array(-np.inf, np.float32), graph.op("ReduceMax", scores, axes=[3], keepdims=0))
    above = graph.op("Exp", graph.op("Sub", scores, graph.op("Identity", spread(largest))))
    weights = graph.op("Div", above, spread(graph.op("ReduceSum", above, ints(3), keepdims=0)))
    model = graph.model(finished(graph, graph.op("MatMul", weights, v_)))
    moved = np.abs(run(rewriter.optimize(model, "gqa2"), graph.inputs) - run(model, graph.inputs)).max()
    assert moved > MOVED if perturbed else moved < EXACT


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
def test_contractions_with_an_axis_of_one_at_the_end(perturbed: bool) -> None:
    """As TensorFlow's exporter takes Einsum apart: [batch * heads, ...] to [batch, heads, ..., 1], then squeezed."""
    graph = Graph()

    def last_two(x: str, rank: int) -> str:
        return graph.op("Slice", graph.op("Shape", x), ints(rank - 2), ints(rank))

    def joined(x: str) -> str:
        return graph.op("Reshape", x, graph.op("Concat", ints(-1), last_two(x, 4), axis=0))

    def split(x: str) -> str:
        apart = graph.op("Concat", ints(-1, HEADS), last_two(x, 3), ints(1), axis=0)
        return graph.op("Squeeze", graph.op("Reshape", x, apart), ints(4))

    q, k, v = (joined(by_heads(graph, x)) for x in _linear(graph, perturbed))
    scores = split(graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1])))
    weights = graph.op("Softmax", graph.op("Mul", scores, SCALE), axis=-1)
    shape = graph.op("Concat", ints(-1), last_two(weights, 4), axis=0)
    weights = graph.op("Reshape", graph.op("Unsqueeze", weights, ints(4)), shape)
    model = graph.model(finished(graph, split(graph.op("MatMul", weights, v))))
    moved = np.abs(run(rewriter.optimize(model, "gqa2"), graph.inputs) - run(model, graph.inputs)).max()
    assert moved > MOVED if perturbed else moved < EXACT


def test_a_softmax_in_a_branch_that_is_always_taken_is_refused_for_where_it_stands() -> None:
    """The branch reads the scores; none of the node's own inputs depends on them."""
    graph = Graph()
    q, k, v = (by_heads(graph, x) for x in _linear(graph, False))
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    branches = {
        name: onnx.helper.make_graph(
            [onnx.helper.make_node("Softmax", [scores], [f"{name}.out"], axis=-1)],
            name,
            [],
            [onnx.helper.make_tensor_value_info(f"{name}.out", onnx.TensorProto.FLOAT, None)],
        )
        for name in ("then_branch", "else_branch")
    }
    weights = graph.op("If", np.array(True), **branches)
    seen = rewriter.inspect(graph.model(finished(graph, graph.op("MatMul", weights, v))))
    assert ["operator If reads them" in r.reason for r in seen.refusals] == [True, True], "one in either branch"


def test_contractions_of_three_factors_are_refused_with_what_to_do() -> None:
    graph = Graph()
    q, k, v = (by_heads(graph, x) for x in _linear(graph, False))
    scores = graph.op("Mul", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), SCALE)
    factors = (graph.op("Softmax", scores), v, graph.matrix(HEADS, DIM, WIDTH))
    out = graph.op("Einsum", *factors, equation="bhst,bhtd,hdw->bsw")
    seen = rewriter.inspect(graph.model(out))
    assert ["written as one contraction after the other" in r.reason for r in seen.refusals] == [True]
