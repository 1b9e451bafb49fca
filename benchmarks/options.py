"""The options that benchmarks share, parsed once: --json, --markdown, --quick, and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def parser(
    description: str | None, *, quick: str = "less of everything", markdown: bool = False
) -> argparse.ArgumentParser:
    """A parser with --json and --quick, and --markdown where the benchmark has a section in docs/benchmarks.md."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="F", help="write rows there")
    made.add_argument("--quick", action="store_true", help=quick)
    if markdown:
        made.add_argument("--markdown", type=Path, metavar="F", help="write a section there")
    return made


def seeds(made: argparse.ArgumentParser, *, count: int) -> argparse.ArgumentParser:
    """Adds --first and --count: which seeds are run."""
    made.add_argument("--first", type=int, default=0, metavar="SEED")
    made.add_argument("--count", type=int, default=count)
    return made


def quick_or(options: argparse.Namespace, quick: T, full: T) -> T:
    return quick if options.quick else full
