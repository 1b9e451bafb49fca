"""Watching modules of a model while it runs: what they were given and what they gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments, and the first floating-point tensor that it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


@contextlib.contextmanager
def observing(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """Calls of the modules at `paths`, in order, as long as the context is open."""
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    with contextlib.ExitStack() as stack:
        for path in paths:

            def note(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                tensor = first_tensor(output)
                if tensor is not None:
                    calls[path].append(Call(args, kwargs, tensor))

            handle = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


@contextlib.contextmanager
def forced(model: nn.Module, calls: Mapping[str, Sequence[Call]]) -> Iterator[dict[str, list[Tensor]]]:
    """Give each of these modules, at each of its calls, the recorded arguments instead of its own.

    Yields what they return. The model is still called as a whole, so that wrappers around it and around its parts
    (data parallel, sharded, checkpointed) do what they do in any other call. Calls are told apart by their order,
    and a module that is called once gets the same arguments however often activations are computed anew.
    """
    outputs: dict[str, list[Tensor]] = {path: [] for path in calls}
    with contextlib.ExitStack() as stack:
        for path, recorded in calls.items():
            count = [0]

            def put(
                _: nn.Module, args: Any, kwargs: Any, recorded: Sequence[Call] = recorded, count: list[int] = count
            ) -> Any:
                call = recorded[min(count[0], len(recorded) - 1)]
                count[0] += 1
                return call.args, dict(call.kwargs)

            def take(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
                tensor = first_tensor(output)
                if tensor is not None and len(outputs[path]) < len(calls[path]):
                    outputs[path].append(tensor)

            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(put, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(take).remove)
        yield outputs


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of what a module returned."""
    leaves = [output] if isinstance(output, Tensor) else torch.utils._pytree.tree_leaves(output)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module with whether it is in training mode, to be given to `restore_modes`."""
    return [(module, module.training) for module in model.modules()]


def restore_modes(before: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in before:
        module.training = training
