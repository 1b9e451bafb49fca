"""A sparse pattern in standard ONNX operators: which keys each query sees, from positions.

The numbers of a pattern are attributes with one entry for each sight; the words say which of them a body reads.

Shape legend: S queries, T keys, P sights of the pattern, H query heads.
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.ops.function_body import FunctionBody
from codegen.sight import Pattern


def sparse_words(pattern: Pattern) -> list[str]:
    """Which relations a body computes, and whether sights differ by head."""
    if not pattern:
        return []
    parts = {
        "Near": True,
        "Block": any(s.block > 1 for s in pattern),
        "Strided": any(s.strided for s in pattern),
        "Sinks": any(s.sinks for s in pattern),
        "Columns": any(s.columns for s in pattern),
        "ByHead": len(pattern) > 1,
        "Ordered": _ordered(pattern),
    }
    return [word for word, present in parts.items() if present]


def sparse_numbers(pattern: Pattern) -> list[str]:
    """Names of the numbers that a body with these words reads."""
    read = {
        "Near": ("reach",),
        "Block": ("block",),
        "Strided": ("stride",),
        "Sinks": ("sinks",),
        "Columns": ("period", "first", "last"),
    }
    return [name for word in sparse_words(pattern) for name in read.get(word, ())]


def sparse_attributes(pattern: Pattern) -> list[ir.Attr]:
    """Those numbers, [P] each."""
    return [ir.AttrInt64s(f"sparse_{name}", [getattr(s, name) for s in pattern]) for name in sparse_numbers(pattern)]


def visible(body: FunctionBody, pattern: Pattern, q_shape: ir.Value, k_shape: ir.Value) -> ir.Value:
    """[1 or H, S, T], boolean; from the shapes of q [B, H, S, D] and k [B, N, T, D]."""
    words = sparse_words(pattern)
    shown = relation(body, words, *_positions(body, q_shape, k_shape))
    return _by_head(body, shown, q_shape, len(pattern)) if "ByHead" in words else shown


def relation(body: FunctionBody, words: list[str], i: ir.Value, j: ir.Value) -> ir.Value:
    """Which keys at positions j queries at positions i see; broadcast, of three axes, the first [P] or 1 wide."""
    shown = _near(body, i, j, ordered="Ordered" in words)
    for word, name, op in (("Block", "block", "Div"), ("Strided", "stride", "Mod")):
        if word in words:
            number = sight_number(body, name)
            same = body.op("Equal", [body.op(op, [x, number], f"{name}_of") for x in (i, j)], f"same_{name}")
            shown = body.op("Or", [shown, same], "shown")
    for x in (j,) if "Ordered" in words else (j, i):
        everywhere = seen_by_all(body, words, x)
        shown = shown if everywhere is None else body.op("Or", [shown, everywhere], "shown")
    if "Ordered" in words:
        shown = body.op("And", [shown, body.op("Not", [body.op("Less", [i, j], "later")], "past")], "shown")
    return shown


def _ordered(pattern: Pattern) -> bool:
    ordered = {sight.ordered for sight in pattern}
    if len(ordered) != 1:
        raise ValueError("the sights of one pattern are ordered, or none of them is")
    return ordered.pop()


def _positions(body: FunctionBody, q_shape: ir.Value, k_shape: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Positions of queries [1, S, 1], which are the last of the keys', and of keys [1, 1, T]."""
    queries = body.op("Gather", [q_shape, body.scalar(2)], "queries")
    keys = body.op("Gather", [k_shape, body.scalar(2)], "keys")
    first = body.op("Sub", [keys, queries], "first")
    i = body.op("Range", [first, keys, body.scalar(1)], "i")
    j = body.op("Range", [body.scalar(0), keys, body.scalar(1)], "j")
    return (
        body.op("Reshape", [i, body.ints([1, -1, 1])], "i_1S1"),
        body.op("Reshape", [j, body.ints([1, 1, -1])], "j_11T"),
    )


def sight_number(body: FunctionBody, name: str) -> ir.Value:
    """An attribute, [P, 1, 1]."""
    raw = body.op("Constant", [], f"sparse_{name}", [ir.RefAttr("value_ints", f"sparse_{name}", ir.AttributeType.INTS)])
    return body.op("Reshape", [raw, body.ints([-1, 1, 1])], f"{name}_P11")


def _near(body: FunctionBody, i: ir.Value, j: ir.Value, *, ordered: bool) -> ir.Value:
    reach = sight_number(body, "reach")
    near = body.op("Less", [body.op("Sub", [i, reach], "out_of_reach"), j], "near")
    if ordered:  # what comes later is taken away in any case
        return near
    return body.op("And", [near, body.op("Less", [j, body.op("Add", [i, reach], "beyond")], "before")], "near")


def seen_by_all(body: FunctionBody, words: list[str], x: ir.Value) -> ir.Value | None:
    found: ir.Value | None = None
    if "Sinks" in words:
        found = body.op("Less", [x, sight_number(body, "sinks")], "sink")
    if "Columns" in words:
        within = body.op("Mod", [x, sight_number(body, "period")], "within")
        early = body.op("Less", [within, sight_number(body, "first")], "early")
        column = body.op("And", [body.op("Not", [early], "late"), body.op("Less", [within, sight_number(body, "last")],
                         "before_last")], "column")  # fmt: skip
        found = column if found is None else body.op("Or", [found, column], "seen_by_all")
    return found


def _by_head(body: FunctionBody, shown: ir.Value, q_shape: ir.Value, sights: int) -> ir.Value:
    """[P, S, T] -> [H, S, T]."""
    heads = body.op("Range", [body.scalar(0), body.op("Gather", [q_shape, body.scalar(1)], "H"), body.scalar(1)], "h")
    return body.op("Gather", [shown, body.op("Mod", [heads, body.scalar(sights)], "sight")], "shown_HST")
