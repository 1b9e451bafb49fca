"""ONNX students: trained as the torch model that they were exported from, whose weights are then put into the file.

The two are matched by their numbers, whatever the exporter calls things: each parameter is looked for among the file's
stored tensors, as it is or transposed. What the file does not hold apart (constants that the exporter folded, tensors
that are equal to each other) is not trained; if that concerns anything that was rewritten, the student is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from passes.dataflow import Array
from rewriter.calibration import batches as calibration
from rewriter.calibration.onnx_trial import feeds_of
from rewriter.errors import InvalidModelFile, UnsupportedModel, UsageError, first_line
from rewriter.uptrain.batch import Batch
from rewriter.uptrain.objective import require_main, run
from rewriter.uptrain.pairs import changed
from rewriter.uptrain.result import Uptrained

HINT = "rewrite the torch model to the same target, uptrain that, and export it"
AGREE = 1e-3
"""Largest difference of file and twin on the data, relative to the largest output."""


@dataclass(frozen=True)
class Home:
    """Where a parameter lies in a file: the stored tensor, and whether it lies there transposed."""

    value: ir.Value
    transposed: bool


def uptrain_through(student: Any, twin: Any, teacher: nn.Module, train: Callable[..., Uptrained]) -> Uptrained:
    """Train a copy of the twin and put its weights into a copy of the file.

    `train` takes the module, the names of the parameters that may learn, and what to call with a batch beforehand.

    Raises UnsupportedModel if there is no twin, or it is none.
    """
    model, folder = open_student(student)
    module = copy.deepcopy(find_twin(twin, folder))
    found = homes(model, module)
    require_whole(module, teacher, found)
    seen: list[Batch] = []

    def check(batch: Batch) -> None:
        require_agreement(model, module, batch)
        seen.append(batch)

    done = train(module, found, check)
    put(model, module, found)
    require_agreement(model, module, seen[0])
    return replace(done, model=model)


def open_student(student: Any) -> tuple[ir.Model, Path | None]:
    """(a copy of the model to put weights into, the file's folder)."""
    from rewriter.capture.onnx_load import copy_of, from_proto, load

    if isinstance(student, (str, Path)):
        if not Path(student).is_file():
            raise UsageError(f"no such file: {student}", hint="check the path")
        return load(student), Path(student).absolute().parent
    return (copy_of(student) if isinstance(student, ir.Model) else from_proto(student)), None


def find_twin(twin: Any, folder: Path | None) -> nn.Module:
    """The module that was given, or the checkpoint that was given or lies beside the file.

    Raises UnsupportedModel if there is none.
    """
    from rewriter.install.checkpoint_folder import CONFIG, MANIFEST
    from rewriter.install.checkpoint_loading import load

    if isinstance(twin, nn.Module):
        return twin
    if twin is None and folder is not None and any((folder / name).is_file() for name in (MANIFEST, CONFIG)):
        twin = folder
    if not isinstance(twin, (str, Path)):
        raise UnsupportedModel(
            "an ONNX model can only be trained through the torch model that it was exported from, and none is known",
            hint=f"name it (--twin), or {HINT}",
        )
    try:
        return load(twin)
    except InvalidModelFile as error:  # a config without weights beside it
        raise UnsupportedModel(f"{twin} holds no torch model: {first_line(error)}", hint=HINT) from error


def homes(model: ir.Model, twin: nn.Module) -> dict[str, Home]:
    """Where each parameter of the twin lies in the file; parameters that are not there once are left out."""
    stored: dict[tuple[Any, ...], list[Home]] = defaultdict(list)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
            continue
        array = tensor.numpy()
        stored[_digest(array)].append(Home(value, False))
        if array.ndim == 2:
            stored[_digest(array.T)].append(Home(value, True))
    parameters: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, parameter in twin.named_parameters():
        if parameter.dtype in (torch.float32, torch.float16, torch.float64):
            parameters[_digest(parameter.detach().cpu().numpy())].append(name)
    return {names[0]: stored[key][0] for key, names in parameters.items() if len(names) == 1 and len(stored[key]) == 1}


def require_whole(twin: nn.Module, teacher: nn.Module, found: Mapping[str, Home]) -> None:
    """Raises UnsupportedModel if something that was rewritten does not lie in the file as the twin has it."""
    own = {name for name, _ in twin.named_parameters()}
    missing = [name for name in changed(twin, teacher) if name in own and name not in found]
    if missing:
        raise UnsupportedModel(
            f"the file does not hold the twin's weights: {len(missing)} parameters that differ from the teacher's are "
            f"not stored in it as they are, the first: {missing[0]}",
            hint=f"export the file from this very torch model, without quantising or folding, or {HINT}",
        )


def require_agreement(model: ir.Model, twin: nn.Module, batch: Batch) -> None:
    """Raises UnsupportedModel if the file does not compute what its twin does."""
    device = next(twin.parameters()).device
    from rewriter.verify.session import cpu_session

    given = {name: tensor.cpu().numpy() for name, tensor in batch.inputs.items()}
    session = cpu_session(model)
    wished = require_main(run(twin, batch.to(device), "twin"), "twin").cpu().numpy()
    outputs = session.run(None, feeds_of(model, calibration.Batch((), given)))
    got = next((o for o in outputs if o.shape == wished.shape), None)
    worst = None if got is None else float(np.abs(got - wished).max() / max(np.abs(wished).max(), 1e-9))
    if worst is None or worst > AGREE:
        said = "no output of that shape" if worst is None else f"a relative difference of {worst:.1e}"
        raise UnsupportedModel(f"the file does not compute what its torch twin does: {said}", hint=HINT)


def put(model: ir.Model, twin: nn.Module, found: Mapping[str, Home]) -> None:
    """Write the twin's weights into the model, in the types that they are stored in."""
    parameters = dict(twin.named_parameters())
    for name, home in found.items():
        old = home.value.const_value
        assert old is not None
        array = parameters[name].detach().cpu().numpy()
        array = np.ascontiguousarray(array.T if home.transposed else array, dtype=old.dtype.numpy())
        home.value.const_value = ir.tensor(array, name=home.value.name)


def _digest(array: Array) -> tuple[Any, ...]:
    """Of the numbers, however they are stored: an exporter may have widened them."""
    content = np.ascontiguousarray(array, dtype=np.float32)
    return content.shape, hashlib.sha256(content.tobytes()).hexdigest()
