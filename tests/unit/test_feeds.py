"""Feeds made from nothing but a graph: sizes that agree, values that mean something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.capture.feeds import candidate_sizes, make_feeds
from rewriter.capture.input_roles import input_roles
from rewriter.errors import UnsupportedModel, UsageError


def graph(inputs: str, body: str, constants: str = "", outputs: str = "float[n] out") -> ir.Model:
    """A model in ONNX's text form; `constants` are initializers."""
    block = f"<{constants}>" if constants else ""
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "own" : 1]>\n'
        f"g ({inputs}) => ({outputs}) {block} {{ {body} }}"
    )


def table(rows: int, width: int = 2) -> str:
    return f"float[{rows},{width}] table = {{{','.join(['0.5'] * (rows * width))}}}"


LARGE = "float low = {-1e9}, float high = {1e9}, float one = {1.0}, int64 zero = {0}"


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "lowest"), [(5, 0), (50, 3)])
def test_ids_stay_below_the_table_they_index(rows: int, lowest: int) -> None:
    model = graph("int64[B,S] x1", "w = Cast<to = 7>(x1) out = Gather(table, w)", table(rows))
    ids = make_feeds(model, batch=4, length=200)["x1"]
    assert ids.dtype == np.int64 and ids.shape == (4, 200)
    assert (ids.min(), ids.max()) == (lowest, rows - 1)


def test_table_behind_dequantisation_and_one_hot() -> None:
    quantised = "int8[6,2] q = {0,0,0,0,0,0,0,0,0,0,0,0}, float s = {0.1}"
    model = graph("int64[B,S] a", "d = Cast<to = 1>(q) t = Mul(d, s) out = Gather(t, a)", quantised)
    assert input_roles(model)[0].bound == 6
    model = graph("int64[B,S] a", "out = OneHot(a, depth, v)", "int64 depth = {9}, float[2] v = {0.0, 1.0}")
    assert input_roles(model)[0].bound == 9


def test_table_inside_a_model_function() -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (int64[B,S] a) => (float[n] out) <{table(7)}> {{ out = own.embed(a, table) }}
        <domain: "own", opset_import: ["" : 17]>
        embed (i, t) => (o) {{ j = Identity(i) o = Gather(t, j) }}"""
    )
    assert input_roles(model)[0].bound == 7


def test_unknown_tables_get_small_ids_and_segments_are_binary() -> None:
    model = graph("int64[B,S] ids, int64[B,S] token_type_ids", "out = own.thing(ids, token_type_ids)")
    feeds = make_feeds(model, batch=8, length=64)
    assert feeds["ids"].max() < 8
    assert set(np.unique(feeds["token_type_ids"])) == {0, 1}


# --- masks ---------------------------------------------------------------------------------------


def masked_scores(how: str, kind: str) -> ir.Model:
    """Scores of a [B,1,S,T] softmax that `how` makes of the raw mask `m` and the scores `s`."""
    return graph(f"{kind} m, float[B,1,S,T] s", f"{how} out = Softmax(z)", LARGE)


MASKS = {
    "inverted and scaled": ("f = Cast<to = 1>(m) g = Sub(one, f) h = Mul(g, low) z = Add(s, h)", "int64[B,T]"),
    "shifted and scaled": ("f = Cast<to = 1>(m) g = Sub(f, one) h = Mul(g, high) z = Add(s, h)", "int64[B,T]"),
    "picks scores": ("b = Cast<to = 9>(m) z = Where(b, s, low)", "int64[B,T]"),
    "picks low": ("z = Where(m, low, s)", "bool[B,T]"),
    "negated, picks low": ("n = Not(m) z = Where(n, low, s)", "bool[B,T]"),
    "compared with zero": ("n = Equal(m, zero) z = Where(n, low, s)", "int64[B,T]"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_hide_something_and_never_everything(case: str) -> None:
    """The polarity is read off the graph; a mask fed upside down would leave nothing but the padding visible."""
    model = masked_scores(*MASKS[case])
    seen = _seen(model)
    assert seen.any(axis=-1).all(), "a row sees nothing"
    assert not seen.all(), "nothing is hidden"
    assert seen[0].all(), "the first row is padded"
    assert seen.mean() > 0.5, "more is hidden than seen: the mask is upside down"
    assert _seen(model, "ones").all()


def _seen(model: ir.Model, mask: str = "mixed") -> np.ndarray:
    """[B, T]: which keys have weight, by running the graph's own mask arithmetic in onnxruntime."""
    import onnxruntime as ort

    feeds = make_feeds(model, batch=3, length=8, mask=mask)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    scores = np.zeros((1, 1, 3, 8), np.float32)  # [B,T] broadcasts over the last two axes
    return session.run(None, {"m": feeds["m"], "s": scores})[0][0, 0] > 1e-6


def test_upside_down_polarities_differ() -> None:
    """Control: the two Where graphs demand opposite masks."""
    low = make_feeds(masked_scores(*MASKS["picks low"]))["m"]
    keep = make_feeds(masked_scores(*MASKS["negated, picks low"]))["m"]
    assert (low == ~keep).all() and low.any() and keep.any()


def test_named_mask_is_padded_on_the_right() -> None:
    model = graph("int64[B,S] ids, int64[B,S] attention_mask", "out = own.thing(ids, attention_mask)")
    mask = make_feeds(model, batch=3, length=9)["attention_mask"]
    assert mask.shape == (3, 9) and (mask[:2] == 1).all()
    assert mask[2].tolist() == [1] * 7 + [0] * 2
    assert (make_feeds(model, mask="ones")["attention_mask"] == 1).all()


def test_additive_float_mask_per_query() -> None:
    model = graph("float[B,1,S,T] the_mask, float[B,4,S,T] s", "z = Add(s, the_mask) out = Softmax(z)")
    feed = make_feeds(model, batch=2, length=6)["the_mask"]
    assert feed.shape == (2, 1, 6, 6) and feed.dtype == np.float32
    assert set(np.unique(feed)) == {-1e4, 0.0}
    assert (feed[..., 0] == 0).all(), "key 0 is hidden"
    assert (np.diagonal(feed, axis1=-2, axis2=-1) == 0).all(), "a query cannot see itself"
    model = graph("float[B,1,S,T] m, float[B,4,S,T] s", "z = Add(s, m) out = Softmax(z)")
    bias = make_feeds(model)["m"]
    assert len(np.unique(bias)) > 4, "an additive input that nobody calls a mask is a bias"


def test_square_mask_keeps_something_in_every_row() -> None:
    model = graph("bool[S,S] m, float[B,h,S,S] s", "z = Where(m, s, low) out = Softmax(z)", LARGE)
    mask = make_feeds(model, length=12)["m"]
    assert mask.shape == (12, 12) and mask.any(axis=-1).all() and not mask.all()


# --- sizes ---------------------------------------------------------------------------------------


def decoder(total: str = "total") -> ir.Model:
    return graph(
        f"int64[batch,seq] input_ids, int64[b2,{total}] attention_mask, int64[b3,seq] position_ids, "
        "float[b4,3,past_len,4] past_key, float[b4,3,past_len,4] past_value",
        "out = own.thing(input_ids, attention_mask, position_ids, past_key, past_value)",
    )


def test_mask_spans_past_and_new_tokens() -> None:
    feeds = make_feeds(decoder(), batch=2, length=5, past=4)
    assert feeds["input_ids"].shape == (2, 5)
    assert feeds["attention_mask"].shape == (2, 9)
    assert feeds["past_key"].shape == (2, 3, 4, 4) and feeds["past_key"].std() > 0.5
    assert feeds["position_ids"].tolist() == [[4, 5, 6, 7, 8]] * 2
    empty = make_feeds(decoder(), past=0)
    assert empty["past_key"].shape == (2, 3, 0, 4) and empty["attention_mask"].shape == (2, 7)


def test_a_state_that_does_not_grow_says_nothing_of_the_past() -> None:
    model = graph(
        "int64[batch,seq] input_ids, float[batch,2,past_len,4] past_key, float[batch,96,2] past_conv",
        "out = own.thing(input_ids, past_key, past_conv)",
    )
    feeds = make_feeds(model, batch=3, past=4)
    assert feeds["past_key"].shape == (3, 2, 4, 4) and feeds["past_conv"].shape == (3, 96, 2)


def test_expressions_of_symbols_are_evaluated() -> None:
    model = decoder()
    mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
    mask.shape = ir.Shape(["batch", "past_len + seq + 1"])
    assert make_feeds(model, length=5, past=4)["attention_mask"].shape == (2, 10)


def test_a_symbol_has_one_size_and_batches_agree() -> None:
    model = graph(
        "int64[s0,s1] a, int64[s7,s1] attention_mask, int64[s9,s1] position_ids",
        "out = own.f(a, attention_mask, position_ids)",
    )
    feeds = make_feeds(model, batch=3, length=6)
    assert {v.shape for v in feeds.values()} == {(3, 6)}


def test_declared_sizes_win() -> None:
    model = graph("int64[1,16] ids, int64[b,t] attention_mask", "out = own.f(ids, attention_mask)")
    feeds = make_feeds(model, batch=5, length=3)
    assert feeds["ids"].shape == feeds["attention_mask"].shape == (1, 16)
    assert candidate_sizes(model) == [(1, 16, 0)]


def test_declared_mask_length_fixes_the_past() -> None:
    feeds = make_feeds(decoder("12"), length=5, past=1)
    assert feeds["past_key"].shape[2] == 7 and feeds["position_ids"][0, 0] == 7


def test_sequence_first_features() -> None:
    model = graph("float[seq,batch,8] x", "out = own.f(x)")
    assert make_feeds(model, batch=2, length=7)["x"].shape == (7, 2, 8)


def test_images_take_the_convolutions_channels_and_the_position_tables_side() -> None:
    weights = f"float[4,3,2,2] w = {{{','.join(['0.1'] * 48)}}}, float[1,17,4] pos = {{{','.join(['0.1'] * 68)}}}"
    model = graph("float[b,c,h,w_] pixels", "y = Conv<strides = [2, 2]>(pixels, w) out = own.f(y, pos)", weights)
    assert make_feeds(model)["pixels"].shape == (2, 3, 8, 8)


def test_images_without_positions_have_other_sides_at_other_lengths() -> None:
    weights = f"float[4,3,2,2] w = {{{','.join(['0.1'] * 48)}}}, float[4,4] m = {{{','.join(['0.1'] * 16)}}}"
    body = "y = Conv<strides = [{0}, {0}]>(pixels, w) t = Transpose<perm = [0, 2, 3, 1]>(y) out = MatMul(t, m)"
    lowered, kept = (graph("float[b,c,h,w_] pixels", body.format(n), weights) for n in (2, 1))
    assert make_feeds(lowered)["pixels"].shape == (2, 3, 224, 224)
    assert make_feeds(lowered, length=9)["pixels"].shape == (2, 3, 228, 226)
    assert make_feeds(kept, length=8)["pixels"].shape[2:] == (17, 18), "attention may stand at every pixel"


def test_an_image_fits_the_positions_that_its_patches_meet_not_those_of_words() -> None:
    filled = {name: ",".join(["0.1"] * count) for name, count in (("w", 48), ("words", 256), ("pos", 64))}
    weights = (
        f"float[4,3,2,2] w = {{{filled['w']}}}, float[64,4] words = {{{filled['words']}}}, "
        f"float[16,4] pos = {{{filled['pos']}}}, int64[1,16] at = {{{','.join(map(str, range(16)))}}}"
    )
    model = graph(
        "float[b,c,h,w_] pixels, int64[b,s] ids",
        "y = Conv<strides = [2, 2]>(pixels, w) z = Transpose(y) near = Gather(pos, at) placed = Add(z, near) "
        "far = Gather(words, ids) out = own.f(placed, far)",
        weights,
    )
    assert make_feeds(model)["pixels"].shape == (2, 3, 8, 8)


def test_flags_counts_and_half_precision() -> None:
    model = graph(
        "bool[1] use_cache_branch, int64 num_logits, float16[b,s,8] inputs_embeds, float[b,2,past,4] past_key",
        "out = own.f(use_cache_branch, num_logits, inputs_embeds, past_key)",
    )
    feeds = make_feeds(model, past=3)
    assert feeds["use_cache_branch"].tolist() == [True] and feeds["num_logits"] == 1
    assert feeds["inputs_embeds"].dtype == np.float16
    assert make_feeds(model, past=0)["use_cache_branch"].tolist() == [False]


def test_seeds_differ_and_repeat() -> None:
    model = graph("int64[B,S] a", "out = Gather(table, a)", table(50))
    assert (make_feeds(model, seed=1)["a"] == make_feeds(model, seed=1)["a"]).all()
    assert (make_feeds(model, seed=1)["a"] != make_feeds(model, seed=2)["a"]).any()


def test_shapes_given_by_name() -> None:
    feeds = make_feeds(decoder(), shapes={"input_ids": (4, 1), "past_key": (4, 3, 9, 4)})
    assert feeds["attention_mask"].shape == (4, 10) and feeds["past_value"].shape == (4, 3, 9, 4)
    assert feeds["position_ids"].tolist() == [[9]] * 4
    with pytest.raises(UsageError, match="no input 'nope'") as caught:
        make_feeds(decoder(), shapes={"nope": (1,)})
    assert "input_ids" in caught.value.hint
    for wrong in ((4,), (4, 3, 9, 5), (4, 3, -1, 4)):
        with pytest.raises(UsageError, match="does not fit"):
            make_feeds(decoder(), shapes={"past_key": wrong})


def test_baked_sizes_are_found() -> None:
    body = "e = Gather(table, a) r = Reshape(e, to) out = Relu(r)"
    model = graph("int64[B,S] a", body, table(9) + ", int64[3] to = {3, 21, 2}")
    assert (3, 21, 0) in candidate_sizes(model)
    assert candidate_sizes(model)[0] == (2, 7, 0), "the default comes first"


def test_a_length_baked_beside_sizes_that_are_read_off_is_found() -> None:
    body = "s = Shape(x) b = Gather(s, zero) to = Concat<axis = 0>(nine, b, four) out = Reshape(x, to)"
    weights = "int64[1] zero = {0}, int64[1] nine = {9}, int64[1] four = {4}"
    sizes = candidate_sizes(graph("float[B,S,4] x", body, weights))
    assert {(2, 9, 0), (1, 9, 0)} <= set(sizes) and sizes[0] == (2, 7, 0)


def test_keys_of_a_cross_attention_have_their_length_behind_the_heads() -> None:
    model = graph("float[b,t,8] x, float[b,4,e,2] given", "out = own.f(x, given)")
    assert make_feeds(model, batch=3, length=5)["given"].shape == (3, 4, 5, 2)


def test_inputs_that_cannot_be_fed() -> None:
    with pytest.raises(UnsupportedModel, match="takes text"):
        make_feeds(graph("string[B] text", "out = own.f(text)"))
    with pytest.raises(UnsupportedModel, match="no plain tensor"):
        make_feeds(graph("seq(float[n]) items", "out = own.f(items)"))


def test_initializers_that_are_also_inputs_are_not_fed() -> None:
    model = graph("int64[B,S] a, float[5,2] table", "out = Gather(table, a)", table(5))
    assert list(make_feeds(model)) == ["a"]


# --- real exports --------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", ["dynamo18", "torchscript17"])
@pytest.mark.parametrize(("name", "past"), [("bert-sdpa", False), ("gpt2-eager", True), ("vit-sdpa", False)])
def test_exports_run_on_their_feeds(name: str, past: bool, exporter: str, zoo_onnx: Callable[..., Path]) -> None:
    import onnxruntime as ort

    from rewriter.capture.onnx_load import load
    from tests.zoo.models import cases

    case = next(c for c in cases(without=()) if c.name == name)
    path = zoo_onnx(case, exporter, past=past)
    model = load(path)
    size = candidate_sizes(model)[0]
    feeds = make_feeds(model, batch=size[0], length=size[1], past=size[2])
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, feeds)[0]).all()
