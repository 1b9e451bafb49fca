"""Rows of `benchmarks.kernels` for linear attention: the C++ kernel beside the torch body and onnxruntime's operator.

com.microsoft.LinearAttention (update_rule "linear") is the causal sum ``scale * q_t^T S_t`` with ``S_t = S_(t-1) + k_t
v_t``, over what it is given as queries and keys: here the same features, and values with a one behind them for the
divisor. It is the far term of our op alone, for all keys: near keys by softmax, features and division come on top of
that in ours, and not in its time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks.rows import Clock, Row, Times, interleaved, timed
from codegen.launch.linear_host import launch
from codegen.ops.linear_attention import reference, torch_body
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention

Call = Callable[[], Tensor]

LIMIT = 2e-6
OPERATOR = "com.microsoft.LinearAttention"


@dataclass(frozen=True)
class Case:
    """One problem: 12 heads of 64 features on as many of keys and values; chunks of 64."""

    tokens: int
    features: FeatureMap = FeatureMap.ELU1
    causal: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def spec(self) -> LinearAttention:
        heads = GroupedQueryAttention(12, 12, 64, 64, 0.125, causal=self.causal, masked_rows_are_zero=True)
        return LinearAttention(heads, 64, self.features)

    @property
    def goal(self) -> float | None:
        return 1.3 if self.causal and self.dtype == torch.float32 else None

    def __str__(self) -> str:
        order, dtype = "causal" if self.causal else "symmetric", str(self.dtype).removeprefix("torch.")
        return f"linear attention, {self.features.value} features, {order}, {self.tokens} tokens, {dtype}"


def cases(*, quick: bool) -> list[Case]:
    both = (FeatureMap.ELU1, FeatureMap.LEARNED)
    if quick:
        return [Case(2048, features) for features in both]
    found = [Case(tokens, features) for features in both for tokens in (256, 1024, 4096, 8192)]
    found += [Case(2048, features, causal=False) for features in both]
    return found + [Case(2048, features, dtype=torch.bfloat16) for features in both]


def run_case(case: Case, runs: int, threads: int, clock: Clock) -> list[Row]:
    """Rows of one case: beside each peer, and the error of a shorter sequence beside double precision."""
    spec, random = case.spec, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, case.tokens, 64, generator=random).to(case.dtype) for _ in range(3))
    parameters = {name: torch.randn(shape, generator=random) / 8 for name, shape in spec.shapes.items()}

    def ours() -> Tensor:
        return launch(spec, q, k, v, parameters)

    peers: dict[str, Call] = {"torch body": lambda: torch_body.linear_attention(spec, q, k, v, parameters)}
    if case.causal and case.dtype == torch.float32:
        peers[OPERATOR] = _operator(spec, q, k, v, parameters, threads)
    parts = [x[:, :, : min(case.tokens, 512)] for x in (q, k, v)]
    wide = {name: p.double().numpy() for name, p in parameters.items()}
    right = torch.from_numpy(reference.linear_attention(spec, *(x.double().numpy() for x in parts), wide))
    error = float((launch(spec, *parts, parameters).double() - right).abs().max() / right.abs().max())
    timed(ours, 2, clock)
    names = ["ours", *peers]
    times = dict(zip(names, interleaved(runs, ours, *peers.values(), clock=clock), strict=True))
    return _rows(case, times, error)


def _operator(
    spec: LinearAttention, q: Tensor, k: Tensor, v: Tensor, parameters: Mapping[str, Tensor], threads: int
) -> Call:
    """onnxruntime's operator on features that were worked out before."""
    wide = {name: p.double().numpy() for name, p in parameters.items()}
    features = [
        reference.features(spec, x.double().numpy(), wide, own) for x, own in ((q, "query_map"), (k, "key_map"))
    ]
    values = np.concatenate([v.numpy(), np.ones((*v.shape[:3], 1), np.float32)], axis=-1)
    packed = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).astype(np.float32) for x in (*features, values)]
    feeds = {name: x.reshape(*x.shape[:2], -1) for name, x in zip("qkv", packed, strict=True)}
    heads = spec.attention
    node = onnx.helper.make_node(
        "LinearAttention", ["q", "k", "v"], ["y", "state"], domain="com.microsoft", q_num_heads=heads.heads,
        kv_num_heads=heads.kv_heads, update_rule="linear", scale=1.0,
    )  # fmt: skip
    values_of = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("q", "k", "v", "y")]
    graph = onnx.helper.make_graph([node], "g", values_of[:3], values_of[3:])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(np.asarray(session.run(["y"], feeds)[0]))


def _rows(case: Case, times: Mapping[str, Times], error: float) -> list[Row]:
    mine, peers = times["ours"], {name: t for name, t in times.items() if name != "ours"}
    best = min(peers, key=lambda name: peers[name].minimum)
    rows = []
    for name, t in peers.items():
        ratio, goal = t.minimum / mine.minimum, case.goal if name == OPERATOR else None
        more = {"kind": "linear", "error": error, "ours_median": mine.median * 1e3, "peer_median": t.median * 1e3}
        more |= {"best_peer": name == best}
        ok = None if goal is None else ratio >= goal
        rows.append(Row("time", str(case), mine.minimum * 1e3, t.minimum * 1e3, name, "ms", ratio, goal, ok, more))
    if case.dtype == torch.float32:
        unit, ratio = "of the largest output", LIMIT / max(error, 1e-30)
        rows.append(Row("error", str(case), error, LIMIT, "limit", unit, ratio, 1.0, error <= LIMIT, {}))
    return rows
