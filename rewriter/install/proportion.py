"""Keeps a config from asking for far more than its checkpoint holds: building stops while that still costs nothing.

A few bytes of config.json say how many layers there are and how wide. Modules are built before weights are looked at,
so a config alone could take all time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from rewriter.errors import InvalidModelFile
from rewriter.install.checkpoint_files import Holdings

MOST_LAYERS = 100_000
"""Of layers, experts, labels: configs make a list of so many entries before a module is built."""
_COUNTS = re.compile(r"(layers?|blocks|experts|labels|depths?)$")

_SLACK = 16
"""Times as many parameters and numbers as are stored: some are split, tied, or set more than once while loading, and
what a rewritten model stores is less than the original that is built first."""
_FREE_PARAMETERS, _FREE_NUMBERS = 1_000, 1 << 26


def require_sane_counts(config: Any, file: Path) -> None:
    """Raises InvalidModelFile if a config asks for absurdly many layers, experts or labels, inner configs included."""
    if isinstance(config, list):
        for value in config:
            require_sane_counts(value, file)
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        most = max((n for n in numbers if isinstance(n, int)), default=0)
        if _COUNTS.search(str(key)) and most > MOST_LAYERS:
            raise InvalidModelFile(f"{file} makes no sense: {str(key)[:80]} is {most:,}", hint="correct that entry")
        require_sane_counts(value, file)


@contextmanager
def in_proportion(folder: Path) -> Iterator[None]:
    """Modules that are built in this block must be no larger than what `folder` holds allows.

    Raises InvalidModelFile as soon as they are.
    """
    held = Holdings.of(folder)
    left = [_FREE_PARAMETERS + _SLACK * held.tensors, _FREE_NUMBERS + _SLACK * held.bytes]

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        left[0] -= 1
        left[1] -= tensor.numel()
        if min(left) < 0:
            raise InvalidModelFile(
                f"{folder} makes no sense: its config asks for a far larger model than the {held.tensors:,} tensors "
                f"({held.bytes:,} bytes) that it holds",
                hint="download it again, all of its files",
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
