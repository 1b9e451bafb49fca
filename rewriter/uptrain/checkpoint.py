"""Checkpoints of a run: written beside their place and moved there whole, so that the newest one is always complete.

A checkpoint holds what Accelerate saves (weights as safetensors, optimizer, random states of each process) and
run.json: the step, the recipe, the curve. Where the data stand follows from the step.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewriter.drafts import writing
from rewriter.errors import InvalidModelFile, UsageError, first_line

RUN = "run.json"
PREFIX, DRAFT = "step-", ".draft-"


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / RUN).is_file()) if folder.is_dir() else []


def newest(folder: Path) -> Path:
    """The newest complete checkpoint; raises UsageError if there is none."""
    found = complete(folder)
    if not found:
        raise UsageError(f"{folder} holds no checkpoint to resume from", hint="start the run without resuming")
    return found[-1]


def sweep(folder: Path, keep: int) -> None:
    """Remove what a killed run left half-written, and checkpoints beyond the newest `keep` that it had no time to."""
    for draft in folder.glob(f"{DRAFT}*"):
        shutil.rmtree(draft, ignore_errors=True)
    for old in complete(folder)[:-keep]:
        _remove(old)


def write(accelerator: Any, folder: Path, step: int, run: Mapping[str, Any], keep: int) -> None:
    """Save the state of all processes after `step` steps; every process calls this. Older checkpoints go.

    Raises CannotWrite if the disk is full; the checkpoints that were there are still there.
    """
    draft = folder / f"{DRAFT}{step:09d}"
    with writing(folder):
        try:
            _write(accelerator, draft, folder / f"{PREFIX}{step:09d}", run)
            if accelerator.is_main_process:
                for old in complete(folder)[:-keep]:
                    _remove(old)
            accelerator.wait_for_everyone()
        except BaseException:
            if accelerator.is_main_process:
                shutil.rmtree(draft, ignore_errors=True)
            raise


def _write(accelerator: Any, draft: Path, target: Path, run: Mapping[str, Any]) -> None:
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(draft))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (draft / RUN).write_text(json.dumps(dict(run)) + "\n", encoding="utf-8")
        if target.exists():
            _remove(target)
        draft.rename(target)


def read(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's run.json; raises InvalidModelFile if it is broken."""
    try:
        found = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
        missing = {"step", "recipe", "curve", "drift", "identity"} - set(found)
        if missing:
            raise ValueError(f"it lacks {sorted(missing)}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        file = checkpoint / RUN
        raise InvalidModelFile(
            f"{file} cannot be read: {error}", hint="remove it to resume from an older one"
        ) from error
    return dict(found)


def restore(accelerator: Any, checkpoint: Path) -> None:
    """Put the state of all processes back; torch's unpickler makes nothing but tensors and plain numbers of it.

    Raises InvalidModelFile if a file is damaged, or holds anything else.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise InvalidModelFile(
            f"{checkpoint} is damaged: {first_line(error)}", hint="remove it to resume from an older one"
        ) from error


def _remove(checkpoint: Path) -> None:
    """Out of sight at once, then gone: a kill in between leaves nothing that looks complete."""
    hidden = checkpoint.with_name(f"{DRAFT}old-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
