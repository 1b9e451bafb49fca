"""One grouped attention as aten nodes: the fused operator, or written out where there is a softcap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node as FxNode

from codegen.spec import GroupedQueryAttention
from passes.dataflow import Value
from passes.site import AttentionSite, Modifier
from rewriter.capture.torch_export import GraphView
from rewriter.install.fx_emit import Emitter, aten

MASKS = ("bias", "mask", "unmask")


@dataclass(frozen=True)
class Mask:
    """What is added to the scores, or, if `boolean`, which scores are kept."""

    node: FxNode
    boolean: bool


def attention(
    emitter: Emitter, like: FxNode, spec: GroupedQueryAttention, q: FxNode, k: FxNode, v: FxNode, mask: Mask | None
) -> FxNode:
    """[B, heads, S, value_dim] of q [B, heads, S, head_dim], k [B, kv_heads, T, head_dim], v likewise."""
    if spec.softcap is not None:
        return _written_out(emitter, like, spec, q, k, v, mask)
    return emitter.call(
        like,
        aten.scaled_dot_product_attention.default,
        q,
        k,
        v,
        None if mask is None else mask.node,
        0.0,
        spec.causal,
        scale=spec.scale,
        enable_gqa=spec.group > 1,
    )


def _written_out(
    emitter: Emitter, like: FxNode, spec: GroupedQueryAttention, q: FxNode, k: FxNode, v: FxNode, mask: Mask | None
) -> FxNode:
    """The query heads of a group become rows of one longer query, so that K and V are never repeated."""

    def op(target: Any, *arguments: Any) -> FxNode:
        return emitter.call(like, target, *arguments)

    def fold(x: FxNode) -> FxNode:
        return op(aten.flatten.using_ints, op(aten.unflatten.int, x, 1, [spec.kv_heads, spec.group]), 2, 3)

    def unfold(x: FxNode) -> FxNode:
        return op(aten.flatten.using_ints, op(aten.unflatten.int, x, 2, [spec.group, -1]), 1, 2)

    assert spec.softcap is not None
    scores = op(aten.to.dtype, op(aten.matmul.default, fold(q), op(aten.transpose.int, k, -2, -1)), torch.float32)
    capped = op(aten.tanh.default, op(aten.mul.Tensor, scores, spec.scale / spec.softcap))
    scores = unfold(op(aten.mul.Tensor, capped, spec.softcap))
    if mask is not None:
        bias = op(aten.where.Scalar, mask.node, 0.0, -float("inf")) if mask.boolean else mask.node
        scores = op(aten.add.Tensor, scores, bias)
    weights = op(aten.softmax.int, scores, -1)
    if spec.pattern:  # it may leave a padded query padding alone
        weights = op(aten.nan_to_num.default, weights, 0.0)
    weights = op(aten.type_as.default, weights, v)
    return unfold(op(aten.matmul.default, fold(weights), v))


def mask_of(
    emitter: Emitter, like: FxNode, site: AttentionSite, view: GraphView, node: Callable[[Value], FxNode]
) -> Mask | None:
    """All masks and biases of a site as one: boolean where every one of them hides completely, else added up."""
    parts = [m for m in site.modifiers if m.kind in MASKS]
    boolean = all(m.number == -np.inf and _dtype(view, m) == torch.bool and m.kind != "bias" for m in parts)
    total: FxNode | None = None
    for modifier in parts:
        assert modifier.value is not None
        value = node(modifier.value)
        part = _kept(emitter, like, modifier, value) if boolean else _added(emitter, like, site, modifier, value, view)
        shape = view.flow.shape(modifier.value)
        if modifier.apart is None:
            part = _by_head(emitter, like, part, shape, site.heads)
        else:
            part = _joined(emitter, like, part, shape, modifier.apart)
        joined = aten.logical_and.default if boolean else aten.add.Tensor
        total = part if total is None else emitter.call(like, joined, total, part)
    return None if total is None else Mask(total, boolean)


def _dtype(view: GraphView, modifier: Modifier) -> torch.dtype:
    assert modifier.value is not None
    return view.tensors[modifier.value].dtype


def _kept(emitter: Emitter, like: FxNode, modifier: Modifier, value: FxNode) -> FxNode:
    return value if modifier.kind == "mask" else emitter.call(like, aten.logical_not.default, value)


def _added(
    emitter: Emitter, like: FxNode, site: AttentionSite, modifier: Modifier, value: FxNode, view: GraphView
) -> FxNode:
    """A modifier as numbers to add, in a dtype that the fused operator takes beside the operands'."""
    assert modifier.number is not None
    dtype = _dtype(view, modifier)
    if modifier.kind == "bias":
        if modifier.number != 1.0:
            value = emitter.call(like, aten.mul.Tensor, value, modifier.number)
    else:
        low = float(torch.finfo(torch.float32).min)
        fill = modifier.number if np.isinf(modifier.number) else max(modifier.number, low)
        if dtype != torch.bool:
            value = emitter.call(like, aten.to.dtype, value, torch.bool)
        pair = (0.0, fill) if modifier.kind == "mask" else (fill, 0.0)
        value, dtype = emitter.call(like, aten.where.Scalar, value, *pair), torch.float32
    wanted = view.tensors[site.output].dtype
    if dtype == wanted or (dtype == torch.float32 and wanted in (torch.float16, torch.bfloat16)):
        return value
    return emitter.call(like, aten.to.dtype, value, wanted)


def _by_head(emitter: Emitter, like: FxNode, part: FxNode, shape: tuple[int, ...], heads: int) -> FxNode:
    """Broadcastable to [B, heads, S, T], also what is written over a fused batch-head axis."""
    if len(shape) == 3 and shape[0] != 1:
        return emitter.call(like, aten.unflatten.int, part, 0, [-1, heads])
    for _ in range(2 - len(shape)):
        part = emitter.call(like, aten.unsqueeze.default, part, 0)
    return part


def _joined(emitter: Emitter, like: FxNode, part: FxNode, shape: tuple[int, ...], apart: tuple[int, int]) -> FxNode:
    """What broadcasts to [B, KV, G, S, T], as what broadcasts to [B, KV * G, S, T]; `apart` is (KV, G)."""
    for _ in range(5 - len(shape)):
        part = emitter.call(like, aten.unsqueeze.default, part, 0)
    by_head = (1, 1, 1, *shape)[-4:-2] != (1, 1)
    if by_head:
        part = emitter.call(like, aten.expand.default, part, [-1, *apart, -1, -1])
    return emitter.call(like, aten.flatten.using_ints, part, 1, 2)
