"""The extra and wide zoo through three doors: sites as built, refusals for their reason, tied twins without loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import rewriter
from passes.match.attention import Matches
from rewriter.report.rewrite_report import RewriteReport
from tests.match.doors import through_onnx, through_torch
from tests.match.expected import REPLAY_LIMIT
from tests.targets.lossless_twin import distance, legal_pool, run_file, tied, twin_file
from tests.zoo.exports import export
from tests.zoo.models import EXTRA, WIDE, ZooCase
from tests.zoo.through import family_of, matrix, one_of_each_family

DOORS = ("torch", "dynamo18", "torchscript17")
EXACT, MOVED = 1e-4, 1e-3
RECORDED, OTHER = (2, 7, 0), (3, 9, 1)

HALF, PARTIAL, INTERLEAVED = "half", "partial", "interleaved"
ROTARY = {
    **dict.fromkeys(
        (
            "mistral",
            "gemma2",
            "phi3",
            "falcon",
            "modernbert",
            "gemma3",
            "gpt-oss",
            "olmo-",
            "olmo2",
            "smollm3",
            "esm",
            "hunyuan",
        ),
        HALF,
    ),
    **dict.fromkeys(("gpt-neox", "gptj", "codegen", "phi-", "stablelm", "x-rotary"), PARTIAL),
    **dict.fromkeys(("cohere", "complex-rotary"), INTERLEAVED),
}
QK_NORM = ("gemma3", "packed-permute-norm", "hunyuan", "olmo2", "cohere-norms")
SINKS = ("gpt-oss",)
CAPPED = ("gemma2",)
ROUTERS = {"gpt-oss-eager": 2}
"""Softmaxes that choose experts."""

KEEPS = "keeps its own attention"
MODULE_KEEPS = {
    "gpt-neo-eager": "could not be reproduced with its own weights",
    "queries-by-group": "could not be reproduced with its own weights",
    "complex-rotary": "of no known role",
    "x-rotary": "of no known role",
    "x-rotary-sdpa": "of no known role",
    "x-alibi": "of no known role",
    "longt5-eager": "put into blocks",
    "two-streams": "tokens of several projections are joined",
    **dict.fromkeys(("packed-sequence", "windows", "image-attends-text"), "the attention is the model itself"),
}
"""Sites in modules that cannot be replaced, and why: their own forward goes on, with repeated heads."""

GRAPH_KEEPS = {
    "complex-rotary": "changes how heads lie",
    "longt5-eager": "put into blocks",
    "x-rotary": "inside a wrapped region",
    "x-rotary-sdpa": "inside a wrapped region",
    "falcon-sdpa": "repeated before they are rotated",
    "falcon-eager": "repeated before they are rotated",
    "packed-sequence": "batch and token axes are lost",
}
"""Those whose exported program keeps its attention as well."""

NOT_IN_FILES = {"falcon": "repeated before they are rotated"}
"""Families that are refused in files only."""


def _jobs(*, rewritable: bool = False) -> list[object]:
    """Every case through torch, one implementation of each family through the exporters."""
    every = [c for c in (*EXTRA.values(), *WIDE.values()) if not rewritable or c.refused < c.sites]
    families = {family_of(case): case for case in reversed(every)}
    files = [case for case in families.values() if not (rewritable and _trait(case, NOT_IN_FILES))]
    return [*one_of_each_family(every, "torch"), *matrix(files, DOORS[1:])]


def _matches(case: ZooCase, door: str, zoo_onnx: Callable[..., Path]) -> Matches:
    return (through_torch(case) if door == "torch" else through_onnx(zoo_onnx(case, door))).matches


@pytest.mark.slow
@pytest.mark.parametrize(("case", "door"), _jobs())
def test_every_attention_is_a_site_or_refused_for_its_reason(
    case: ZooCase, door: str, zoo_onnx: Callable[..., Path]
) -> None:
    matches = _matches(case, door, zoo_onnx)
    if door != "torch" and (reason := _trait(case, NOT_IN_FILES)) is not None:
        assert [r.reason for r in matches.refusals if reason not in r.reason] == []
        assert len(matches.refusals) == case.sites
        return
    assert [r.reason for r in matches.refusals if case.refusal not in r.reason] == []
    assert (len(matches.sites), len(matches.refusals)) == (case.sites - case.refused, case.refused)
    assert len(matches.not_attention) == ROUTERS.get(case.name, 0)
    for site in matches.sites:
        assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (case.heads, case.kv_heads, 8, 8)
        assert (site.k.rotary.kind if site.k.rotary else None) == _trait(case, ROTARY)
        assert site.qk_norm is case.name.startswith(QK_NORM)
        kinds = [m.kind for m in site.modifiers]
        assert ("sinks" in kinds) is case.name.startswith(SINKS)
        assert ("softcap" in kinds) is case.name.startswith(CAPPED)
        assert site.replay_error < REPLAY_LIMIT
    crossing = sum(site.cross for site in matches.sites)
    if "encoder-decoder" in case.tags:
        assert crossing == sum(site.causal for site in matches.sites) > 0
        assert not any(site.causal and site.cross for site in matches.sites)
    elif "cross" in case.tags:
        assert crossing == len(matches.sites) and not any(site.causal for site in matches.sites)
    else:
        assert crossing == 0 and all(site.causal is case.causal for site in matches.sites)


def _trait(case: ZooCase, table: dict[str, str]) -> str | None:
    found = [key for key in table if case.name.startswith(key)]
    return table[max(found, key=len)] if found else None


@pytest.mark.slow
@pytest.mark.parametrize(("case", "door"), _jobs(rewritable=True))
def test_a_tied_twin_is_rewritten_without_loss_and_a_perturbed_one_is_not(
    case: ZooCase, door: str, zoo_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    if door == "torch":
        exact, lossy = (_torch_error(case, perturbed=p) for p in (False, True))
    else:
        path = zoo_onnx(case, door)
        exact, lossy = (_file_error(case, path, tmp_path, perturbed=p) for p in (False, True))
    assert exact < EXACT
    assert lossy > MOVED


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.exhaustive] if n in ("falcon-eager", "x-rotary-sdpa") else [])
        for n in sorted({*MODULE_KEEPS, *GRAPH_KEEPS})
    ],
)
def test_a_site_that_keeps_its_attention_says_why_in_the_module_and_in_the_graph(name: str) -> None:
    case = WIDE.get(name) or EXTRA[name]
    new = rewriter.optimize(tied(case), _target(case), example_inputs=case.inputs(*RECORDED))
    _check_notes(new.rewrite_report, MODULE_KEEPS.get(name))
    assert _graph_error(case, perturbed=False) < EXACT
    assert _graph_error(case, perturbed=True) > MOVED


def _check_notes(report: RewriteReport, why: str | None) -> None:
    """Some site keeps its attention for this reason and all others are rewritten whole; none does if `why` is None."""
    notes = [note for row in report.sites for note in row.notes]
    assert bool(notes) is (why is not None), "the table of what is kept is wrong"
    assert all(note.startswith(KEEPS) and why is not None and why in note for note in notes)


def _torch_error(case: ZooCase, *, perturbed: bool) -> float:
    module = tied(case, perturbed=perturbed)
    sizes = [case.inputs(*RECORDED), case.inputs(*OTHER)]
    expected = [case.run(module, inputs) for inputs in sizes]
    new = rewriter.optimize(module, _target(case), example_inputs=sizes[0])
    _check_report(case, new.rewrite_report, exact=not perturbed)
    _check_notes(new.rewrite_report, MODULE_KEEPS.get(case.name))
    return max(distance(case.run(new, i), e) for i, e in zip(sizes, expected, strict=True))


def _graph_error(case: ZooCase, *, perturbed: bool) -> float:
    module, inputs = tied(case, perturbed=perturbed), case.inputs(*RECORDED)
    constants: dict[str, Any] = {}
    if getattr(getattr(module, "config", None), "use_cache", False):
        constants["use_cache"] = False
    expected = case.run(module, inputs)
    program = torch.export.export(module, (), {**inputs, **constants}, strict=False)
    new = rewriter.optimize(program, _target(case))
    _check_report(case, new.rewrite_report, exact=not perturbed)
    _check_notes(new.rewrite_report, GRAPH_KEEPS.get(case.name))
    return distance(case.run(new.module(), {**inputs, **constants}), expected)


def _target(case: ZooCase) -> str:
    return f"gqa{legal_pool(case)}"


def _check_report(case: ZooCase, report: RewriteReport, *, exact: bool) -> None:
    assert len(report.sites) == case.sites - case.refused
    assert all(row.exact is exact for row in report.sites)


def _file_error(case: ZooCase, path: Path, folder: Path, *, perturbed: bool) -> float:
    twin = _twin(case, path, folder, perturbed=perturbed)
    out = folder / f"rewritten-{perturbed}.onnx"
    done = rewriter.optimize(twin, _target(case))
    done.save(out)
    onnx.checker.check_model(out, full_check=True)
    assert len(done.rewrite_report.sites) == case.sites - case.refused
    return distance(run_file(out, case.inputs(*RECORDED)), run_file(twin, case.inputs(*RECORDED)))


def _twin(case: ZooCase, path: Path, folder: Path, *, perturbed: bool) -> Path:
    """The export with other weights. Where the exporter folded the weights into others the twin is exported anew, and
    the control is the export itself, whose heads differ: an export takes ten seconds."""
    try:
        return twin_file(case, path, folder / f"twin-{perturbed}.onnx", perturbed=perturbed)
    except AssertionError:
        if perturbed:
            return path
        other = replace(case, name=f"{case.name}-tied", build=lambda: tied(case))
        return export(other, path.name.removeprefix(case.name).split(".")[1], folder)


def test_tables_name_families_that_exist() -> None:
    names = [*EXTRA, *WIDE]
    for key in (*ROTARY, *QK_NORM, *SINKS, *CAPPED, *ROUTERS, *MODULE_KEEPS, *GRAPH_KEEPS, *NOT_IN_FILES):
        assert any(name.startswith(key) for name in names), key
