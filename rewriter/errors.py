"""Everything that can go wrong for a user, each with a hint that says what to do."""

from __future__ import annotations


class RewriteError(Exception):
    """Base of all errors that rewriter raises on purpose.

    Attributes:
        hint: one sentence on what to do next; may be empty.
        exit_code: what the command line exits with.
    """

    exit_code = 1
    usual_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class UsageError(RewriteError):
    """A wrong argument: illegal head count, bad layer selector, missing file or folder."""

    exit_code = 2


class UnknownTarget(UsageError):
    """No target has this name."""


class UnsupportedModel(RewriteError):
    """The model is of a kind that rewriter does not take (quantised by a library, not exportable, ...)."""


class NotExportable(UnsupportedModel):
    """torch.export does not take the model, and one run of it cannot be traced either."""


class NothingToRewrite(RewriteError):
    """No site could be rewritten; the refusals say why."""


class VerificationFailed(RewriteError):
    """The rewritten model did not pass its checks; nothing was written."""


class CannotWrite(RewriteError):
    """The output cannot be written: the disk is full, or fails. What was there before is still there."""


class InvalidModelFile(RewriteError):
    """The input file is broken, or unsafe to open."""

    exit_code = 3
    usual_hint = "download it again, or save it again with the program that wrote it"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
