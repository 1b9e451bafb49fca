"""Fourier mixing as CUDA C++: fast transforms in shared memory, single precision between 16-bit operands."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from codegen import hooks
from codegen.device import DType
from codegen.render import identifier, numbers, render
from codegen.spec import FourierMixing

TEMPLATE = "cuda/fourier_mixing.cu.j2"

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

DTYPES = (DType.BFLOAT16, DType.FLOAT16)
"""Twiddle factors come from the card's fast sine, which is good for half precisions."""

RADICES = (16, 12, 10, 9, 8, 6, 5, 4, 3, 2)
"""What one pass can do in registers. Each is written out or a product of two of those that are."""

COMPOSITES = {
    6: (3, 2), 8: (4, 2), 9: (3, 3), 10: (5, 2), 12: (4, 3), 15: (5, 3), 16: (4, 4), 18: (9, 2), 20: (5, 4), 24: (8, 3),
    25: (5, 5), 27: (9, 3), 30: (10, 3), 32: (8, 4),
}  # fmt: skip
"""Numbers of points whose transform is a product of two."""

IN_REGISTERS = frozenset({1, 2, 3, 4, 5, *COMPOSITES})
"""Numbers of points that one thread transforms."""

MOST_FEATURES, MOST_TOKENS = 4096, 4096
"""What fits a multiprocessor's shared memory."""

WIDTH = 32
"""Rows between the two kernels are padded to this many pairs, a whole number of blocks' columns and of sectors."""

SAMPLE_TOKENS = 512
"""The length that a source is rendered for where none is named: a kernel knows its length."""

MOST_POINTS = 16
"""Points that a thread holds at once, unless a cut says otherwise."""

MOST_SHARED = 96 << 10
"""Bytes of shared memory of a block: what every card has."""

MOST_THREADS = 512
"""Of a block, unless a cut says otherwise: two of them fit a multiprocessor's registers."""


@dataclass(frozen=True)
class Cut:
    """How work is cut; 0 means the default of `cut_for`.

    Attributes:
        bundle: tokens of a block of the first kernel.
        feature_threads: threads of a transform over features, of two tokens.
        token_threads: threads of a transform over what is left of the tokens, in shared memory.
        columns: features to a block of the second kernel; in shared memory a divisor of 32.
        early: the second kernel is started before the first has ended, and waits on the card (from sm_90 on).
    """

    bundle: int = 0
    feature_threads: int = 0
    token_threads: int = 0
    columns: int = 0
    early: bool = True


@dataclass(frozen=True)
class Plan:
    """A cut with its numbers, and what launches of both kernels take: threads of a block, bytes of shared memory.

    Attributes:
        rest: tokens over the bundle.
        width: pairs of numbers in a row between the kernels.
    """

    cut: Cut
    rest: int
    width: int
    feature_block: int
    feature_shared: int
    token_block: int
    token_shared: int

    @property
    def in_registers(self) -> bool:
        return self.token_shared == 0


@functools.cache
def radices(length: int) -> tuple[int, ...] | None:
    """Radices of the passes, from the least to the greatest: few, and then small; None if a prime above 5 divides."""
    if length == 1:
        return None
    best: tuple[int, ...] | None = (length,) if length in RADICES else None
    for radix in RADICES:
        if length % radix == 0 and length != radix and (rest := radices(length // radix)) is not None:
            found = tuple(sorted((radix, *rest)))
            if best is None or (len(found), sum(found)) < (len(best), sum(best)):
                best = found
    return best


def bundle_for(tokens: int, hidden: int) -> int:
    """Tokens of a block: 8 of short sequences, so that there are many blocks, else 16, or the nearest that divides and
    whose transforms fit the shared memory."""
    most = min(8 if tokens <= 256 else 16, 2 * (MOST_SHARED // (_span(hidden) * 8)))
    fitting = [b for b in sorted(IN_REGISTERS) if b <= most and tokens % b == 0]
    short = [b for b in fitting if tokens // b in IN_REGISTERS]
    return max(short or fitting)


def threads_for(length: int) -> int:
    """Threads of a transform: the number that leaves the fewest idle, of those that need few registers."""
    own = radices(length) or (1,)

    def cost(threads: int) -> tuple[int, int]:
        return sum(radix * math.ceil(length // radix / threads) * threads for radix in own), -threads

    fitting = [t for t in {length // r for r in own} if max(r * math.ceil(length // r / t) for r in own) <= MOST_POINTS]
    return min(fitting, key=cost)


def cut_for(spec: FourierMixing, tokens: int, arch: str, cut: Cut | None = None) -> Cut:
    """`cut` with defaults for what it leaves open."""
    cut = cut or Cut()
    bundle = cut.bundle or bundle_for(tokens, spec.hidden)
    rest, pairs = tokens // bundle, -(-bundle // 2)
    features = cut.feature_threads or min(threads_for(spec.hidden), MOST_THREADS // pairs)
    own = 1 if rest in IN_REGISTERS else cut.token_threads or rest // (radices(rest) or (1,))[0]
    columns = cut.columns or (128 if rest in IN_REGISTERS else _columns(rest, own))
    return Cut(bundle, features, own, columns, cut.early and arch not in ("sm_80", "sm_86", "sm_89"))


def _columns(rest: int, threads: int) -> int:
    """As many as a block may have, up to 16: neighbours' columns make reads and writes wide."""
    return max(c for c in (1, 2, 4, 8, 16) if c == 1 or (c * threads <= 1024 and c * _span(rest) * 8 <= MOST_SHARED))


def legal(spec: Any, dtype: DType) -> str | None:
    """Why there is no such kernel at any length, or None if there is one."""
    if not isinstance(spec, FourierMixing):
        return f"there is no CUDA kernel of {type(spec).__name__}"
    if spec.hartley:
        return "the Hartley transform has no kernel"
    if dtype not in DTYPES:
        return f"there is no kernel in {dtype.value}"
    return _why_not_length(spec.hidden, MOST_FEATURES, "features")


def legal_tokens(tokens: int) -> str | None:
    """Why there is no kernel for sequences of this length, or None if there is one."""
    return _why_not_length(tokens, MOST_TOKENS, "tokens")


def _why_not_length(length: int, most: int, what: str) -> str | None:
    if length > most:
        return f"more than {most} {what} do not fit the kernel's shared memory"
    if length < 2 or radices(length) is None:
        return f"{length} {what} are no product of 2, 3 and 5"
    return None


def kernel_name(spec: FourierMixing, dtype: DType, arch: str, *, tokens: int = SAMPLE_TOKENS) -> hooks.Lowered:
    """Readable, unique to the spec and the length, and nothing but letters, digits and underscores."""
    words = ["gain"] * spec.gain + ["bias"] * spec.bias
    return identifier("fourier_cuda", [f"s{tokens}", f"d{spec.hidden}", *words, dtype.short, arch], spec)


def plan(spec: FourierMixing, tokens: int, arch: str, cut: Cut | None = None) -> Plan:
    """What the launcher has to know of a source that was rendered with the same arguments."""
    cut = cut_for(spec, tokens, arch, cut)
    rest, pairs = tokens // cut.bundle, -(-cut.bundle // 2)
    return Plan(
        cut,
        rest,
        -(-spec.half // WIDTH) * WIDTH,
        pairs * cut.feature_threads,
        (pairs * _span(spec.hidden) + cut.bundle) * 8,
        cut.columns * cut.token_threads,
        0 if rest in IN_REGISTERS else cut.columns * _span(rest) * 8,
    )


def source(spec: FourierMixing, dtype: DType, arch: str, *, tokens: int = SAMPLE_TOKENS, cut: Cut | None = None) -> str:
    """A file with two kernels, over features and over tokens, for sequences of this length.

    Raises UnsafeInput if the spec holds anything but numbers and flags.
    """
    fields = numbers(spec)
    name = kernel_name(spec, dtype, arch, tokens=tokens)
    made = plan(spec, tokens, arch, cut)
    feature_passes = _passes(spec.hidden, made.cut.feature_threads)
    token_passes = [] if made.in_registers else _passes(made.rest, made.cut.token_threads)
    used = {it["radix"] for it in (*feature_passes, *token_passes)} | {made.cut.bundle}
    used |= {made.rest} if made.in_registers else set()
    return render(
        TEMPLATE,
        {
            "fields": fields,
            "name": name,
            "dtype": dtype,
            "early": made.cut.early,
            "hidden": spec.hidden,
            "half": spec.half,
            "tokens": tokens,
            "gain": spec.gain,
            "bias": spec.bias,
            "width": made.width,
            "feature_passes": feature_passes,
            "feature_threads": made.cut.feature_threads,
            "feature_padding": feature_passes[0]["radix"],
            "feature_span": _span(spec.hidden),
            "bundle": made.cut.bundle,
            "pairs": -(-made.cut.bundle // 2),
            "rest": made.rest,
            "token_angle": -2 * math.pi / tokens,
            "token_passes": token_passes,
            "token_threads": made.cut.token_threads,
            "token_padding": token_passes[0]["radix"] if token_passes else 1,
            "columns": made.cut.columns,
            "composites": [_composite(points) for points in _with_parts(used)],
        },
    )


def _span(length: int) -> int:
    """Places of a transform's points in shared memory, gaps included."""
    first = (radices(length) or (length,))[0]
    return length + -(-length // first)


def _passes(length: int, threads: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before = 1
    for radix in radices(length) or ():
        step = length // radix
        count = math.ceil(step / threads)
        angle = -2 * math.pi / (radix * before)
        found.append({"radix": radix, "before": before, "step": step, "count": count, "angle": angle,
                      "whole": step == count * threads})  # fmt: skip
        before *= radix
    return found


def _with_parts(used: set[int]) -> list[int]:
    """The products among them and what these are made of, each after its parts."""
    needed: set[int] = set()
    waiting = list(used)
    while waiting:
        points = waiting.pop()
        if points in COMPOSITES and points not in needed:
            needed.add(points)
            waiting += COMPOSITES[points]
    return sorted(needed)


def _composite(points: int) -> dict[str, Any]:
    left, right = COMPOSITES[points]
    angles = [2 * math.pi * i / points for i in range((left - 1) * (right - 1) + 1)]
    roots = [[_exact(math.cos(a)), _exact(-math.sin(a))] for a in angles]
    return {"points": points, "left": left, "right": right, "roots": roots}


def _exact(value: float) -> float:
    """Sines and cosines of quarter turns as they are."""
    return round(value) + 0.0 if abs(value - round(value)) < 1e-12 else value
