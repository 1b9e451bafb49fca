"""What is said of an attention, or a softmax, that is not read; and reasons that several modules give."""

from __future__ import annotations

from passes.dataflow import Value

TALKING_HEADS = "its scores are mixed between heads by learned weights (talking heads)"
TURNED = "something is added to its scores where they are [keys, queries], or masks them there"
INTEGER_SCORES = (
    "its scores are computed in integers (QLinearMatMul); quantise in the QDQ format instead, "
    "or rewrite the float model and quantise it afterwards"
)
LEARNED_QUERY = (
    "its queries are stored numbers (learned, mostly) that no projection makes, so it has no query heads to read; "
    "project them (a linear layer behind the parameter)"
)
TOO_LARGE = (
    "its scores on the example inputs, recomputed in double precision, take more memory than there is; pass "
    "example_inputs of fewer tokens (a shorter text, a smaller image)"
)
TOO_LONG = (
    "it may be read by trying what it answers to, which so many tokens would take too long for; pass example_inputs of "
    "fewer tokens (a shorter text, a smaller image)"
)
DRAWN = "it draws random numbers in every call, so that what it gives can be compared with nothing"
BIAS_NOT_ASKED_FOR = (
    "the score bias is computed from hidden states (content-dependent positions), which sharing "
    "heads may not suit; GroupedQuery(N, keep_hidden_bias=True), or --keep-hidden-bias, shares them and keeps the bias"
)
CONTENT_BIAS = (
    "the score bias is computed from hidden states in a way that is not read (beside it is no product of queries and "
    "keys, or more than one, or it is part of an operator); leave this attention as it is (layers= selects others)"
)


class NotUnderstood(Exception):
    """An attention with a step that matching does not understand; the message is the refusal's reason."""


class OtherInputs(NotUnderstood):
    """An attention that other inputs would tell more of; the message says which."""


class NotTried(NotUnderstood):
    """An attention that might be known by trying what it answers to, and is not tried; the message says why."""


class SurelyAttention(NotUnderstood):
    """Scores of pairs of tokens were seen: this is an attention, wherever its weights lead."""


class Unrelated(Exception):
    """A softmax that is no attention; the message says what it is instead."""


class FreeQuery(NotUnderstood):
    """A query that no fed data reaches.

    Attributes:
        query: the operand; a projected parameter, or what `otherwise` says.
    """

    def __init__(self, query: Value, otherwise: Exception) -> None:
        super().__init__(str(otherwise))
        self.query, self.otherwise = query, otherwise
