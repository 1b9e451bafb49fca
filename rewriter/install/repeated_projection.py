"""Projections with fewer heads behind the old layout, for attentions whose own forward is kept.

Where a module projects by ``x @ W.T + b`` and nothing else, `RepeatedProjection` takes its place: each distinct column
is computed once. Elsewhere the stored parameter shrinks and is spread out each time it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from rewriter.install.huggingface import move_dispatch_hook

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


class RepeatedProjection(nn.Module):
    """``output[..., c] = (x @ weight.T + bias)[..., index[c]]``.

    Attributes:
        weight: [columns, in]; bias [columns] or None.
        index: [out_features], the column that each output feature repeats.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, index: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.register_buffer("index", index)
        self.index: Tensor
        self.in_features, self.out_features = weight.shape[1], len(index)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias).index_select(-1, self.index)

    def extra_repr(self) -> str:
        columns = self.weight.shape[0]
        return f"in_features={self.in_features}, out_features={self.out_features}, columns={columns}"


def joined(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """[columns, ...]: the slices of a tensor along these axes, which are one in the result."""
    return tensor.movedim(tuple(axes), tuple(range(len(axes)))).flatten(0, len(axes) - 1)


def parted(columns: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The inverse of `joined`, for axes of these sizes."""
    apart = columns.reshape(*sizes, *columns.shape[1:])
    return apart.movedim(tuple(range(len(axes))), tuple(axes))


class Spread(nn.Module):
    """A parametrization: slices of the stored tensor, laid out (and repeated) along axes of the tensor that is read.

    Attributes:
        axes, sizes: those axes, and how long they are. Slices along one axis are stored along it, slices along several
            as ``[slices, ...]``.
        index: for each slice that is read (the axes joined) the stored one.
    """

    def __init__(self, index: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> None:
        super().__init__()
        self.axes, self.sizes = tuple(axes), tuple(sizes)
        self.register_buffer("index", index)
        self.index: Tensor

    def forward(self, stored: Tensor) -> Tensor:
        if len(self.axes) == 1:
            return stored.index_select(self.axes[0], self.index)
        return parted(stored.index_select(0, self.index), self.axes, self.sizes)

    def right_inverse(self, spread: Tensor) -> Tensor:
        """One of the slices that are equal, for each that is stored."""
        count = int(self.index.max()) + 1
        last = torch.zeros(count, dtype=self.index.dtype, device=self.index.device)
        last[self.index] = torch.arange(len(self.index), device=self.index.device)
        columns = joined(spread, self.axes).index_select(0, last)
        return columns if len(self.axes) > 1 else columns.movedim(0, self.axes[0])


def replace_projection(model: nn.Module, path: str, new: RepeatedProjection) -> None:
    """Put `new` wherever the module at `path` stands, with its hooks and mode."""
    old = model.get_submodule(path)
    new.train(old.training)
    for name in HOOKS:
        getattr(new, name).update(getattr(old, name))
    move_dispatch_hook(old, new)
    swap(model, old, new)


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Every place of `old` in the model is `new`'s."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def spread_parameter(module: nn.Module, name: str, index: Tensor, axes: Sequence[int]) -> None:
    """Store only one of each group of slices of ``module.name`` that `index` says are equal (and that must be)."""
    spread = getattr(module, name)
    trainable, sizes = spread.requires_grad, [spread.shape[axis] for axis in axes]
    _own_class(module)
    parametrize.register_parametrization(module, name, Spread(index, axes, sizes), unsafe=True)
    parametrizations: Any = module.parametrizations
    parametrizations[name].original.requires_grad_(trainable)


def unspread_parameter(module: nn.Module, name: str) -> None:
    """Undo `spread_parameter`; the parameter holds the spread tensor."""
    _own_class(module)
    parametrize.remove_parametrizations(module, name)


def _own_class(module: nn.Module) -> None:
    """A parametrised module shares its class, where its parameters are properties, with what it was copied from; one of
    its own may be changed."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        held = {n: v for n, v in vars(shared).items() if n not in {"__dict__", "__weakref__"}}
        module.__class__ = type(shared.__name__, shared.__bases__, held)


def spreads(module: nn.Module) -> dict[str, Spread]:
    """The spread parameters of one module by name."""
    found: dict[str, Spread] = {}
    if parametrize.is_parametrized(module):
        for name, steps in module.parametrizations.items():  # type: ignore[union-attr, operator]
            last = steps[-1]
            if isinstance(last, Spread):
                found[name] = last
    return found


def describe(module: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs, as JSON; index tables are stored with the weights."""
    if isinstance(module, RepeatedProjection):
        shape = [*module.weight.shape, module.bias is not None, len(module.index)]
        return {"kind": "repeated", "shape": shape}
    names = {
        name: [step.axes[0] if len(step.axes) == 1 else list(step.axes), len(step.index), int(step.index.max()) + 1]
        for name, step in spreads(module).items()
    }
    return {"kind": "spread", "parameters": names}


def rebuild(model: nn.Module, path: str, description: Mapping[str, Any]) -> None:
    """Edit a freshly built module as described, with empty weights and tables, to be filled.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if the description is broken or fits another module.
    """
    module = model.get_submodule(path)
    if description["kind"] == "repeated":
        rows, columns, bias, features = (int(n) for n in description["shape"])
        like = next(module.parameters())

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_empty(*shape), requires_grad=like.requires_grad)

        index = torch.zeros(features, dtype=torch.int64, device=like.device)
        new = RepeatedProjection(empty(rows, columns), empty(rows) if bias else None, index)
        replace_projection(model, path, new)
        return
    for name, (along, features, count) in description["parameters"].items():
        axes = [int(axis) for axis in along] if isinstance(along, list) else [int(along)]
        index = torch.arange(int(features), device=getattr(module, name).device) % int(count)
        spread_parameter(module, name, index, axes)


def repeated(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with repeated projections or spread parameters, by dotted path, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, RepeatedProjection) or spreads(m)}
