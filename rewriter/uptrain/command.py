"""What ``rewriter uptrain`` does between its options and its output: places, the recipe of a resumed run, saving."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewriter.calibration.batches import SAMPLED
from rewriter.errors import UsageError
from rewriter.uptrain.recipe import Recipe


@dataclass(frozen=True)
class Places:
    """Where things go.

    Attributes:
        output: the trained student. checkpoints: the folder of the run's checkpoints. resume: take them up.
    """

    output: Path
    checkpoints: Path
    resume: bool

    @staticmethod
    def of(student: Path, output: Path | None, checkpoints: Path | None, resume: Path | None) -> Places:
        """Beside the student where nothing is said; raises UsageError for a folder that is named twice."""
        if checkpoints is not None and resume is not None and checkpoints != resume:
            raise UsageError("a resumed run keeps its checkpoints where they are", hint="leave --checkpoints out")
        student = student.absolute()
        output = output or student.with_name(f"{student.stem}-uptrained{student.suffix}")
        found = resume or checkpoints or output.with_name(f"{output.name}.run")
        return Places(output, found, resume is not None)


def run_command(
    student: Path,
    teacher: Path,
    data: Sequence[Path],
    places: Places,
    settings: Mapping[str, Any],
    *,
    validation: Path | None,
    twin: Path | None,
    progress: bool,
    html: Path | None = None,
) -> dict[str, Any] | None:
    """Train, write the student, and return the report with the paths; None in all processes but the first.

    `settings` are the recipe's, None where they were not given: then a resumed run's own hold, else the defaults.
    `html` is where a page about the run goes.
    """
    from rewriter.uptrain.progress import shown
    from rewriter.uptrain.run import uptrain

    with shown(progress) as show:
        done = uptrain(
            student,
            teacher,
            data_of(data),
            recipe=_recipe(places, settings),
            validation=validation,
            checkpoints=places.checkpoints,
            resume=places.resume,
            twin=twin,
            progress=show,
        )
    done.save(places.output)
    if int(os.environ.get("RANK", "0")):
        return None
    if html is not None:
        from rewriter.inspection import pictures_of

        done.save_html(html, pictures_of(teacher))
    where = {"student": student, "teacher": teacher, "output": places.output, "checkpoints": places.checkpoints}
    return {**{k: str(v) for k, v in where.items()}, "data": [str(d) for d in data], **done.to_dict()}


def data_of(paths: Sequence[Path]) -> list[Path] | str:
    """The files, or the word for text that the teacher writes; a file of that name is a file."""
    return SAMPLED if [str(p) for p in paths] == [SAMPLED] and not paths[0].exists() else list(paths)


def _recipe(places: Places, settings: Mapping[str, Any]) -> Recipe:
    from rewriter.uptrain import checkpoint

    stored = Recipe()
    if places.resume:
        stored = Recipe.of(checkpoint.read(checkpoint.newest(places.checkpoints))["recipe"])
    given = {name: value for name, value in settings.items() if value is not None}
    if {"steps", "fraction"} & set(given):
        stored = replace(stored, steps=None, fraction=None)
    return replace(stored, **given)
