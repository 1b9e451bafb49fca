"""What one run of uptraining does, in numbers: everything that decides its result besides models and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from rewriter.errors import UsageError

Train = Literal["all", "blocks", "rewritten"]
Precision = Literal["no", "bf16", "fp16"]
Output = Literal["auto", "logits", "features"]


HOW_LONG = "give steps (--steps N) or a fraction of the pre-training (--fraction 0.05)"


@dataclass(frozen=True)
class Recipe:
    """How to uptrain.

    Attributes:
        steps: optimizer steps; None where `fraction` says how many.
        fraction: part of the pre-training to repeat (0.05 in arXiv 2305.13245), of `pretraining_tokens` tokens.
        pretraining_tokens: tokens that the teacher was trained on.
        batch: sequences in one step, over all processes and accumulated parts.
        window: tokens of a sequence: text for causal models is cut into windows of this length, other texts are cut
            off there.
        learning_rate: at its peak, reached after the `warmup` part of all steps; a half cosine leads from it to 0.
        weight_decay: of AdamW, on matrices alone.
        clip: largest norm of the gradient.
        layer_phase: part of the steps in which each rewritten block learns its original's output on the original's
            input; the rest distils what the model puts out.
        distillation: weight of the distance to the teacher's output in the second phase; 0 trains on the data alone.
        hidden: weight of the blocks' outputs in the second phase, beside the model's output.
        output: what the model puts out: "logits", "features", or "auto": logits if the model calls them so.
        temperature: at which logits are compared.
        language_model: weight of next-token prediction on the data itself in the second phase.
        train: which parameters learn: "all", those of "blocks" (layers) in which something was rewritten, or only
            "rewritten" ones, those that differ from the teacher's.
        group_by_length: make batches of sequences that are about equally long, so that little is padding; the order is
            still random from batch to batch. Sequences of one length stay in the order in which they were drawn.
        accumulate: parts of a step that are run one after the other, to save memory.
        precision: "no" (float32), "bf16" or "fp16" products; None leaves it to ``accelerate launch``.
        gradient_checkpointing: compute activations twice, to save memory.
        dropout: leave the student's dropout on. Distillation does without.
        seed: of the data's order and of dropout.
        validation: sequences held out of the data where none are given apart.
        validate_every: steps between validations; None: only before and after.
        save_every: steps between checkpoints.
        keep: complete checkpoints that are kept.
    """

    steps: int | None = None
    fraction: float | None = None
    pretraining_tokens: float | None = None
    batch: int = 8
    window: int = 512
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    layer_phase: float = 0.2
    distillation: float = 1.0
    hidden: float = 1.0
    output: Output = "auto"
    temperature: float = 1.0
    language_model: float = 0.0
    train: Train = "blocks"
    group_by_length: bool = True
    accumulate: int = 1
    precision: Precision | None = None
    gradient_checkpointing: bool = False
    dropout: bool = False
    seed: int = 0
    validation: int = 64
    validate_every: int | None = None
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        """Raises UsageError for numbers that mean nothing."""
        for name in ("batch", "accumulate", "validation", "save_every", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.window >= 2, "window", self.window, "at least 2")
        for name in ("warmup", "layer_phase"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("learning_rate", "clip", "temperature"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("weight_decay", "distillation", "hidden", "language_model"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.train in get_args(Train), "train", self.train, '"all", "blocks" or "rewritten"')
        known = self.precision is None or self.precision in get_args(Precision)
        _require(known, "precision", self.precision, '"no", "bf16" or "fp16"')
        _require(self.output in get_args(Output), "output", self.output, '"auto", "logits" or "features"')
        for name in ("steps", "validate_every", "fraction", "pretraining_tokens"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "positive")
        if self.steps is not None and self.fraction is not None:
            raise UsageError("steps and fraction both say how long to train", hint="give one of them")
        if self.fraction is not None and self.pretraining_tokens is None:
            raise UsageError(
                "a fraction of the pre-training needs to know how many tokens that was",
                hint="state pretraining_tokens (--pretraining-tokens 2e12), or give steps",
            )

    def total(self, tokens_per_sequence: float) -> int:
        """Steps of the whole run; a fraction is rounded up to whole steps.

        Raises UsageError if neither steps nor a fraction are given.
        """
        if self.steps is not None:
            return self.steps
        if self.fraction is None or self.pretraining_tokens is None:
            raise UsageError("how long to train is not said", hint=HOW_LONG)
        budget = self.fraction * self.pretraining_tokens
        return max(1, -int(-budget // (self.batch * tokens_per_sequence)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(stored: dict[str, Any]) -> Recipe:
        """Back from `to_dict`; raises UsageError for a recipe of another version."""
        names = {field.name for field in fields(Recipe)}
        if set(stored) != names:
            raise UsageError("the run was started by another version of rewriter", hint="start it anew")
        return Recipe(**stored)


def _require(good: bool, name: str, value: object, rule: str) -> None:
    if not good:
        raise UsageError(f"{name} is {value!r}", hint=f"it must be {rule}")
