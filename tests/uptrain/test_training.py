"""Runs of the loop on small models: what they reach, what they leave alone, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewriter
from rewriter import Recipe
from rewriter.errors import RewriteError, UnsupportedModel, UsageError
from rewriter.uptrain.schedule import learning_rate
from tests.uptrain.small_models import (
    VOCABULARY,
    bert,
    equal,
    largest_difference,
    llama,
    padded_rows,
    student_of,
    token_ids,
    weights,
)

RECIPE = Recipe(steps=6, batch=4, window=16, learning_rate=3e-3, validation=8, save_every=2)


def run(recipe: Recipe = RECIPE, build: Any = llama, **options: Any) -> rewriter.Uptrained:
    teacher = build()
    data = token_ids() if build is llama else padded_rows()
    return rewriter.uptrain(student_of(teacher), teacher, data, recipe=recipe, **options)


@pytest.mark.parametrize("build", [llama, bert], ids=["decoder", "encoder"])
def test_students_come_nearer_and_everything_else_stays(build: Any) -> None:
    teacher = build()
    student = student_of(teacher)
    old, before, modes = weights(teacher), weights(student), [m.training for m in student.modules()]
    data = token_ids() if build is llama else padded_rows()
    done = rewriter.uptrain(student, teacher, data, recipe=replace(RECIPE, steps=60, validate_every=30))
    assert equal(weights(teacher), old) and done.model is student
    assert [m.training for m in student.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert sorted(done.drift) == [0, 30, 60] and done.steps == 60
    assert done.after.cosine > 0.5 * done.before.cosine + 0.5 * 1 if build is bert else True
    assert (done.after.kl < 0.6 * done.before.kl) if build is llama else done.after.kl is None  # type: ignore[operator]
    assert [p.step for p in done.curve] == list(range(60))
    assert [p.phase for p in done.curve] == ["layers"] * 12 + ["output"] * 48
    for part in (done.curve[:12], done.curve[12:]):
        assert np.mean([p.loss for p in part[-4:]]) < np.mean([p.loss for p in part[:4]])
    moved = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert moved and all(".layer" in name for name in moved)


def test_targets_without_parameters_heal_by_what_is_around_them() -> None:
    teacher = bert()
    student = student_of(teacher, "fnet")
    with pytest.raises(UsageError, match="no parameter would learn") as caught:
        rewriter.uptrain(student, teacher, padded_rows(), recipe=replace(RECIPE, train="rewritten"))
    assert "blocks" in caught.value.hint
    done = rewriter.uptrain(student, teacher, padded_rows(), recipe=replace(RECIPE, steps=60))
    assert done.compared and done.after.cosine > done.before.cosine + 0.3 * (1 - done.before.cosine)


def test_validation_measures_what_the_models_say() -> None:
    teacher = llama()
    student = student_of(teacher)
    rows = token_ids(64).reshape(4, 16)
    done = rewriter.uptrain(student, teacher, token_ids(), validation=rows, recipe=replace(RECIPE, steps=1))
    with torch.no_grad():
        pair = [m(torch.from_numpy(rows)) for m in (teacher, student)]
        losses = [m(torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss for m in (teacher, student)]
        old, new = (out.logits.double().log_softmax(-1) for out in pair)
        kl = float((old.exp() * (old - new)).sum(-1).mean())
    assert done.after.kl == pytest.approx(kl, rel=1e-4)
    assert done.after.teacher_perplexity == pytest.approx(float(losses[0].exp()), rel=1e-4)
    assert done.after.perplexity == pytest.approx(float(losses[1].exp()), rel=1e-4)


@pytest.mark.parametrize(
    ("train", "wished"),
    [
        ("rewritten", {"k_proj", "v_proj"}),
        ("blocks", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "layernorm"}),
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "layernorm", "embed"}),
    ],
)
def test_only_what_was_asked_for_learns(train: Any, wished: set[str]) -> None:
    teacher = llama()
    student = rewriter.optimize(teacher, "mqa", layers="-1:", verify=False)
    before = weights(student)
    rewriter.uptrain(student, teacher, token_ids(), recipe=replace(RECIPE, train=train, layer_phase=0.0))
    moved = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert {part for part in wished if any(part in name for name in moved)} == wished
    assert all(any(part in name for part in {*wished, "norm", "lm_head"}) for name in moved)
    if train != "all":
        assert all(name.startswith("model.layers.1.") for name in moved)


# ------------------------------------------------------------------ one run, however it is cut up


def test_a_run_is_a_function_of_its_seed() -> None:
    first, again, other = (weights(run(replace(RECIPE, seed=seed)).model) for seed in (0, 0, 1))
    assert equal(first, again) and not equal(first, other)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("build", [llama, bert], ids=["decoder", "encoder"])
def test_a_resumed_run_is_the_same_run(build: Any, dropout: bool, tmp_path: Path) -> None:
    recipe = replace(RECIPE, dropout=dropout, validate_every=3)
    straight = run(recipe, build, checkpoints=tmp_path / "straight")
    shutil.copytree(tmp_path / "straight" / "step-000000004", tmp_path / "cut" / "step-000000004")
    (tmp_path / "cut" / ".draft-000000006").mkdir()
    torch.rand(5)  # random states come from the checkpoint
    resumed = run(recipe, build, checkpoints=tmp_path / "cut", resume=True)
    assert resumed.resumed_from == 4 and straight.resumed_from is None
    assert equal(weights(resumed.model), weights(straight.model))
    assert resumed.curve == straight.curve and resumed.drift == straight.drift
    assert resumed.tokens == straight.tokens
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["step-000000004", "step-000000006"]
    if dropout and build is bert:
        assert not equal(weights(run(replace(recipe, dropout=False), build).model), weights(straight.model))


def test_runs_are_resumed_as_they_were_or_not_at_all(tmp_path: Path) -> None:
    run(checkpoints=tmp_path / "run")
    with pytest.raises(UsageError, match="another run"):
        run(replace(RECIPE, learning_rate=1e-3), checkpoints=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="holds checkpoints"):
        run(checkpoints=tmp_path / "run")
    with pytest.raises(UsageError, match="no checkpoint"):
        run(checkpoints=tmp_path / "other", resume=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("build", [llama, bert], ids=["decoder", "encoder"])
def test_accumulated_parts_make_the_same_step(build: Any) -> None:
    def trained(recipe: Recipe) -> dict[str, torch.Tensor]:
        # the softmax does not see a bias of all keys: its gradient is rounding, which Adam makes as large as any other
        return {n: w for n, w in weights(run(recipe, build).model).items() if not n.endswith("k_proj.bias")}

    whole = trained(RECIPE)
    assert largest_difference(whole, trained(replace(RECIPE, accumulate=4))) < 2e-5
    assert largest_difference(whole, trained(replace(RECIPE, clip=0.1))) > 1e-4


def test_checkpointed_activations_make_the_same_step() -> None:
    plain, twice = (weights(run(replace(RECIPE, gradient_checkpointing=on)).model) for on in (False, True))
    assert largest_difference(plain, twice) < 1e-5


def test_half_precision_students_learn_in_float32_and_keep_their_dtype() -> None:
    teacher = llama().to(torch.bfloat16)
    student = student_of(teacher)
    done = rewriter.uptrain(student, teacher, token_ids(), recipe=replace(RECIPE, steps=40, precision="bf16"))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16} and done.precision == "bf16"
    assert done.after.kl < 0.8 * done.before.kl  # type: ignore[operator]


def test_precisions_may_follow_each_other_in_one_process() -> None:
    assert [run(replace(RECIPE, precision=p)).precision for p in ("bf16", "no", None)] == ["bf16", "no", "no"]


def test_students_are_saved_as_ordinary_checkpoints(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = run()
    done.save(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert equal(weights(again), weights(done.model)) and again.config.num_key_value_heads == 1


# ------------------------------------------------------------------ how long


def test_the_papers_budget() -> None:
    assert Recipe(fraction=0.05, pretraining_tokens=2e12, batch=512).total(2048) == 95368
    assert Recipe(fraction=0.05, pretraining_tokens=100, batch=8).total(16) == 1
    teacher = llama()
    done = rewriter.uptrain(
        student_of(teacher),
        teacher,
        token_ids(),
        fraction=0.05,
        pretraining_tokens=6400,
        recipe=replace(RECIPE, steps=None),
    )
    assert done.steps == 5 and done.tokens == 320


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0 and 0 < rates[0] < 0.1 and 0 < rates[-1] < 0.001


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "what"),
    [
        pytest.param({}, "how long", id="no length"),
        pytest.param({"fraction": 0.05}, "how many tokens", id="no tokens"),
        pytest.param({"steps": 5, "fraction": 0.05, "pretraining_tokens": 1e9}, "both", id="both"),
        pytest.param({"steps": 0}, "steps", id="no steps"),
        pytest.param({"steps": 5, "resume": True}, "resume", id="nowhere to resume"),
        pytest.param({"steps": 5, "twin": "somewhere"}, "twin", id="twin of a torch model"),
        pytest.param({"steps": 5, "checkpoints": "/nowhere/at/all"}, "not a folder", id="no folder"),
        pytest.param({"steps": 5, "recipe": Recipe(batch=3, accumulate=2)}, "does not divide", id="odd batch"),
    ],
)
def test_wrong_numbers_are_refused_with_a_hint(options: dict[str, Any], what: str) -> None:
    teacher = llama()
    with pytest.raises(UsageError, match=what) as caught:
        rewriter.uptrain(student_of(teacher), teacher, token_ids(), **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"window": 1}, {"warmup": 2.0}, {"learning_rate": 0.0}, {"train": "some"}, {"precision": "int8"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_recipes_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Recipe(steps=1, **wrong)


def test_models_that_do_not_belong_together() -> None:
    teacher = llama()
    student = student_of(teacher)
    cases: list[tuple[Any, Any, Any, type[RewriteError], str]] = [
        (teacher, teacher, token_ids(), UsageError, "share parameters"),
        (copy.deepcopy(teacher), teacher, token_ids(), UsageError, "nothing was rewritten"),
        (student, bert(), token_ids(), UnsupportedModel, "puts out 32 .* 96"),
        (student, "nowhere", token_ids(), UsageError, "nowhere"),
        (student, 5, token_ids(), UsageError, "int"),
        (student, "model.onnx", token_ids(), UnsupportedModel, "ONNX"),
        ("model.onnx", teacher, token_ids(), UsageError, "no such file"),
        (student, teacher, token_ids() + VOCABULARY, UsageError, "vocabulary of 96"),
        (student, teacher, {"pixel_values": np.zeros((20, 3, 8, 8), np.float32)}, UsageError, "does not take"),
    ]
    for one, other, data, kind, what in cases:
        with pytest.raises(kind, match=what) as caught:
            rewriter.uptrain(one, other, data, recipe=RECIPE)
        assert caught.value.hint


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(RewriteError, match="loss is") as caught:
        run(replace(RECIPE, steps=60, learning_rate=1e30, layer_phase=0.0))
    assert "learning rate" in caught.value.hint
