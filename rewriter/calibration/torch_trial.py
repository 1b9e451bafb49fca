"""Runs of an exported torch graph that stop at values and go on with others; the torch doors' Probe."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from passes.dataflow import Array, Value
from rewriter.calibration.batches import not_taken
from rewriter.capture.torch_export import to_numpy
from rewriter.errors import UnsupportedModel


@dataclass(frozen=True)
class Reference:
    """Stands for a computed value among a call's arguments."""

    name: Value


@dataclass(frozen=True)
class Call:
    """One call of a flat program: `target` of `args` and `kwargs`, in which `Reference`s stand for values."""

    name: Value
    target: Any
    args: Any
    kwargs: Any
    reads: tuple[Value, ...]


@dataclass(frozen=True)
class Straight:
    """A graph as a straight line of calls; regions wrapped in autocast or no_grad are written out in place.

    Attributes:
        constants: attributes of the graph module by the value name of the node that reads them.
        last: for each value the index of the last call that reads it.
        index: for each value the call that computes it.
    """

    calls: tuple[Call, ...]
    constants: Mapping[Value, Any]
    last: Mapping[Value, int]
    index: Mapping[Value, int]

    @property
    def shape(self) -> tuple[tuple[str, str], ...]:
        """What the program computes, without sizes: equal for two exports of one program."""
        return tuple((c.name, str(c.target)) for c in self.calls)


def straighten(module: GraphModule) -> Straight:
    """Write a graph module out. Value names are those that captures give."""
    calls: list[Call] = []
    constants: dict[Value, Any] = {}
    names = {n.name: n.name for n in module.graph.nodes if n.op == "placeholder"}
    _walk(module, "", names, calls, constants)
    last = {name: i for i, call in enumerate(calls) for name in call.reads}
    return Straight(tuple(calls), constants, last, {c.name: i for i, c in enumerate(calls)})


def _walk(
    module: GraphModule, prefix: str, names: dict[str, Value], calls: list[Call], constants: dict[Value, Any]
) -> Any:
    """Append the calls of one graph; `names` are its nodes' value names. Returns the names of its results."""
    result: Any = None
    for fx in module.graph.nodes:
        name = prefix + fx.name
        if fx.op == "get_attr":
            names[fx.name] = name
            constants[name] = operator.attrgetter(fx.target)(module)
        elif fx.op == "output":
            result = torch.fx.node.map_arg(fx.args[0], lambda n: names.get(n.name, ""))
        elif fx.op == "call_function":
            inner = next((i for i, a in enumerate(fx.args) if _graph(module, a) is not None), None)
            if inner is not None:
                _wrapped(module, fx, inner, prefix, names, calls, constants)
            elif fx.name not in names:
                names[fx.name] = name
                calls.append(_call(fx, name, names))
    return result


def _wrapped(
    module: GraphModule,
    fx: FxNode,
    position: int,
    prefix: str,
    names: dict[str, Value],
    calls: list[Call],
    constants: dict[Value, Any],
) -> None:
    body = _graph(module, fx.args[position])
    assert body is not None
    holders = [n.name for n in body.graph.nodes if n.op == "placeholder"]
    given = [names[a.name] if isinstance(a, FxNode) else "" for a in fx.args[position + 1 :]]
    results = _walk(body, f"{prefix}{fx.name}.", dict(zip(holders, given, strict=True)), calls, constants)
    pieces = results if isinstance(results, (tuple, list)) else (results,)
    for user in fx.users:
        if user.target is operator.getitem:
            names[user.name] = pieces[int(user.args[1])]  # type: ignore[arg-type]


def _graph(module: GraphModule, argument: Any) -> GraphModule | None:
    if not isinstance(argument, FxNode) or argument.op != "get_attr":
        return None
    found = operator.attrgetter(str(argument.target))(module)
    return found if isinstance(found, GraphModule) else None


def _call(fx: FxNode, name: Value, names: Mapping[str, Value]) -> Call:
    def refer(node: FxNode) -> Any:
        return Reference(names[node.name])

    args: Any = torch.fx.node.map_arg(fx.args, refer)
    kwargs: Any = torch.fx.node.map_arg(fx.kwargs, refer)
    return Call(name, fx.target, args, kwargs, tuple(names[n.name] for n in fx.all_input_nodes))


class TorchTrial:
    """One run; see `passes.protocols.Trial`."""

    def __init__(self, program: Straight, bound: Mapping[Value, Any]) -> None:
        self._program = program
        self._held: dict[Value, Any] = {**program.constants, **bound}
        self._next = 0

    def advance(self, until: Value, wanted: Collection[Value]) -> dict[Value, Array]:
        program = self._program
        stop = program.index[until]
        kept: dict[Value, Array] = {}
        with torch.no_grad():
            for name in wanted:
                if name in self._held:
                    kept[name] = _copied(self._held[name])
            for i in range(self._next, stop + 1):
                call = program.calls[i]
                args, kwargs = (self._filled(a) for a in (call.args, call.kwargs))
                args = _without_mutation(call.target, args)
                result = self._called(call.target, args, kwargs)
                if call.name in program.last or i == stop:
                    self._held[call.name] = result
                if call.name in wanted:
                    kept[call.name] = _copied(result)
                for name in call.reads:
                    if program.last[name] == i and name not in program.constants:
                        self._held.pop(name, None)
        self._next = max(self._next, stop + 1)
        missing = set(wanted) - set(kept)
        if missing:
            raise KeyError(f"not computed on the way: {sorted(missing)[0]}")
        return kept

    def _called(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What fails before the first site has nothing but the batch to go by."""
        try:
            return target(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            if self._next:
                raise
            raise not_taken(error) from error

    def put(self, value: Value, array: Array) -> None:
        old = self._held.get(value)
        if isinstance(old, torch.Tensor):
            self._held[value] = torch.from_numpy(np.ascontiguousarray(array)).to(old).view(old.shape)

    def fork(self) -> TorchTrial:
        other = TorchTrial(self._program, {})
        other._held, other._next = dict(self._held), self._next
        return other

    def _filled(self, arguments: Any) -> Any:
        return torch.utils._pytree.tree_map(
            lambda a: self._held[a.name] if isinstance(a, Reference) else a,
            arguments,
            is_leaf=lambda a: isinstance(a, Reference),
        )


def _without_mutation(target: Any, args: Any) -> Any:
    """In-place operators run on a copy: what they would change may be read again."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable or not args:
        return args
    return (args[0].clone(), *args[1:])


def _copied(value: Any) -> Array:
    return np.array(to_numpy(value))


class TorchProbe:
    """Batches and the program that runs each; see `passes.protocols.Probe`."""

    def __init__(self, runs: Sequence[tuple[Straight, Mapping[Value, Any]]]) -> None:
        self._runs = runs

    def trials(self) -> list[TorchTrial]:
        return [TorchTrial(program, bound) for program, bound in self._runs]


def require_same_program(first: Straight, other: Straight) -> None:
    """Raises UnsupportedModel if two exports of a model are not the same program but for sizes."""
    if first.shape != other.shape:
        raise UnsupportedModel(
            "the model's program differs between its example inputs and the calibration batches",
            hint="give example_inputs of the same kind as the calibration batches",
        )
