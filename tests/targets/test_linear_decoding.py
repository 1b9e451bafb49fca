"""Generation with linear attention: a state of fixed size in transformers' caches answers as the whole at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
from passes.targets import LinearHeads, Window
from passes.targets.linear_attention import FeatureMap
from rewriter.errors import UsageError
from rewriter.install.linear_cache import LinearLayer
from rewriter.install.torch_module import mixers
from tests.targets.watched_mixes import relative
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

CLOSE = 2e-5
LLAMA, GPT2 = ZOO["llama-sdpa"], ZOO["gpt2-sdpa"]
CASES = [
    pytest.param(LLAMA, LinearHeads(4), id="llama-learned"),
    pytest.param(LLAMA, LinearHeads(3, FeatureMap.FAVOR), id="llama-favor"),
    pytest.param(GPT2, LinearHeads(4, FeatureMap.ELU1), id="gpt2-elu1"),
]
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def rewritten(case: ZooCase, target: Any, **options: Any) -> Any:
    model = rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 30, 0), **options)
    with torch.no_grad():
        for mixer in mixers(model).values():
            if mixer.linear_term is not None:
                mixer.linear_term.log_gain += 1.0  # far keys count for more than before training
    return model


def answers(model: Any, ids: Tensor, cache: Any = None, mask: Tensor | None = None, first: int = 13) -> Tensor:
    """Logits of a prompt of `first` tokens, and of all others one by one."""
    found = []
    for start, stop in ((0, first), *((n, n + 1) for n in range(first, ids.shape[1]))):
        part = {} if mask is None else {"attention_mask": mask[:, :stop]}
        with torch.no_grad():
            out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **part)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("case", "target"), CASES)
def test_token_by_token_is_the_whole_at_once(case: ZooCase, target: LinearHeads) -> None:
    """After prompts of every place in a chunk, with padding on the left too."""
    from transformers import DynamicCache

    model, ids = rewritten(case, target), case.inputs(2, 26, 3)["input_ids"]
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    for mask in (None, padding):
        more = {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False, **more).logits
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        for first in (1, 7, 8, 9, 11) if mask is None else (10,):
            cache = DynamicCache()
            assert relative(answers(model, ids, cache, mask, first)[real], whole[real]) < CLOSE, first
            assert all(isinstance(layer, LinearLayer) for layer in cache.layers)
    forgetful = DynamicCache()
    answers(model, ids[:, :20], forgetful, first=13)
    for layer in forgetful.layers:
        layer.sums = torch.zeros_like(layer.sums)
    assert relative(answers(model, ids[:, 20:], forgetful, first=1), whole[:, 20:]) > 1e-3  # the control


@pytest.mark.parametrize("features", [pytest.param(f, id=f.value) for f in FeatureMap])
def test_the_state_is_of_one_size(features: FeatureMap) -> None:
    """Two chunks at most, and sums, however long the sequence; a cache that was filled otherwise goes on growing."""
    from transformers import DynamicCache

    model = rewritten(LLAMA, LinearHeads(4, features))
    ids = LLAMA.inputs(1, 60, 3)["input_ids"]
    sizes, held, stored = set(), set(), set()
    cache = DynamicCache()
    for n in range(60):
        answers(model, ids[:, n : n + 1], cache, first=1)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values, layer.sums) if t is not None]
        sizes.add(sum(t.nbytes for t in tensors))
        stored.add(sum(t.untyped_storage().nbytes() for t in tensors))
        held.add(int(cache.layers[0].keys.shape[2]))
    assert held == set(range(1, 8)) and len(sizes) <= 7 + 4  # before there are sums, and from then on
    assert max(stored) == max(sizes)
    assert cache.get_seq_length() == 60
    again = DynamicCache()
    answers(model, ids[:, :59], again, first=59)
    stored = sum(t.untyped_storage().nbytes() for layer in again.layers for t in (layer.keys, layer.values, layer.sums))
    assert stored <= max(sizes)


def test_a_cache_filled_by_the_original_goes_on_growing() -> None:
    from transformers import DynamicCache

    model, original = rewritten(LLAMA, "linear:4"), LLAMA.build()
    ids = LLAMA.inputs(1, 30, 3)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        original(input_ids=ids[:, :20], past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, 20:], past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[2] for layer in cache.layers] == [30, 30]


def test_generate_searches_and_samples_with_it() -> None:
    """Beams, several answers to a prompt and padded batches: as with caches that hold everything."""
    model = rewritten(LLAMA, "linear:4")
    ids = LLAMA.inputs(2, 14, 3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for more in ({}, {"num_beams": 3}, {"attention_mask": mask}, {"num_beams": 4, "num_return_sequences": 3}):
        made = model.generate(ids, **OPTIONS, **more)
        without = model.generate(ids, use_cache=False, **OPTIONS, **more)
        assert torch.equal(made, without), more
        given = rewriter.bounded_cache(model)
        assert torch.equal(model.generate(ids, past_key_values=given, **OPTIONS, **more), made)
        assert max(layer.keys.shape[2] for layer in given.layers) <= 8
    torch.manual_seed(0)
    drawn = model.generate(ids, do_sample=True, num_return_sequences=2, max_new_tokens=8, pad_token_id=0)
    torch.manual_seed(0)
    plain = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=False, **plain), drawn)
    assert not torch.equal(LLAMA.build().generate(ids, **OPTIONS), model.generate(ids, **OPTIONS))  # the control


def test_rows_of_the_state_move_with_those_of_the_batch() -> None:
    model = rewritten(LLAMA, "linear:4")
    ids = LLAMA.inputs(3, 30, 3)["input_ids"]
    order = torch.tensor([2, 0, 0])
    expected = answers(model, ids[order])[:, 20:]
    apart = []
    for move in ("reorder_cache", "batch_select_indices", None):
        cache = rewriter.bounded_cache(model)
        answers(model, ids[:, :20], cache)
        if move is not None:
            getattr(cache, move)(order)
        apart.append(relative(answers(model, ids[order][:, 20:], copy.deepcopy(cache), first=1), expected))
    assert max(apart[:2]) < CLOSE and apart[2] > 1e-3  # the control: rows that stay where they are
    cache = rewriter.bounded_cache(model)
    answers(model, ids[:1, :20], cache)
    cache.batch_repeat_interleave(2)
    twice = answers(model, ids[:1, 20:].expand(2, -1), cache, first=1)
    assert relative(twice, answers(model, ids[:1])[:, 20:].expand(2, -1, -1)) < CLOSE
    cache.reset()
    assert relative(answers(model, ids, cache), answers(model, ids)) < CLOSE


def test_what_a_sum_cannot_give_back_is_refused() -> None:
    model = rewritten(LLAMA, "linear:4")
    ids = LLAMA.inputs(1, 20, 3)["input_ids"]
    cache = rewriter.bounded_cache(model)
    answers(model, ids, cache)
    with pytest.raises(UsageError, match="cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cropped"):
        model.generate(ids, prompt_lookup_num_tokens=3, **OPTIONS)
    for other in (LLAMA.build(), rewritten(LLAMA, "gqa2")):
        with pytest.raises(UsageError, match="linear"):
            rewriter.bounded_cache(other)


def test_windows_and_sums_beside_each_other() -> None:
    model = rewritten(LLAMA, {"0": Window(5, 1), "1": "linear:4"})
    ids = LLAMA.inputs(2, 40, 3)["input_ids"]
    cache = rewriter.bounded_cache(model)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    assert relative(answers(model, ids, cache), whole) < CLOSE
    assert [layer.keys.shape[2] for layer in cache.layers] == [5, 4]


def test_low_precision_keeps_its_sums_in_float32() -> None:
    model = rewritten(LLAMA, "linear:4").bfloat16()
    ids = LLAMA.inputs(1, 40, 3)["input_ids"]
    cache = rewriter.bounded_cache(model)
    stepwise = answers(model, ids, cache).float()
    layer = cache.layers[0]
    assert layer.keys.dtype == torch.bfloat16 and layer.sums.dtype == torch.float32
    with torch.no_grad():
        assert relative(stepwise, model(input_ids=ids, use_cache=False).logits.float()) < 0.05


def test_training_with_a_cache_reaches_the_features() -> None:
    model = rewritten(LLAMA, "linear:4")
    ids = LLAMA.inputs(1, 24, 3)["input_ids"]
    first = model(input_ids=ids[:, :16], use_cache=True)
    later = model(input_ids=ids[:, 16:], past_key_values=first.past_key_values, use_cache=True).logits
    later.square().sum().backward()
    terms = [m.linear_term for m in mixers(model).values()]
    assert all(term.key_map.grad is not None and bool(term.key_map.grad.any()) for term in terms)
