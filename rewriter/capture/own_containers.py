"""Inputs that a model may write into: some put what they compute into the dict that they are called with."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any


def own(given: Any) -> Any:
    """The same tensors in mappings, lists and tuples of their own, so that no call finds what another left there."""
    if type(given) is dict:
        return {name: own(value) for name, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(own(value) for value in given)
    return copy.copy(given) if isinstance(given, MutableMapping) else given
