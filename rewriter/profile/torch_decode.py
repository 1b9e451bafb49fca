"""Generation with a PyTorch model that keeps a key/value cache: the prompt in one call, then token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rewriter.capture.example_inputs import default_inputs
from rewriter.errors import UnsupportedModel
from rewriter.profile.interleaved import Job
from rewriter.profile.workload import Workload

_CACHES = ("past_key_values", "cache")
"""What a cache is called, as an argument and in the answer."""


def generation(module: torch.nn.Module, workload: Workload, device: torch.device) -> Job:
    """The prompt, or the tokens behind it, with fixed tokens and without gradients.

    Raises UnsupportedModel for a module that is not called with `input_ids` and a cache.
    """
    takes = inspect.signature(module.forward).parameters
    name = next((name for name in _CACHES if name in takes), None)
    if name is None or "input_ids" not in takes:
        raise UnsupportedModel(
            f"mode {workload.mode} needs a model that takes input_ids and returns a cache",
            hint="leave --mode out, or give a decoder of transformers",
        )
    ids = default_inputs(module, workload.batch, workload.total)["input_ids"].to(device)

    def fill() -> Any:
        return _step(module, ids[:, : workload.prompt], {name: None}, device)

    def go_on(cache: Any) -> Any:
        for position in range(workload.prompt, workload.total):
            cache = _step(module, ids[:, position : position + 1], {name: cache}, device)
        return cache

    if workload.mode == "prefill":
        return Job(lambda _: fill())
    return Job(go_on, fill, workload.new_tokens)


def _step(module: torch.nn.Module, ids: torch.Tensor, cache: Mapping[str, Any], device: torch.device) -> Any:
    with torch.inference_mode():
        found = module(input_ids=ids, use_cache=True, **cache)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    left = next((value for name in _CACHES if (value := getattr(found, name, None)) is not None), None)
    if left is None:
        raise UnsupportedModel("the model returned no cache", hint="leave --mode out")
    return left


def cache_bytes(job: Job) -> int:
    """Bytes of keys and values at the end of one run of a job from `generation`."""
    return sum(tensor.nbytes for tensor in _tensors(job.call(job.prepare())))


def _tensors(cache: Any) -> Iterable[torch.Tensor]:
    """Whatever the cache is made of: layers with keys and values, or nested tuples."""
    if isinstance(cache, torch.Tensor):
        yield cache
        return
    parts: Iterable[Any] = ()
    if isinstance(cache, list | tuple):
        parts = cache
    elif isinstance(cache, Mapping):
        parts = cache.values()
    elif hasattr(cache, "layers"):
        parts = cache.layers
    elif hasattr(cache, "keys") and hasattr(cache, "values"):
        sums = getattr(cache, "sums", None)  # of linear attention
        parts = (cache.keys, cache.values) if sums is None else (cache.keys, cache.values, sums)
    elif hasattr(cache, "self_attention_cache"):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
    for part in parts:
        yield from _tensors(part)
