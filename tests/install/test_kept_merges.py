"""Heads merged with turns where an attention's own forward is kept: queries and output projection follow in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import rewriter
from passes.match.attention import find_attention
from passes.targets import GroupedQuery
from passes.targets.grouped_query import averaged
from rewriter.capture.torch_export import capture
from rewriter.errors import NothingToRewrite
from rewriter.install.repeated_heads import keep_forwards
from tests.install.kept_twins import DIM, HEADS, KEPT, Crowd, Told, given, through, turned, untied
from tests.install.test_kept_attention import STORED, Holder, Stored, angles

EXACT, MOVED = 1e-4, 1e-2
KEEPS = "keeps its own attention"
CASES = [
    pytest.param(Crowd, False, "module", id="several attentions"),
    pytest.param(Crowd, True, "module", id="several attentions, packed"),
    pytest.param(Told, True, "module", id="weights told"),
    pytest.param(Told, False, "program", id="weights told, program"),
    pytest.param(Told, True, "program", id="weights told, packed, program"),
    pytest.param(Told, False, "file", id="weights told, file"),
    pytest.param(Told, True, "file", id="weights told, packed, file"),
    pytest.param(Told, False, "old file", id="weights told, old file"),
]


def apart(answers: tuple[Tensor, ...], wanted: Any) -> float:
    """The largest difference; told weights of heads included."""
    expected = wanted if isinstance(wanted, tuple) else (wanted,)
    return max(float((a - b).abs().max()) for a, b in zip(answers, expected, strict=True))


@pytest.mark.parametrize(("kind", "packed", "door"), CASES)
def test_turned_heads_are_recovered_where_the_forward_is_kept(
    kind: type[Crowd], packed: bool, door: str, tmp_path: Path
) -> None:
    model = turned(kind, packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in ("aligned", "joint"):
        answers, report = through(door, model, GroupedQuery(KEPT, merge=merge), tmp_path)
        assert apart(answers, model(given(9))) < EXACT
        assert all(row.exact and row.merge == merge for row in report.sites) and len(report.sites) == 2
        assert all(any(note.startswith(KEEPS) for note in row.notes) for row in report.sites)
        removed = 2 * 2 * (HEADS - KEPT) * DIM * (HEADS * DIM + 1)
        assert report.parameters.before - report.parameters.after == removed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the original"
    answers, _ = through(door, model, GroupedQuery(KEPT, merge="mean"), tmp_path)
    assert apart(answers, model(given(9))) > MOVED, "control: averages recover nothing"


@pytest.mark.parametrize(("kind", "packed", "door"), CASES)
def test_calibrated_heads_are_nearer_than_their_mean(
    kind: type[Crowd], packed: bool, door: str, tmp_path: Path
) -> None:
    model = untied(kind, packed)
    wanted = model(given(9))
    first = wanted[0] if isinstance(wanted, tuple) else wanted
    calibration = [given(9, seed=seed) for seed in range(1, 9)]

    def error(target: Any, *more: Any) -> tuple[float, set[str]]:
        answers, report = through(door, model, target, tmp_path, *more)
        return float((answers[0] - first).square().mean()), {row.merge for row in report.sites}

    mean, averages = error(f"gqa{KEPT}")
    joint, merges = error(f"gqa{KEPT}", calibration)
    assert averages == {"mean"} and merges == {"joint"}
    assert joint < 0.7 * mean


@pytest.mark.parametrize("how", STORED)
def test_queries_follow_however_keys_are_stored(how: str) -> None:
    """Rotated heads, whose rotation the module is given."""
    model = Stored(how).eval().requires_grad_(False)
    holder, x = Holder(model), (given(9), angles(9))
    calibration = [(given(9, seed=seed), angles(9)) for seed in range(1, 9)]
    new = {
        name: rewriter.optimize(holder, f"gqa{KEPT}", example_inputs=x, calibration=data)
        for name, data in (("joint", calibration), ("mean", None))
    }
    assert [m.rewrite_report.sites[0].merge for m in new.values()] == ["joint", "mean"]
    assert all(m.rewrite_report.sites[0].notes[0].startswith(KEEPS) for m in new.values())
    other = (given(11, seed=9), angles(11))
    errors = {name: float((m(*other) - holder(*other)).square().mean()) for name, m in new.items()}
    assert errors["joint"] < 0.7 * errors["mean"]


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_saved_and_loaded(packed: bool, tmp_path: Path) -> None:
    model = turned(Crowd, packed)
    new = rewriter.optimize(model, GroupedQuery(KEPT, merge="joint"), example_inputs=(given(6),))
    rewriter.save(new, tmp_path / "new")
    loaded = rewriter.load(tmp_path / "new", module=Crowd(packed))
    assert torch.equal(loaded(given(9)), new(given(9)))
    state = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    other = rewriter.optimize(untied(Crowd, packed), f"gqa{KEPT}", example_inputs=(given(6),))
    other.load_state_dict(state)
    assert apart((other(given(9)),), model(given(9))) < EXACT


def test_it_can_be_rewritten_again() -> None:
    model = turned(Crowd)
    new = rewriter.optimize(model, GroupedQuery(KEPT, merge="joint"), example_inputs=(given(6),))
    calibration = [given(n, 4) for n in (12, 13, 14, 16)]
    twice = {
        name: rewriter.optimize(new, "mqa", example_inputs=(given(6),), calibration=data)
        for name, data in (("joint", calibration), ("mean", None))
    }
    assert [(row.before, row.after) for row in twice["joint"].rewrite_report.sites] == [(f"gqa{KEPT}", "mqa")] * 2
    errors = {name: float((m(given(9)) - model(given(9))).square().mean()) for name, m in twice.items()}
    assert errors["joint"] < 0.7 * errors["mean"]


@pytest.mark.parametrize("part", ["query", "output"])
def test_what_is_computed_cannot_follow(part: str) -> None:
    """Asked for, a merge is refused with the reason; the default is the mean, and says why."""
    model = turned(Crowd)
    layer = model.first.project[0] if part == "query" else model.first.out
    parametrizations.weight_norm(layer)
    reason = f"its {part} weight is computed" if part == "query" else "the output projection's weight is computed"
    asked: dict[str, Any] = {"layers": "attention.0", "example_inputs": (given(6),)}
    with pytest.raises(NothingToRewrite, match=f'{reason}, not stored.*merge="mean"'):
        rewriter.optimize(model, GroupedQuery(KEPT, merge="joint"), **asked)
    calibration = [given(n, 4) for n in (12, 13)]
    rewritten = rewriter.optimize(model, f"gqa{KEPT}", example_inputs=(given(6),), calibration=calibration)
    rows = {row.name: row for row in rewritten.rewrite_report.sites}
    assert {name: row.merge for name, row in rows.items()} == {"attention.0": "mean", "attention.1": "joint"}
    assert any(note.startswith("heads are averaged") and reason in note for note in rows["attention.0"].notes)
    plain = rewriter.optimize(model, {"attention.0": f"gqa{KEPT}"}, example_inputs=(given(6),))
    row = plain.rewrite_report.sites[0]
    mean = GroupedQuery(KEPT, merge="mean")  # refitted where that can be
    refitted = rewriter.optimize(model, mean, example_inputs=(given(6),), calibration=calibration)
    first = refitted.rewrite_report.sites[0]
    assert first.merge == "mean" and not refitted.rewrite_report.refused
    assert any(note.startswith("heads are averaged") for note in first.notes) is (part == "output")
    assert rows["attention.0"].error == pytest.approx(row.error), "the error is that of the mean"


def test_heads_that_are_not_where_they_are_thought_to_be_are_left_alone() -> None:
    """The proof by turning the original's heads; with the description as it is, it holds."""
    model = turned(Crowd)
    args = (given(6),)
    captured = capture(model, args, {})
    matches = find_attention(captured.flow)
    site = matches.sites[0]
    made = GroupedQuery(KEPT, merge="joint").transform(captured.flow, site, matches.evidence[site.name])
    backwards = replace(site.q, columns=np.ascontiguousarray(site.q.columns[::-1]))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def kept(site: Any) -> Any:
        mine = replace(made, site=site)
        why = {site.name: "for a test"}
        return keep_forwards(
            model, captured.flow, {"": [mine]}, why, args, {}, lambda r, why: averaged(captured.flow, r, why)
        )

    wrong = kept(replace(site, q=backwards))
    assert "heads that are turned do not give what they should" in wrong.refused[site.name]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not kept(site).refused
