"""Caches of attentions that keep their forward on repeated heads: where they hold each head once, proved by trying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passes.targets.replacement import Replacement
from rewriter.install.reproduction import disagreement
from rewriter.install.shared_cache import share, sharing, unshare
from rewriter.module_modes import evaluating, unchanged


def share_caches(
    model: nn.Module, groups: Mapping[str, Sequence[Replacement]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> set[str]:
    """Let the owners of edited sites see caches through views; names of the sites where that was proved.

    Tried where the model makes its cache itself when asked to (``use_cache``): with the views it must answer as
    without, for the recorded tokens and for a further one, and the cache must hold fewer heads.
    """
    owners = {o: rs[0].grouped.kv_heads for o, rs in groups.items() if o and len({r.grouped.kv_heads for r in rs}) == 1}
    plain = _with_cache(model, args, kwargs)
    if not owners or plain is None:
        return set()
    for owner, kv_heads in owners.items():
        share(model.get_submodule(owner), kv_heads)
    shared = _with_cache(model, args, kwargs)
    proved = shared is not None and disagreement(shared.answers, plain.answers) is None
    caching = {o for o in owners if (hooks := sharing(model.get_submodule(o))) is not None and hooks.heads is not None}
    if not proved or shared is None or shared.numbers >= plain.numbers:
        caching = set()
    for owner in owners.keys() - caching:
        unshare(model.get_submodule(owner))
    return {r.site.name for o in caching for r in groups[o]}


@dataclass(frozen=True)
class _Cached:
    """Answers for the recorded tokens and for one more, and how many numbers the cache then holds."""

    answers: list[Any]
    numbers: int


def _with_cache(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Cached | None:
    """None where the model makes no cache that it hands out."""
    tokens = next((n for n in ("decoder_input_ids", "input_ids", "decoder_inputs_embeds") if n in kwargs), None)
    if args or tokens is None or "use_cache" not in kwargs:
        return None
    given = {**kwargs, "use_cache": True}
    try:
        with torch.no_grad(), evaluating(model), unchanged(model):
            first = model(**given)
            cache = first.past_key_values
            if tokens == "input_ids" and (mask := given.get("attention_mask")) is not None:
                given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            second = model(**{**given, tokens: given[tokens][:, -1:], "past_key_values": cache})
    except Exception:  # whatever a model says to a call that it does not take
        return None
    if cache is None or not (numbers := _numbers(cache)):
        return None
    return _Cached([_main(first), _main(second)], numbers)


def _main(output: Any) -> Tensor:
    found = output[0] if isinstance(output[0], Tensor) else output[1]
    assert isinstance(found, Tensor)
    return found


def _numbers(cache: Any) -> int:
    """Elements of all keys and values in a cache, or in the two of a decoder with cross-attention."""
    pair = (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None))
    layers = [layer for part in (pair if all(pair) else (cache,)) for layer in getattr(part, "layers", ())]
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(t.numel() for t in tensors if isinstance(t, Tensor))
