"""Kernels for Hugging Face models that keep their own attention code.

Such models ask a registry of transformers for the function between projections and output projection. Here one that
calls the generated kernels is registered, and a model is told to use it once it has answered as before with it.

Shape legend: B batch, H query heads, KV key/value heads, S queries, T keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codegen.launch.torch_op import attention
from codegen.spec import GroupedQueryAttention
from rewriter.install.huggingface import MARK, is_pretrained, turned
from rewriter.verify.torch_pair import run, verify_torch

PREFIX = "rewriter_"
"""Of the names under which the function is registered; the rest is the choice of kernels."""

PROOF = "rewriter_proof"
REPLACED = "sdpa"
"""The only function that is replaced: others were chosen for what they do (return weights, take unpadded batches)."""

UNREAD = ("softcap", "s_aux")
"""Arguments that change scores and that the replaced function does not take either: it says so."""

Function = Callable[..., tuple[Tensor, None]]


def attach(
    model: nn.Module, kernels: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, everywhere: bool
) -> bool:
    """Let the attentions of a Hugging Face model that can call kernels do so; whether any does.

    Unless the model gives the same outputs with kernels and comes by them at all, it is left as it was.

    Args:
        kernels: "auto", "cpp", "triton" or "cuda", as `codegen.launch.torch_op.attention` takes it.
        args, kwargs: a call of the model.
        everywhere: not only where the head count was changed, but at every attention.
    """
    configs = [c for c in _configs(model) if getattr(c, "_attn_implementation", None) == REPLACED]
    if not configs or not (everywhere or turned(model)):
        return False
    attend = partial(_attend if everywhere else _attend_where_turned, kernels)
    calls: list[nn.Module] = []

    def counted(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        if _reads(key, attention_mask, more):
            calls.append(module)
        return attend(module, query, key, value, attention_mask, **more)

    before = run(model, args, kwargs)
    try:
        _register(PROOF, counted)
        _choose(configs, PROOF)
        same = verify_torch(before, run(model, args, kwargs), kwargs, exact=True).ok
    finally:
        _choose(configs, REPLACED)
        _forget(PROOF)
    if not (same and any(everywhere or _is_turned(m) for m in calls)):
        return False
    name = f"{PREFIX}{kernels}" if everywhere else f"{PREFIX}{kernels}_where_rewritten"
    _register(name, attend)
    _choose(configs, name)
    return True


def detach(model: nn.Module) -> None:
    """Back to the function that was there before."""
    _choose([c for c in _configs(model) if str(getattr(c, "_attn_implementation", "")).startswith(PREFIX)], REPLACED)


def _attend_where_turned(kernels: str, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """As `_attend`, and the replaced function at attentions that were not rewritten: these stay bit for bit."""
    if _is_turned(module):
        return _attend(kernels, module, *args, **kwargs)
    replaced: Function = _functions()[REPLACED]
    return replaced(module, *args, **kwargs)


def _is_turned(module: nn.Module) -> bool:
    return hasattr(module, MARK)


def _attend(
    kernels: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ([B, S, H, E], None) of query [B, H, S, D], key and value [B, KV, T, *]."""
    if not _reads(key, attention_mask, more):
        replaced: Function = _functions()[REPLACED]
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return replaced(module, query, key, value, attention_mask, **given, **more)
    s = query.shape[2]
    ordered = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = s > 1 and attention_mask is None and bool(ordered)
    if causal and key.shape[2] > s:  # a static cache that is still empty behind these tokens
        key, value = key[:, :, :s], value[:, :, :s]
        position_bias = None if position_bias is None else position_bias[..., :s]
    bias = _bias(position_bias, attention_mask)
    spec = GroupedQueryAttention(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        causal=causal,
        bias=bias is not None,
    )
    out = attention(spec, query, key, value, bias, dropout=dropout, kernels=kernels)
    return out.transpose(1, 2).contiguous(), None


def _reads(key: Tensor, mask: Tensor | None, more: Mapping[str, Any]) -> bool:
    """Whether a call is one that kernels can take over; exported programs must run where this library is not."""
    exported = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
    known = all(more.get(name) is None for name in UNREAD)
    return known and not exported and (mask is None or mask.shape[-1] == key.shape[2])


def _bias(position_bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One bias out of both; a boolean mask shows a key where it is True."""
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    return position_bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else position_bias + mask


def _configs(model: nn.Module) -> list[Any]:
    """The configs that modules of a Hugging Face model read, each once."""
    if not any(is_pretrained(module) for module in model.modules()):
        return []
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "to_dict")}.values())


def _choose(configs: list[Any], name: str) -> None:
    for config in configs:
        # the public setter would also reach parts with a choice of their own
        config._attn_implementation_internal = name


def _register(name: str, function: Function) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    _functions().register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[REPLACED])


def _forget(name: str) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for registry in (_functions(), ALL_MASK_ATTENTION_FUNCTIONS):
        registry._global_mapping.pop(name, None)


def _functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS
