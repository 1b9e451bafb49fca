"""Names and layer numbers out of what doors know: owners, exporters' scopes, names of stored weights."""

from __future__ import annotations

import re
from collections.abc import Sequence


def layer_of(name: str, fallback: int) -> int:
    """The first number that stands alone in a dotted name."""
    found = re.search(r"(?:^|[._/])(\d+)(?:[._/]|$)", name)
    return int(found.group(1)) if found else fallback


def common_scope(names: Sequence[str]) -> str:
    """The dotted prefix that these names share, "" if there is none or some are unnamed."""
    if not all(names):
        return ""
    common: list[str] = []
    for level in zip(*(n.split(".") for n in names), strict=False):
        if len(set(level)) != 1:
            break
        common.append(level[0])
    return ".".join(common)


def exporter_scope(name: str) -> str:
    """The scope part of an exporter's node name: "/encoder/layer.0/attention/self/Softmax" without its last part."""
    return name.rsplit("/", 1)[0].strip("/").replace("/", ".") if "/" in name.strip("/") else ""
