"""A limit that the user sets by a variable of the environment."""

from __future__ import annotations

import math
import os

from rewriter.errors import UsageError


def asked_number(variable: str, unit: str) -> float | None:
    """The positive number in a variable; None if it is not set. Raises UsageError if it holds anything else."""
    given = os.environ.get(variable)
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    if not (number > 0 and math.isfinite(number)):
        raise UsageError(f"{variable}={given!r} is no number of {unit}", hint="give a positive one, or unset it")
    return number
