"""The command line's tables, made from the same dictionaries that --json prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rewriter.report.choice import FRONTIER, choice_line, frontier_cells
from rewriter.report.printable import printable
from rewriter.report.rewrite_report import note_lines, number, requantised_line

Row = Mapping[str, Any]

_PIPED_WIDTH = 240
WHEN = ("before", "after")


def text(content: RenderableType) -> str:
    """What to print on standard output; where that is no terminal, uncoloured and wide enough not to break lines."""
    console = Console(highlight=False)
    return _printed(console, content) if console.is_terminal else plain(content)


def plain(content: RenderableType) -> str:
    """The same without colours or other control codes, for `str` of what these tables show."""
    return _printed(Console(highlight=False, width=_PIPED_WIDTH, no_color=True, force_terminal=False), content)


def _printed(console: Console, content: RenderableType) -> str:
    with console.capture() as captured:
        console.print(content)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of escaped cells."""
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in headers:
        made.add_column(header, overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def kernels(found: Row) -> RenderableType:
    """What was built for which machine."""
    rows = [(k["name"], k["arch"], k["source"], k["binary"]) for k in found["kernels"]]
    return table(("kernel", "arch", "source", "binary"), rows)


def inspection(found: Row) -> RenderableType:
    """Sites with what they are and why some cannot be rewritten."""
    origin = ", ".join(
        printable(part)
        for part in (
            found.get("format"),
            f"opset {found['opset']}" if found.get("opset") else None,
            found.get("producer"),
        )
        if part
    )
    sites: Sequence[Row] = found["sites"]
    parts: list[RenderableType] = [Text(f"{printable(found['model'])}  ({origin})")]
    if sites:
        headers = ("site", "kind", "status", "heads", "kv", "dim", "traits", "targets, or why not")
        letters = _letters(sites)
        parts.append(table(headers, (_site_cells(site, letters) for site in sites)))
        parts += [Text(f"{letter}: {', '.join(names)}") for names, letter in letters.items()]
    attentions = [site for site in sites if site["kind"] == "attention"]
    blocks = [site for site in sites if site["kind"] == "feed_forward"]
    good = sum(site["status"] == "rewritable" for site in attentions)
    parts.append(Text(f"{good} of {len(attentions)} attention sites can be rewritten"))
    if blocks:
        read = sum(site["status"] == "rewritable" for site in blocks)
        parts.append(Text(f"{read} of {len(blocks)} feed-forward sites are understood"))
    parts += [Text(f"not attention: {printable(o['name'])}: {printable(o['reason'])}") for o in found["not_attention"]]
    return Group(*parts)


def _letters(sites: Sequence[Row]) -> dict[tuple[str, ...], str]:
    """A letter (beyond Z a number) for each different list of targets: most sites of a model share one."""
    lists = dict.fromkeys(tuple(s["targets"]) for s in sites if s["status"] == "rewritable" and s.get("targets"))
    return {names: ascii_uppercase[i] if i < len(ascii_uppercase) else str(i + 1) for i, names in enumerate(lists)}


def _site_cells(site: Row, letters: Mapping[tuple[str, ...], str]) -> tuple[object, ...]:
    traits = [name.replace("_", "-") for name in ("causal", "cross", "cached", "qk_norm") if site.get(name)]
    traits += [f"{site['rotary']} rotary"] if site.get("rotary") else []
    traits += list(site.get("score_modifiers") or ())
    traits += [site["layout"]] if site["kind"] == "feed_forward" and site["layout"] else []
    verdict = site["reason"] if site["status"] != "rewritable" else letters.get(tuple(site.get("targets") or ()), "")
    counts = ("-" if site.get(key) is None else site[key] for key in ("heads", "kv_heads", "head_dim"))
    return (site["name"], site["kind"], site["status"], *counts, ", ".join(traits), verdict)


def rewrite(done: Row) -> RenderableType:
    """What changed, what it cost and how far outputs moved."""
    headers = ("site", "from", "to", "merge", "step", "error", "floor")
    rows = (
        (s["name"], s["from"], s["to"], s["merge"], s["step"], number(s["error"]), number(s["floor"]))
        for s in done["sites"]
    )
    parts: list[RenderableType] = [Text(printable(f"target {done['target']}: {_counts(done)}"))]
    parts += [table(headers, rows)] if done["sites"] else []
    parts += [Text(line) for line in requantised_line([s.get("requantised") for s in done["sites"]])]
    parts += [Text(line) for line in note_lines([(s["name"], s["notes"]) for s in done["sites"]])]
    refused = note_lines([(r["name"], [r["reason"]]) for r in done["refused"]])
    parts += [Text(f"refused {line}") for line in refused]
    costs = ("parameters", "kv_bytes_per_token", "flops")
    parts.append(table(("", "before", "after", "ratio"), (_cost_cells(name, done.get(name)) for name in costs)))
    if done.get("auto"):
        parts += [table(FRONTIER, frontier_cells(done["auto"])), Text(choice_line(done["auto"]))]
    parts.append(fidelity(done.get("fidelity")))
    seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in (done.get("seconds") or {}).items())
    parts.append(Text(f"seconds: {printable(seconds)}"))
    return Group(*parts)


def _counts(done: Row) -> str:
    kept = sum(site["from"] == site["to"] for site in done["sites"])
    stays = [f"{kept} kept"] if kept else []
    return ", ".join([f"{len(done['sites']) - kept} rewritten", *stays, f"{len(done['refused'])} refused"])


def _cost_cells(name: str, change: Row | None) -> tuple[object, ...]:
    label = name.replace("kv_", "K/V_").replace("_", " ")
    if not change or change.get("before") is None:
        return label, "-", "-", "-"
    ratio = f"{change['after'] / change['before']:.3f}" if change["before"] else "-"
    return label, f"{change['before']:,}", f"{change['after']:,}", ratio


def fidelity(drift: Row | None) -> Text:
    """One line on how far the main output moved."""
    if not drift:
        return Text("output drift: not measured")
    kl = "" if drift.get("kl") is None else f" · KL {drift['kl']:.3g} nats"
    return Text(f"output drift: max |Δ| {number(drift['max_abs'])} · cosine {drift['cosine']:.6f}{kl}")


def verification(found: Row) -> RenderableType:
    """Each check and what it saw."""
    rows = ((check["name"], "ok" if check["ok"] else "FAILED", check["detail"]) for check in found["checks"])
    verdict = "verified" if found["ok"] else "not verified"
    return Group(table(("check", "", "detail"), rows), fidelity(found["fidelity"]), Text(verdict))


def profile(found: Row, *, operators: int = 12) -> RenderableType:
    """Times, memory and the slowest operators of both models."""
    before, after = found["before"], found["after"]
    runtime = f"onnxruntime {found['onnxruntime']}" if found["onnxruntime"] else f"PyTorch {_version(found, 'torch')}"
    title = f"{found['device']} · {found['provider']} · {found['threads']} threads · {found['runs']} runs · {runtime}"
    mode = "a CUDA graph, replayed" if found.get("cuda_graph") else _mode(found.get("workload") or {})
    rows: list[tuple[object, ...]] = [
        (f"{which} ms", *_ratio_cells(before["ms"][which], after["ms"][which], "{:.3f}"))
        for which in ("min", "median", "max")
    ]
    rows.append(("peak MB", *_ratio_cells(_megabytes(before), _megabytes(after), "{:.1f}")))
    if before.get("kv_bytes") is not None:
        rows.append(("K/V cache MB", *_ratio_cells(before["kv_bytes"] / 1e6, after["kv_bytes"] / 1e6, "{:.3f}")))
    if before.get("cpu_ms") is not None:
        used = [side["cpu_ms"]["median"] for side in (before, after)]
        rows.append(("processor ms, median", *_ratio_cells(used[0], used[1], "{:.3f}")))
    slowest = sorted({*before["ops"], *after["ops"]}, key=lambda op: -max(_ms(before, op), _ms(after, op)))
    ops = ((op, *_ratio_cells(_ms(before, op), _ms(after, op), "{:.3f}")) for op in slowest[:operators])
    return Group(
        Text(printable(title)),
        *([Text(printable(mode))] if mode else []),
        table(("", "before", "after", "before / after"), rows),
        table(("operator, ms", "before", "after", "before / after"), ops),
    )


def _version(found: Row, name: str) -> str:
    return str((found.get("versions") or {}).get(name, ""))


def _mode(workload: Row) -> str:
    """What was measured where it is not one call on given inputs."""
    if workload.get("mode") == "decode":
        size = f"{workload['batch']} x {workload['prompt']}"
        return f"one new token, of {workload['new_tokens']} behind a prompt of {size} tokens"
    if workload.get("mode") == "prefill":
        return f"a prompt of {workload['batch']} x {workload['prompt']} tokens"
    return ""


def _ms(measured: Row, op: str) -> float:
    return float(measured["ops"].get(op, 0.0))


def _megabytes(measured: Row) -> float | None:
    return None if measured["peak_bytes"] is None else measured["peak_bytes"] / 1e6


def _ratio_cells(before: float | None, after: float | None, form: str) -> tuple[str, str, str]:
    cells = ["-" if value is None else form.format(value) for value in (before, after)]
    return cells[0], cells[1], f"{before / after:.2f}" if before is not None and after else "-"


def uptrained(found: Row) -> RenderableType:
    """How far the student was from its teacher before and after, and what the run took."""
    names = ("kl", "cosine", "pooled_cosine", "perplexity", "teacher_perplexity")
    rows = (
        (name.replace("_", " "), *(number(found[when][name]) for when in WHEN))
        for name in names
        if found["before"][name] is not None
    )
    facts = f"{found['steps']} steps · {found['tokens']:,} tokens · {found['seconds']:.0f} s · {found['device']}"
    more = f"{found['processes']} processes · {found['trained_parameters']:,} parameters trained"
    return Group(
        Text(printable(f"{facts} · {more}")),
        table(("held-out data", "before", "after"), rows),
        Text(
            printable(
                f"loss {number(found['curve'][0]['loss'])} at first, {number(found['curve'][-1]['loss'])} at last"
            )
        ),
        *([Text(printable(f"written to {found['output']}"))] if found.get("output") else []),
    )


def targets(found: Row) -> RenderableType:
    """The destinations there are."""
    keys = ("name", "summary", "rewrites", "needs", "paper")
    return table(keys, (tuple(row.get(key) or "" for key in keys) for row in found["targets"]))
