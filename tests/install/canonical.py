"""Canonical q/k/v parameters of known attention modules, extracted by hand: what matching supplies in the product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from codegen.spec import GroupedQueryAttention
from passes.weights.pooling import mean_pool
from rewriter.install.call_record import record_calls
from rewriter.install.mixer import MixerParameters, RewrittenMixer
from rewriter.install.torch_module import install

Layer = tuple[Tensor, Tensor | None]

SEPARATE = {  # q, k, v, output projection by attribute name
    ("query", "key", "value"): None,
    ("q_lin", "k_lin", "v_lin"): "out_lin",
    ("q", "k", "v"): "o",
}


@dataclass(frozen=True)
class Attention:
    """One attention module taken apart."""

    spec: GroupedQueryAttention
    parameters: MixerParameters
    names: Mapping[str, str | None] = field(default_factory=dict)


def owners(model: nn.Module, heads: int) -> list[str]:
    """Paths of the attention modules that `take_apart` knows."""
    return [name for name, module in model.named_modules() if name and _layers(module, heads) is not None]


def take_apart(module: nn.Module, heads: int, *, causal: bool) -> Attention:
    """Spec, parameters (views of the module's own) and the names of what is taken over, for `heads` query heads."""
    found = _layers(module, heads)
    assert found is not None
    (q, k, v), out = found
    dim = q[0].shape[0] // heads
    config: Any = getattr(module, "config", None)
    scale = getattr(module, "scaling", dim**-0.5)
    spec = GroupedQueryAttention(
        heads=heads,
        kv_heads=k[0].shape[0] // dim,
        head_dim=dim,
        value_dim=v[0].shape[0] * dim // k[0].shape[0],
        scale=float(scale),
        causal=causal,
        softcap=getattr(config, "attn_logit_softcapping", None),
    )
    names = {"out": out, **{norm: norm for norm in ("q_norm", "k_norm") if hasattr(module, norm)}}
    return Attention(spec, MixerParameters(q[0], k[0], v[0], q[1], k[1], v[1]), names)


def pooled(attention: Attention, kv_heads: int) -> tuple[GroupedQueryAttention, MixerParameters]:
    """The mean-pooled form; q stays the very object it is."""
    before = attention.spec.kv_heads

    def pool(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        exact = tensor.detach().float().numpy()
        return tensor.new_tensor(mean_pool(exact, before, kv_heads))

    changed: dict[str, Any] = {
        name: pool(getattr(attention.parameters, name)) for name in ("k_weight", "k_bias", "v_weight", "v_bias")
    }
    return replace(attention.spec, kv_heads=kv_heads), replace(attention.parameters, **changed)


def rewrite(
    model: nn.Module,
    inputs: Mapping[str, Any],
    heads: int,
    kv_heads: int,
    *,
    causal: bool,
    only: list[str] | None = None,
) -> dict[str, RewrittenMixer]:
    """Install mixers with `kv_heads` heads at every attention of `model` (or at those in `only`)."""
    paths = owners(model, heads) if only is None else only
    records = record_calls(model, paths, kwargs=inputs)
    return {path: _install(model, path, heads, kv_heads, causal, records[path]) for path in paths}


def _install(model: nn.Module, path: str, heads: int, kv_heads: int, causal: bool, record: Any) -> RewrittenMixer:
    module = model.get_submodule(path)
    attention = take_apart(module, heads, causal=bool(getattr(module, "is_causal", causal)))
    spec, parameters = pooled(attention, kv_heads)
    return install(model, path, attention.spec, spec, attention.parameters, parameters, record, **attention.names)


def _layers(module: nn.Module, heads: int) -> tuple[tuple[Layer, Layer, Layer], str | None] | None:
    for names, out in SEPARATE.items():
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            q, k, v = (_linear(getattr(module, name)) for name in names)
            return (q, k, v), out
    if hasattr(module, "q_proj") and isinstance(module.q_proj, nn.Linear):
        q, k, v = (_linear(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj"))
        return (q, k, v), "o_proj" if hasattr(module, "o_proj") else "out_proj"
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return _thirds(module.in_proj_weight, module.in_proj_bias), "out_proj"
    if hasattr(module, "c_attn"):
        weight, bias = _linear(module.c_attn)
        return _thirds(weight.mT if type(module.c_attn).__name__ == "Conv1D" else weight, bias), "c_proj"
    if hasattr(module, "query_key_value"):
        return _interleaved(module, heads), "dense"
    if hasattr(module, "qkv_proj"):
        return _thirds(*_linear(module.qkv_proj)), "o_proj"
    return None


def _linear(layer: Any) -> Layer:
    return layer.weight, layer.bias


def _thirds(weight: Tensor, bias: Tensor | None) -> tuple[Layer, Layer, Layer]:
    biases: Any = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = zip(weight.chunk(3), biases, strict=True)
    return q, k, v


def _interleaved(module: Any, heads: int) -> tuple[Layer, Layer, Layer]:
    """Rows of one layer: per key/value head its query heads, its key, its value."""
    kv_heads = getattr(module, "num_kv_heads", heads)
    group = heads // kv_heads

    def split(rows: Tensor | None) -> list[Any]:
        if rows is None:
            return [None, None, None]
        grouped = rows.view(kv_heads, group + 2, -1, *rows.shape[1:])
        return [part.flatten(0, 2) for part in (grouped[:, :group], grouped[:, -2:-1], grouped[:, -1:])]

    weights, biases = split(module.query_key_value.weight), split(module.query_key_value.bias)
    q, k, v = zip(weights, biases, strict=True)
    return q, k, v
