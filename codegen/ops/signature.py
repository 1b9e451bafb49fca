"""What a kernel of Triton is compiled for ahead of time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """Types of one kernel's arguments, as Triton's compiler wants them.

    Attributes:
        types: by argument name.
        aligned: arguments that are multiples of 16 (bytes for pointers, elements for strides).
        constants: compile-time arguments.
    """

    types: dict[str, str]
    aligned: frozenset[str]
    constants: dict[str, bool]
