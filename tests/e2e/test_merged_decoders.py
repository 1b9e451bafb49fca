"""Files that choose between a decoder's first and later steps: both branches are rewritten, and go on fitting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.parser
import onnx_ir
import onnxruntime as ort
import pytest

import rewriter
from passes.dataflow import Array
from rewriter.capture import onnx_branches
from rewriter.kernels.needed import needs

HEADS, DIM = 4, 4
WIDTH = HEADS * DIM
KINDS = ("key", "value")


def _attention(name: str, x: str, source: str, *, cached: bool, filled: bool = False) -> str:
    """Keys are handed out by a transposition of their own, as exporters write it; `filled`: the cache holds all."""

    def heads(part: str, given: str) -> str:
        return f"{name}_{part}_p = MatMul({given}, {name}_w{part}) {name}_{part} = Reshape({name}_{part}_p, apart)"

    lines = [heads("q", x), f"{name}_qt = Transpose<perm=[0, 2, 1, 3]>({name}_q)"]
    if not filled:
        lines += [heads("key", source), heads("value", source)]
        lines += [f"{name}_new_{kind} = Transpose<perm=[0, 2, 1, 3]>({name}_{kind})" for kind in KINDS]
    if cached and not filled:
        lines += [f"{name}_all_{kind} = Concat<axis=2>(past_{name}_{kind}, {name}_new_{kind})" for kind in KINDS]
    seen = f"past_{name}" if filled else f"{name}_all" if cached else f"{name}_new"
    keys, perm = (f"{seen}_key", [0, 1, 3, 2]) if cached else (f"{name}_key", [0, 2, 3, 1])
    lines += [
        f"{name}_kt = Transpose<perm={perm}>({keys})",
        f"{name}_s = MatMul({name}_qt, {name}_kt) {name}_w = Softmax<axis=-1>({name}_s)",
        f"{name}_m = MatMul({name}_w, {seen}_value) {name}_t = Transpose<perm=[0, 2, 1, 3]>({name}_m)",
        f"{name}_f = Reshape({name}_t, flat) {name}_o = MatMul({name}_f, {name}_wo)",
    ]
    return " ".join(lines)


def _branch(cached: bool) -> str:
    """One layer: what it attends to itself is cached as it grows, the memory as the first step leaves it."""
    own = "self_all" if cached else "self_new"
    other = "nothing" if cached else "cross_new"
    given = [f"{n}_{kind}" for n in (own, other) for kind in KINDS]
    outputs = ", ".join(["float[b, s, w] y", *(f"float[b, h, t, d] {name}" for name in given)])
    nothing = " ".join(f"nothing_{kind} = Identity(empty)" for kind in KINDS) if cached else ""
    nodes = f"{_attention('self', 'x', 'x', cached=cached)} h = Add(x, self_o)"
    nodes += f" {_attention('cross', 'h', 'memory', cached=cached, filled=cached)} y = Add(h, cross_o) {nothing}"
    nodes += " unread = MatMul(h, self_wq) unread_too = Identity(unread)"
    return f"{'later' if cached else 'first'} () => ({outputs}) {{ {nodes} }}"


def _weights(*, twin: bool) -> list[onnx.TensorProto]:
    rng = np.random.default_rng(0)
    weights = {f"{n}_w{part}": rng.standard_normal((WIDTH, WIDTH)) / 4 for n in ("self", "cross")
               for part in ("q", "key", "value", "o")}  # fmt: skip
    for name, weight in weights.items():
        if twin and name.endswith(KINDS):
            by_head = weight.reshape(WIDTH, HEADS, DIM)
            by_head[:, 1::2] = by_head[:, ::2]
    weights |= {"head": rng.standard_normal((WIDTH, 11)), "empty": np.zeros((0, HEADS, 1, DIM))}
    tensors = [onnx.numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    shapes = {"apart": [0, 0, HEADS, DIM], "flat": [0, 0, WIDTH]}
    tensors += [onnx.numpy_helper.from_array(np.array(s, np.int64), name) for name, s in shapes.items()]
    return tensors


def _file(path: Path, *, twin: bool, called: bool = False) -> Path:
    """A decoder layer and a head behind the If; weights stand outside of its branches, and softmaxes are `called`
    in a function if wanted."""
    names = [f"{n}_{kind}" for n in ("self", "cross") for kind in KINDS]
    pasts = ", ".join(f"float[b, {HEADS}, p_{name[:4]}, {DIM}] past_{name}" for name in names)
    presents = ", ".join(f"float[b, {HEADS}, n_{name[:4]}, {DIM}] present_{name}" for name in names)
    made = ", ".join(f"present_{name}" for name in names)
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 17, "own": 1]>\n'
        f"decoder (float[b, s, {WIDTH}] x, float[b, e, {WIDTH}] memory, {pasts}, bool[1] use_cache_branch) "
        f"=> (float[b, s, 11] logits, {presents}) {{"
        f"hidden, {made} = If (use_cache_branch) <then_branch = {_branch(True)}, else_branch = {_branch(False)}> "
        "logits = MatMul(hidden, head)}\n"
        '<domain: "own", opset_import: ["": 17]> weigh (s) => (w) { w = Softmax<axis=-1>(s) }'
    )
    for branch in model.graph.node[0].attribute if called else ():
        for node in branch.g.node:
            if node.op_type == "Softmax":
                node.CopyFrom(onnx.helper.make_node("weigh", node.input, node.output, domain="own"))
    model.graph.initializer.extend(_weights(twin=twin))
    onnx.save(model, path)
    return path


def _decode(path: Path) -> tuple[list[Array], set[int]]:
    """Logits of a first step and of two later ones on the caches that it left, and the heads that these hold."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    heads = {i.name: i.shape[1] for i in session.get_inputs() if len(i.shape) == 4}
    rng = np.random.default_rng(1)
    memory = rng.standard_normal((2, 5, WIDTH), np.float32)
    pasts = list(heads)
    cache = {n: np.zeros((2, heads[n], 0, DIM), np.float32) for n in pasts}
    logits = []
    for step, tokens in enumerate((6, 1, 1)):
        x = rng.standard_normal((2, tokens, WIDTH), np.float32)
        feeds = {"x": x, "memory": memory, "use_cache_branch": np.array([step > 0]), **cache}
        found = dict(zip(names, session.run(None, feeds), strict=True))
        logits.append(found["logits"])
        left = {n: found[n.replace("past", "present")] for n in pasts}
        cache = {n: array if array.size else cache[n] for n, array in left.items()}
    return logits, {array.shape[1] for array in cache.values()}


@pytest.mark.parametrize(("twin", "called"), [(True, False), (True, True), (False, False)])
def test_a_decoder_of_two_branches_is_rewritten_as_one(twin: bool, called: bool, tmp_path: Path) -> None:
    """Also the branch that only reads the cache of the other; heads that differ are the control."""
    path, out = _file(tmp_path / "merged.onnx", twin=twin, called=called), tmp_path / "new.onnx"
    done = rewriter.optimize(path, "gqa2")
    done.save(out)
    rows, refused = done.rewrite_report.sites, done.rewrite_report.refused
    assert len(rows) == 3 and all(row.exact == twin for row in rows)
    assert [r.reason.partition(" (")[0] for r in refused] == ["its keys and values come straight from an input"]
    assert "which another branch of the file fills" in refused[0].reason
    (before, all_heads), (after, heads) = _decode(path), _decode(out)
    assert all_heads == {HEADS} and heads == {2}
    errors = [float(np.abs(a - b).max()) for a, b in zip(after, before, strict=True)]
    assert max(errors) < 1e-4 if twin else min(errors) > 1e-2


def test_what_is_not_rewritten_in_branches_stays(tmp_path: Path) -> None:
    path, out = _file(tmp_path / "merged.onnx", twin=True), tmp_path / "new.onnx"
    done = rewriter.optimize(path, "gqa2", layers="cross")
    done.save(out)
    assert len(done.rewrite_report.sites) == 1
    old, new = (next(n for n in onnx.load(p).graph.node if n.op_type == "If") for p in (path, out))
    later = [{n.output[0]: (n.op_type, list(n.input)) for n in node.attribute[0].g.node} for node in (old, new)]
    changed = {name for name, made in later[0].items() if later[1].get(name) != made}
    assert changed == {"cross_kt", "cross_m", "nothing_key", "nothing_value"}, "all that reads the other branch's cache"
    (before, _), (after, heads) = _decode(path), _decode(out)
    assert heads == {HEADS, 2}
    assert max(float(np.abs(a - b).max()) for a, b in zip(after, before, strict=True)) < 1e-4


@pytest.mark.parametrize("keys", [7, 10])
def test_a_cache_that_was_seen_empty_only_is_not_understood(keys: int, tmp_path: Path) -> None:
    """A table over 7 keys runs with nothing cached behind 7 tokens, one over 10 with 3 tokens (the control)."""
    nodes = _attention("self", "x", "x", cached=True)
    nodes = nodes.replace(
        "self_w = Softmax<axis=-1>(self_s)", "near = Add(self_s, table) self_w = Softmax<axis=-1>(near)"
    )
    pasts = ", ".join(f"float[b, {HEADS}, p, {DIM}] past_self_{kind}" for kind in KINDS)
    presents = ", ".join(f"float[b, {HEADS}, t, {DIM}] self_all_{kind}" for kind in KINDS)
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 17]> g (float[b, s, {WIDTH}] x, {pasts}) '
        f"=> (float[b, s, {WIDTH}] self_o, {presents}) {{{nodes}}}"
    )
    model.graph.initializer.extend(
        [*_weights(twin=True), onnx.numpy_helper.from_array(np.zeros((7, keys), np.float32), "table")]
    )
    onnx.save(model, tmp_path / "g.onnx")
    (site,) = (s for s in rewriter.inspect(tmp_path / "g.onnx").to_dict()["sites"] if s["kind"] == "attention")
    assert site["status"] == ("refused" if keys == 7 else "rewritable")
    assert keys == 10 or "past_self_key, which the file ran with empty only" in site["reason"]


def test_only_so_many_choices_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a pass over the graph: a file with thousands must not take hours."""
    body = "w = Softmax<axis=-1>({x}) {y} = MatMul(w, {x})"
    nodes = " ".join(
        f"y{i} = If (c) <then_branch = t{i} () => (float[b, t, t] a{i}) {{{body.format(x='x', y=f'a{i}')}}}, "
        f"else_branch = e{i} () => (float[b, t, t] o{i}) {{{body.format(x='x', y=f'o{i}')}}}>"
        for i in range(4)
    )
    text = f'<ir_version: 9, opset_import: ["": 17]> g (float[b, t, t] x, bool c) => (float[b, t, t] y) {{{nodes} '
    model = onnx.parser.parse_model(f"{text} y = Sum(y0, y1, y2, y3)}}")
    for most, left in ((3, 1), (4, 0)):
        monkeypatch.setattr(onnx_branches, "MOST", most)
        opened = onnx_ir.from_proto(model)
        assert len(onnx_branches.lift(opened)) == most
        assert sum(map(onnx_branches.chooses, opened.graph)) == left


def test_attention_in_a_body_that_cannot_be_run_is_listed(tmp_path: Path) -> None:
    """A decoder inside of a search over beams: what the search takes is not made up, and the decoder not unseen."""
    model = onnx.load(_file(tmp_path / "merged.onnx", twin=True))
    searched = onnx.helper.make_node("BeamSearch", ["ids"], ["found"], domain="com.microsoft", decoder=model.graph)
    ids, found = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT32, ["b", n]) for n in ("ids", "found"))
    opsets = [*model.opset_import, onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([searched], "search", [ids], [found])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "search.onnx")
    (refusal,) = rewriter.inspect(tmp_path / "search.onnx").refusals
    assert "body of BeamSearch" in refusal.reason
    with pytest.raises(rewriter.errors.NothingToRewrite, match="body of BeamSearch"):
        rewriter.optimize(tmp_path / "search.onnx", "gqa2")


def test_what_was_rewritten_is_rewritten_again(tmp_path: Path) -> None:
    """Names of the first time are in the branches then, and no name of the second may be the same."""
    path, out, again = _file(tmp_path / "merged.onnx", twin=True), tmp_path / "new.onnx", tmp_path / "again.onnx"
    rewriter.optimize(path, "gqa2").save(out)
    assert len(needs(out)) == 1, "kernels are told from the branches, too"
    done = rewriter.optimize(out, "mqa")
    done.save(again)
    assert len(done.rewrite_report.sites) == 3 and not any(row.exact for row in done.rewrite_report.sites)
    assert _decode(again)[1] == {1}
