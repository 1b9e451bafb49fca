"""Sparse attention: patterns against the papers' definitions, tiles and bodies against the float64 oracle."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegen.device import Device, DType
from codegen.errors import NotLegal
from codegen.launch.torch_op import attention
from codegen.ops.grouped_query_attention import reference, tiles, torch_body
from codegen.ops.grouped_query_attention.onnx_body import DOMAIN, attributes
from codegen.ops.grouped_query_attention.onnx_tiles import computed_scores, functions
from codegen.registry import KERNELS, select
from codegen.sight import Pattern, Sight, from_json, visible
from codegen.spec import GroupedQueryAttention
from tests.unit.test_onnx_body import operands as onnx_operands
from tests.unit.test_onnx_body import oracle as onnx_oracle
from tests.unit.test_onnx_body import run as run_onnx

CLOSE = 1e-5

WINDOW = Sight(reach=5, sinks=2)
FIXED = Sight(block=8, period=8, first=6, last=8)
STRIDED = Sight(reach=9, stride=8)
PATTERNS: dict[str, Pattern] = {
    "window": (WINDOW,),
    "fixed": (FIXED,),
    "fixed-by-head": tuple(replace(FIXED, first=6 - 2 * n, last=8 - 2 * n) for n in range(4)),
    "blocks-alone": (Sight(block=8),),
    "columns-alone": (Sight(period=8, first=6, last=8),),
    "strided": (STRIDED,),
    "strided-by-head": (Sight(reach=9), Sight(stride=8)),
}


def ordered(pattern: Pattern) -> Pattern:
    return tuple(replace(sight, ordered=True) for sight in pattern)


def relation(sight: Sight, length: int) -> NDArray[np.bool_]:
    found = visible(sight, np.arange(length)[:, None], np.arange(length))
    return np.broadcast_to(found, (length, length))


# ------------------------------------------------------------------ what is seen


def sets(length: int, seen: Any) -> NDArray[np.bool_]:
    """Row i of the result holds what the set `seen(i)` has."""
    return np.array([[j in seen(i) for j in range(length)] for i in range(length)])


def test_causal_patterns_are_the_papers() -> None:
    """A¹ and A² as Sparse Transformers writes them, and StreamingLLM's recent and first tokens; a query sees itself."""
    n, length = 8, 40
    strided_1 = lambda i: set(range(max(0, i - n), i + 1))  # noqa: E731
    strided_2 = lambda i: {j for j in range(i + 1) if (i - j) % n == 0}  # noqa: E731
    fixed_1 = lambda i: {j for j in range(i + 1) if j // n == i // n}  # noqa: E731
    fixed_2 = lambda i: {j for j in range(i + 1) if j % n >= n - 2} | {i}  # noqa: E731
    window = lambda i: set(range(max(0, i - 4), i + 1)) | set(range(min(2, i + 1)))  # noqa: E731
    expected = {
        Sight(reach=n + 1, ordered=True): strided_1,
        Sight(stride=n, ordered=True): strided_2,
        replace(STRIDED, ordered=True): lambda i: strided_1(i) | strided_2(i),
        Sight(block=n, ordered=True): fixed_1,
        Sight(period=n, first=6, last=8, ordered=True): fixed_2,
        replace(FIXED, ordered=True): lambda i: fixed_1(i) | fixed_2(i),
        replace(WINDOW, ordered=True): window,
    }
    for sight, seen in expected.items():
        np.testing.assert_array_equal(relation(sight, length), sets(length, seen))
    assert (relation(replace(WINDOW, reach=6, ordered=True), length) != sets(length, window)).any()  # the control


@pytest.mark.parametrize("name", PATTERNS)
def test_other_patterns_are_symmetric_and_hold_the_causal_ones(name: str) -> None:
    for sight in PATTERNS[name]:
        both, causal = relation(sight, 40), relation(replace(sight, ordered=True), 40)
        np.testing.assert_array_equal(both, both.T)
        assert both[causal].all() and not np.triu(causal, 1).any() and causal.diagonal().all()


def test_a_sights_numbers_are_checked() -> None:
    for wrong in ({"reach": 0}, {"block": 0}, {"stride": 0}, {"sinks": -1}, {"period": 4, "last": 5}):
        with pytest.raises(ValueError, match=r"must lie|beyond"):
            Sight(**wrong)
    pattern = PATTERNS["fixed-by-head"]
    assert from_json([vars(sight) for sight in pattern]) == pattern
    with pytest.raises(ValueError, match="unknown"):
        from_json([{"reach": 3, "text": 1}])


# ------------------------------------------------------------------ tiles


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_hold_every_query_once_and_every_key_it_sees(name: str, causal: bool) -> None:
    pattern = ordered(PATTERNS[name]) if causal else PATTERNS[name]
    for queries, keys in ((0, 5), (1, 70), (33, 33), (300, 300), (130, 300)):
        for sight in pattern:
            found = tiles.tiles(sight, queries, keys)
            rows = np.concatenate([t.queries for t in found]) if found else np.empty(0)
            assert sorted(rows) == list(range(queries))
            for tile in found:
                seen = np.broadcast_to(
                    visible(sight, tile.queries[:, None] + keys - queries, np.arange(keys)), (len(tile.queries), keys)
                )
                assert set(np.flatnonzero(seen.any(axis=0))) <= set(tile.keys)


def test_work_grows_as_it_should() -> None:
    """A window's with n, that of fixed blocks of sqrt(n) with n * sqrt(n), a full mask's with n²."""

    def growth(make: Any) -> float:
        few, many = (tiles.computed_scores((make(n),), 1, n, n) for n in (4096, 16384))
        return float(np.log(many / few) / np.log(4))

    assert growth(lambda n: replace(WINDOW, reach=128, ordered=True)) == pytest.approx(1.0, abs=0.02)
    root = lambda n: Sight(block=int(n**0.5), period=int(n**0.5), first=0, last=8, ordered=True)  # noqa: E731
    assert growth(root) == pytest.approx(1.5, abs=0.05)
    assert tiles.computed_scores((), 3, 50, 60) == 9000
    assert tiles.computed_scores(ordered((WINDOW,)), 3, 10, 10) == 300  # a mask over all is cheaper than tiles


# ------------------------------------------------------------------ torch


LENGTHS = [(0, 0), (0, 4), (1, 90), (3, 3), (70, 150)]
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "bias": {"bias": True},
    "everything": {"bias": True, "softcap": 1.5, "sinks": True},
}


def made(spec: GroupedQueryAttention, s: int, t: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    g = torch.Generator().manual_seed(7 * s + t)
    q = torch.randn(2, spec.heads, s, spec.head_dim, generator=g)
    k = torch.randn(2, spec.kv_heads, t, spec.head_dim, generator=g)
    v = torch.randn(2, spec.kv_heads, t, spec.value_dim, generator=g)
    bias = torch.randn(2, 1, s, t, generator=g) if spec.bias else None
    sinks = torch.randn(1, spec.heads, 1, 1, generator=g) if spec.sinks else None
    return (q, k, v), {"bias": bias, "sinks": sinks}


def expected(spec: GroupedQueryAttention, operands: tuple[Tensor, ...], more: dict[str, Tensor | None]) -> Tensor:
    given = (None if x is None else x.numpy() for x in (more["bias"], more["sinks"]))
    return torch.from_numpy(reference.grouped_query_attention(spec, *(x.numpy() for x in operands), *given))


def off(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b).abs().max()) if a.numel() else 0.0


@pytest.mark.parametrize("tiled", [False, True], ids=["masked", "tiled"])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", PATTERNS)
def test_torch_is_the_oracle(
    name: str, beside: str, kv_heads: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WORTH", 10.0 if tiled else 0.0)
    for pattern in (PATTERNS[name], ordered(PATTERNS[name])):
        spec = GroupedQueryAttention(
            6, kv_heads, 8, 5, 0.4, pattern=pattern, masked_rows_are_zero=True, **BESIDE[beside]
        )
        for s, t in LENGTHS:
            operands, more = made(spec, s, t)
            ours = torch_body.grouped_query_attention(spec, *operands, more["bias"], sinks=more["sinks"])
            assert off(ours, expected(spec, operands, more)) < CLOSE
        full = expected(replace(spec, pattern=()), operands, more)
        assert off(ours, full) > 1e-2  # the control


@pytest.mark.parametrize("tiled", [False, True], ids=["masked", "tiled"])
def test_padding_beside_a_pattern(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boolean masks too, and queries that are left without a key: zeros, and nothing that spreads."""
    monkeypatch.setattr(tiles, "WORTH", 10.0 if tiled else 0.0)
    spec = GroupedQueryAttention(4, 2, 8, 8, 0.4, pattern=(Sight(reach=5),), masked_rows_are_zero=True, bias=True)
    operands, _ = made(spec, 150, 150)
    keep = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    keep[1, :, :, 120:] = False
    ours = torch_body.grouped_query_attention(spec, *operands, keep)
    assert off(ours, expected(spec, operands, {"bias": keep, "sinks": None})) < CLOSE
    assert bool((ours[1, :, 124:] == 0).all()) and bool((ours[1, :, :120] != 0).any(-1).all())


def test_gradients_of_tiles_are_those_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("window", "fixed", "fixed-by-head"):
        spec = GroupedQueryAttention(4, 2, 8, 8, 0.4, pattern=PATTERNS[name])
        found = []
        for worth in (0.0, 10.0):
            monkeypatch.setattr(tiles, "WORTH", worth)
            leaves = [x.requires_grad_() for x in made(spec, 150, 150)[0]]
            torch_body.grouped_query_attention(spec, *leaves).square().sum().backward()
            found.append([x.grad for x in leaves])
        for a, b in zip(*found, strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiled", [False, True], ids=["masked", "tiled"])
@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_leaks_from_later_tokens(name: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: what comes after a position, and how much of it, changes nothing before it."""
    monkeypatch.setattr(tiles, "WORTH", 10.0 if tiled else 0.0)
    spec = GroupedQueryAttention(4, 2, 8, 8, 0.4, pattern=ordered(PATTERNS[name]))
    (q, k, v), _ = made(spec, 200, 200)
    before = torch_body.grouped_query_attention(spec, q, k, v)
    for x in (q, k, v):
        x[:, :, 140:] += 3.0
    after = torch_body.grouped_query_attention(spec, q, k, v)
    assert torch.equal(before[:, :, :140], after[:, :, :140])
    assert not torch.equal(before[:, :, 140:], after[:, :, 140:])  # the control


@pytest.mark.parametrize("name", PATTERNS)
def test_decoding_is_the_same_computation(name: str) -> None:
    """A prefix of 90 alone, inside 150, and the rest token by token."""
    spec = GroupedQueryAttention(4, 2, 8, 8, 0.4, pattern=ordered(PATTERNS[name]))
    (q, k, v), _ = made(spec, 150, 150)
    whole = torch_body.grouped_query_attention(spec, q, k, v)
    prefix = torch_body.grouped_query_attention(spec, q[:, :, :90], k[:, :, :90], v[:, :, :90])
    assert off(prefix, whole[:, :, :90].double()) < CLOSE
    for n in (90, 97, 149):
        step = torch_body.grouped_query_attention(spec, q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1])
        assert off(step, whole[:, :, n : n + 1].double()) < CLOSE


def test_a_long_window_never_holds_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, q.shape[2] * k.shape[2])
        return sdpa(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    spec = GroupedQueryAttention(2, 1, 4, 4, 0.5, pattern=(Sight(reach=128, sinks=4, ordered=True),))
    torch_body.grouped_query_attention(spec, *made(spec, 4096, 4096)[0])
    assert largest <= 128 * (2 * 128 + 4)
    torch_body.grouped_query_attention(spec, *made(spec, 1, 4096)[0])
    assert largest <= 128 * (2 * 128 + 4)


def test_a_captured_program_takes_any_length() -> None:
    spec = GroupedQueryAttention(4, 2, 8, 8, 0.4, pattern=ordered(PATTERNS["fixed-by-head"]))

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(spec, q, k, v)

    tokens = torch.export.Dim("tokens", min=2, max=512)
    operands = made(spec, 20, 20)[0]
    program = torch.export.export(Attend(), operands, dynamic_shapes=({2: tokens},) * 3, strict=False)
    for length in (20, 7, 150):
        operands = made(spec, length, length)[0]
        none: dict[str, Tensor | None] = {"bias": None, "sinks": None}
        assert off(program.module()(*operands), expected(spec, operands, none)) < CLOSE


# ------------------------------------------------------------------ kernels and files


def test_kernels_of_every_device_take_a_pattern() -> None:
    plain = GroupedQueryAttention(4, 2, 64, 64, 0.125, causal=True)
    sparse = replace(plain, pattern=(Sight(reach=128, ordered=True),))
    devices = {Device(k.device_kind, arch) for k in KERNELS for arch in k.archs}
    for device in devices:
        for dtype in DType:
            assert select(sparse, device, dtype) is not None
    assert all(select(plain, device, DType.FLOAT32) is not None for device in devices)  # the control
    q, k, v = made(sparse, 9, 9)[0]
    with pytest.raises(NotLegal, match="triton kernel"):
        attention(sparse, q, k, v, kernels="triton")


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_function_of_a_file_is_the_oracle(name: str, causal: bool) -> None:
    pattern = ordered(PATTERNS[name]) if causal else PATTERNS[name]
    for beside, opset in zip(BESIDE, (12, 17, 24), strict=True):
        spec = GroupedQueryAttention(
            8, 2, 4, 5, 0.5, causal=causal and opset == 17, pattern=pattern, masked_rows_are_zero=True, **BESIDE[beside]
        )
        for queries, keys in ((1, 1), (1, 30), (30, 30), (7, 30)):
            feeds = onnx_operands(spec, 2, queries, keys, 0)
            found = run_onnx(spec, opset, feeds)
            np.testing.assert_allclose(found, onnx_oracle(spec, feeds), rtol=2e-5, atol=2e-6)
        assert np.abs(found - onnx_oracle(replace(spec, pattern=()), feeds)).max() > 1e-2  # the control


# ------------------------------------------------------------------ tiles in files


def choosing(spec: GroupedQueryAttention, opset: int, names: list[str], *, by_key: bool) -> ort.InferenceSession:
    """A session of one call of the function that chooses."""
    bodies = functions(spec, opset, bias_by_key=by_key)
    assert bodies[0].name == bodies[1].name + ("TiledByKey" if by_key else "Tiled")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    whole = choosing_file(spec, names, 0, opset, by_key=by_key)
    return ort.InferenceSession(whole, options, providers=["CPUExecutionProvider"])


def choosing_file(
    spec: GroupedQueryAttention, names: list[str], number: int, opset: int = 17, *, by_key: bool = False
) -> bytes:
    """A model of one call of the function with this number."""
    bodies = functions(spec, opset, bias_by_key=by_key)
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * 4)) for n in names]
    node = ir.Node(DOMAIN, bodies[number].name, inputs, attributes(spec, ir.DataType.FLOAT), num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * 4)
    graph = ir.Graph(inputs, [output], nodes=[node], name="g", opset_imports={"": opset, DOMAIN: 1})
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=8, functions=bodies))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


TILED_SIZES = [(5, 5), (1, 300), (70, 300), (333, 333)]


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("name", ["window", "fixed", "blocks-alone", "columns-alone"])
def test_a_file_may_compute_by_tiles(name: str, causal: bool) -> None:
    pattern = ordered(PATTERNS[name]) if causal else PATTERNS[name]
    for number, (beside, by_key) in enumerate([("alone", False), ("bias", False), ("everything", True)]):
        opset = (12, 17, 24)[number]
        spec = GroupedQueryAttention(8, 2, 4, 5, 0.5, pattern=pattern, masked_rows_are_zero=True, **BESIDE[beside])
        session: ort.InferenceSession | None = None
        for queries, keys in TILED_SIZES:
            feeds = onnx_operands(spec, 2, queries, keys, 0)
            session = session or choosing(spec, opset, list(feeds), by_key=by_key)
            if by_key:
                feeds["bias"] = np.ascontiguousarray(feeds["bias"][:, :, -1:])
                feeds["bias"][1, ..., -7:] = -np.inf  # padding
            found = session.run(None, feeds)[0]
            np.testing.assert_allclose(found, onnx_oracle(spec, feeds), rtol=2e-5, atol=2e-6)
    assert np.abs(found - onnx_oracle(replace(spec, pattern=()), feeds)).max() > 1e-2  # the control


def test_a_file_counts_what_it_computes() -> None:
    window, fixed = (Sight(reach=128, sinks=4, ordered=True),), ordered((FIXED,))
    assert computed_scores(window, 2, 1024, 1024) == 2 * 8 * 128 * (255 + 4)
    assert computed_scores((replace(window[0], ordered=False),), 1, 1024, 1024) == 8 * 128 * (382 + 4) + 4 * 1024
    assert computed_scores(fixed, 1, 8, 80) == 8 * (8 + 20)
    assert computed_scores(window, 2, 60, 60) == computed_scores(PATTERNS["strided"], 2, 60, 60) == 2 * 60 * 60


def test_a_long_file_never_holds_all_scores() -> None:
    """The control is the function with the mask, of which the same trace shows all of them."""
    spec = GroupedQueryAttention(1, 1, 4, 4, 0.5, pattern=(Sight(reach=64, sinks=4),))
    feeds = onnx_operands(spec, 1, 1024, 1024, 0)
    largest = []
    for number in (0, 1):
        options = ort.SessionOptions()
        options.enable_profiling, options.log_severity_level = True, 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = f"{folder}/trace"
            session = ort.InferenceSession(choosing_file(spec, list(feeds), number), options)
            session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        shapes = [t for e in events for s in e.get("args", {}).get("output_type_shape", []) for t in s.values()]
        largest.append(max(int(np.prod(shape)) for shape in shapes if shape))
    assert largest[0] < 1024 * 1024 // 2 and largest[1] >= 1024 * 1024
