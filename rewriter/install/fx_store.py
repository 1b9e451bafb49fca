"""Where a flat graph keeps its parameters: attributes of a graph module, or lifted inputs of an exported program."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import ModuleCallEntry
from torch.export.graph_signature import InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule
from torch.fx import Node as FxNode


class Store(Protocol):
    """Adds parameters to a graph while it is edited, and drops those that are read no more.

    Attributes:
        graph: the copy that is edited.
    """

    graph: Graph

    def get(self, key: str) -> Tensor | None: ...

    def read(self, name: str) -> FxNode:
        """A new node, ahead of all computation, that stands for a parameter; `put` says later which."""

    def is_weight(self, node: FxNode) -> bool: ...

    def key(self, node: FxNode) -> str:
        """Under which a weight that was there from the start is stored."""

    def drop(self, node: FxNode) -> None:
        """Erase the unread node of a weight."""

    def dropped(self) -> set[str]:
        """Keys of weights that nothing reads any more."""

    def put(self, node: FxNode, key: str, tensor: Tensor) -> None:
        """Store a parameter, or a buffer if it is none, under `key`."""

    def remove(self, key: str) -> None: ...


class ModuleStore:
    """A graph module's attributes. The module is a shallow copy: tensors are shared with the original."""

    def __init__(self, original: GraphModule) -> None:
        self.module = _shallow_copy(original)
        self.graph = self.module.graph
        self._erased: set[str] = set()

    def get(self, key: str) -> Tensor | None:
        found = _lookup(self.module, key)
        return found if isinstance(found, Tensor) else None

    def read(self, name: str) -> FxNode:
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            return self.graph.create_node("get_attr", "", name=name)

    def is_weight(self, node: FxNode) -> bool:
        return node.op == "get_attr"

    def key(self, node: FxNode) -> str:
        return str(node.target)

    def drop(self, node: FxNode) -> None:
        self._erased.add(str(node.target))
        self.graph.erase_node(node)

    def dropped(self) -> set[str]:
        read = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        gone = self._erased - read
        lost = [self.get(key) for key in gone]
        named = {**dict(self.module.named_parameters(remove_duplicate=False)), **dict(self.module.named_buffers())}
        return gone | {key for key, t in named.items() if key not in read and any(t is old for old in lost)}

    def put(self, node: FxNode, key: str, tensor: Tensor) -> None:
        node.target = key
        path, _, leaf = key.rpartition(".")
        owner: nn.Module = self.module
        for step in path.split(".") if path else ():
            child = owner._modules.get(step)
            if child is None:
                child = nn.Module()
                owner.add_module(step, child)
            owner = child
        owner.__dict__.pop(leaf, None)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)

    def remove(self, key: str) -> None:
        path, _, leaf = key.rpartition(".")
        owner = self.module.get_submodule(path)
        if hasattr(owner, leaf):
            delattr(owner, leaf)

    def finish(self) -> GraphModule:
        self.graph.lint()
        self.module.recompile()
        return self.module


@dataclass
class ProgramStore:
    """An exported program's state dict, and the placeholders that its graph signature ties to it."""

    original: torch.export.ExportedProgram
    state: dict[str, Any] = field(init=False)
    graph: Graph = field(init=False)

    def __post_init__(self) -> None:
        self.state = dict(self.original.state_dict)
        self.graph = copy.deepcopy(self.original.graph)
        for copied, given in zip(self.graph.nodes, self.original.graph.nodes, strict=True):
            copied.name = given.name  # copying renames inputs that are called like Python's builtins
        self._keys = {s.arg.name: s.target for s in self.original.graph_signature.input_specs if s.target is not None}
        self._new: dict[str, str] = {}
        self._erased: set[str] = set()

    def get(self, key: str) -> Tensor | None:
        found = self.state.get(key, self.original.constants.get(key))
        return found if isinstance(found, Tensor) else None

    def read(self, name: str) -> FxNode:
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            return self.graph.create_node("placeholder", f"p_{name}", name=f"p_{name}")

    def is_weight(self, node: FxNode) -> bool:
        return node.op == "placeholder" and (node.name in self._keys or node.name in self._new)

    def key(self, node: FxNode) -> str:
        return str(self._keys[node.name])

    def drop(self, node: FxNode) -> None:
        self._erased.add(self._keys[node.name])
        self.graph.erase_node(node)

    def dropped(self) -> set[str]:
        lost = [self.get(key) for key in self._erased]
        for node in list(self.graph.nodes):
            key = self._keys.get(node.name) if node.op == "placeholder" else None
            # another name of a tensor that is gone
            if key is not None and not node.users and any(self.get(key) is t for t in lost):
                self.drop(node)
        aliases = {key for key, t in self.state.items() if any(t is old for old in lost)}
        kept = {self._keys[n.name] for n in self.graph.nodes if n.op == "placeholder" and n.name in self._keys}
        return (self._erased | aliases) - kept

    def put(self, node: FxNode, key: str, tensor: Tensor) -> None:
        node.target = node.name
        self._new[node.name] = key
        self.state[key] = tensor

    def remove(self, key: str) -> None:
        self.state.pop(key, None)

    def finish(self) -> torch.export.ExportedProgram:
        self.graph.lint()
        old = self.original
        specs = {s.arg.name: s for s in old.graph_signature.input_specs}
        inputs = [self._input_spec(n, specs) for n in self.graph.nodes if n.op == "placeholder"]
        results = next(n for n in self.graph.nodes if n.op == "output").args[0]
        outputs = [_output_spec(s, r) for s, r in zip(old.graph_signature.output_specs, results, strict=True)]
        signature = copy.copy(old.graph_signature)
        signature.input_specs, signature.output_specs = inputs, outputs
        return torch.export.ExportedProgram(
            root=old.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state,
            range_constraints=copy.copy(old.range_constraints),
            module_call_graph=[_copied_entry(e) for e in old.module_call_graph],
            example_inputs=old.example_inputs,
            constants=self._constants(inputs),
            verifiers=old.verifiers,
        )

    def _input_spec(self, node: FxNode, specs: Mapping[str, InputSpec]) -> InputSpec:
        if node.name in self._new:
            key, argument = self._new[node.name], TensorArgument(name=node.name)
            if isinstance(self.state[key], nn.Parameter):
                return InputSpec(InputKind.PARAMETER, argument, key)
            return InputSpec(InputKind.BUFFER, argument, key, persistent=True)
        return specs[node.name]

    def _constants(self, inputs: list[InputSpec]) -> dict[str, Any]:
        gone = {s.target for s in self.original.graph_signature.input_specs} - {s.target for s in inputs}
        return {key: value for key, value in self.original.constants.items() if key not in gone}


def _copied_entry(entry: ModuleCallEntry) -> ModuleCallEntry:
    signature = entry.signature
    if signature is not None:
        signature = replace(signature, inputs=list(signature.inputs), outputs=list(signature.outputs))
    return replace(entry, signature=signature)


def _output_spec(spec: OutputSpec, result: Any) -> OutputSpec:
    if isinstance(result, FxNode) and result.name != spec.arg.name:
        return OutputSpec(spec.kind, TensorArgument(name=result.name), spec.target)
    return spec


_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "meta")


def _shallow_copy(original: GraphModule) -> GraphModule:
    """A graph module of its own (graph, containers, hooks) around the same tensors."""
    copied = _copied_module(original, {})
    assert isinstance(copied, GraphModule)
    for name, value in vars(original).items():
        if isinstance(value, MethodType) and value.__self__ is original:
            copied.__dict__[name] = MethodType(value.__func__, copied)
    copied.graph = copy.deepcopy(original.graph)
    return copied


def _copied_module(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    copied: nn.Module = type(module).__new__(type(module))
    done[id(module)] = copied
    copied.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name in _TABLES or name.endswith("_hooks"):
            copied.__dict__[name] = copy.copy(value)
    for name, child in module._modules.items():
        # regions are read, never edited
        if child is not None and not isinstance(child, GraphModule):
            copied._modules[name] = _copied_module(child, done)
    return copied


def _lookup(module: nn.Module, key: str) -> Any:
    found: Any = module
    for step in key.split("."):
        found = getattr(found, step, None)
    return found
