"""A module run for a while in another mode, or on trial: afterwards it is as it was, each part for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the module and everything below it."""
    with _in_mode(module, training=False):
        yield


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Training mode for the module and everything below it."""
    with _in_mode(module, training=True):
        yield


@contextmanager
def _in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Modes are set by `train`, which some modules override, e.g. to take adapters out of their weights again.

    Exported modules refuse: they are what they were exported as.
    """
    before = [(m, m.training) for m in module.modules()]
    try:
        module.train(training)
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        module.train(before[0][1])
        for part, mode in before:  # parents come before their children
            if part.training != mode:
                part.train(mode)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put back what a forward leaves on its modules: what it caches (fake tensors, under export), and parts that it
    exchanges, as where short sequences are attended to in another way from then on."""
    before = [(m, dict(m._buffers), dict(m._modules), dict(m.__dict__)) for m in module.modules()]
    try:
        yield
    finally:
        for owner, buffers, children, attributes in before:
            for held, old in ((owner._buffers, buffers), (owner._modules, children)):
                held.clear()
                held.update(old)  # type: ignore[arg-type]
            for name in [n for n, v in owner.__dict__.items() if isinstance(v, torch.Tensor)]:
                if name not in attributes:
                    del owner.__dict__[name]
            owner.__dict__.update({n: v for n, v in attributes.items() if n not in {"_buffers", "_modules"}})
