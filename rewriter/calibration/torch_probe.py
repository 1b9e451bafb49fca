"""From a torch model and calibration batches to runs that stop at sites: one program for each shape of batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from passes.dataflow import Value
from rewriter.calibration.batches import Batch
from rewriter.calibration.torch_trial import Straight, TorchProbe, require_same_program, straighten
from rewriter.capture.torch_export import exported, placeholders
from rewriter.errors import UsageError, first_line

SHAPES = 16
"""Shapes of batches for which programs are exported, beside the one that the module was captured with."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def module_probe(
    module: torch.nn.Module, like: Call, program: torch.export.ExportedProgram, batches: Sequence[Batch]
) -> TorchProbe:
    """Runs of a module; `like` is the call it was captured with, `program` what that gave.

    Inputs that the captured call has and a batch lacks are added: a mask that hides nothing, or the captured flag.
    Raises UsageError for too many shapes, UnsupportedModel if the program depends on more than sizes.
    """
    first = straighten(program.graph_module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    known: dict[Any, tuple[torch.export.ExportedProgram, Straight]] = {_shapes(*like): (program, first)}
    runs = []
    for batch in batches:
        args, kwargs = completed(batch, like, device)
        shapes = _shapes(args, kwargs)
        if shapes not in known:
            if len(known) > SHAPES:
                raise UsageError(
                    f"calibration batches come in more than {SHAPES} shapes", hint="pad or cut them to a few lengths"
                )
            fresh = exported(module, args, kwargs)
            straight = straighten(fresh.graph_module)
            require_same_program(first, straight)
            known[shapes] = fresh, straight
        fresh, straight = known[shapes]
        runs.append((straight, placeholders(fresh, args, kwargs)))
    return TorchProbe(runs)


def program_probe(
    model: torch.fx.GraphModule | torch.export.ExportedProgram, like: Call, batches: Sequence[Batch]
) -> TorchProbe:
    """Runs of an exported program, on batches of the sizes that it takes.

    Raises UsageError for a graph module, which does not say what its placeholders hold, and for batches that the
    program does not accept.
    """
    if isinstance(model, torch.fx.GraphModule):
        raise UsageError("a graph module cannot be calibrated", hint="pass torch.export.export(model, ...) instead")
    straight = straighten(model.graph_module)
    module = model.module()
    tried: set[Any] = set()
    runs: list[tuple[Straight, Mapping[Value, Any]]] = []
    for batch in batches:
        args, kwargs = completed(batch, like, torch.device("cpu"))
        shapes = _shapes(args, kwargs)
        if shapes not in tried:
            _try(module, args, kwargs)
            tried.add(shapes)
        runs.append((straight, placeholders(model, args, kwargs)))
    return TorchProbe(runs)


def _try(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A program checks its inputs when it is called, and only then."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # guards raise many unrelated types
        raise UsageError(
            f"the exported program does not take a calibration batch: {first_line(error)}",
            hint="export it with dynamic dimensions, or give batches of its sizes",
        ) from error


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t))


def completed(batch: Batch, like: Call, device: torch.device) -> Call:
    """A batch as torch tensors, called the way `like` is.

    Raises UsageError if it lacks an input that cannot be made up.
    """
    args = tuple(_tensor(a, device) for a in batch.args)
    kwargs = {k: _tensor(v, device) for k, v in batch.kwargs.items()}
    like_args, like_kwargs = like
    if not args and len(like_args) == 1 and isinstance(like_args[0], Mapping):  # a model that takes all in one mapping
        return (completed(batch, ((), dict(like_args[0])), device)[1],), dict(like_kwargs)
    if args and not like_args:
        raise UsageError("calibration batches are positional, the model's inputs are named", hint="use dicts")
    if like_args and not args:  # named inputs for a model that was captured with positions
        if len(kwargs) != len(like_args):
            raise UsageError("calibration batches are named, example_inputs are positional", hint="use tuples")
        return tuple(kwargs.values()), dict(like_kwargs)
    for name, value in like_kwargs.items():
        if name in kwargs:
            continue
        ids = kwargs.get("input_ids")
        if not torch.is_tensor(value):
            kwargs[name] = value
        elif name == "attention_mask" and ids is not None:
            kwargs[name] = torch.ones_like(ids)
        elif name == "token_type_ids" and ids is not None:
            kwargs[name] = torch.zeros_like(ids)
        else:
            raise UsageError(f"the calibration batches lack the input {name!r}", hint="give it in each batch")
    return args, {k: kwargs[k] for k in like_kwargs}


def _tensor(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    return value.to(device) if isinstance(value, torch.Tensor) else value
