"""Sources that are kept to be read, and the changes to a spec that must change a source: for every language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "golden"

CHANGES: list[dict[str, Any]] = [
    {"heads": 12}, {"heads": 12, "kv_heads": 6}, {"head_dim": 6}, {"value_dim": 9}, {"scale": 0.5}, {"causal": False},
    {"bias": False}, {"softcap": None}, {"softcap": 4.0}, {"masked_rows_are_zero": False}, {"sinks": False},
]  # fmt: skip
"""To `problems.EVERYTHING`, each field once or more."""


def require_golden(name: str, text: str) -> None:
    """To accept a change: delete the file and run again; the test then writes it, and fails once."""
    path = FOLDER / name
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{name} was missing and has been written")
    assert text == path.read_text()
