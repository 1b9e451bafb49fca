"""Lowers the score-modifier part of a spec into expressions of each target language.

A modifier is first an expression tree over the raw score q·k, then text. A template only says where it goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from codegen.spec import GroupedQueryAttention

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Score:
    """q·k of one query and one key, before anything is done to it."""


@dataclass(frozen=True)
class Bias:
    """The additive bias of one query and one key; a boolean mask arrives here as 0 or minus infinity."""


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Times:
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Plus:
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Tanh:
    argument: Expression


Expression = Score | Bias | Number | Times | Plus | Tanh


@dataclass(frozen=True)
class Lowered:
    """Text in a target language that was made here, from numbers and operators alone."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Dialect:
    """How a language writes the tree.

    Attributes:
        score, bias: names of the variables that hold them where the template puts the expression.
        row, queries, keys: names of the query's number and of both lengths, for `last_key`.
        number: a constant.
        tanh: the name of a hyperbolic tangent.
    """

    score: str
    bias: str
    row: str
    queries: str
    keys: str
    number: Callable[[float], str]
    tanh: str


def _cpp_number(value: float) -> str:
    return f"splat({_single(value)}f)"


def _cuda_number(value: float) -> str:
    return f"{_single(value)}f"


def _single(value: float) -> str:
    """The nearest single-precision number as an exact hexadecimal literal; raises ValueError if it is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be written into a kernel")
    return value.hex()


DIALECTS: Mapping[str, Dialect] = {
    "cpp": Dialect("score", "bias", "row", "queries", "keys", _cpp_number, "tanh_of"),
    "cuda": Dialect("score", "bias", "row", "queries", "keys", _cuda_number, "tanhf"),
    "triton": Dialect("score", "bias", "rows[:, None]", "queries", "keys", repr, "tanh_of"),
}


def score_expression(spec: GroupedQueryAttention) -> Expression:
    """Scale, then softcap, then bias: the argument of the softmax."""
    found: Expression = Times(Score(), Number(spec.scale))
    if spec.softcap is not None:
        capped = Tanh(Times(Score(), Number(spec.scale / spec.softcap)))
        found = Times(capped, Number(spec.softcap))
    return Plus(found, Bias()) if spec.bias else found


def in_base_two(spec: GroupedQueryAttention) -> bool:
    """Whether log2(e) is multiplied in with the last constant, so that the softmax needs no further factor.

    Not with a bias: the lowest finite number, which masks hold, would become minus infinity.
    """
    return not spec.bias


def folded_expression(spec: GroupedQueryAttention) -> Expression:
    """`score_expression`, times log2(e) where `in_base_two`."""
    found = score_expression(spec)
    if in_base_two(spec) and isinstance(found, Times) and isinstance(found.right, Number):
        return Times(found.left, Number(found.right.value * LOG2_E))
    return found


def factored_expression(spec: GroupedQueryAttention) -> tuple[Expression, float]:
    """(expression, factor): `folded_expression` with its last constant apart, for kernels that multiply it in with the
    subtraction of the largest score. The factor is 1 where that constant cannot be taken out of a maximum."""
    found = folded_expression(spec)
    if in_base_two(spec) and isinstance(found, Times) and isinstance(found.right, Number) and found.right.value > 0:
        return found.left, found.right.value
    return found, 1.0


def lower(expression: Expression, language: str) -> Lowered:
    """The expression in "cpp" (on vectors), "cuda" (on floats) or "triton" (on blocks)."""
    return Lowered(_text(expression, DIALECTS[language]))


def last_key(spec: GroupedQueryAttention, language: str) -> Lowered | None:
    """The last key that a query sees, as an integer expression; None if it sees all."""
    dialect = DIALECTS[language]
    return Lowered(f"{dialect.row} + ({dialect.keys} - {dialect.queries})") if spec.causal else None


def _text(expression: Expression, dialect: Dialect) -> str:
    match expression:
        case Score():
            return dialect.score
        case Bias():
            return dialect.bias
        case Number(value):
            return dialect.number(value)
        case Times(left, right):
            return f"{_text(left, dialect)} * {_text(right, dialect)}"
        case Plus(left, right):
            return f"({_text(left, dialect)} + {_text(right, dialect)})"
        case Tanh(argument):
            return f"{dialect.tanh}({_text(argument, dialect)})"
