"""Real models before and after: how fast, how large, how far the answers moved, before and after healing.

    python -m benchmarks.real_models [--quick] [--only minilm,minilm-onnx,smollm2,card] [--json F] [--markdown F]
                                     [--readme F]

Times are those of `rewriter.profile`: both models by turns in one run, ratios of minima; on the CPU of processor time
of one thread, which other work on the machine disturbs less. Drift is measured on a play that calibration and healing
have not seen: cosine of sentence embeddings with the original's (MiniLM), perplexity over the original's (SmolLM2).
Healing is `rewriter.uptrain` for three minutes of processor time. On a graphics card the model is eight layers of Llama
2 7B's shape with random weights, where drift means nothing.

What there is so far is written after every row. `--only` leaves the other lines of the README's table as they are.
"""

from __future__ import annotations

import os

# Before torch starts: threads of one library must not spin while another one works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewriter
from benchmarks import options as shared_options
from benchmarks.healing import Healing, encoded, healed, precision, training_plays
from benchmarks.machine import machine
from benchmarks.peers import quiet
from benchmarks.rows import Row, between, markdown_table, merged_table, put_between, put_section, write_json
from benchmarks.texts import CALIBRATION, HELD_OUT, cosine, embedded, sentences, token_ids
from passes.targets import GroupedQuery
from rewriter.demo.perplexity import perplexity
from rewriter.demo.weights import minilm, play, smollm2, smollm2_twin
from rewriter.profile.result import Profile

SENTENCES, LENGTH = 8, 128
"""Of one call of an encoder."""
HEALING = 180.0
"""Seconds of processor time."""
MARK = "real models"
"""Names the place in README.md."""


def row(
    model: str, target: str, profile: Profile, measure: str | None = None, drift: float | None = None,
    after: float | None = None, **more: Any,
) -> Row:  # fmt: skip
    """One line: `drift` is what `measure` says of the rewritten model, `after` of the healed one."""
    old, new = profile.before, profile.after
    on_card = profile.provider == "cuda"
    times = [m.ms if on_card or m.cpu_ms is None else m.cpu_ms for m in (old, new)]
    made = more.pop("report", None) or profile.rewrite
    changes = {} if made is None else {
        "parameters": made.parameters.after / made.parameters.before,
        "kv": made.kv_bytes_per_token.after / max(made.kv_bytes_per_token.before, 1),
    }  # fmt: skip
    peak = None if not old.peak_bytes or not new.peak_bytes else new.peak_bytes / old.peak_bytes
    where = profile.device if on_card else "onnxruntime, CPU" if profile.onnxruntime else "torch, CPU"
    return Row(
        f"{model}, {target}", f"{where}: {_workload(profile)}", times[1].min, times[0].min, "the original", "ms",
        times[0].min / times[1].min, None, None,
        {"model": model, "target": target, "where": where, "ours_median": times[1].median,
         "peer_median": times[0].median, "peak": peak, "measure": measure, "drift": drift, "healed": after,
         **changes, **more},
    )  # fmt: skip


def _workload(profile: Profile) -> str:
    if profile.workload.mode == "forward":
        return " x ".join(map(str, next(iter(profile.shapes.values())))) + " tokens"
    return str(profile.workload)


# ------------------------------------------------------------ MiniLM


Target = tuple[str, Any, Mapping[str, Any]]
"""How the table names it, what `optimize` takes, and further keywords."""


def encoder_targets() -> tuple[Target, ...]:
    return (
        ("gqa6, joint", GroupedQuery(6, "joint"), {}),
        ("auto, kv=0.5", "auto", {"budget": "kv=0.5"}),
        ("fnet-hybrid:4", "fnet-hybrid:4", {}),
    )


def encoder_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (SENTENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm_rows(quick: bool) -> Iterator[Row]:
    """In torch, healed too."""
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences([HELD_OUT], 64 if quick else 256, 1), padding=True, return_tensors="pt"))
    wished = embedded(model, batch)
    texts = (sentences(CALIBRATION, 64 if quick else 256, 0), tokenizer)
    for name, target, more in encoder_targets()[: 1 if quick else None]:
        student = rewriter.optimize(model, target, calibration=texts, verify=False, **more)
        report, drift = student.rewrite_report, cosine(wished, embedded(student, batch))
        profile = rewriter.profile(model, student, example_inputs=encoder_inputs(), runs=5 if quick else 20, threads=1)
        found = heal_encoder(student, model, tokenizer, quick)
        yield row(
            "MiniLM-L6", name, profile, "cosine", drift, cosine(wished, embedded(student, batch)), report=report,
            steps=found.done.steps, cpu_seconds=found.cpu_seconds,
        )  # fmt: skip


def heal_encoder(student: nn.Module, model: nn.Module, tokenizer: Any, quick: bool) -> Healing:
    """For `HEALING` seconds of one thread; with `quick` a few steps."""
    texts = sentences(training_plays(), 10**9, 3)
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
    recipe = rewriter.Recipe(
        steps=4 if quick else None, batch=64, window=64, learning_rate=3e-4, layer_phase=0.0, precision=precision(),
        validation=64,
    )  # fmt: skip
    return healed(student, model, rows, recipe, HEALING / torch.get_num_threads())


class Positional(nn.Module):
    """What goes into the exporter: inputs and output by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


def minilm_onnx_rows(quick: bool) -> Iterator[Row]:
    """The same model, exported to a file."""
    model, tokenizer = minilm()
    with tempfile.TemporaryDirectory() as temporary:
        before = export(model, Path(temporary) / "minilm.onnx")
        batch = dict(tokenizer(sentences([HELD_OUT], 64 if quick else 256, 1), padding=True, return_tensors="pt"))
        wished = embedded(model, batch)
        texts = (sentences(CALIBRATION, 64 if quick else 256, 0), tokenizer)
        for name, target, more in encoder_targets()[: 1 if quick else None]:
            done = rewriter.optimize(before, target, calibration=texts, verify=False, **more)
            after = Path(temporary) / "after.onnx"
            done.save(after)
            shapes = dict.fromkeys(("input_ids", "attention_mask"), (SENTENCES, LENGTH))
            profile = rewriter.profile(before, after, shapes=shapes, runs=5 if quick else 20, threads=1)
            drift = cosine(wished, embedded(FromFile(after), batch))
            yield row("MiniLM-L6", name, profile, "cosine", drift, report=done.rewrite_report)


class FromFile(nn.Module):
    """A file that answers as the model that it was exported from."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        super().__init__()
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        from types import SimpleNamespace

        (states,) = self.session.run(None, {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))


def export(model: nn.Module, path: Path) -> Path:
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            Positional(model).eval(), tuple(t[:2, :16] for t in encoder_inputs().values()), str(path),
            input_names=["input_ids", "attention_mask"], output_names=["states"], opset_version=18, dynamo=True,
            external_data=False, dynamic_shapes=(dims, dims),
        )  # fmt: skip
    return path


# ------------------------------------------------------------ SmolLM2


def smollm2_rows(quick: bool) -> Iterator[Row]:
    """Tokens behind a prompt: its multi-head twin to the heads it was trained with, and its last layers to one."""
    model, tokenizer = smollm2()
    held = token_ids(tokenizer, HELD_OUT, 1 if quick else 4)
    base = perplexity(model, held)
    work: dict[str, Any] = {"mode": "decode", "threads": 1, "runs": 2 if quick else 5, "kernels": None}
    work |= {"prompt": 64 if quick else 2048, "new_tokens": 2 if quick else 8}
    twin = smollm2_twin(model)
    small = rewriter.optimize(twin, "gqa3", verify=False)
    profile = rewriter.profile(twin, small, **work)
    yield row("SmolLM2-135M, 9 K/V heads", "gqa3", profile, "perplexity", perplexity(small, held) / base, base=base)
    del twin, small
    if quick:
        return
    windows = [token_ids(tokenizer, name, 3) for name in CALIBRATION]
    for name, target, layers in (("mqa, last 8 layers", GroupedQuery(1, "joint"), "-8:"),):
        student = rewriter.optimize(model, target, layers=layers, calibration=torch.cat(windows), verify=False)
        profile = rewriter.profile(model, student, **work)
        drift = perplexity(student, held) / base
        found = heal_decoder(student, model, tokenizer)
        yield row(
            "SmolLM2-135M", name, profile, "perplexity", drift, perplexity(student, held) / base, base=base,
            steps=found.done.steps, cpu_seconds=found.cpu_seconds,
        )  # fmt: skip


def heal_decoder(student: nn.Module, model: nn.Module, tokenizer: Any) -> Healing:
    """For `HEALING` seconds of one thread."""
    ids = torch.cat([encoded(tokenizer, play(name)) for name in training_plays()]).numpy()
    recipe = rewriter.Recipe(
        batch=4, window=256, learning_rate=4e-5, layer_phase=0.0, precision=precision(), validation=4
    )
    return healed(student, model, ids, recipe, HEALING / torch.get_num_threads())


# ------------------------------------------------------------ a card


def card_rows(quick: bool) -> Iterator[Row]:
    """Decode and prefill of eight layers of Llama 2 7B's shape in bfloat16."""
    if not torch.cuda.is_available():
        print("  no CUDA device here: nothing measured on a card", file=sys.stderr)
        return
    jobs: list[dict[str, Any]] = [{"mode": "decode", "prompt": 512 if quick else 4096, "new_tokens": 16}]
    jobs = [*({**job, "batch": 16} for job in jobs), {"mode": "prefill", "prompt": 512 if quick else 8192, "batch": 1}]
    for name in ("gqa8", "mqa"):
        model = llama(layers=2 if quick else 8)
        small = rewriter.optimize(model, name, verify=False)
        for job in jobs:
            profile = rewriter.profile(model, small, provider="cuda", runs=3 if quick else 5, **job)
            yield row("8 layers of Llama 2 7B", name, profile)
        del model, small
        torch.cuda.empty_cache()


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=16384, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        made: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return made


# ------------------------------------------------------------ command line


PARTS: Mapping[str, Callable[[bool], Iterator[Row]]] = {
    "minilm": minilm_rows,
    "minilm-onnx": minilm_onnx_rows,
    "smollm2": smollm2_rows,
    "card": card_rows,
}
KEYS = 3
"""Columns that say which line of the README's table it is: model, target, where."""
COLUMNS = {
    "K/V": "kv", "parameters": "parameters", "peak memory": "peak", "drift in": "measure", "rewritten": "drift",
    "healed": "healed",
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a model, target and device; sizes as parts of the original's."""
    header = ["model", "target", "where", "times as fast", *COLUMNS]
    lines = [[r.more["model"], r.more["target"], r.case, r.ratio, *map(r.more.get, COLUMNS.values())] for r in rows]
    return markdown_table(header, lines)


def document(rows: Sequence[Row], quick: bool) -> str:
    where = machine()
    spent = [f"{r.more['cpu_seconds']:.0f} s ({r.more['steps']} steps)" for r in rows if "cpu_seconds" in r.more]
    healing = f" Healed for {', '.join(spent)} of processor time." if spent else ""
    note = (
        f"`python -m benchmarks.real_models{' --quick' if quick else ''}` on {where['processor']}"
        f"{', ' + where['accelerator'] if where['accelerator'] else ''}; on the CPU processor time of one thread; load "
        f"{where['load_before'][0]}.{healing}"
    )
    return f"{note}\n\n{table(rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    chosen = [name for name in PARTS if not options.only or name in options.only.split(",")]
    if not chosen:
        print(f"no such part; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if options.readme:
        between(options.readme, MARK)  # before hours of work, not after
    rows: list[Row] = []
    for name in chosen:
        for found in PARTS[name](options.quick):
            rows.append(found)
            print(f"{found.name} | {found.case} | {found.ratio:.3g} | {found.more['drift']}", file=sys.stderr)
            publish(options, rows, "Real models" if len(chosen) == len(PARTS) else f"Real models: {', '.join(chosen)}")
    print(document(rows, options.quick))
    return 0


def publish(options: argparse.Namespace, rows: Sequence[Row], title: str) -> None:
    """Write what there is so far, so that a run that is cut off has not been for nothing.

    The README's lines of other models, targets and devices stay: a card's come from another machine.
    """
    if options.markdown:
        put_section(options.markdown, title, document(rows, options.quick))
    if options.readme:
        put_between(options.readme, MARK, merged_table(between(options.readme, MARK), table(rows), KEYS))
    if options.json:
        write_json(options.json, rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = shared_options.parser(__doc__, quick="tiny samples; times mean nothing", markdown=True)
    parser.add_argument("--only", default="", help=f"only these parts, by comma: {', '.join(PARTS)}")
    parser.add_argument("--readme", type=Path, metavar="F", help=f"put the table between its marks ({MARK!r})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
