"""Renders whole-file templates. Only numbers, flags, enums and what hooks lowered can reach them."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import jinja2

from codegen.errors import UnsafeInput
from codegen.hooks import Lowered

TEMPLATES = Path(__file__).parent / "templates"

Value = bool | int | float | Enum | Lowered | None
Values = Mapping[str, Any]
"""Plain values, and sequences and mappings of them; checked when they are rendered."""

_LARGEST = 2**31 - 1
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,119}")


@functools.cache
def environment() -> jinja2.Environment:
    """The one Jinja environment: an undefined name is an error, nothing is escaped, no line is lost."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, values: Values) -> str:
    """The text of one template file, e.g. ``"cpp/grouped_query_attention.cpp.j2"``.

    Raises:
        UnsafeInput: a value is neither a number, a flag, an enum, an identifier made by `identifier`, nor lowered.
        jinja2.UndefinedError: the template reads a value that was not given.
    """
    for name, value in values.items():
        _require_safe(name, value)
    return environment().get_template(template).render(values)


def identifier(prefix: str, parts: Sequence[str | int], spec: Any) -> Lowered:
    """A readable name with a hash of the whole spec behind it; `parts` are words of ours and numbers of the spec.

    Raises UnsafeInput if the spec holds anything but numbers, flags and enums.
    """
    text = "_".join([prefix, *map(str, parts), fingerprint(spec)[:8]])
    if not _IDENTIFIER.fullmatch(text):
        raise UnsafeInput(f"{text!r} is no identifier")
    return Lowered(text)


def word(text: str) -> Lowered:
    """A name of ours as it is; raises UnsafeInput if it has anything but letters, digits and underscores."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,160}", text):
        raise UnsafeInput(f"{text!r} is no name")
    return Lowered(text)


def fingerprint(spec: Any) -> str:
    """A hash of a spec's type and fields, as hexadecimal digits."""
    return hashlib.sha256(repr((type(spec).__name__, *numbers(spec).items())).encode()).hexdigest()


def numbers(spec: Any) -> dict[str, Any]:
    """A spec's fields by name but for empty ones, once each is known to be a plain number, flag, enum or None, or to
    hold nothing but those.

    Raises:
        UnsafeInput: a field holds something else, e.g. text.
    """
    found = {f.name: _opened(value) for f in fields(spec) if (value := getattr(spec, f.name)) != ()}
    for name, value in found.items():
        if isinstance(value, Lowered):
            raise UnsafeInput(f"the spec's field {name!r} holds text")
        _require_safe(name, value)
    return found


def _opened(value: Any) -> Any:
    """Parts of a spec, and tuples of them, field by field; anything else as it is."""
    if type(value) is tuple:
        return [_opened(item) for item in value]
    return numbers(value) if is_dataclass(value) and not isinstance(value, type | Lowered) else value


def _require_safe(name: str, value: Any) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UnsafeInput(f"{name!r} is no name of a template value")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_safe(key, item)
    elif type(value) in (list, tuple):
        for item in value:
            _require_safe(name, item)
    elif _is_plain(value):
        return
    elif is_dataclass(value) and not isinstance(value, type):  # a part of a spec
        for part, item in numbers(value).items():
            _require_safe(part, item)
    else:
        raise UnsafeInput(f"{name} is {value!r}: only finite numbers, flags and enums may reach a template")


def _is_plain(value: Any) -> bool:
    if value is None or type(value) in (bool, Lowered):
        return True
    if type(value) is int:
        return abs(value) <= _LARGEST
    if type(value) is float:
        return math.isfinite(value)
    return isinstance(value, Enum) and type(value).__module__.startswith("codegen.")
