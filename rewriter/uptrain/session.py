"""One run from two torch modules and data to a report: what has to be set up before the loop, and undone after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewriter.calibration.batches import is_sampled
from rewriter.errors import UnsupportedModel, UsageError
from rewriter.uptrain import checkpoint
from rewriter.uptrain.batch import Batch, check_vocabulary, collate
from rewriter.uptrain.corpus import Reading, held_rows, read
from rewriter.uptrain.loop import Loop, Progress, State
from rewriter.uptrain.objective import Distillation, is_causal, plan
from rewriter.uptrain.observe import modes, restore_modes
from rewriter.uptrain.pairs import changed, to_train
from rewriter.uptrain.recipe import Recipe
from rewriter.uptrain.result import Uptrained
from rewriter.uptrain.rows import Rows
from rewriter.uptrain.written import written_rows

SHARDED = ("FSDP", "DEEPSPEED")


def train(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    recipe: Recipe,
    accelerator: Any,
    *,
    tokenizer: Any,
    validation: Any,
    folder: Path | None,
    resume: bool,
    progress: Progress | None,
    only: Collection[str] | None = None,
    check: Callable[[Batch], None] | None = None,
) -> Uptrained:
    """See `rewriter.uptrain`. The student is trained in place; modes, devices and dtypes of both are restored.

    Args:
        only: names of parameters outside which none learns.
        check: called with a batch of the data before training starts.
    """
    different = changed(student, teacher)
    _require_apart(student, teacher, different, recipe)
    _prepare_folder(accelerator, folder, resume, recipe.keep)
    _seed(recipe.seed, accelerator.process_index)
    learning = to_train(student, teacher, list(different), recipe.train)
    learning = learning if only is None else learning & set(only)
    if not learning:
        raise UsageError("no parameter would learn: what was rewritten has none", hint='train "blocks" or "all"')
    with _ready(student, teacher, recipe, learning, accelerator.device):
        rows = _rows(data, _reading(teacher, recipe, tokenizer, accelerator.device), validation, teacher)
        pad = _padding(tokenizer, teacher)
        sample = collate(list(rows.validation[: min(4, recipe.batch)]), pad).to(accelerator.device)
        check_vocabulary(sample, teacher, "teacher")
        check_vocabulary(sample, student, "student")
        if check is not None:
            check(sample)
        plans = plan(student, teacher, different, sample, recipe)
        total = recipe.total(rows.tokens)
        distillation = Distillation(student, plans, recipe, sharded=_is_sharded(accelerator))
        loop = Loop(accelerator, distillation, teacher, plans, rows, recipe, total, pad)
        start = loop.restore(folder) if resume and folder is not None else State(0, 0, 0.0, [], {})
        begun = start.step if resume else None
        done = loop.run(start, folder, progress)
        gathered = _gathered(accelerator, loop.model)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return Uptrained(
        model=student,
        recipe=recipe,
        steps=total,
        tokens=done.tokens,
        curve=tuple(done.curve),
        drift=dict(done.drift),
        compared=plans.pairs,
        trained=trained,
        device=str(accelerator.device),
        processes=accelerator.num_processes,
        precision=str(accelerator.mixed_precision),
        seconds=done.seconds,
        resumed_from=begun,
        state=gathered,
    )


def _require_apart(student: nn.Module, teacher: nn.Module, different: Sequence[str], recipe: Recipe) -> None:
    theirs = {id(p) for p in teacher.parameters()}
    if any(id(p) in theirs for p in student.parameters()):
        raise UsageError(
            "student and teacher share parameters, so that training one would change the other",
            hint="rewrite a copy: leave inplace out, or pass copy.deepcopy(model)",
        )
    if not different and (recipe.train == "rewritten" or not recipe.language_model):
        raise UsageError("student and teacher are equal: nothing was rewritten", hint="give the rewritten model first")


def _prepare_folder(accelerator: Any, folder: Path | None, resume: bool, keep: int) -> None:
    """Sweep what a killed run left; a folder with checkpoints is only for resuming."""
    if folder is None:
        return
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"{folder.absolute().parent} is not a folder", hint="create it first")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", hint="name a folder for checkpoints")
    if resume:
        checkpoint.newest(folder)
    elif checkpoint.complete(folder):
        raise UsageError(f"{folder} holds checkpoints of a run", hint="resume it (--resume), or name another folder")
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        checkpoint.sweep(folder, keep)
    accelerator.wait_for_everyone()


def _seed(seed: int, rank: int) -> None:
    import random

    import numpy as np

    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def _reading(teacher: nn.Module, recipe: Recipe, tokenizer: Any, device: torch.device) -> Reading:
    """Text is packed for models that are causal, which is tried out on a few tokens."""
    ids = torch.arange(8)[None].to(device)
    try:
        packed = is_causal(teacher, Batch({"input_ids": ids}, None))
    except (UsageError, UnsupportedModel):  # it takes other inputs: these are rows already
        packed = False
    batch = recipe.batch if recipe.group_by_length else 1
    return Reading(packed, recipe.window, tokenizer, recipe.validation, recipe.seed, batch)


def _rows(data: Any, reading: Reading, validation: Any, teacher: nn.Module) -> Rows:
    if not is_sampled(data):
        return read(data, reading, validation)
    held = None if validation is None else held_rows(validation, reading)
    return written_rows(teacher, reading.window, reading.seed, reading.held_out, held)


def _padding(tokenizer: Any, teacher: nn.Module) -> int:
    config = getattr(teacher, "config", None)
    for found in (getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None)):
        if isinstance(found, int):
            return found
    return 0


@contextlib.contextmanager
def _ready(
    student: nn.Module, teacher: nn.Module, recipe: Recipe, learning: Collection[str], device: torch.device
) -> Iterator[None]:
    """Both on the device; the student in float32 with the parameters that learn; all of it undone at the end."""
    undo: list[Callable[[], Any]] = []
    for model in (student, teacher):
        undo += [partial(model.to, home) for home in {p.device for p in model.parameters()} - {device}]
        undo.append(partial(restore_modes, modes(model)))
        model.to(device)
        model.eval()
    dtypes = {p: p.dtype for p in student.parameters()}
    undo.append(lambda: _restore_dtypes(dtypes))
    for parameter in dtypes:
        if parameter.is_floating_point() and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    wanted = {p: p.requires_grad for p in student.parameters()}
    undo.append(lambda: [p.requires_grad_(w) for p, w in wanted.items()])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name in learning)
    if recipe.gradient_checkpointing:
        undo.append(_checkpoint_activations(student))
    if recipe.dropout:
        student.train()
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def _restore_dtypes(dtypes: dict[nn.Parameter, torch.dtype]) -> None:
    for parameter, dtype in dtypes.items():
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)


def _checkpoint_activations(student: nn.Module) -> Callable[[], Any]:
    """Switch Hugging Face's gradient checkpointing on; returns what switches it off.

    Layers compute activations twice in training mode alone, so that mode is set on them, and only on them: their
    parts keep their dropout off.
    """
    enable: Any = getattr(student, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(student, "supports_gradient_checkpointing", False):
        raise UnsupportedModel(
            f"{type(student).__name__} does not offer gradient checkpointing", hint="accumulate smaller parts instead"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in student.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    off: Callable[[], Any] = student.gradient_checkpointing_disable  # type: ignore[assignment]
    return off


def _is_sharded(accelerator: Any) -> bool:
    return any(kind in str(accelerator.distributed_type) for kind in SHARDED)


def _gathered(accelerator: Any, model: nn.Module) -> dict[str, Any] | None:
    """The student's whole weights, where each process holds a part of them."""
    if not _is_sharded(accelerator):
        return None
    state = accelerator.get_state_dict(model)
    return {name.removeprefix("student."): tensor for name, tensor in state.items()} if state else {}
