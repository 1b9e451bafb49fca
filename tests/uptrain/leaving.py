"""How a process of a group ends."""

from __future__ import annotations

import os
import sys


def leave() -> None:
    """End this process, done, without taking the interpreter down.

    Gloo's threads outlive `destroy_process_group`; one that lets go of its last tensor while the interpreter ends is
    unwound through code that may not throw, and aborts a process whose work is done ("terminate called without an
    active exception", once in some hundred runs on a busy machine).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
