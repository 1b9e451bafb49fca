"""Every zoo model through every door: what is matched is what was built, and what must be refused is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.match.doors import Seen, through_onnx, through_torch
from tests.match.expected import check_sites
from tests.zoo.models import EXTRA, MAIN, ZooCase, cases
from tests.zoo.through import exporters, matrix, one_of_each_family

ATTENDING = [c for c in MAIN.values() if not c.tags & {"none", "refuse"}]
WITHOUT = cases(having="none", without=())
REFUSED = cases(having="refuse", without=())
DECODERS = [c for c in ATTENDING if c.causal and "hf" in c.tags]
ZooOnnx = Callable[..., Path]


def params(chosen: list[ZooCase]) -> list[object]:
    return [pytest.param(case, id=case.name) for case in chosen]


def in_torch(chosen: list[ZooCase]) -> list[object]:
    return [pytest.param(case, "torch", id=f"{case.name}-torch") for case in chosen]


def check_complete(case: ZooCase, seen: Seen, *, cached: bool = False) -> None:
    assert seen.matches.refusals == ()
    assert seen.matches.not_attention == ()
    assert len(seen.matches.sites) == case.sites
    assert [site.layer for site in seen.matches.sites] == list(range(case.sites))
    assert all(site.causal is case.causal and not site.cross for site in seen.matches.sites)
    check_sites(case, seen.matches, cached=cached)


@pytest.mark.parametrize("case", params(ATTENDING))
def test_torch(case: ZooCase) -> None:
    seen = through_torch(case)
    check_complete(case, seen)
    assert all(site.out is not None for site in seen.matches.sites)


@pytest.mark.parametrize(("case", "exporter"), matrix(ATTENDING))
def test_onnx(case: ZooCase, exporter: str, zoo_onnx: ZooOnnx) -> None:
    check_complete(case, through_onnx(zoo_onnx(case, exporter)))


@pytest.mark.parametrize(("case", "exporter"), matrix(DECODERS, past=True))
def test_onnx_with_past(case: ZooCase, exporter: str, zoo_onnx: ZooOnnx) -> None:
    seen = through_onnx(zoo_onnx(case, exporter, past=True))
    check_complete(case, seen, cached=True)
    for index, site in enumerate(seen.matches.sites):
        for operand, part in ((site.k, "key"), (site.v, "value")):
            assert (operand.past, operand.past_head_axis) == (f"past_key_values.{index}.{part}", 1)
            assert operand.presents == ((f"present.{index}.{part}", 1),)


@pytest.mark.parametrize("case", one_of_each_family(EXTRA.values()))
def test_no_attention_of_the_extras_is_lost(case: ZooCase) -> None:
    """An attention is a site as described, or refused with a reason; none vanishes."""
    matches = through_torch(case).matches
    assert len(matches.sites) + len(matches.refusals) == case.sites
    assert matches.not_attention == ()
    assert all(len(refusal.reason) > 20 for refusal in matches.refusals)
    check_sites(case, matches)
    if "encoder-decoder" in case.tags and not matches.refusals:
        assert sum(site.cross for site in matches.sites) == case.sites // 3
        assert sum(site.causal for site in matches.sites) == case.sites // 3
        assert not any(site.causal and site.cross for site in matches.sites)


@pytest.mark.parametrize(("case", "door"), [*in_torch(REFUSED), *matrix(REFUSED)])
def test_content_dependent_positions_are_refused_for_that_reason(case: ZooCase, door: str, zoo_onnx: ZooOnnx) -> None:
    matches = (through_torch(case) if door == "torch" else through_onnx(zoo_onnx(case, door))).matches
    assert matches.sites == ()
    assert len(matches.refusals) == case.sites
    assert all("computed from hidden states" in refusal.reason for refusal in matches.refusals)
    assert [refusal.layer for refusal in matches.refusals] == list(range(case.sites))


@pytest.mark.parametrize(("case", "door"), [*in_torch(WITHOUT), *matrix(WITHOUT)])
def test_a_softmax_that_is_no_attention_is_called_so(case: ZooCase, door: str, zoo_onnx: ZooOnnx) -> None:
    matches = (through_torch(case) if door == "torch" else through_onnx(zoo_onnx(case, door))).matches
    assert matches.sites == () and matches.refusals == ()
    softmaxes = {"mlp": 1, "conv": 0, "router": 1}[case.name]
    assert len(matches.not_attention) == softmaxes
    assert all("learned projection" in n.reason for n in matches.not_attention)


@pytest.mark.parametrize("case", params([MAIN["bert-sdpa"], MAIN["llama-gqa-sdpa"]]))
def test_both_doors_describe_one_model_alike(case: ZooCase, zoo_onnx: ZooOnnx) -> None:
    through = [through_torch(case), *(through_onnx(zoo_onnx(case, e)) for e in exporters(case))]
    assert len({_meaning(seen) for seen in through}) == 1


def _meaning(seen: Seen) -> tuple[object, ...]:
    """What a program computes; where constant factors stand (before or after the seam) is each exporter's choice."""
    return tuple(
        (
            site.group,
            round(site.scale * site.q.gain * site.k.gain, 5),
            site.causal,
            operand.rotary,
            operand.columns.tobytes(),
            operand.projection.features,
        )
        for site in seen.matches.sites
        for operand in (site.q, site.k, site.v)
    )
