"""What stands on the command line, checked and read before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewriter.cli.options import Grouping, Merge
from rewriter.drafts import DATA_SUFFIX, require_place
from rewriter.errors import UsageError
from rewriter.given_path import existing
from rewriter.whole_folder import recover


def require_model(path: Path) -> None:
    if not os.path.exists(path) and os.path.isdir(path.absolute().parent):
        recover(path.absolute())  # a command that was killed may have moved it aside
    existing(path)


def require_output(model: Path, output: Path, *, folder: bool = False) -> None:
    """`folder`: a folder is written, whatever the model is.

    What a killed command left half-written there goes.
    """
    parent = output.absolute().parent
    if not os.path.isdir(parent):
        raise UsageError(f"the output folder {parent} does not exist", hint="create it first")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"the output folder {parent} is not writable", hint="check its permissions")
    require_place(output, longer=0 if folder or model.is_dir() else len(DATA_SUFFIX))
    if folder or model.is_dir():
        recover(output.absolute())
    else:
        from rewriter.install.onnx_write import clean_up

        clean_up(output)
    if folder:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is a file", hint="name a folder")
        return
    if model.is_file() and output.is_dir():
        raise UsageError(f"{output} is a folder", hint="name the output file, e.g. out.onnx")
    if model.is_dir() and output.is_file():
        raise UsageError(f"{output} is a file", hint="name a folder: the input is one")


def require_page(path: Path | None) -> None:
    if path is not None:
        from rewriter.report.html_page import require_page

        require_page(path)


def calibration_of(path: Path | None) -> Any:
    if path is None:
        return None
    from rewriter.calibration.batches import SAMPLED
    from rewriter.calibration.files import read_calibration

    return SAMPLED if str(path) == SAMPLED and not path.exists() else read_calibration(path)


def target_of(name: str, merge: Merge | None, grouping: Grouping | None, keep_hidden_bias: bool = False) -> Any:
    """The target of this name as asked; names that are unknown are left for `optimize` to refuse."""
    given = {
        "merge": merge and merge.value,
        "grouping": grouping and grouping.value,
        "keep_hidden_bias": keep_hidden_bias or None,
    }
    asked: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if not asked:
        return name
    from passes.targets import Auto, DecoupledHeads, GroupedQuery
    from passes.targets.catalogue import find

    found = find(name)
    if isinstance(found, DecoupledHeads) and grouping is not None:
        raise UsageError("--grouping is for keys and values that are grouped alike", hint="leave it out")
    if keep_hidden_bias and found is not None and not isinstance(found, GroupedQuery):
        raise UsageError(f"--keep-hidden-bias is for mqa and gqaN, not for {name}", hint="leave it out")
    if found is not None and not isinstance(found, (Auto, DecoupledHeads, GroupedQuery)):
        raise UsageError(f"--{next(iter(asked))} says how heads become one, and {name} has none", hint="leave it out")
    return name if found is None else replace(found, **asked)


def shapes_of(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for text in given:
        name, _, sizes = text.rpartition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split("x")) if sizes else ()
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--shape {text!r} is no shape", hint="write it as name=2x128")
    return shapes
