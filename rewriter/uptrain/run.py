"""`rewriter.uptrain`: from models and data as a person has them to a trained student and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewriter.calibration.tokenizer import tokenizer_beside, tokenizer_in
from rewriter.errors import UnsupportedModel, UsageError
from rewriter.model_kinds import is_onnx
from rewriter.uptrain.recipe import HOW_LONG, Recipe
from rewriter.uptrain.result import Uptrained


def uptrain(
    student: Any,
    teacher: Any,
    data: Any,
    *,
    steps: int | None = None,
    fraction: float | None = None,
    pretraining_tokens: float | None = None,
    recipe: Recipe | None = None,
    tokenizer: Any = None,
    validation: Any = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    twin: Any = None,
    progress: Any = None,
) -> Uptrained:
    """Train a rewritten model towards its original: block outputs first, then the model's output.

    Runs as one process, or as one of several under ``accelerate launch``, whose settings (number of processes, FSDP,
    mixed precision) hold. The data's order, and so the run, is a function of the recipe's seed; a run that was killed
    and is resumed gives the weights that it would have given, bit for bit on CPUs.

    Args:
        student: a torch module, which is trained in place, or a path to one; or an .onnx file or ONNX model with a
            `twin`, of which a trained copy is made.
        teacher: the original: a torch module or a path to a Hugging Face directory. It is not changed.
        data: token ids (an integer array, [N] or [B, T]), texts, (texts, tokenizer), files (.txt, .jsonl, .npy, .npz,
            .safetensors), named inputs, an iterable of texts, id lists or inputs (a dataset, which may stream), or
            "sampled": the teacher, a causal language model, writes them as training goes on.
            Causal models get windows of packed text, others one text a sequence.
        steps, fraction, pretraining_tokens: how long to train; they take precedence over the recipe's.
        recipe: everything else that decides what comes out.
        tokenizer: for texts; found beside models that are paths, and in those that carry one.
        validation: held-out data, like `data`; without it some sequences of `data` are held out.
        checkpoints: a folder to keep checkpoints in.
        resume: go on from the newest checkpoint in `checkpoints`; everything else must be as it was.
        twin: the torch module (or its folder) that an ONNX student was exported from.
        progress: called after each step with (step, steps, {"loss": …, term: …}).

    Returns:
        The trained student with its report; see `Uptrained`.

    Raises:
        UsageError: wrong numbers; data that are missing, too short or do not fit; checkpoints of another run.
        UnsupportedModel: the two models' outputs do not fit, or the student cannot be trained.
        RewriteError: the loss became infinite.
    """
    recipe = _recipe(recipe, steps, fraction, pretraining_tokens)
    if resume and checkpoints is None:
        raise UsageError("there is nothing to resume from", hint="say where the checkpoints are")
    if is_onnx(teacher) or str(teacher).endswith(".onnx"):
        raise UnsupportedModel(
            "the teacher is an ONNX model, whose inner values and batches are not at hand for training",
            hint="give the torch model that it was exported from",
        )
    if twin is not None and not _names_onnx(student):
        raise UsageError("only ONNX students have a torch twin", hint="leave twin out")
    original = _module(teacher, "teacher")
    folders = [Path(m) for m in (student, twin, teacher) if isinstance(m, (str, Path))]
    folders = [path if path.is_dir() else path.parent for path in folders]
    if tokenizer is None:
        tokenizer = next(
            (t for folder in folders if (t := tokenizer_beside(folder)) is not None), tokenizer_in(original)
        )

    def trained(model: Any, only: Collection[str] | None = None, check: Callable[[Any], None] | None = None) -> Any:
        from rewriter.uptrain.session import train

        with _accelerator(recipe) as accelerator:
            return train(
                model, original, data, recipe, accelerator,
                tokenizer=tokenizer, validation=validation, folder=None if checkpoints is None else Path(checkpoints),
                resume=resume, progress=progress, only=only, check=check,
            )  # fmt: skip

    if _names_onnx(student):
        from rewriter.uptrain.onnx_twin import uptrain_through

        return uptrain_through(student, twin, original, trained)
    done: Uptrained = trained(_module(student, "student"))
    return replace(done, student_from=folders[0] if isinstance(student, (str, Path)) else None)


def _names_onnx(student: Any) -> bool:
    return is_onnx(student) or (isinstance(student, (str, Path)) and str(student).endswith(".onnx"))


def _recipe(recipe: Recipe | None, steps: int | None, fraction: float | None, tokens: float | None) -> Recipe:
    recipe = recipe or Recipe()
    if steps is not None or fraction is not None:
        recipe = replace(recipe, steps=steps, fraction=fraction, pretraining_tokens=tokens or recipe.pretraining_tokens)
    elif tokens is not None:
        recipe = replace(recipe, pretraining_tokens=tokens)
    if recipe.steps is None and recipe.fraction is None:
        raise UsageError("how long to train is not said", hint=HOW_LONG)
    return recipe


def _module(model: Any, who: str) -> Any:
    import torch

    from rewriter.capture.plain_module import require_plain

    if isinstance(model, (str, Path)):
        from rewriter.install.checkpoint_loading import load

        model = load(model)
    if isinstance(model, torch.export.ExportedProgram):
        raise UnsupportedModel(f"the {who} is an exported program", hint="give its module: program.module()")
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"the {who} is a {type(model).__name__}", hint="give a torch module or a folder that holds one"
        )
    require_plain(model)
    return model


@contextlib.contextmanager
def _accelerator(recipe: Recipe) -> Iterator[Any]:
    """Accelerate's view of devices and processes. What a caller set up stays; what is made here goes again, so that
    the next run may choose another precision."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UsageError("uptraining needs accelerate", hint="pip install rewriter[uptrain]") from error
    ours = not AcceleratorState._shared_state
    try:
        # the first phase uses some parameters only, and so do models with heads that their output does not need
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        yield Accelerator(mixed_precision=recipe.precision, kwargs_handlers=[unused])
    except ValueError as error:
        if "AcceleratorState" not in str(error):
            raise
        raise UsageError(
            f"this process has set up Accelerate with another precision than {recipe.precision!r}",
            hint="leave the recipe's precision out",
        ) from error
    finally:
        if ours:
            AcceleratorState._reset_state()


__all__ = ["Recipe", "Uptrained", "uptrain"]
