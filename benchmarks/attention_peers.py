"""What grouped-query attention is timed against: torch's scaled_dot_product_attention and onnxruntime's operators.

Shape legend: B batch, H query heads, KV key/value heads, S queries, T keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

Call = Callable[[], Any]


def decode_peers(q: Tensor, k: Tensor, v: Tensor, threads: int) -> Mapping[str, Call]:
    """Of one query per sequence, without a mask: q [B, H, 1, D], k and v [B, KV, T, D]."""
    group = q.shape[1] // k.shape[1]
    rows = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
    peers: dict[str, Call] = {"torch sdpa, group packed into rows": lambda: sdpa(rows, k, v)}
    if group == 1:
        peers = {"torch sdpa": lambda: sdpa(q, k, v)}
    else:
        peers["torch sdpa, enable_gqa"] = lambda: sdpa(q, k, v, enable_gqa=True)
    if q.dtype == torch.float32:
        peers["onnxruntime Attention"] = _attention(q, k, v, threads, causal=False)
        peers["onnxruntime com.microsoft.GroupQueryAttention"] = _group_query(q, k, v, threads)
    return peers


def prefill_peers(q: Tensor, k: Tensor, v: Tensor, threads: int) -> Mapping[str, Call]:
    """Causal, as many queries as keys: q [B, H, T, D], k and v [B, KV, T, D]."""
    gqa = q.shape[1] != k.shape[1]
    peers: dict[str, Call] = {"torch sdpa": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=gqa)}
    if q.dtype == torch.float32:
        peers["onnxruntime Attention"] = _attention(q, k, v, threads, causal=True)
        if not gqa:
            peers["onnxruntime com.microsoft.MultiHeadAttention"] = _multi_head(q, k, v, threads)
    return peers


def _session(nodes: list[Any], inputs: Mapping[str, tuple[int, list[int]]], outputs: list[str], threads: int) -> Any:
    import onnxruntime as ort

    graph = helper.make_graph(
        nodes,
        "peer",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(session: Any, feeds: Mapping[str, Any], outputs: Mapping[str, Any | None]) -> Call:
    """Runs on memory that stays where it is; outputs without a place of their own are allocated by onnxruntime."""
    import onnxruntime as ort

    binding = session.io_binding()
    held = {n: x if isinstance(x, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(x) for n, x in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name, place in outputs.items():
        if place is None:
            binding.bind_output(name, "cpu")
        else:
            binding.bind_ortvalue_output(name, place)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    return run


def _shapes(**arrays: Any) -> dict[str, tuple[int, list[int]]]:
    return {name: (onnx.helper.np_dtype_to_tensor_dtype(a.dtype), list(a.shape)) for name, a in arrays.items()}


def _attention(q: Tensor, k: Tensor, v: Tensor, threads: int, *, causal: bool) -> Call:
    feeds = {"q": q.contiguous().numpy(), "k": k.contiguous().numpy(), "v": v.contiguous().numpy()}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(causal))
    return _bound(_session([node], _shapes(**feeds), ["y"], threads), feeds, {"y": None})


def _multi_head(q: Tensor, k: Tensor, v: Tensor, threads: int) -> Call:
    feeds = {n: x.transpose(1, 2).flatten(2).contiguous().numpy() for n, x in (("q", q), ("k", k), ("v", v))}
    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=q.shape[1], unidirectional=1
    )
    return _bound(_session([node], _shapes(**feeds), ["y"], threads), feeds, {"y": None})


def _group_query(q: Tensor, k: Tensor, v: Tensor, threads: int) -> Call:
    """Past and present in one buffer, which is how it is fastest; the last key is the new one."""
    import onnxruntime as ort

    batch, kv_heads, keys, _ = k.shape
    feeds: dict[str, Any] = {
        "q": q.transpose(1, 2).flatten(2).contiguous().numpy(),
        "k": k[:, :, -1:].transpose(1, 2).flatten(2).contiguous().numpy(),
        "v": v[:, :, -1:].transpose(1, 2).flatten(2).contiguous().numpy(),
        "past_k": k.contiguous().numpy(),
        "past_v": v.contiguous().numpy(),
        "last": np.full(batch, keys - 1, np.int32),
        "total": np.array([keys], np.int32),
    }
    node = helper.make_node(
        "GroupQueryAttention", list(feeds), ["y", "new_k", "new_v"], domain="com.microsoft",
        num_heads=q.shape[1], kv_num_heads=kv_heads,
    )  # fmt: skip
    session = _session([node], _shapes(**feeds), ["y", "new_k", "new_v"], threads)
    feeds["past_k"], feeds["past_v"] = (ort.OrtValue.ortvalue_from_numpy(feeds[n]) for n in ("past_k", "past_v"))
    return _bound(session, feeds, {"y": None, "new_k": feeds["past_k"], "new_v": feeds["past_v"]})


def as_heads(found: Any, like: Tensor) -> Tensor:
    """A peer's answer [B, H, S, D] whatever it is laid out as."""
    tensor = found if isinstance(found, Tensor) else torch.from_numpy(found.numpy())
    if tensor.dim() == 3:
        tensor = tensor.unflatten(2, (like.shape[1], -1)).transpose(1, 2)
    return tensor.reshape(like.shape)
