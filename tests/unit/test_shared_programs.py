"""What tests share of torch.export: equal modules get equal programs with their own weights, others their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from tests.shared_programs import Programs
from tests.zoo.models import ZOO


class Scaled(nn.Module):
    """A weight, a buffer that is not saved, a constant of the code, and an attribute that the code reads."""

    def __init__(self, seed: int = 0, factor: float = 2.0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.factor = factor
        self.linear = nn.Linear(width, width)
        self.register_buffer("shift", torch.rand(width), persistent=False)
        self.table = torch.arange(3.0)

    def forward(self, x: torch.Tensor, *, on: bool = True) -> torch.Tensor:
        y = self.linear(x) * self.factor + self.shift + torch.tensor([1.0]) + self.table.sum()
        return y if on else x


Memory = tuple[Programs, list[Any]]


@pytest.fixture
def programs(shared_programs: Programs) -> Memory:
    """A memory of its own, and the modules that were really exported."""
    made: list[Any] = []

    def export(module: nn.Module, *args: Any, **options: Any) -> ExportedProgram:
        made.append(module)
        return shared_programs.export(module, *args, **options)

    return Programs(export), made


def test_a_copy_computes_with_its_own_weights(programs: Memory) -> None:
    shared, made = programs
    first, second, x = Scaled(0), Scaled(1), torch.rand(2, 4)
    shared.shared(first, (x,))
    copy, other = shared.shared(second, (x + 1,)), shared.shared(first, (x,))
    assert made == [first]
    for module, program in ((second, copy), (first, other)):
        assert torch.equal(program.module()(x), module(x))
        assert program.state_dict["linear.weight"] is module.linear.weight
    assert not torch.equal(first(x), second(x)), "control"
    assert torch.equal(copy.example_inputs[0][0], x + 1)
    next(n for n in copy.graph.nodes if "linear" in n.name and n.op == "call_function").args = ()
    assert torch.equal(shared.shared(second, (x,)).module()(x), second(x)), "what one test edits no other sees"


def test_a_copy_is_what_torch_would_export(programs: Memory) -> None:
    shared, made = programs
    case = ZOO["bert-sdpa"]
    inputs = case.inputs(2, 7, 0)
    shared.shared(case.build(), (), inputs)
    model = case.build()
    copy = shared.shared(model, (), inputs)
    assert len(made) == 1
    fresh = shared.export(model, (), inputs, strict=False)
    assert str(copy.graph) == str(fresh.graph) and copy.graph_signature == fresh.graph_signature
    assert copy.state_dict.keys() == fresh.state_dict.keys()
    assert all(copy.state_dict[name] is tensor for name, tensor in fresh.state_dict.items())
    for mine, theirs in zip(copy.graph.nodes, fresh.graph.nodes, strict=True):
        assert mine.meta.get("nn_module_stack") == theirs.meta.get("nn_module_stack")


def test_inputs_that_are_called_as_something_of_python_stay_so(programs: Memory) -> None:
    shared, made = programs
    x = torch.rand(2, 4)
    found = [shared.shared(nn.Sequential(Scaled(seed)), (x,)) for seed in range(3)]
    assert len(made) == 1
    names = [[node.name for node in program.graph.nodes] for program in found]
    assert "input" in names[0] and names[0] == names[1] == names[2]
    assert torch.equal(found[2].module()(x), Scaled(2)(x))


def _hooked(module: Scaled) -> Scaled:
    module.linear.register_forward_hook(lambda _, __, out: out + module.factor)
    return module


def _half(module: Scaled) -> Scaled:
    return module.to(torch.float16)


def _frozen(module: Scaled) -> Scaled:
    return module.requires_grad_(False)


def _table(module: Scaled) -> Scaled:
    module.table = torch.arange(1.0, 4.0)
    return module


CHANGES: dict[str, Callable[[], tuple[Scaled, dict[str, Any]]]] = {
    "attribute": lambda: (Scaled(factor=3.0), {}),
    "width": lambda: (Scaled(width=5), {}),
    "dtype": lambda: (_half(Scaled()), {}),
    "gradients": lambda: (_frozen(Scaled()), {}),
    "constant": lambda: (_table(Scaled()), {}),
    "mode": lambda: (Scaled().eval(), {}),
    "hook": lambda: (_hooked(Scaled()), {}),
    "input": lambda: (Scaled(), {"on": False}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_exported(programs: Memory, change: str) -> None:
    shared, made = programs
    shared.shared(Scaled(), (torch.rand(2, 4),))
    module, kwargs = CHANGES[change]()
    x = torch.rand(2, module.linear.in_features, dtype=module.linear.weight.dtype)
    found = shared.shared(module, (x,), kwargs)
    assert made[1:] == [module]
    assert torch.equal(found.module()(x, **kwargs), module(x, **kwargs))


def test_what_surrounds_a_call_matters(programs: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, made = programs
    x = torch.rand(2, 4)
    shared.shared(Scaled(), (x,))
    with torch.no_grad():
        shared.shared(Scaled(), (x,))
    with torch.autocast("cpu", torch.bfloat16):
        shared.shared(Scaled(), (x,))
    shared.shared(Scaled(), (torch.rand(3, 4),))
    shared.shared(Scaled(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    monkeypatch.setattr(Scaled, "forward", lambda self, x: x + self.linear.bias)
    assert torch.equal(shared.shared(module := Scaled(), (x,)).module()(x), x + module.linear.bias)
    assert len(made) == 6
