"""The zoo through every door, beside ONNX Runtime's optimizer and onnxscript's: found, explained, rewritten, verified.

``python -m benchmarks.coverage [--quick] [--json F] [--markdown F] [--cases A,B] [--doors A,B] [--workers N]``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks import matching_time
from benchmarks.attentions import DOORS, PAST, ExportSkipped, Outcome, measure
from benchmarks.machine import machine
from benchmarks.rows import Row, markdown_table, put_section, write_json
from tests.zoo.case import ZooCase
from tests.zoo.exports import fingerprint
from tests.zoo.models import MAIN, ZOO
from tests.zoo.vision_library import timm_cases

Job = tuple[str, str]
QUICK_DOORS = ("torch", "graph", "dynamo18", "torchscript17")
PEERS = ("onnxruntime", "onnxscript")


def jobs(quick: bool) -> list[Job]:
    """(case, door): all doors for the main list, the usual ones for the rest; `quick` takes one case per family.

    Models of timm are among them where it is installed.
    """
    known = (ZOO | timm_cases()).values()
    chosen = list(_one_per_family(known) if quick else known)
    made = []
    for case in chosen:
        main = case.name in MAIN
        doors = (QUICK_DOORS if main else ("torch",)) if quick else (DOORS if main else QUICK_DOORS)
        made += [(case.name, door) for door in doors if not door.endswith(PAST) or _caches(case)]
    return made


def _one_per_family(cases: Iterable[ZooCase]) -> Iterator[ZooCase]:
    seen: set[str] = set()
    for case in cases:
        family = case.name.removesuffix("-sdpa").removesuffix("-eager")
        if family not in seen:
            seen.add(family)
            yield case


def _caches(case: ZooCase) -> bool:
    return case.causal and "hf" in case.tags and "encoder-decoder" not in case.tags


def run(work: Sequence[Job], cache: Path, workers: int, tell: Callable[[str], None]) -> tuple[list[Outcome], list[Job]]:
    """(outcomes, what the exporters could not export), in the order of `work`."""
    done: dict[Job, Outcome] = {}
    skipped: list[Job] = []
    cache.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[Outcome], Job] = {pool.submit(measure, *job, cache): job for job in work}
        for future in as_completed(waiting):
            job = waiting[future]
            try:
                done[job] = future.result()
            except ExportSkipped:
                skipped.append(job)
            tell(f"{len(done) + len(skipped)} of {len(work)}: {job[0]} {job[1]}")
    return [done[job] for job in work if job in done], [job for job in work if job in skipped]


# ------------------------------------------------------------ rows


def rows_of(outcome: Outcome) -> list[Row]:
    """One row per peer, or one without a peer."""
    more = {
        "found": outcome.found,
        "explained": outcome.explained,
        "expected": outcome.expected,
        "expected_refusals": outcome.refusable,
        "error": outcome.error,
        "seconds": outcome.seconds,
        "note": outcome.note,
    }
    case = f"{outcome.case} {outcome.door}"
    goal = outcome.expected - outcome.refusable
    rows = []
    for name, peer in outcome.peers.items():
        ratio = outcome.verified / peer.fused if peer.fused else None
        beside = {**more, "peer_seconds": peer.seconds, "peer_note": peer.note}
        rows.append(
            Row("coverage", case, outcome.verified, peer.fused, name, "attentions", ratio, goal, outcome.ok, beside)
        )
    return rows or [Row("coverage", case, outcome.verified, None, None, "attentions", None, goal, outcome.ok, more)]


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per door."""
    lines = []
    for door in DOORS:
        here = [o for o in outcomes if o.door == door]
        if not here:
            continue
        peers: list[object] = [None] * 4
        if here[0].peers:
            fused = [sum(o.peers[p].fused for o in here) for p in PEERS]
            seconds = [round(sum(o.peers[p].seconds for o in here), 1) for p in PEERS]
            peers = [fused[0], seconds[0], fused[1], seconds[1]]
        lines.append(
            [
                door,
                len(here),
                sum(o.expected for o in here),
                sum(o.found for o in here),
                sum(o.explained for o in here),
                sum(o.verified for o in here),
                round(sum(o.seconds for o in here), 1),
                *peers,
            ]
        )
    header = ["door", "models", "attentions", "found", "refused, with reason", "rewritten and verified", "s"]
    return markdown_table([*header, "ONNX Runtime fuses", "s", "onnxscript fuses", "s"], lines)


def shortfalls(outcomes: Sequence[Outcome]) -> str:
    lines = [[o.case, o.door, o.expected, o.found, o.explained, o.verified, o.note[:160]] for o in outcomes if not o.ok]
    if not lines:
        return "Every attention is accounted for, and every site called rewritable was rewritten without loss."
    return markdown_table(["model", "door", "attentions", "found", "refused", "verified", "why"], lines)


def times(rows: Sequence[Row]) -> str:
    lines = [
        [
            *(r.name, r.case, r.more["nodes"], r.ours, r.more["ours_median"]),
            *(r.peer, r.more["peer_median"], r.ratio, r.goal, r.ok),
        ]
        for r in rows
    ]
    header = [
        "what",
        "model",
        "nodes",
        "ours, s (min)",
        "(median)",
        "peer, s (min)",
        "(median)",
        "ratio",
        "goal",
        "met",
    ]
    return markdown_table(header, lines)


def document(outcomes: Sequence[Outcome], skipped: Sequence[Job], timing: Sequence[Row], *, quick: bool) -> str:
    where = machine()
    load = where["load_before"][0]
    extent = "; --quick: one case of each family" if quick else ""
    parts = [
        f"{where['processor']}, {where['cores']} cores, one thread per process, load {load}{extent}.",
        "A site counts as verified if a twin whose key/value heads are equal within groups, rewritten to fewer heads, "
        "computes the same to 1e-4. The peers fuse attention into one operator and change no weights; a fusion counts "
        "if the file still runs and computes the same.",
        table(outcomes),
        f"{len(skipped)} exports were not possible for the exporters themselves.",
        "### Shortfalls",
        shortfalls(outcomes),
    ]
    if timing:
        parts += ["### Time", times(timing)]
    return "\n\n".join(parts)


# ------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    work = [
        (case, door)
        for case, door in jobs(options.quick)
        if (not options.cases or case in options.cases.split(","))
        and (not options.doors or door in options.doors.split(","))
    ]
    if not work:
        print("no such case or door", file=sys.stderr)
        return 2
    tell = (
        (lambda text: print(f"\r{text:<60}", end="", file=sys.stderr)) if sys.stderr.isatty() else (lambda text: None)
    )
    cache = options.cache or Path(tempfile.gettempdir()) / f"rewriter-zoo-{fingerprint()}"
    outcomes, skipped = run(work, cache, options.workers, tell)
    timing = [] if options.cases or options.doors else matching_time.rows(3)
    text = document(outcomes, skipped, timing, quick=options.quick)
    print(text)
    if options.markdown:
        put_section(options.markdown, "Coverage", text)
    if options.json:
        rows = [row for outcome in outcomes for row in rows_of(outcome)]
        write_json(options.json, [*rows, *timing], skipped=[" ".join(job) for job in skipped])
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case per family, the usual doors; under 5 minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the file whose section Coverage is replaced")
    parser.add_argument("--cases", default="", help="only these, by comma")
    parser.add_argument("--doors", default="", help=f"only these, by comma: {', '.join(DOORS)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="where exports are kept (default: the temporary folder)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
