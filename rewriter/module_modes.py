"""Eval and training mode for a while: afterwards each module has its own mode back, whatever its parent's is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    """Modes are set by `train`, which some modules override, e.g. to take adapters out of their weights again."""
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        module.train(before[0][1])
        for part, mode in before:  # parents come before their children
            if part.training != mode:
                part.train(mode)
