"""Replay tells a right description from a wrong one: each way of being wrong moves it by more than 0.05."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passes.dataflow import Flow
from passes.match.attention import Evidence
from passes.match.operands import Traced
from passes.replay import Replay, replay
from passes.site import Modifier
from tests.match.doors import Seen, through_onnx, through_torch
from tests.zoo.models import ZOO

Change = Callable[[Evidence], Evidence]
RIGHT, WRONG = 1e-5, 0.05


@cache
def seen_in_torch(name: str) -> Seen:
    return through_torch(ZOO[name])


def replayed(flow: Flow, evidence: Evidence) -> Replay:
    return replay(flow, evidence.path, evidence.q, evidence.k, evidence.v)


# ---------------------------------------------------------------- ways of being wrong


def _tokens(traced: Traced, **changes: Any) -> Traced:
    return replace(traced, tokens=replace(traced.tokens, **changes))


def shifted_rows(e: Evidence) -> Evidence:
    """Every key comes from the token before it."""
    return replace(e, k=_tokens(e.k, rows=np.roll(e.k.tokens.rows, 1, axis=1)))


def swapped_sequences(e: Evidence) -> Evidence:
    return replace(e, v=_tokens(e.v, rows=e.v.tokens.rows[::-1]))


def rolled_heads(e: Evidence) -> Evidence:
    return replace(e, k=_tokens(e.k, columns=np.roll(e.k.tokens.columns, 1, axis=0)))


def swapped_features(e: Evidence) -> Evidence:
    columns = e.q.tokens.columns.copy()
    columns[:, [0, 1]] = columns[:, [1, 0]]
    return replace(e, q=_tokens(e.q, columns=columns))


def swapped_value_features(e: Evidence) -> Evidence:
    columns = e.v.tokens.columns.copy()
    columns[0, [0, 1]] = columns[0, [1, 0]]
    return replace(e, v=_tokens(e.v, columns=columns))


def flipped_rotation(e: Evidence) -> Evidence:
    assert e.k.tokens.other is not None
    return replace(e, k=_tokens(e.k, other=-e.k.tokens.other))


def forgotten_rotation(e: Evidence) -> Evidence:
    return replace(e, k=replace(_tokens(e.k, other=None), operand=replace(e.k.operand, rotary=None)))


def wrong_partners(e: Evidence) -> Evidence:
    rotary = e.k.operand.rotary
    assert rotary is not None
    interleaved = tuple(i ^ 1 for i in range(len(rotary.partner)))
    assert interleaved != rotary.partner
    operand = replace(e.k.operand, rotary=replace(rotary, partner=interleaved))
    return replace(e, k=replace(e.k, operand=operand))


def wrong_scale(e: Evidence) -> Evidence:
    return replace(e, path=replace(e.path, scale=e.path.scale * 2))


def forgotten_masks(e: Evidence) -> Evidence:
    return replace(e, path=replace(e.path, modifiers=()))


def invented_causality(e: Evidence) -> Evidence:
    return replace(e, path=replace(e.path, modifiers=(*e.path.modifiers, Modifier("causal"))))


def keys_for_values(e: Evidence) -> Evidence:
    return replace(e, v=e.k)


def forgotten_bias(e: Evidence) -> Evidence:
    operand = e.k.operand
    assert operand.projection.bias is not None
    return replace(e, k=replace(e.k, operand=replace(operand, projection=replace(operand.projection, bias=None))))


def transposed_weight(e: Evidence) -> Evidence:
    projection = e.v.operand.projection
    flipped = replace(projection, out_first=not projection.out_first)
    return replace(e, v=replace(e.v, operand=replace(e.v.operand, projection=flipped)))


ALWAYS: list[Change] = [
    shifted_rows, swapped_sequences, rolled_heads, swapped_features, swapped_value_features, wrong_scale,
    keys_for_values, transposed_weight,
]  # fmt: skip
ROTATED: list[Change] = [flipped_rotation, forgotten_rotation, wrong_partners]
CONTROLS: list[tuple[str, Change]] = [
    *(("bert-sdpa", change) for change in [*ALWAYS, forgotten_masks, forgotten_bias, invented_causality]),
    *(("llama-sdpa", change) for change in [*ALWAYS, *ROTATED, forgotten_masks]),
    *(("llama-gqa-eager", change) for change in [*ROTATED, shifted_rows, rolled_heads, wrong_scale]),
    *(("qwen3-eager", change) for change in [*ROTATED, shifted_rows, rolled_heads]),
    *(("gpt2-eager", change) for change in [shifted_rows, rolled_heads, keys_for_values, forgotten_bias]),
    *(("mha-sequence-first", change) for change in [shifted_rows, swapped_sequences, rolled_heads]),
]


@pytest.mark.parametrize(
    ("name", "change"), [pytest.param(name, change, id=f"{name}-{change.__name__}") for name, change in CONTROLS]
)
def test_a_wrong_description_does_not_replay(name: str, change: Change) -> None:
    seen = seen_in_torch(name)
    for site in seen.matches.sites:
        evidence = seen.matches.evidence[site.name]
        assert replayed(seen.flow, evidence).worst < RIGHT
        assert replayed(seen.flow, change(evidence)).worst > WRONG


def test_an_error_shows_where_it_was_made() -> None:
    seen = seen_in_torch("llama-sdpa")
    evidence = next(iter(seen.matches.evidence.values()))
    keys, values = replayed(seen.flow, rolled_heads(evidence)), replayed(seen.flow, swapped_value_features(evidence))
    assert keys.k > WRONG > RIGHT > max(keys.q, keys.v)
    assert values.v > WRONG > RIGHT > max(values.q, values.k, values.scores)
    scale = replayed(seen.flow, wrong_scale(evidence))
    assert scale.output > RIGHT > max(scale.q, scale.k, scale.v)


@pytest.mark.parametrize("change", [shifted_rows, rolled_heads, flipped_rotation, wrong_scale])
def test_new_tokens_after_a_cache_are_replayed_too(change: Change, zoo_onnx: Callable[..., Path]) -> None:
    seen = through_onnx(zoo_onnx(ZOO["llama-gqa-sdpa"], "dynamo18", past=True))
    evidence = seen.matches.evidence[seen.matches.sites[0].name]
    assert evidence.k.tokens.new.start > 0
    assert replayed(seen.flow, evidence).worst < RIGHT
    assert replayed(seen.flow, change(evidence)).worst > WRONG


def test_other_weights_do_not_replay() -> None:
    """What is compared is the recording, not the description with itself."""
    seen = seen_in_torch("bert-sdpa")
    site = seen.matches.sites[0]
    weight = site.k.projection.weight

    def read(value: str) -> Any:
        array = seen.flow.read(value)
        return array[::-1] if value == weight else array

    assert replayed(replace(seen.flow, read=read), seen.matches.evidence[site.name]).k > WRONG
