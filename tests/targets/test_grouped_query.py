"""Grouped-query targets: the new attention equals the old one on tied heads, computed from the replacement alone."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from codegen.ops.grouped_query_attention.reference import grouped_query_attention
from passes.cost import costs, parameters_removed
from passes.dataflow import Array
from passes.measure import site_error
from passes.replay import rebuild, recorded
from passes.site import AttentionSite, Modifier, Norm
from passes.targets import GroupedQuery
from passes.targets.catalogue import CATALOGUE, find
from passes.targets.decoupled import DecoupledHeads
from passes.targets.grouped_query import describe, specification
from passes.targets.replacement import Replacement
from tests.match.doors import Seen, through_torch
from tests.targets.lossless_twin import legal_pool, tied
from tests.zoo.case import ZooCase
from tests.zoo.models import MAIN, ZOO
from tests.zoo.through import one_of_each_family

ATTENDING = [c for c in MAIN.values() if not c.tags & {"none", "refuse"}]


@cache
def seen(name: str, how: str) -> Seen:
    """A case as it is, tied, or perturbed."""
    case = ZOO[name]
    builds = {"free": case.build, "tied": lambda: tied(case), "perturbed": lambda: tied(case, perturbed=True)}
    return through_torch(replace(case, build=builds[how]))


def heads_of(replacement: Replacement, site: AttentionSite, found: Seen, role: str) -> Array:
    """[B, N, T, D]: the replacement's keys or values before any rotation or norm, from the projection's input."""
    operand, tokens = getattr(site, role), getattr(found.matches.evidence[site.name], role).tokens
    x = np.asarray(found.flow.value(operand.projection.input), dtype=np.float64)
    rows = x.reshape(-1, x.shape[-1]) @ np.asarray(replacement.tensors[f"{role}_weight"], np.float64).T
    if f"{role}_bias" in replacement.tensors:
        rows = rows + np.asarray(replacement.tensors[f"{role}_bias"], np.float64)
    by_token: Array = rows[tokens.rows]
    heads: Array = by_token.reshape(*by_token.shape[:2], replacement.spec.kv_heads, -1)
    return heads.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("case", one_of_each_family(ATTENDING))
def test_tied_heads_pool_to_themselves_and_perturbed_ones_do_not(case: ZooCase) -> None:
    target = GroupedQuery(legal_pool(case))
    for how in ("tied", "perturbed"):
        found = seen(case.name, how)
        for site in found.matches.sites:
            replacement = target.transform(found.flow, site)
            assert replacement.exact is (how == "tied")
            assert (replacement.before, replacement.after) == (describe(site), target.name)
            rows = legal_pool(case) * site.head_dim
            assert {t.shape[0] for t in replacement.tensors.values()} == {rows}
            assert all(t.dtype == np.float32 for t in replacement.tensors.values())
            has_bias = site.k.projection.bias is not None
            assert ("k_bias" in replacement.tensors) is has_bias is ("v_bias" in replacement.tensors)
            own = rebuild(found.flow, found.matches.evidence[site.name].v)[:, :: case.heads // case.kv_heads]
            pooled = heads_of(replacement, site, found, "v")
            wide = np.repeat(pooled, case.kv_heads // legal_pool(case), axis=1)
            error = float(np.abs(wide - own).max())
            assert error < 1e-6 if how == "tied" else error > 0.05


@pytest.mark.parametrize("name", ["bert-eager", "nanogpt-sdpa", "mha-sequence-first", "vit-sdpa"])
def test_the_oracle_on_pooled_weights_gives_the_recorded_output(name: str) -> None:
    """Spec and tensors alone say what to compute: codegen's float64 oracle agrees with the program."""
    found = seen(name, "tied")
    for site in found.matches.sites:
        replacement = GroupedQuery(2).transform(found.flow, site)
        evidence = found.matches.evidence[site.name]
        q = rebuild(found.flow, evidence.q)
        k, v = (heads_of(replacement, site, found, role) for role in ("k", "v"))
        spec = replace(replacement.spec, bias=False, scale=evidence.path.scale)
        output = grouped_query_attention(spec, q, k * site.k.gain, v)
        expected = recorded(found.flow, evidence.path.output_view, evidence.q.tokens)
        unmasked = name != "bert-eager"
        row = slice(None) if unmasked else slice(0, 1)  # the second sequence is padded
        np.testing.assert_allclose(output[row], expected[row], atol=1e-5)
        swapped = grouped_query_attention(spec, q, k[:, ::-1], v)
        assert np.abs(swapped[row] - expected[row]).max() > 0.05


def test_the_error_of_a_site_is_nothing_for_tied_heads_and_grows_with_pooling() -> None:
    name = "llama-sdpa"
    case = ZOO[name]
    errors = {}
    for how, heads in (("tied", 2), ("perturbed", 2), ("free", 2), ("free", 1)):
        found = seen(name, how)
        site = found.matches.sites[0]
        measured = site_error(
            found.flow, found.matches.evidence[site.name], GroupedQuery(heads).transform(found.flow, site)
        )
        assert measured is not None and measured[1] == 1.0
        errors[how, heads] = measured[0]
    assert errors["tied", 2] < 1e-6
    assert 1e-3 < errors["perturbed", 2] < errors["free", 2] < errors["free", 1] < 2
    assert case.kv_heads == 4


def test_parameters_and_cache_shrink_as_they_should() -> None:
    found = seen("llama-gqa-sdpa", "free")
    replacements = [GroupedQuery(1).transform(found.flow, s) for s in found.matches.sites]
    assert (
        parameters_removed(found.flow, replacements) == 2 * 2 * 8 * 32
    )  # two layers, key and value, one head of 8 rows
    before, after = costs(found.flow, found.matches, replacements, 4)
    assert (before.kv_bytes_per_token, after.kv_bytes_per_token) == (2 * 2 * (8 + 8) * 4, 2 * 1 * (8 + 8) * 4)
    assert after.flops < before.flops


# ------------------------------------------------------------------ specs, names, refusals


def test_a_spec_holds_what_lies_between_score_and_softmax() -> None:
    site = seen("llama-sdpa", "free").matches.sites[0]
    mask, cap = Modifier("mask", "m", -np.inf), Modifier("softcap", number=30.0)
    spec = specification(replace(site, modifiers=(cap, mask, Modifier("causal"))), 2)
    assert (spec.heads, spec.kv_heads, spec.group, spec.head_dim) == (4, 2, 2, 8)
    assert (spec.causal, spec.bias, spec.softcap) == (True, True, 30.0)
    bare = specification(replace(site, modifiers=()), 4)
    assert (bare.causal, bare.bias, bare.softcap, bare.scale) == (False, False, None, site.scale)


def test_descriptions() -> None:
    site = seen("llama-gqa-sdpa", "free").matches.sites[0]
    assert [describe(replace(site, kv_heads=n)) for n in (4, 2, 1)] == ["mha4", "gqa2", "mqa"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "legal"), [(12, 12, [1, 2, 3, 4, 6, 12]), (9, 3, [1, 3]), (8, 6, [1, 2])]
)
def test_legal_counts_divide_both(heads: int, kv_heads: int, legal: list[int]) -> None:
    site = replace(seen("llama-sdpa", "free").matches.sites[0], heads=heads, kv_heads=kv_heads)
    assert GroupedQuery(1).legal(site) == legal


def test_what_cannot_be_pooled_is_refused() -> None:
    site = seen("llama-sdpa", "free").matches.sites[0]
    assert GroupedQuery(1).refuses(site) is None
    for per_head in (False, True):
        normed = replace(site, k=replace(site.k, norm=Norm("rms", per_head, "a", "b")))
        assert GroupedQuery(1).refuses(normed) is None
    wide = replace(site, k=replace(site.k, norm=Norm("rms", False, "a", "b")))
    assert "treats its heads apart" in str(DecoupledHeads(1, 2).refuses(wide))
    headless = replace(site, v=replace(site.v, past="cache", past_head_axis=None))
    assert "value cache" in str(GroupedQuery(1).refuses(headless))


@pytest.mark.parametrize(("name", "heads"), [("mqa", 1), ("gqa1", 1), ("gqa8", 8), (" GQA4 ", 4), ("gqa12", 12)])
def test_targets_by_name(name: str, heads: int) -> None:
    assert find(name) == GroupedQuery(heads)


@pytest.mark.parametrize(
    "name", ["", "gqa", "gqa0", "gqa-1", "gqa1.5", "mqa2", "gqa 4", "gqa9999999", "fnet?", "gqa\u0662"]
)
def test_other_names_are_no_targets(name: str) -> None:
    assert find(name) is None


def test_impossible_targets_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GroupedQuery(0)
    with pytest.raises(ValueError, match="unknown merge"):
        GroupedQuery(2, merge="guess")


def test_the_catalogue_says_everything_about_each_target() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names) and {"mqa", "gqaN"} <= set(names)
    for entry in CATALOGUE:
        assert all(entry.to_dict().values())
        spelled = entry.name.replace("N", "2").replace("[:pair]", ":pair")
        name = re.sub(r"\[:\w+\]", ":2", spelled)  # one number; of several the defaults
        assert entry.parse(re.sub(r"\[.*\]", "", name)) is not None, name
