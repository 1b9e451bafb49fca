"""Coverage-guided fuzzing of loader, provenance and writer: what reaches new code is kept and changed further.

    python -m benchmarks.coverage_fuzz [--seconds N] [--corpus DIR] [--json F] [--markdown F] [--quick]

Needs atheris (the extra "fuzz"). Inputs are changed as bytes, and as models (the ways of benchmarks/fuzz.py). Each is
opened, matched and written as a command does it, within limits on time and memory; anything but a `RewriteError`, a
crash, a minute or 4 GB is a fault, and is kept in DIR/faults. The corpus stays in DIR and is where the next run begins;
benchmarks/corpus is where the first one does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bodies import KINDS, with_body
from benchmarks.fuzzing import put_counts
from benchmarks.options import parser, quick_or
from benchmarks.rows import Row, write_json

CORPUS = Path(__file__).parent / "corpus"
FAULTS = "faults"
MISSING = "atheris is not installed (pip install 'rewriter[fuzz]')"
CHILD = "--in-this-process"
LIMITS = ("-timeout=60", "-rss_limit_mb=4096", "-max_len=20000", "-print_final_stats=1")

OURS = {"REWRITER_RUN_TIMEOUT": "5", "REWRITER_MEMORY_LIMIT": "2"}
"""Limits of ours, far below those of the fuzzer, which must hold."""


@dataclass(frozen=True)
class Found:
    """One run: inputs tried, edges of our code that were reached, corpus size, and files that are faults."""

    tried: int
    edges: int
    corpus: int
    faults: tuple[str, ...]
    said: str


def available() -> bool:
    return importlib.util.find_spec("atheris") is not None


def run(corpus: Path, seconds: int, *, seed: int = 0) -> Found:
    """Fuzz for so long in a process of its own, which a crash may take with it."""
    faults = corpus / FAULTS
    faults.mkdir(parents=True, exist_ok=True)
    for file in sorted(CORPUS.glob("*.onnx")):
        if not (corpus / file.name).exists():
            shutil.copyfile(file, corpus / file.name)
    before = set(faults.iterdir())
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={faults}/", f"-seed={seed + 1}", *LIMITS]
    words = [sys.executable, "-m", "benchmarks.coverage_fuzz", CHILD, str(corpus), *options]
    environment = {**os.environ, **OURS, "PYTHONPATH": str(CORPUS.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)
    said = done.stdout + done.stderr
    edges = [int(n) for n in re.findall(r"\bcov: (\d+)", said)]
    tried = re.findall(r"number_of_executed_units: (\d+)", said) or re.findall(r"^#(\d+)\s", said, re.MULTILINE)
    new = tuple(sorted(str(path) for path in set(faults.iterdir()) - before))
    if done.returncode and not new:
        raise RuntimeError(f"the fuzzer ended with {done.returncode}: {said[-2000:]}")
    held = sum(path.is_file() for path in corpus.iterdir())
    return Found(int(tried[-1]) if tried else 0, max(edges, default=0), held, new, said)


# ---------------------------------------------------------------------- in the fuzzer's process


def _fuzz(arguments: Sequence[str]) -> None:
    import atheris

    with atheris.instrument_imports(
        include=["rewriter.capture", "rewriter.install", "rewriter.onnx_rewrite", "passes"]
    ):
        import rewriter.inspection
        import rewriter.install.onnx_write
        import rewriter.onnx_rewrite  # noqa: F401
    from benchmarks import fuzz

    warnings.simplefilter("ignore")
    scratch = Path(tempfile.mkdtemp())
    path, output = scratch / "in.onnx", scratch / "out.onnx"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        walk(path, output)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        """A model is changed as one three times of four; what is none, or becomes too long, as bytes."""
        import onnx
        from google.protobuf.message import DecodeError

        r = fuzz.Random(seed)
        if r.random() < 0.75:
            try:
                model = onnx.load_from_string(data)
                r.choice(fuzz.STRUCTURE)(model, r)
                made = bytes(model.SerializeToString())
                if len(made) <= limit:
                    return made
            except (DecodeError, IndexError, ValueError, TypeError, AttributeError):
                pass  # nothing of that kind is left in it
        return bytes(atheris.Mutate(data, limit))

    atheris.Setup([sys.argv[0], *arguments], one, custom_mutator=mutate)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def walk(path: Path, output: Path) -> None:
    """Open, match, rewrite, write and read again; typed errors are fine anywhere."""
    import rewriter
    from rewriter.capture.memory_limit import limited_memory
    from rewriter.capture.onnx_load import load
    from rewriter.errors import RewriteError
    from rewriter.install.onnx_write import save

    try:
        with limited_memory([path]):
            model: Any = load(path)
            save(model, output, external_data="always")
            load(output)
            rewriter.inspect(path).to_dict()
            rewriter.optimize(path, "mqa", verify=False).save(output)
    except RewriteError as error:
        if not error.hint:
            raise AssertionError(f"an error without a hint: {error}") from error


def small_models() -> list[bytes]:
    """What the corpus began with: one layer of attention, the same rewritten, with its weights as constants, and with
    one of them behind control flow of each kind."""
    import onnx

    import rewriter
    from benchmarks.scale_models import Stack, write

    with tempfile.TemporaryDirectory() as scratch:
        path, output = Path(scratch) / "in.onnx", Path(scratch) / "out.onnx"
        write(Stack(1, hidden=8, inner=8, heads=2), path, external=False)
        rewriter.optimize(path, "mqa").save(output)
        model = onnx.load(path)
        constants = [
            onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer
        ]
        nodes = [*constants, *model.graph.node]
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(nodes)
        behind = [with_body(path.read_bytes(), kind) for kind in KINDS]
        return [path.read_bytes(), output.read_bytes(), bytes(model.SerializeToString()), *behind]


# ---------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    options_parser = parser(__doc__, quick="two minutes", markdown=True)
    options_parser.add_argument("--seconds", type=int, default=600)
    options_parser.add_argument("--seed", type=int, default=0)
    options_parser.add_argument("--corpus", type=Path, metavar="DIR", help="kept and grown; a fresh copy without it")
    options = options_parser.parse_args(arguments)
    if not available():
        print(f"not run: {MISSING}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        found = run(options.corpus or Path(scratch), quick_or(options, 120, options.seconds), seed=options.seed)
        print(
            f"{found.tried} inputs, {found.edges} edges, {found.corpus} files in the corpus, {len(found.faults)} faults"
        )
        for fault in found.faults:
            kept = Path(tempfile.gettempdir()) / f"rewriter-{Path(fault).name}"
            shutil.copyfile(fault, kept)
            print(f"    {kept}")
        if found.faults:
            print(found.said[-3000:])
    if options.json:
        more = {"tried": found.tried, "edges": found.edges, "corpus": found.corpus, "seed": options.seed}
        count = len(found.faults)
        write_json(
            options.json, [Row("coverage fuzz", "faults", count, None, None, "faults", None, 0, not count, more)]
        )
    if options.markdown:
        case = f"{quick_or(options, 120, options.seconds)} s, seed {options.seed}"
        counts = {f"edges of {found.corpus} kept inputs": found.edges, "fault": len(found.faults)}
        put_counts(options.markdown, "coverage_fuzz", case, found.tried, counts)
    return 1 if found.faults else 0


def keep(folder: Path, contents: Sequence[bytes]) -> None:
    """Put inputs into a corpus under names that are their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    for content in contents:
        (folder / f"{hashlib.sha256(content).hexdigest()[:16]}.onnx").write_bytes(content)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        _fuzz(sys.argv[2:])
    else:
        sys.exit(main())
