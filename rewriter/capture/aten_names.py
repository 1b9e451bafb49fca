"""aten operators under their canonical (ONNX-style) names: one table and the few argument shuffles it needs."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node as FxNode

_NAMES: Mapping[str, str] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias"),
        "Reshape",
    ),
    **dict.fromkeys(
        ("permute", "transpose", "t", "swapaxes", "movedim", "numpy_T", "mT", "matrix_H", "swapdims", "moveaxis"),
        "Transpose",
    ),
    **dict.fromkeys(("slice", "narrow"), "Slice"),
    **dict.fromkeys(("select", "index", "index_select", "embedding", "gather", "take_along_dim"), "Gather"),
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split", "unsafe_chunk"), "Split"
    ),
    **dict.fromkeys(("squeeze",), "Squeeze"),
    **dict.fromkeys(("unsqueeze",), "Unsqueeze"),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "unfold"), "Expand"),
    **dict.fromkeys(("cat", "concat", "stack", "hstack", "vstack"), "Concat"),
    **dict.fromkeys(("pad", "constant_pad_nd"), "Pad"),
    **dict.fromkeys(("tril", "triu"), "Trilu"),
    "roll": "Roll",
    "flip": "Slice",
    **dict.fromkeys(
        ("contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "positive"), "Identity"
    ),
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "native_dropout"), "Dropout"),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "half", "bfloat16"), "Cast"),
    "slice_scatter": "SliceScatter",
    "select_scatter": "SelectScatter",
    "where": "Where",
    "masked_fill": "MaskedFill",
    "add": "Add",
    "sub": "Sub",
    "subtract": "Sub",
    "rsub": "Sub",
    "mul": "Mul",
    "multiply": "Mul",
    "div": "Div",
    "true_divide": "Div",
    "divide": "Div",
    "neg": "Neg",
    "linear": "Linear",
    "addmm": "Gemm",
    **dict.fromkeys(("matmul", "bmm", "mm", "__matmul__"), "MatMul"),
    "baddbmm": "Baddbmm",
    "einsum": "Einsum",
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "Conv"),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), "Softmax"),
    **dict.fromkeys(("log_softmax", "_log_softmax"), "LogSoftmax"),
    "scaled_dot_product_attention": "Attention",
    **dict.fromkeys(("layer_norm", "native_layer_norm"), "LayerNormalization"),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), "RMSNormalization"),
    **dict.fromkeys(
        ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
        "BatchNormalization",
    ),
    "tanh": "Tanh",
    "exp": "Exp",
    "sum": "ReduceSum",
    "logsumexp": "ReduceLogSumExp",
    "clamp": "Clip",
    "view_as_complex": "ViewAsComplex",
    "view_as_real": "ViewAsReal",
    "max": "Max",
    "maximum": "Max",
    "clamp_min": "Max",
    "isnan": "IsNaN",
    "sym_size": "Shape",
}


_SHAPE_ONLY = frozenset(
    {
        *("zeros_like", "ones_like", "full_like", "empty_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
    }
)
"""Operators that read no element of their arguments."""


@dataclass(frozen=True)
class Literal:
    """A Python number among an operator's arguments, at this position."""

    position: int
    number: float


@dataclass(frozen=True)
class CanonicalOp:
    """A canonical name, its attributes, and what feeds it, in canonical order."""

    name: str
    attrs: Mapping[str, Any]
    operands: tuple[FxNode | Literal, ...]


def canonical(fx: FxNode, env: Mapping[str, Any]) -> CanonicalOp:
    """Name the call of an fx node. Operators outside the table keep their own name as ``aten.<name>``."""
    schema = getattr(fx.target, "_schema", None)
    raw = schema.name.split("::")[-1] if schema is not None else getattr(fx.target, "__name__", str(fx.target))
    base = raw if raw in _NAMES else raw.removesuffix("_")
    name = _NAMES.get(base, f"aten.{base}")
    operands: tuple[FxNode | Literal, ...] = tuple(fx.all_input_nodes)
    attrs: dict[str, Any] = {}
    if name == "Gemm":
        bias, x, w = fx.args[:3]
        operands = tuple(a for a in (x, w, bias) if isinstance(a, FxNode))
    elif name in {"Softmax", "LogSoftmax"}:
        attrs["axis"] = _argument(fx, "dim", 1)
    elif name == "Attention":
        return _attention(fx, env)
    elif name == "Einsum":
        attrs["equation"] = fx.args[0]
    elif base == "tensordot":
        name = "Einsum"
        attrs["equation"] = _tensordot(fx, env)
    elif name in {"Add", "Sub"} and fx.kwargs.get("alpha", 1) != 1:
        name = f"aten.{base}_alpha"
    elif base == "rsub":  # the other way round: the second argument minus the first
        operands = tuple(_operand(i, a, env) for i, a in reversed(tuple(enumerate(fx.args))))
    elif name == "Div" and fx.kwargs.get("rounding_mode"):
        name = "aten.div_round"
    elif name in {"Add", "Sub", "Mul", "Div", "MaskedFill", "Where"} or base in {"maximum", "clamp_min"}:
        operands = tuple(_operand(i, a, env) for i, a in enumerate(fx.args))
    elif name == "Clip":
        bounds = {"min": _argument(fx, "min", 1), "max": _argument(fx, "max", 2)}
        attrs.update({side: float(b) for side, b in bounds.items() if isinstance(b, (int, float))})
    elif name == "Baddbmm":
        attrs.update({"alpha": float(fx.kwargs.get("alpha", 1)), "beta": float(fx.kwargs.get("beta", 1))})  # type: ignore[arg-type]
    elif raw.endswith("_as"):  # only the shape or dtype of the second argument is read
        operands = operands[:1]
    elif raw in _SHAPE_ONLY:
        operands = ()
    elif raw == "copy":  # the second argument in the first one's shape and dtype
        held = [env[a.name] for a in fx.args[:2] if isinstance(a, FxNode)]
        operands = operands[-1:]
        name = "Cast" if len(held) == 2 and held[0].shape == held[1].shape else "Expand"
    if raw.endswith("_") and raw not in _NAMES and base == "copy":
        name = "aten.copy_"
    return CanonicalOp(name, attrs, operands)


def _tensordot(fx: FxNode, env: Mapping[str, Any]) -> str:
    """The equation of tensordot(a, b, dims of a, dims of b): the other axes of a, then those of b."""
    a, b, dims, others = fx.args[:4]
    assert isinstance(a, FxNode) and isinstance(b, FxNode)
    first = list(string.ascii_lowercase[: env[a.name].dim()])
    second = list(string.ascii_uppercase[: env[b.name].dim()])
    summed = []
    for mine, theirs in zip(dims, others, strict=True):  # type: ignore[arg-type]
        second[theirs] = first[mine]
        summed.append(first[mine])
    rest = [c for c in (*first, *second) if c not in summed]
    return f"{''.join(first)},{''.join(second)}->{''.join(rest)}"


def _operand(position: int, argument: Any, env: Mapping[str, Any]) -> FxNode | Literal:
    if isinstance(argument, FxNode):
        held = env[argument.name]
        return argument if isinstance(held, torch.Tensor) else Literal(position, float(held))
    return Literal(position, float(argument))


def _attention(fx: FxNode, env: Mapping[str, Any]) -> CanonicalOp:
    """scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)."""
    query, key, value = fx.args[:3]
    mask = _argument(fx, "attn_mask", 3)
    operands = [a for a in (query, key, value, mask) if isinstance(a, FxNode)]
    assert isinstance(query, FxNode)
    dim = env[query.name].shape[-1]
    scale = fx.kwargs.get("scale")
    attrs = {
        "scale": float(scale) if isinstance(scale, (int, float)) else dim**-0.5,
        "is_causal": int(bool(_argument(fx, "is_causal", 5))),
        "bool_mask": isinstance(mask, FxNode) and env[mask.name].dtype == torch.bool,
    }
    return CanonicalOp("Attention", attrs, tuple(operands))


def _argument(fx: FxNode, name: str, position: int) -> Any:
    if name in fx.kwargs:
        return fx.kwargs[name]
    return fx.args[position] if len(fx.args) > position else None
