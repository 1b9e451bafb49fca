"""What can go wrong on the way from a spec to a loaded kernel, each with a hint that says what to do."""

from __future__ import annotations


class KernelError(Exception):
    """Base of all errors that building, caching or loading a kernel raises on purpose.

    Attributes:
        hint: one sentence on what to do next; may be empty.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UnsafeInput(KernelError):
    """Something other than finite numbers, flags and enums was about to reach a template."""


class NotLegal(KernelError):
    """No kernel computes this spec in this dtype on this device."""


class NoCompiler(KernelError):
    """There is no compiler that can build the kernel."""


class CompilationFailed(KernelError):
    """The compiler refused the source, or took too long."""


class UnsafeCache(KernelError):
    """Other users could change what the cache folder holds."""


class UnusableCache(KernelError):
    """The cache folder cannot be made or written to."""


class CorruptBinary(KernelError):
    """A cached binary is not the one that was built."""
