"""Rows of `benchmarks.gpu` for files: onnxruntime's CUDA provider with the library of kernels, beside the functions
that a rewritten file carries and beside onnxruntime's own operator.

Times are of whole calls on operands that lie on the card, on the wall: onnxruntime ends a call when its stream is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.kernels import Case
from codegen.device import Device, DType
from codegen.launch.ort_op import build
from codegen.launch.torch_op import graphics_card
from codegen.ops.grouped_query_attention.onnx_body import DOMAIN, attributes
from codegen.ops.grouped_query_attention.onnx_tiles import functions
from codegen.registry import select
from codegen.spec import GroupedQueryAttention

HALF, OPSET, CHECKED = "float16", 18, 64

Call = Callable[[], None]


def cases(*, quick: bool) -> list[Case]:
    small = 16 if quick else 1
    decode = Case("decode", 32 // small, 32, 8, 128, 8192, HALF)
    return [decode, *(Case("prefill", 1, 32, 8, 128, keys, HALF) for keys in ((2048,) if quick else (4096, 8192)))]


def works(case: Case) -> tuple[dict[str, Call], float]:
    """Calls by name, ours first, and the error of ours relative to the largest output in double precision."""
    spec = case.spec
    device = graphics_card(torch.device("cuda"))[0]
    choice = select(spec, Device("cuda", device.arch), DType.FLOAT16)
    assert choice is not None
    random = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        shape = (case.batch, heads, tokens, case.dim)
        return torch.randn(shape, device="cuda", dtype=torch.float16, generator=random)

    x = {"q": draw(case.heads, case.queries), "k": draw(case.kv_heads, case.keys), "v": draw(case.kv_heads, case.keys)}
    out = torch.empty_like(x["q"])
    model = _function_model(spec)
    found = {"ours": _bound(model, x, {"y": out}, str(build([choice]).path))}
    found["ours"]()
    peers: dict[str, Callable[[], Call]] = {
        "onnxruntime, the file's function": lambda: _bound(model, x, {"y": torch.empty_like(out)}),
        "onnxruntime, GroupQueryAttention": lambda: _own_operator(case, x),
    }
    for name, made in peers.items():
        try:
            call = made()
            call()
        except Exception as error:  # onnxruntime's errors share no public base class
            print(f"  {name} does not take it: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            found[name] = call
    rows = slice(max(0, case.queries - CHECKED), case.queries)
    group = case.heads // case.kv_heads
    k, v = (x[n].double().repeat_interleave(group, 1) for n in "kv")
    seen = None
    if spec.causal:
        places = torch.arange(case.keys, device="cuda")
        seen = places <= torch.arange(case.queries, device="cuda")[rows, None] + case.keys - case.queries
    right = sdpa(x["q"][:, :, rows].double(), k, v, seen, scale=spec.scale)
    return found, float((out[:, :, rows].double() - right).abs().max() / right.abs().max())


def times(calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each call, by turns, after three that do not count."""
    for call in calls.values():
        for _ in range(3):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def _function_model(spec: GroupedQueryAttention) -> bytes:
    made = functions(spec, OPSET)
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([None] * 4)) for n in "qkv"]
    node = ir.Node(DOMAIN, made[0].name, inputs, attributes(spec, ir.DataType.FLOAT16), num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT16)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], name="g", opset_imports={"": OPSET, DOMAIN: 1})
    model = ir.Model(graph, ir_version=10, functions=made)
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _own_operator(case: Case, x: Mapping[str, Tensor]) -> Call:
    """onnxruntime's operator, its caches in place: a decode step writes its token into the buffer that it reads."""
    b, s, t = case.batch, case.queries, case.keys
    names = ["query", "key", "value", "past_key", "past_value", "lengths", "total"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "present_key", "present_value"], domain="com.microsoft",
        num_heads=case.heads, kv_num_heads=case.kv_heads, scale=case.spec.scale,
    )  # fmt: skip
    half, whole = TensorProto.FLOAT16, TensorProto.INT32
    past = ["b", case.kv_heads, "p", case.dim]
    kinds = {"query": (half, ["b", "s", case.heads * case.dim])}
    kinds |= {n: (half, ["b", "s", case.kv_heads * case.dim]) for n in ("key", "value")}
    kinds |= {n: (half, past) for n in ("past_key", "past_value")}
    kinds |= {"lengths": (whole, ["b"]), "total": (whole, [])}
    outputs = {
        "y": kinds["query"],
        **{n: (half, ["b", case.kv_heads, "t", case.dim]) for n in ("present_key", "present_value")},
    }
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, *k) for n, k in kinds.items()],
        [helper.make_tensor_value_info(n, *k) for n, k in outputs.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def rows(heads: Tensor) -> Tensor:
        return heads[:, :, -s:].transpose(1, 2).reshape(b, s, -1).contiguous()

    caches = {n: x[n[0]].clone() for n in ("key", "value")}
    feeds = {"query": rows(x["q"]), "key": rows(x["k"]), "value": rows(x["v"])}
    feeds |= {f"past_{n}": c for n, c in caches.items()}
    feeds["lengths"] = torch.full((b,), t - 1, dtype=torch.int32, device="cuda")
    given = {"y": torch.empty_like(feeds["query"]), **{f"present_{n}": c for n, c in caches.items()}}
    return _bound(model, feeds, given, numbers={"total": np.array(t, np.int32)})


def _bound(
    model: bytes,
    feeds: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    library: str | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> Call:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(model, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("onnxruntime could not start its CUDA provider")
    binding = session.io_binding()
    kinds = {torch.float16: np.float16, torch.int32: np.int32}
    for name, x in feeds.items():
        binding.bind_input(name, "cuda", 0, kinds[x.dtype], tuple(x.shape), x.data_ptr())
    for name, number in (numbers or {}).items():
        binding.bind_cpu_input(name, number)
    for name, x in outputs.items():
        binding.bind_output(name, "cuda", 0, kinds[x.dtype], tuple(x.shape), x.data_ptr())
    held = (dict(feeds), dict(outputs))  # their memory is what the binding knows

    def call() -> None:
        assert held
        session.run_with_iobinding(binding)

    return call
