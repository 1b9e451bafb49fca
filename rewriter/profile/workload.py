"""What one measured call is: the model as it is called, a whole prompt, or the tokens generated after one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewriter.errors import UsageError

MODES = ("forward", "prefill", "decode")
PROMPT, NEW_TOKENS, BATCH = 512, 32, 1


@dataclass(frozen=True)
class Workload:
    """One measured call.

    Attributes:
        mode: "forward" calls the model on the inputs given; "prefill" on a prompt with an empty cache, which it
            fills; "decode" one token at a time behind a prompt, whose prefill is not measured.
        batch: sequences.
        prompt: tokens of each prompt. new_tokens: tokens generated; times are of one of them. Both 0 in "forward".
    """

    mode: str = "forward"
    batch: int = 0
    prompt: int = 0
    new_tokens: int = 0

    @staticmethod
    def of(mode: str, batch: int | None, prompt: int | None, new_tokens: int | None, shaped: bool) -> Workload:
        """With defaults for what is None; raises UsageError for what does not go together."""
        if mode not in MODES:
            raise UsageError(f"unknown mode {mode!r}", hint=f"one of {', '.join(MODES)}")
        given = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens}
        if (name := next((n for n, v in given.items() if v is not None and v < 1), None)) is not None:
            raise UsageError(f"{name} must be at least 1", hint="e.g. --prompt 512 --new-tokens 32 --batch 1")
        if mode == "forward":
            if any(value is not None for value in given.values()):
                raise UsageError("prompt, new tokens and batch are of modes prefill and decode", hint="--mode decode")
            return Workload()
        if shaped:
            raise UsageError(f"shapes follow from the prompt in mode {mode}", hint="leave --shape out")
        if mode == "prefill" and new_tokens is not None:
            raise UsageError("a prefill makes no new tokens", hint="leave --new-tokens out, or take --mode decode")
        new = 0 if mode == "prefill" else new_tokens or NEW_TOKENS
        return Workload(mode, batch or BATCH, prompt or PROMPT, new)

    @property
    def total(self) -> int:
        """Tokens of a sequence at the end."""
        return self.prompt + self.new_tokens

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def read(stored: Mapping[str, Any]) -> Workload:
        """What `to_dict` gave."""
        return Workload(**stored)

    def __str__(self) -> str:
        if self.mode == "forward":
            return "forward"
        new = f", {self.new_tokens} new tokens" if self.new_tokens else ""
        return f"{self.mode}, {self.batch} x {self.prompt} tokens{new}"


FORWARD = Workload()
