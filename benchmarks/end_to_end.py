"""Whole models beside the best that runs BERT-base's shape: such encoders with Fourier mixing, Sparse Mixer, FLASH.

    python -m benchmarks.end_to_end [--quick] [--threads N | --cpu-time] [--tokens N ...] [--runs N] [--json F]
                                    [--markdown F] [--only encoders | flash | colt5]

Weights are random, batch 1, all tokens shown. In onnxruntime the peer is the fastest of the file as exported (opset
18), with the standard Attention operator (opset 24), and fused by onnxruntime's and onnxscript's optimizers; ours is
the faster of two rewritten files, of the export and of the one that onnxruntime's optimizer made, once by themselves
and once with the library that `rewriter kernels` writes for them. Forms that hold all scores are left out where these
would take more than an eighth of the memory. In torch the peer is the model with sdpa. All are timed by turns in one
run; --cpu-time takes processor time of one thread, which the machine's other work disturbs less.

Sparse Mixer and its fast variant (`benchmarks/sparse_mixers.py`) stand beside a whole BERT-base at 512 tokens, always
on one thread; --quick takes all of them at half the width and depth, without goals. FLASH's layers stand beside the
Transformer layer that they replace (`benchmarks/flash_layers.py`), encoders as CoLT5 beside themselves
(`benchmarks/colt5_encoders.py`).
"""

from __future__ import annotations

import os

# Before torch starts: threads of one library must not spin while another one works.
for _name, _value in (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0")):
    os.environ.setdefault(_name, _value)

import argparse  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import onnxruntime as ort  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import rewriter  # noqa: E402
from benchmarks import colt5_encoders, flash_layers, peers  # noqa: E402
from benchmarks.machine import machine  # noqa: E402
from benchmarks.rows import Clock, Row, Times, interleaved, markdown_table, put_section, write_json  # noqa: E402
from benchmarks.sparse_mixers import Sizes, sparse_mixer_rows  # noqa: E402
from codegen.errors import NoCompiler  # noqa: E402
from codegen.toolchain.cxx import find_compiler  # noqa: E402
from rewriter.kernels.emit import emit  # noqa: E402
from rewriter.kernels.folder import LIBRARY  # noqa: E402

Call = Callable[[], Any]
GOALS: Mapping[int, float] = {512: 1.6, 2048: 1.9, 8192: 3.0}
"""Ratio of minima, by tokens."""

ERROR_LIMIT = 1e-4
"""Of the rewritten file against the rewritten module, relative to the largest output."""

PLAIN, WITH_KERNELS = "onnxruntime", "onnxruntime with our kernels"

WHOLE_SCORES = ("as exported", "Attention operator")
"""Forms that hold all scores of a layer at once."""


@dataclass(frozen=True)
class Shape:
    """An encoder: BERT-base's by default, with fewer layers, since all are alike."""

    hidden: int = 768
    heads: int = 12
    feed_forward: int = 3072
    layers: int = 2
    longest: int = 8192

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.hidden} wide, {self.heads} heads"


class Encoder(nn.Module):
    """A BERT model called by position."""

    def __init__(self, shape: Shape, attention: str) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            max_position_embeddings=shape.longest,
        )
        config._attn_implementation = attention
        self.bert = BertModel(config, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return output


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones(1, tokens, dtype=torch.int64)


def export(shape: Shape, folder: Path, opset: int, *, attention: str = "sdpa", dynamo: bool = True) -> Path:
    path = folder / f"{attention}-{opset}.onnx"
    names, axes = ["input_ids", "attention_mask"], {0: "batch", 1: "tokens"}
    options: dict[str, Any] = {"dynamic_axes": dict.fromkeys(names, axes)}
    if dynamo:
        dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        options = {"dynamic_shapes": (dims, dims)}
    with peers.quiet(), torch.no_grad():
        example = tuple(torch.cat([t, t]) for t in inputs(16))
        module = Encoder(shape, attention)
        torch.onnx.export(
            module, example, str(path), input_names=names, output_names=["output"], opset_version=opset, dynamo=dynamo,
            external_data=False, **options,
        )  # fmt: skip
    return path


@dataclass(frozen=True)
class Files:
    """Paths by form: what runs the attention, what mixes instead, and the library of kernels for the latter.

    No library without a compiler.
    """

    originals: Mapping[str, Path]
    mixed: Mapping[str, Path]
    library: Path | None


def files(shape: Shape, folder: Path) -> Files:
    """Export, fuse and rewrite; forms that an optimizer cannot make are left out."""
    plain = export(shape, folder, 18)
    originals = {"as exported": plain, "Attention operator": export(shape, folder, 24)}
    feeds = dict(zip(("input_ids", "attention_mask"), (t.numpy() for t in inputs(16)), strict=True))
    eager = export(shape, folder, 17, attention="eager", dynamo=False)
    fused = folder / "onnxruntime.onnx"
    if peers.by_onnxruntime(eager, fused, "bert", shape.heads, shape.hidden, feeds).fused:
        originals["fused by onnxruntime"] = fused
    if peers.by_onnxscript(plain, folder / "onnxscript.onnx", feeds).fused:
        originals["fused by onnxscript"] = folder / "onnxscript.onnx"
    mixed = {}
    for form in ("as exported", "fused by onnxruntime"):
        if form in originals:
            mixed[form] = folder / f"mixed-{len(mixed)}.onnx"
            rewriter.optimize(originals[form], "fnet").save(mixed[form])
    return Files(originals, mixed, library(mixed["as exported"], folder / "kernels"))


def library(model: Path, folder: Path) -> Path | None:
    try:
        find_compiler()
    except NoCompiler:
        return None
    emit(model, folder, ["cpu"])
    return folder / LIBRARY


def session(path: Path, threads: int, library: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


Forms = tuple[dict[str, Call], dict[str, Call]]
"""(Ours, peers)."""


def in_onnxruntime(shape: Shape, made: Files, tokens: int, threads: int) -> dict[str, Forms]:
    """By what runs ours: onnxruntime alone, or with the library of kernels."""
    feeds = dict(zip(("input_ids", "attention_mask"), (t.numpy() for t in inputs(tokens)), strict=True))

    def call(path: Path, library: Path | None = None) -> Call:
        opened = session(path, threads, library)
        return lambda: opened.run(None, feeds)

    scores = 4 * shape.heads * tokens**2
    fits = scores <= psutil.virtual_memory().total / 8
    wanted = {form: path for form, path in made.originals.items() if fits or form not in WHOLE_SCORES}
    theirs = {f: call(p) for f, p in wanted.items()}
    found = {PLAIN: ({f: call(p) for f, p in made.mixed.items()}, theirs)}
    if made.library is not None:
        found[WITH_KERNELS] = ({f: call(p, made.library) for f, p in made.mixed.items()}, theirs)
    return found


def in_torch(shape: Shape, tokens: int) -> Forms:
    given = inputs(tokens)
    original = Encoder(shape, "sdpa").eval()
    mixed = rewriter.optimize(original, "fnet", example_inputs=inputs(16))
    return {"eager": lambda: mixed(*given)}, {"eager, sdpa": lambda: original(*given)}


def compare(
    where: str, shape: Shape, tokens: int, ours: Mapping[str, Call], theirs: Mapping[str, Call], runs: int, clock: Clock
) -> list[Row]:
    """A row for each peer; the fastest peer's carries the goal."""
    works = [*ours.values(), *theirs.values()]
    for work in works:
        work()
    times = interleaved(runs, *works, clock=clock)
    mine = dict(zip(ours, times[: len(ours)], strict=True))
    peer_times = dict(zip(theirs, times[len(ours) :], strict=True))
    form, best = min(mine.items(), key=lambda item: item[1].minimum)
    fastest = min(peer_times.values(), key=lambda t: t.minimum)
    return [_row(where, shape, tokens, form, best, name, other, other is fastest) for name, other in peer_times.items()]


def _row(where: str, shape: Shape, tokens: int, form: str, ours: Times, peer: str, theirs: Times, fastest: bool) -> Row:
    ratio = theirs.minimum / ours.minimum
    goal = GOALS.get(tokens) if fastest else None
    more = {
        "best_peer": fastest,
        "ours_form": form,
        "ours_median": ours.median * 1e3,
        "peer_median": theirs.median * 1e3,
        "shape": str(shape),
    }
    case = f"fnet, {where}, {tokens} tokens"
    met = None if goal is None else ratio >= goal
    peer_name = f"{PLAIN if where == WITH_KERNELS else where}, {peer}"
    return Row("time", case, ours.minimum * 1e3, theirs.minimum * 1e3, peer_name, "ms", ratio, goal, met, more)


def errors(made: Files, shape: Shape, tokens: int) -> list[Row]:
    """The rewritten files against the rewritten module."""
    given = inputs(tokens)
    with torch.no_grad():
        expected = rewriter.optimize(Encoder(shape, "sdpa").eval(), "fnet", example_inputs=inputs(16))(*given).numpy()
    feeds = dict(zip(("input_ids", "attention_mask"), (t.numpy() for t in given), strict=True))
    rows = []
    tried = {form: session(path, 1) for form, path in made.mixed.items()}
    if made.library is not None:
        tried |= {f"{form}, our kernels": session(path, 1, made.library) for form, path in made.mixed.items()}
    for form, opened in tried.items():
        found = np.asarray(opened.run(None, feeds)[0])
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        case = f"fnet file, {form}, {tokens} tokens"
        rows.append(Row("error", case, error, ERROR_LIMIT, "the module", "relative", None, ERROR_LIMIT,
                        error <= ERROR_LIMIT))  # fmt: skip
    return rows


def encoders(shape: Shape, options: argparse.Namespace, clock: Clock, mixers: Sizes | None) -> Iterator[Row]:
    """Whole encoders, in onnxruntime and in torch."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made = files(shape, Path(folder))
        yield from errors(made, shape, 100)
        repeated = options.runs or (3 if options.quick else 7)
        yield from sparse_mixer_rows(Path(folder), repeated, clock, mixers or Sizes(2 if options.quick else 1))
        for tokens in options.tokens or ([512, 2048] if options.quick else list(GOALS)):
            runs = options.runs or (3 if tokens > 4096 else 5 if options.quick else 11)
            pairs = {**in_onnxruntime(shape, made, tokens, options.threads), "torch": in_torch(shape, tokens)}
            for where, (ours, theirs) in pairs.items():
                yield from compare(where, shape, tokens, ours, theirs, runs, clock)


def flash(shape: Shape, options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Layers of FLASH, of the same width."""
    sizes = flash_layers.Sizes(shape.hidden, shape.heads, shape.feed_forward, 8 * shape.longest)
    lengths = options.tokens or (flash_layers.QUICK if options.quick else flash_layers.LENGTHS)
    yield from flash_layers.measure(sizes, lengths, options.runs, clock)


def colt5(shape: Shape, options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Encoders with light and heavy branches, of the same width."""
    sizes = colt5_encoders.Sizes(shape.hidden, shape.heads, shape.layers)
    lengths = options.tokens or (colt5_encoders.QUICK if options.quick else list(colt5_encoders.GOALS))
    yield from colt5_encoders.measure(sizes, lengths, options.runs, clock)


def _told(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, each printed as it comes."""
    for row in rows:
        if row.ratio is not None:
            print(f"{row.case}: {row.ours:.3g} / {row.peer:.3g} {row.unit} ({row.peer_name}) = {row.ratio:.2f}",
                  flush=True)  # fmt: skip
        yield row


def heading(threads: int, *, cpu_time: bool) -> str:
    """What was run on what, before a section's tables."""
    about = machine()
    measured = "processor time of one thread" if cpu_time else f"wall time on {threads} threads"
    command = f"`python -m benchmarks.end_to_end{' --cpu-time' * cpu_time}`"
    return (
        f"{command} on {about['processor']}, torch {torch.__version__}, onnxruntime {ort.__version__}. Milliseconds "
        f"are minima of {measured}, over runs by turns; the load of the machine was {about['load_before'][0]} at the "
        "end, so read ratios, not times.\n\n"
    )


def report(rows: Sequence[Row]) -> str:
    """Tables of whole encoders."""
    lines = [
        [r.case, r.ours, r.more["ours_median"], r.peer_name, r.peer, r.more["peer_median"], r.ratio, r.goal, r.ok]
        for r in rows
        if r.name == "time"
    ]
    header = ["case", "ours, min ms", "median", "peer", "min ms", "median", "ratio of minima", "goal", "met"]
    found = [[r.case, r.ours, r.peer, r.ok] for r in rows if r.name == "error"]
    return markdown_table(header, lines) + "\n\n" + markdown_table(["case", "error", "limit", "met"], found)


def main(arguments: Sequence[str] | None = None, *, shape: Shape | None = None, mixers: Sizes | None = None) -> int:
    """`shape`, and `mixers` of Sparse Mixers, make smaller models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter lengths, fewer runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths, instead of the usual ones")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for machines that others keep busy")
    parser.add_argument("--only", choices=("encoders", "flash", "colt5"), help="one of the parts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    shape = shape or Shape()
    options.threads = 1 if options.cpu_time else options.threads
    clock = time.process_time if options.cpu_time else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    parts: dict[str, list[Row]] = {}
    try:
        if options.only in (None, "encoders"):
            parts["End to end"] = list(_told(encoders(shape, options, clock, mixers)))
        if options.only in (None, "flash"):
            parts["FLASH layers"] = list(_told(flash(shape, options, clock)))
        if options.only in (None, "colt5"):
            parts["CoLT5 encoders"] = list(_told(colt5(shape, options, clock)))
    finally:
        torch.set_num_threads(before)
    rows = [row for part in parts.values() for row in part]
    if options.json:
        write_json(options.json, rows, threads=options.threads, cpu_time=options.cpu_time)
    for title, found in parts.items() if options.markdown else ():
        reports = {"End to end": report, "FLASH layers": flash_layers.report, "CoLT5 encoders": colt5_encoders.report}
        table = reports[title](found)
        put_section(options.markdown, title, heading(options.threads, cpu_time=options.cpu_time) + table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
