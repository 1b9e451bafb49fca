"""Names out of model files are untrusted: no terminal control code or direction override gets through."""

from __future__ import annotations

import math
import unicodedata
from typing import Any


def printable(text: object) -> str:
    """`text` on one line, with control and formatting characters written as escapes."""
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in str(text))


def _is_harmless(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] not in {"C", "Z"}


def jsonable(value: Any) -> Any:
    """`value` with numbers that JSON does not know (NaN, infinities) as null, and numpy scalars as plain ones."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "item"):
        return jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
