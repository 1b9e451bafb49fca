"""Commands killed, interrupted and starved: the output must be the old one or the new one, whole.

    python -m benchmarks.faults [--json F] [--markdown F] [--quick] [--seed N] [--only WORDS]

Each command (benchmarks/fault_operations.py) replaces an older output. It is killed at random moments and before random
steps of what it does to files, interrupted (Ctrl-C), and run on a disk that fills up or may not be written. After each
fault a reader must find the old output or the new one; then the command is run again, undisturbed: the output must be
the new one, and nothing else may be left behind. Training must come to the weights that it would have come to.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fault_operations import OPERATIONS, Operation, command, names
from benchmarks.options import parser, quick_or
from benchmarks.rows import Row, markdown_table, put_section, write_json

PRELOADED = [
    "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2", "onnxruntime", "accelerate",
    "torch.export", "torch._dynamo", "rewriter.cli", "rewriter.onnx_rewrite", "rewriter.torch_rewrite",
    "rewriter.install.checkpoint_saving", "rewriter.kernels.emit", "rewriter.uptrain.session", "rewriter.report.tables",
    "benchmarks.fault_operations",
]  # fmt: skip
"""What takes seconds to import is imported once, in the process that all commands are forked from."""

PRIVATE = "BENCHMARKS_FAULTS_PRIVATE_MOUNTS"
LIMIT_S = 300
FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod"})
INTERRUPTED = 130
BEGUN = b"begun\n"


@dataclass(frozen=True)
class Child:
    """How a command ended: its exit code (negative for a signal), what it printed, and how many steps it took.

    `begun` is false if the signal came while the process was still starting.
    """

    code: int
    said: str
    steps: int
    begun: bool = True


@dataclass
class Tally:
    """What came of one kind of fault on one command."""

    operation: str
    fault: str
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    def row(self, seed: int) -> Row:
        wrong, trials = len(self.problems), sum(self.outcomes.values())
        more = {"trials": trials, "outcomes": dict(self.outcomes), "problems": self.problems, "seed": seed}
        case = f"{self.operation}: {self.fault}"
        return Row("faults", case, wrong, None, None, "problems", None, 0, not wrong and trials > 0, more)


# ---------------------------------------------------------------------- a command in a process of its own


def _in_child(
    name: str, folder: Path, log: Path, kill_at: int, file_limit: int, environment: Mapping[str, str]
) -> None:
    """Counts steps of the command on files below `folder`; before step `kill_at` (if any) it kills itself."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    steps = 0
    below = str(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event not in FILE_EVENTS or not isinstance(arguments[0], str) or not arguments[0].startswith(below):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        os.write(handle, BEGUN)
        code = command(name, folder)
    except KeyboardInterrupt:  # before the command line could see to it: nothing has been done yet
        code = INTERRUPTED
    sys.stdout.flush()
    os.write(handle, f"\nsteps {steps}\n".encode())
    os._exit(code)


def run(
    operation: Operation, folder: Path, *, kill_at: int = 0, after: float = 0.0, by: int = signal.SIGKILL,
    file_limit: int = 0, environment: Mapping[str, str] | None = None,
) -> Child:  # fmt: skip
    """Run the command; `after` so many seconds it gets the signal `by`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    log = Path(tempfile.gettempdir()) / f"benchmarks-faults-{os.getpid()}.log"
    process = context.Process(
        target=_in_child, args=(operation.name, folder, log, kill_at, file_limit, environment or {})
    )
    process.start()
    if after:
        process.join(after)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, by)
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return Child(-signal.SIGALRM, f"did not end within {LIMIT_S} s", 0)
    said = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    begun, said = said.startswith(BEGUN.decode()), said.removeprefix(BEGUN.decode())
    text, _, steps = said.rpartition("\nsteps ")
    return Child(process.exitcode, text or said, int(steps) if steps.strip().isdigit() else 0, begun)


# ---------------------------------------------------------------------- faults


class Bench:
    """One operation with its old and its new output, ready to be disturbed again and again."""

    def __init__(self, operation: Operation, scratch: Path, seed: int) -> None:
        self.operation, self.scratch, self.random = operation, scratch, random.Random(f"{seed} {operation.name}")
        self.ready = scratch / "ready"
        self.ready.mkdir()
        _prepare(operation, self.ready)
        self.old = operation.seen(self.ready)
        done = self.fresh()
        start = time.perf_counter()
        whole = run(operation, done)
        self.seconds, self.steps = time.perf_counter() - start, whole.steps
        if whole.code:
            raise RuntimeError(f"{operation.name} fails undisturbed: {whole.said[-2000:]}")
        self.new, self.names = operation.seen(done), names(done)
        if self.old == self.new or not self.steps:
            raise RuntimeError(f"{operation.name} changes nothing, so nothing could go wrong")
        shutil.rmtree(done)

    def fresh(self) -> Path:
        """A copy of what the command starts from, always at the same place."""
        folder = self.scratch / "work"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.ready, folder, symlinks=True)
        return folder

    def killed_at_moments(self, count: int) -> Tally:
        tally = Tally(self.operation.name, "killed at a random moment")
        for _ in range(count):
            moment = self.random.uniform(0.02, self.seconds)
            folder = self.fresh()
            run(self.operation, folder, after=moment)
            self._judge(tally, folder, f"after {moment:.3f} s")
        return tally

    def killed_at_steps(self, count: int) -> Tally:
        tally = Tally(self.operation.name, "killed before a random step on files")
        for step in sorted(self.random.sample(range(1, self.steps + 1), min(count, self.steps))):
            folder = self.fresh()
            ended = run(self.operation, folder, kill_at=step)
            if ended.code != -signal.SIGKILL:
                tally.problems.append(f"step {step}: it was not killed, but ended with {ended.code}")
            self._judge(tally, folder, f"before step {step} of {self.steps}")
        return tally

    def interrupted(self, count: int) -> Tally:
        tally = Tally(self.operation.name, "interrupted at a random moment")
        for _ in range(count):
            moment = self.random.uniform(0.05, self.seconds)
            folder = self.fresh()
            ended = run(self.operation, folder, after=moment, by=signal.SIGINT)
            where = f"after {moment:.3f} s"
            if not ended.begun:
                tally.outcomes["not begun"] += 1
                continue
            if ended.code not in (0, INTERRUPTED) or "Traceback" in ended.said:
                tally.problems.append(f"{where}: exit code {ended.code}: {ended.said[-300:]}")
            self._judge(tally, folder, where, clean=True)
        return tally

    def short_of_space(self, count: int) -> Tally:
        """No file may grow beyond a random size: what a full disk does to whoever writes, without needing one."""
        tally = Tally(self.operation.name, "no room for a file")
        largest = max(path.stat().st_size for path in self.ready.rglob("*") if path.is_file())
        for _ in range(count):
            limit = self.random.randrange(1, max(2, largest // 2))
            folder = self.fresh()
            ended = run(self.operation, folder, file_limit=limit)
            self._judge_refusal(tally, folder, ended, f"at most {limit} bytes a file", codes=(1,))
        return tally

    def on_a_full_disk(self, count: int) -> Tally:
        """A file system of memory with a random amount of room."""
        tally = Tally(self.operation.name, "the disk fills up")
        used = sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in self.ready.rglob("*"))
        for _ in range(count):
            room = used + self.random.randrange(4096, max(8192, used // 3))
            with _mounted(self.scratch / "work", room):
                folder = self.scratch / "work" / "here"
                shutil.copytree(self.ready, folder, symlinks=True)
                ended = run(self.operation, folder)
                self._judge_refusal(tally, folder, ended, f"{room - used} bytes are free", codes=(1,))
        return tally

    def on_a_read_only_disk(self) -> Tally:
        tally = Tally(self.operation.name, "the folder may not be written")
        with _mounted(self.scratch / "work", 1 << 28):
            folder = self.scratch / "work" / "here"
            shutil.copytree(self.ready, folder, symlinks=True)
            subprocess.run(["mount", "-o", "remount,ro", str(self.scratch / "work")], check=True)
            ended = run(self.operation, folder)
            subprocess.run(["mount", "-o", "remount,rw", str(self.scratch / "work")], check=True)
            self._judge_refusal(tally, folder, ended, "read-only", codes=(2,))
        return tally

    # ------------------------------------------------------------------ judging

    def _judge(self, tally: Tally, folder: Path, where: str, *, clean: bool = False) -> None:
        """Old or new now; new, and nothing else, after the next undisturbed run."""
        outcome = self._seen(folder)
        tally.outcomes[outcome] += 1
        if outcome not in ("old", "new"):
            tally.problems.append(f"{where}: {outcome}")
        if clean and (left := _drafts(folder)):
            tally.problems.append(f"{where}: left behind: {left}")
        again = run(self.operation, folder)
        after, found = self._seen(folder), names(folder)
        if outcome == "new" and again.code == 1 and self.operation.name.endswith("in place"):
            found = self.names if not _drafts(folder) else found  # nothing is left to rewrite, so nothing was written
        if after != "new":
            tally.problems.append(f"{where}: the next run gave {after}, exit code {again.code}: {again.said[-300:]}")
        elif found != self.names:
            tally.problems.append(f"{where}: names after the next run: {sorted(set(found) ^ set(self.names))}")

    def _judge_refusal(self, tally: Tally, folder: Path, ended: Child, where: str, codes: Sequence[int]) -> None:
        outcome = self._seen(folder)
        tally.outcomes[f"{outcome}, exit code {ended.code}"] += 1
        typed = ended.code in codes and "Traceback" not in ended.said and "bug in rewriter" not in ended.said
        fine = (outcome, ended.code) == ("new", 0) or (outcome == "old" and typed)
        if not fine:
            tally.problems.append(f"{where}: {outcome}, exit code {ended.code}: {ended.said[-300:]}")
        if left := _drafts(folder):
            tally.problems.append(f"{where}: left behind: {left}")

    def _seen(self, folder: Path) -> str:
        try:
            found = self.operation.seen(folder)
        except Exception as error:  # whatever a reader would have run into
            return f"broken ({type(error).__name__}: {str(error)[:100]})"
        return "old" if found == self.old else "new" if found == self.new else "something else"


def _prepare(operation: Operation, folder: Path) -> None:
    """In a process of its own: what it loads must not be in the one that starts all others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=operation_prepare, args=(operation.name, folder))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{operation.name} cannot be prepared")


def operation_prepare(name: str, folder: Path) -> None:
    OPERATIONS[name].prepare(folder)


def _drafts(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.endswith(".tmp") or "/.draft" in name or name.startswith(".")]


@contextlib.contextmanager
def _mounted(place: Path, size: int) -> Iterator[None]:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# ---------------------------------------------------------------------- several processes


def building_at_once(scratch: Path, processes: int = 4) -> Tally:
    """Several processes ask for the same kernels: each is compiled once."""
    operation, folder = OPERATIONS["kernels"], scratch / "work"
    tally = Tally("kernels", f"{processes} processes at once")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _prepare(operation, folder)
    log = folder / "bin" / "c++.log"
    log.unlink()
    older = len(list((folder / "cache").glob("*.lock")))
    context = multiprocessing.get_context("forkserver")
    logs = [folder.with_name(f"work.{i}.log") for i in range(processes)]
    running = [context.Process(target=_in_child, args=(operation.name, folder, path, 0, 0, {})) for path in logs]
    for process in running:
        process.start()
    for process in running:
        process.join(LIMIT_S)
    built = len(log.read_text().split())
    kernels = len(list((folder / "cache").glob("*.lock"))) - older
    tally.outcomes[f"{built} builds of {kernels} kernels"] += 1
    if built != kernels or any(process.exitcode for process in running):
        tally.problems.append(f"{built} builds of {kernels} kernels; exit codes {[p.exitcode for p in running]}")
    operation.seen(folder)
    return tally


COMPILERS = {
    "hangs": "sleep 600",
    "hangs in a process of its own": "sleep 600 & wait",
    "fails": "echo 'error: no space' >&2; exit 1",
    "is killed": "kill -9 $$",
    "writes nothing": "exit 0",
}


def bad_compilers(scratch: Path) -> list[Tally]:
    """The command ends in time with one line, and the older kernels are still there."""
    tallies = []
    for what, line in COMPILERS.items():
        folder = scratch / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _prepare(OPERATIONS["kernels"], folder)
        old = OPERATIONS["kernels"].seen(folder)
        compiler = folder / "bin" / "c++"
        compiler.write_text(f'#!/bin/sh\ncase "$1" in --version) echo bad 1; exit;; esac\n{line}\n')
        start = time.perf_counter()
        ended = run(OPERATIONS["kernels"], folder, environment={"REWRITER_CXX_TIMEOUT": "2"})
        seconds = time.perf_counter() - start
        tally = Tally("kernels", f"a compiler that {what}")
        tally.outcomes[f"exit code {ended.code}"] += 1
        typed = ended.code == 1 and "Traceback" not in ended.said and "bug in rewriter" not in ended.said
        left = _drafts(folder) + [p.name for p in (folder / "cache").iterdir() if p.name.startswith(".")]
        if not typed or OPERATIONS["kernels"].seen(folder) != old or left or seconds > 60:
            tally.problems.append(f"{ended.code} after {seconds:.0f} s, left {left}: {ended.said[-300:]}")
        tallies.append(tally)
    return tallies


def dying_worker(scratch: Path, seed: int, count: int) -> Tally:
    """Two processes train, one is killed: the other ends too, and the resumed run comes to the same weights."""
    import psutil  # type: ignore[import-untyped]

    operation, tally = OPERATIONS["uptrain"], Tally("uptrain", "one of two workers is killed")
    moments, ready = random.Random(seed), scratch / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    _prepare(operation, ready)

    def start(folder: Path) -> subprocess.Popen[str]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rewriter"]
        setting = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, *launch, *operation.words(folder)]
        return subprocess.Popen(words, env=setting, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def copy() -> Path:
        shutil.rmtree(scratch / "work", ignore_errors=True)
        return Path(shutil.copytree(ready, scratch / "work"))

    folder = copy()
    _, said = start(folder).communicate(timeout=LIMIT_S)
    straight = operation.seen(folder)
    if straight == "nothing":
        raise RuntimeError(f"training with two processes fails undisturbed: {said[-2000:]}")
    for _ in range(count):
        folder = copy()
        running = start(folder)
        while not list((folder / "run").glob("step-*/run.json")) and running.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.3))
        workers = [p for p in psutil.Process(running.pid).children(recursive=True) if "uptrain" in p.cmdline()]
        if workers:
            moments.choice(workers).kill()
        try:
            running.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            tally.problems.append("the other worker waits for ever")
            running.kill()
            running.communicate()
        resumed = bool(list((folder / "run").glob("step-*/run.json"))) and running.returncode != 0
        tally.outcomes["resumed" if resumed else "done before it could be killed"] += 1
        if operation.seen(folder) == "nothing":
            _, said = start(folder).communicate(timeout=LIMIT_S)
        if operation.seen(folder) != straight:
            tally.problems.append(f"the resumed run is another one: {said[-300:]}")
        if left := _drafts(folder):
            tally.problems.append(f"left behind: {left}")
    return tally


# ---------------------------------------------------------------------- command line


def _may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode == 0
    except OSError:
        return False


def _in_private_mounts() -> None:
    """Start this program again where it may mount file systems that nobody else sees, if the system allows that."""
    if PRIVATE not in os.environ and _may_mount():
        os.environ[PRIVATE] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]])


def campaign(operation: Operation, count: int, seed: int, *, mounts: bool) -> list[Tally]:
    """Every fault on one command, `count` kills of each kind."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(operation, Path(scratch), seed)
        few = max(1, count // 4)
        tallies = [bench.killed_at_steps(count), bench.killed_at_moments(count), bench.interrupted(few)]
        if operation.name != "uptrain":
            tallies.append(bench.short_of_space(few))
        if mounts:
            tallies += [bench.on_a_full_disk(few), bench.on_a_read_only_disk()]
    return tallies


def main(arguments: Sequence[str] | None = None) -> int:
    options_parser = parser(__doc__, quick="a few kills of each kind", markdown=True)
    options_parser.add_argument("--seed", type=int, default=0)
    options_parser.add_argument("--kills", type=int, default=40, help="of each command, in each of two ways")
    options_parser.add_argument("--only", default="", help="operations whose names hold these words")
    options = options_parser.parse_args(arguments)
    os.environ.update({"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"})
    mounts = PRIVATE in os.environ
    count = quick_or(options, 2, options.kills)
    tallies: list[Tally] = []
    print(f"seed {options.seed}; {'real full and read-only disks' if mounts else 'no mounts: files are limited'}")

    def told(found: Sequence[Tally]) -> None:
        for tally in found:
            tallies.append(tally)
            outcomes = ", ".join(f"{n} {what}" for what, n in tally.outcomes.most_common())
            print(f"{tally.operation}: {tally.fault}: {outcomes}; {len(tally.problems)} problems", flush=True)
            for problem in tally.problems:
                print(f"    {problem}", flush=True)

    for operation in OPERATIONS.values():
        if options.only in operation.name:
            told(campaign(operation, count, options.seed, mounts=mounts))
    with tempfile.TemporaryDirectory() as scratch:
        if options.only in "kernels":
            told([building_at_once(Path(scratch)), *bad_compilers(Path(scratch))])
        if options.only in "uptrain":
            told([dying_worker(Path(scratch), options.seed, quick_or(options, 1, 3))])
    rows = [tally.row(options.seed) for tally in tallies]
    if options.json:
        write_json(options.json, rows)
    if options.markdown:
        put_section(options.markdown, "Faults", _table(tallies, options.seed))
    return 0 if all(row.ok for row in rows) else 1


def _table(tallies: Sequence[Tally], seed: int) -> str:
    lines = [
        (t.operation, t.fault, sum(t.outcomes.values()), ", ".join(f"{n} {o}" for o, n in t.outcomes.most_common()),
         len(t.problems))
        for t in tallies
    ]  # fmt: skip
    header = ("command", "fault", "trials", "what a reader found then", "problems")
    return f"`python -m benchmarks.faults`, seed {seed}.\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    _in_private_mounts()
    sys.exit(main())
