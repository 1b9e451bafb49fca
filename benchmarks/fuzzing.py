"""What fuzzers have alike: whether what a broken input came to was meant, and a run over many seeds."""

from __future__ import annotations

import argparse
import collections
import resource
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.options import quick_or
from benchmarks.rows import Row, markdown_table, put_lines, write_json
from codegen.errors import KernelError
from rewriter.errors import RewriteError

MEMORY = 8 << 30
"""Bytes of address space that a run may take."""
QUICK = 300

Found = tuple[str, str]
"""("result" or the name of a typed error, what is wrong with it), or ("fault", what was raised and where)."""


def attempted(work: Callable[[], None]) -> Found:
    """What `work` comes to; other errors than ours are faults."""
    try:
        work()
    except (RewriteError, KernelError) as error:
        return type(error).__name__, "" if error.hint else "an error without a hint"
    except Exception as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return "fault", f"{type(error).__name__} at {where}: {str(error)[:200]}"
    return "result", ""


def run(name: str, outcome: Callable[[int, Path], Found], options: argparse.Namespace) -> int:
    """Try seeds in a scratch folder within `MEMORY`, print what is wrong and the counts; 1 if there was a fault.

    `name` is what is run ("folder fuzz"), which is also its row in the table of all such runs.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    count = quick_or(options, QUICK, options.count)
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.first, options.first + count):
            kind, text = outcome(seed, Path(scratch))
            found[kind] += 1
            if text:
                print(f"seed {seed}: {text}", flush=True)
    print(", ".join(f"{kind} {times}" for kind, times in found.most_common()))
    if options.json:
        case, faults = f"seeds {options.first} to {options.first + count - 1}", found["fault"]
        row = Row(name, case, faults, 0, "none", "faults", None, 0, not faults, {"outcomes": dict(found)})
        write_json(options.json, [row])
    if options.markdown:
        put_counts(options.markdown, name, f"seeds {options.first} to {options.first + count - 1}", count, found)
    return 1 if found["fault"] else 0


SECTION = "Broken input and random architectures"


def put_counts(path: Path, name: str, case: str, tried: int, found: Mapping[str, int]) -> None:
    """Put what a run over many inputs came to into docs/benchmarks.md; `found` counts outcomes, "fault" is one."""
    outcomes = ", ".join(f"{n} {kind}" for kind, n in sorted(found.items(), key=lambda x: -x[1]) if kind != "fault")
    line = (name, case, tried, outcomes, found.get("fault", 0))
    text = (
        "`python -m benchmarks.NAME --markdown docs/benchmarks.md`. An outcome is a result or a typed error with a "
        "hint; anything else is a fault."
    )
    put_lines(path, SECTION, text, markdown_table(("benchmark", "inputs", "tried", "outcomes", "faults"), [line]), 1)
