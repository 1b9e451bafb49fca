"""Compares what pip installed with the hashes that are kept for it: python check_hashes.py REPORT...

A report is what ``pip install --report`` writes. It is read by an interpreter outside the new environment, before
anything in that runs. Two kinds are only named, since no list can hold them for every machine: builds with a local
version label (torch's for CPUs, 2.13.0+cpu), which the public index does not accept, so that they come from an index
that the machine's own configuration names; and what is not pinned (CUDA libraries that other builds of torch require).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HASHES = Path(__file__).resolve().parents[1] / "requirements-hashes.txt"


def known_hashes(text: str) -> dict[tuple[str, str], set[str]]:
    """SHA-256 by (normalised name, version), from pip's format of requirements with hashes."""
    known: dict[tuple[str, str], set[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.match(r"([\w.-]+)==(\S+)", line):
            known[_normal(found[1]), found[2]] = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
    return known


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def complaints(report: Mapping[str, Any], known: Mapping[tuple[str, str], set[str]]) -> tuple[list[str], list[str]]:
    """(what is wrong, what could not be compared), one line for each distribution; editable ones are left out."""
    wrong, left = [], []
    for entry in report["install"]:
        if "dir_info" in entry["download_info"]:
            continue
        name, version = _normal(entry["metadata"]["name"]), entry["metadata"]["version"]
        given = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if "+" in version:
            left.append(f"{name} {version}: a build of another index, sha256 {given}")
        elif name not in {pinned for pinned, _ in known}:
            left.append(f"{name} {version}: not pinned, sha256 {given}")
        elif (name, version) not in known:
            wrong.append(f"{name} {version} is not the version in {HASHES.name}")
        elif given not in known[name, version]:
            wrong.append(f"{name} {version} has another hash than {HASHES.name} knows: {given}")
    return wrong, left


def main(paths: Sequence[str]) -> int:
    known = known_hashes(HASHES.read_text())
    found = [complaints(json.loads(Path(path).read_text()), known) for path in paths]
    for line in (line for _, left in found for line in left):
        print(f"not compared: {line}")
    wrong = [line for lines, _ in found for line in lines]
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
