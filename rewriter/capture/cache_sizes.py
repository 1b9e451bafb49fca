"""How large the cache of a fused attention is, where the input that holds it does not say so."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.capture.onnx_constants import constant_tensor
from rewriter.capture.quantised import quantised_product
from rewriter.onnx_nodes import input_at

# shapes: a cache is [B, heads, P, D]

CACHE_SLOTS = {
    "Attention": (4, 5),
    "GroupQueryAttention": (3, 4),
    "MultiHeadAttention": (6, 7),
    "DecoderMaskedMultiHeadAttention": (5, 6),
}
"""Inputs of fused operators that hold caches."""

_SAME_WIDTH = frozenset(
    {"MatMul", "Add", "Cast", "Identity", "DequantizeLinear", "RotaryEmbedding", "SimplifiedLayerNormalization"}
)
"""Operators whose result's last axis is that of an operand: of the second for products and sums."""


CacheSize = tuple[int | None, int | None, int | None]
"""(heads, tokens, features) of a cache; None for what is open."""


def cache_size(node: ir.Node, inputs: Sequence[ir.Value | None], slot: int) -> CacheSize:
    """The size of the cache at input `slot` of a fused operator, as far as the operator and its inputs tell."""
    heads, features = _heads_and_features(node, inputs, slot)
    slides = node.attributes.get_int("sliding_window_cache", 0)  # a buffer that holds the window, full or not
    return heads, count(node, "local_window_size") if slides else None, features


def _heads_and_features(node: ir.Node, inputs: Sequence[ir.Value | None], slot: int) -> tuple[int | None, int | None]:
    heads, kv_heads = (count(node, *names) for names in (("num_heads", "q_num_heads"), ("kv_num_heads", "num_heads")))
    query, key, value = (inputs[i] if i < len(inputs) else None for i in range(3))
    if heads is None or kv_heads is None:
        return None, None
    if node.op_type == "GroupQueryAttention" and key is None:
        return kv_heads, _part(query, heads + 2 * kv_heads)
    is_value = slot == CACHE_SLOTS[node.op_type][1]
    if is_value and value is not None:
        return kv_heads, _part(value, kv_heads)
    return kv_heads, _part(key, kv_heads) or _part(query, heads)


def count(node: ir.Node, *names: str) -> int | None:
    """The first of these attributes that is there, if it is a number of at least one."""
    held = next((node.attributes[n] for n in names if n in node.attributes), None)
    return held.as_int() if held is not None and held.type == ir.AttributeType.INT and held.as_int() > 0 else None


def _part(value: ir.Value | None, parts: int) -> int | None:
    """Size of one of `parts` equal pieces of the last axis of [B, S, width]."""
    width = None if value is None or _rank(value) not in (None, 3) else _width(value)
    return width // parts if width is not None and width % parts == 0 else None


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _width(value: ir.Value | None) -> int | None:
    """Size of the last axis, declared or told by the matrix that makes it."""
    for _ in range(8):
        if value is None:
            return None
        if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
            return int(value.shape[-1])
        node = value.producer()
        if node is None:
            return None
        product = quantised_product(node)
        if product is not None:
            return product.shape[1]
        if node.op_type in {"Reshape", "Split"}:
            return _laid_out(node, value)
        if node.op_type not in _SAME_WIDTH:
            return None
        value = input_at(node, 1 if node.op_type in {"MatMul", "Add"} else 0)
    return None


def _laid_out(node: ir.Node, value: ir.Value) -> int | None:
    """Size of the last axis that a Reshape or Split with constant sizes gives."""
    given = input_at(node, 1)
    sizes = None if given is None else constant_tensor(given)
    if sizes is None:
        return None
    split = node.op_type == "Split"
    size = int(sizes.numpy().reshape(-1)[list(node.outputs).index(value) if split else -1])
    if split and node.attributes.get_int("axis", 0) not in {-1, 2}:
        return None
    return size if size > 0 else None
