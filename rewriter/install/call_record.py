"""What a module is called with and what it returns, recorded while the whole model runs once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture.own_containers import own
from rewriter.errors import UnsupportedModel
from rewriter.module_modes import evaluating


@dataclass(frozen=True)
class CallRecord:
    """The first call of one module.

    Attributes:
        args, kwargs: as passed; tensors by reference, caches as a snapshot taken before the call.
        output: what came back, by reference.
        arguments: the same arguments by name; what was left at its default is absent.
        signature: of the module's own forward, decorators unwrapped, without self.
        calls: how often the module was called; more than once if a model shares it between layers.
        alike: all calls gave the same arguments, by kind: names, types, dtypes, numbers of dimensions, and numbers and
            texts themselves (the layer that calls a shared module).
        autocast: the dtype that a region around the call computes in; None outside of such regions.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    arguments: Mapping[str, Any]
    signature: inspect.Signature
    calls: int = 1
    alike: bool = True
    autocast: torch.dtype | None = None

    def surroundings(self) -> AbstractContextManager[Any]:
        """What to repeat the call in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", self.autocast, cache_enabled=False)  # parameters are exchanged between calls


def record_calls(
    model: nn.Module, owners: Iterable[str], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, CallRecord]:
    """Run `model(*args, **kwargs)` once, in eval mode without gradients, and return the call of each owner.

    `owners` are dotted paths ("" is the model itself). Owners that are not called are absent from the result.

    Raises:
        UnsupportedModel: if the model has no such module.
    """
    modules = {owner: _submodule(model, owner) for owner in owners}
    recorders = _run(model, modules, args, kwargs or {}, clone=False)
    if any(recorder.overwritten() for recorder in recorders.values()):
        recorders = _run(model, modules, args, kwargs or {}, clone=True)
    return {owner: record for owner, recorder in recorders.items() if (record := recorder.record()) is not None}


def forward_signature(module: nn.Module) -> inspect.Signature:
    """The signature of the module's own forward: below decorators, dispatch hooks and without self.

    A module that stands in for another declares that one's signature as its own.
    """
    declared = getattr(module, "__signature__", None)
    if isinstance(declared, inspect.Signature):
        return declared
    forward = inspect.unwrap(getattr(module, "_old_forward", module.forward))
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    bound = inspect.ismethod(forward)
    return signature.replace(parameters=parameters if bound or not parameters else parameters[1:])


def named_arguments(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], owner: str
) -> dict[str, Any]:
    """The given arguments by name, in the order of the signature; what ``*args`` takes is one argument, ``*args``.

    Raises:
        UnsupportedModel: if positional arguments are left over.
    """
    order = positional_order(signature)
    variadic = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    if len(args) > len(order) and variadic is not None:
        return {**dict(zip(order, args, strict=False)), f"*{variadic}": tuple(args[len(order) :]), **kwargs}
    if len(args) > len(order):
        raise UnsupportedModel(
            f"{owner or 'the model'} takes a variable number of positional arguments",
            hint="rewrite it as a graph: pass torch.export.export(model, ...) instead of the model",
        )
    return {**dict(zip(order, args, strict=False)), **kwargs}


def positional_order(signature: inspect.Signature) -> tuple[str, ...]:
    """Names of the parameters that can be given by position."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in signature.parameters.items() if parameter.kind in by_position)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without torch's fused attention: its encoder layer bypasses the attention module, which ignores hints in it."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def snapshot(value: Any) -> Any:
    """A copy of `value` if it is a cache, which the call will change; else its tensors in containers of their own."""
    return copy.deepcopy(value) if is_cache(value) else own(value)


def is_cache(value: Any) -> bool:
    """True for objects that collect keys and values through an `update` method."""
    return not isinstance(value, Tensor | Mapping) and callable(getattr(value, "update", None))


@dataclass
class _Recorder:
    module: nn.Module
    owner: str
    clone: bool
    before: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    output: Any = None
    calls: int = 0
    kind: Any = None
    alike: bool = True
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    autocast: torch.dtype | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        if self.calls == 1:
            self.before = self._keep(args), self._keep(kwargs)
            self.kind = _kind((args, kwargs))
            self.autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.alike &= _kind((args, kwargs)) == self.kind

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.calls == 1 and self.output is None:
            self.output = self._keep(output)

    def _keep(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if self.clone:
                return value.clone()
            if not value.is_inference():
                self.versions.append((value, value._version))
            return value
        if type(value) in (tuple, list):
            return type(value)(self._keep(v) for v in value)
        if type(value) is dict:
            return {k: self._keep(v) for k, v in value.items()}
        return snapshot(value)

    def overwritten(self) -> bool:
        """True if the model changed a recorded tensor in place after the fact."""
        return any(tensor._version != version for tensor, version in self.versions)

    def record(self) -> CallRecord | None:
        if self.before is None:
            return None
        args, kwargs = self.before
        signature = forward_signature(self.module)
        arguments = named_arguments(signature, args, kwargs, self.owner)
        return CallRecord(args, kwargs, self.output, arguments, signature, self.calls, self.alike, self.autocast)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    if isinstance(value, dict):
        return {name: _kind(v) for name, v in value.items()}
    return (type(value), value) if isinstance(value, (int, float, str)) else type(value)


def _run(
    model: nn.Module, modules: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], *, clone: bool
) -> dict[str, _Recorder]:
    recorders = {owner: _Recorder(module, owner, clone) for owner, module in modules.items()}
    handles = []
    for recorder in recorders.values():
        handles.append(recorder.module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(recorder.module.register_forward_hook(recorder.leave, with_kwargs=True, prepend=True))
    try:
        with evaluating(model), plain_attention(), torch.no_grad():
            model(*(snapshot(a) for a in args), **{k: snapshot(v) for k, v in kwargs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return recorders


def _submodule(model: nn.Module, owner: str) -> nn.Module:
    try:
        return model.get_submodule(owner)
    except AttributeError as error:
        raise UnsupportedModel(f"the model has no module {owner!r}") from error
