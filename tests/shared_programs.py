"""Exports that are made again: most of a rewrite's time is torch.export's, mostly on modules that it exported before.

`shared` stands for `torch.export.export` while tests run. An export depends on a module's classes and attributes and on
the shapes of its weights and inputs, not on their numbers: modules alike in all of that get copies of one program, each
with weights, buffers and inputs of its own. What this project makes (modules of ``rewriter`` or ``codegen``), graphs,
dynamic shapes, hooks and whatever cannot be compared are exported each time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Export = Callable[..., ExportedProgram]
OURS = ("rewriter", "passes", "codegen")
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
WHOLE = (bool, int, float, complex, str, bytes, slice, range, torch.dtype, torch.device, torch.memory_format)
"""What is told by how it is written."""
CODE = (FunctionType, BuiltinFunctionType)


class NotAlike(Exception):
    """This call cannot be compared with others."""


@dataclass
class _Structure:
    """Writes a call down as text; of weights and inputs (`free`, by id) what they look like, of other tensors all.

    Classes and functions are told apart by identity, so `held` keeps them. Lists and the like that are one object or
    several equal ones are the same: exporting makes new ones.
    """

    free: set[int]
    text: list[str] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)

    def write(self, found: Any) -> None:
        kind = type(found)
        if found is None or kind in WHOLE:
            self.text.append(repr(found))
        elif isinstance(found, torch.Tensor):
            self._tensor(found)
        elif isinstance(found, type) or kind in CODE:
            if getattr(found, "__closure__", None):
                raise NotAlike("a function of what is around it")
            self._identity(found)
        elif kind is MethodType:
            self._identity(found.__func__)
            self.write(found.__self__)
        elif isinstance(found, (list, tuple, dict, set, frozenset)):
            self._identity(kind)
            parts = found.items() if isinstance(found, dict) else found
            self.text.append(f"{len(found)}(")
            for part in sorted(parts, key=repr) if isinstance(found, (set, frozenset)) else parts:
                self.write(part)
            self.write(vars(found) if getattr(found, "__dict__", None) else None)
        elif self._first(found):
            self._object(found)

    def _tensor(self, found: torch.Tensor) -> None:
        if type(found) not in PLAIN or found.layout is not torch.strided:
            raise NotAlike(type(found).__name__)
        if not self._first(found):
            return
        looks = type(found).__name__, tuple(found.shape), found.stride(), found.dtype, found.device, found.requires_grad
        numbers = b"" if id(found) in self.free else found.detach().contiguous().view(-1).view(torch.uint8).numpy()
        self.text.append(f"{looks} {hashlib.sha256(numbers).hexdigest()}")

    def _object(self, found: Any) -> None:
        if not hasattr(found, "__dict__") or isinstance(found, (torch.fx.GraphModule, torch.jit.ScriptModule)):
            raise NotAlike(type(found).__name__)
        if type(found).__module__.split(".")[0] in OURS:
            raise NotAlike("what is tested here")
        self._identity(type(found))
        self._identity(getattr(type(found), "forward", None))
        self.write(vars(found))

    def _first(self, found: Any) -> bool:
        """Whether it was not written before; if it was, its number is."""
        before = len(self.numbers)
        self.text.append(f"#{self.numbers.setdefault(id(found), before)}")
        return len(self.numbers) > before

    def _identity(self, found: Any) -> None:
        self.held.append(found)
        self.text.append(f"@{id(found)}")


def structure(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Equal for calls that export to equal programs, as long as the list is kept; else raises `NotAlike`."""
    if torch.overrides._get_current_function_mode_stack() or _get_current_dispatch_mode() is not None:
        raise NotAlike("something watches")
    inputs = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    written = _Structure({id(t) for t in (*module.parameters(), *module.buffers(), *inputs)})
    cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    written.write((torch.is_grad_enabled(), *cast, torch.get_default_dtype()))
    written.write((torch.nn.functional.scaled_dot_product_attention, *ALL_ATTENTION_FUNCTIONS.values()))
    try:
        written.write((module, args, dict(kwargs)))
    except RecursionError as error:
        raise NotAlike("a list within itself") from error
    return hashlib.sha256("\n".join(written.text).encode()).hexdigest(), written.held


@dataclass
class Programs:
    """Programs by what they were exported from."""

    export: Export
    known: dict[str, tuple[ExportedProgram, list[Any]]] = field(default_factory=dict)

    def shared(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        dynamic_shapes: Any = None,
        strict: bool = False,
        **options: Any,
    ) -> ExportedProgram:
        """As `torch.export.export`."""
        given = {"dynamic_shapes": dynamic_shapes, "strict": strict, **options}
        try:
            if dynamic_shapes is not None or strict or options:
                raise NotAlike("other options")
            key, held = structure(module, args, kwargs or {})
        except NotAlike:
            return self.export(module, args, kwargs, **given)
        if key in self.known:
            return _copied(self.known[key][0], module, args, dict(kwargs or {}))
        program = self.export(module, args, kwargs, **given)
        with contextlib.suppress(NotAlike):
            if structure(module, args, kwargs or {})[0] == key:  # else exporting has changed the module
                self.known[key] = _copied(program, None, (), {}), held
        return program


def _same_names(made: torch.fx.GraphModule, like: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copied graph whose nodes are called as before, also where a name is one of Python's own, as ``input``."""
    for mine, theirs in zip(made.modules(), like.modules(), strict=True):
        if isinstance(mine, torch.fx.GraphModule) and isinstance(theirs, torch.fx.GraphModule):
            names = [node.name for node in theirs.graph.nodes]
            if names != [node.name for node in mine.graph.nodes]:
                for node, name in zip(mine.graph.nodes, names, strict=True):
                    node.name = name
                mine.recompile()
    return made


def _copied(
    program: ExportedProgram, module: torch.nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ExportedProgram:
    """A program of its own; with the tensors of `module`, or without any but the constants of its code."""
    graph = _same_names(copy.deepcopy(program.graph_module), program.graph_module)
    made = copy.copy(program)
    made._graph_module = graph
    made._graph_signature = copy.deepcopy(program.graph_signature)
    made._module_call_graph = copy.deepcopy(program.module_call_graph)
    made._range_constraints = dict(program.range_constraints)
    held: dict[str, Any] = {}
    if module is not None:
        held |= module.named_parameters(remove_duplicate=False)
        held |= module.named_buffers(remove_duplicate=False)
    made._state_dict = {name: held.get(name) for name in program.state_dict}
    made._constants = {
        name: held[name] if name in held else copy.deepcopy(value) for name, value in program.constants.items()
    }
    made._example_inputs = (args, kwargs)
    return made
