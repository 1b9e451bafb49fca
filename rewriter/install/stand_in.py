"""Does a model call whatever stands where one of its modules stood? Some ask for the module's class first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rewriter.install.call_record import plain_attention, snapshot
from rewriter.module_modes import evaluating

REASON = "{owner} is not called once another module is in its place: the code around it asks for its class"


def not_called_by_place(
    model: nn.Module, owners: Iterable[str], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> set[str]:
    """Those of the modules at `owners` (each of them called by the model's forward) that a stand-in is not called for.

    Runs `model(*args, **kwargs)` once with stand-ins; where that fails nothing is known, and nothing is returned.
    """
    stood = {owner: _StandIn(model.get_submodule(owner)) for owner in owners if owner}
    if not stood:
        return set()
    try:
        with _standing(model, stood), evaluating(model), plain_attention(), torch.no_grad():
            model(*(snapshot(a) for a in args), **{k: snapshot(v) for k, v in (kwargs or {}).items()})
    except Exception:  # whatever foreign code raises on a module that it did not expect; installing finds out
        return set()
    return {owner for owner, module in stood.items() if not module.called}


class _StandIn(nn.Module):
    """Answers as another module does, under a class of its own."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.called = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.original(*args, **kwargs)


@contextmanager
def _standing(model: nn.Module, stood: Mapping[str, _StandIn]) -> Iterator[None]:
    """With the stand-ins wherever their originals stand."""
    ours = {id(stand_in) for stand_in in stood.values()}
    by_original = {id(stand_in.original): stand_in for stand_in in stood.values()}
    places = [
        (parent, name, child)
        for parent in model.modules()
        if id(parent) not in ours
        for name, child in parent._modules.items()
        if child is not None and id(child) in by_original
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = by_original[id(child)]
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
