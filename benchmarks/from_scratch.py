"""FLASH, FLASH-Quad and a Transformer trained from scratch on the same text for the same steps.

    python -m benchmarks.from_scratch [--steps N] [--seeds N] [--json F] [--markdown F] [--svg F]

Characters of Shakespeare's works, one of which is held out; every model sees the same batches in the same order, with
the same optimiser. Two units stand for each of the Transformer's layers, which has rotary positions, norms before its
parts and a GELU feed-forward; at this width units have an eighth more parameters, for their base. Each model begins in
what was better for it of weights of 0.02 and of one over the root of their inputs: the Transformer in the former, units
in the latter. The rate is one for all; the Transformer does worse with twice it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.curves import svg
from benchmarks.healing import HELD_OUT, training_plays
from benchmarks.machine import machine
from benchmarks.rows import Row, markdown_table, put_section, write_json
from codegen.ops.gated_attention.torch_body import rotated, turns
from rewriter.architectures.flash import Flash, FlashConfig

CONTEXT, BATCH, RATE = 256, 8, 3e-3
HIDDEN, LAYERS, HEADS, CHUNK = 96, 3, 4, 64
CHARACTERS = 128
"""All others become spaces."""

GOAL = 1.02
"""Largest ratio of perplexities to the Transformer's."""


class Layer(nn.Module):
    """Norm, causal attention with rotary positions, residual; norm, feed-forward, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.project, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.first(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        turn = turns(x.shape[1], HIDDEN // HEADS, query)
        query, key = rotated(query, *turn), rotated(key, *turn)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        added: Tensor = self.down(F.gelu(self.up(self.second(x))))
        return x + added


class Transformer(nn.Module):
    """Ids [B, S] to scores [B, S, characters]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, HIDDEN)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.norm(self.layers(self.embedding(ids))), self.embedding.weight)


def models() -> dict[str, nn.Module]:
    quad = FlashConfig(
        CHARACTERS, HIDDEN, 2 * LAYERS, 2 * HIDDEN, base=64, chunk=None, length=CONTEXT, projections=None
    )
    return {"transformer": Transformer(), "flash-quad": Flash(quad), "flash": Flash(replace(quad, chunk=CHUNK))}


# ------------------------------------------------------------ text and training


def characters(text: str) -> Tensor:
    return torch.tensor([c if c < CHARACTERS else 32 for c in map(ord, text)])


def batches(text: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """[B, context + 1] from random places."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        places = torch.randint(0, len(text) - CONTEXT - 1, (BATCH,), generator=draw)
        yield torch.stack([text[p : p + CONTEXT + 1] for p in places.tolist()])


def train(model: nn.Module, text: Tensor, held_out: Tensor, steps: int, seed: int) -> dict[int, float]:
    """Perplexity per character of the held-out text, by steps done."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min((n + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * n / steps))
    )
    found = {}
    marks = {round(steps * part / 8) for part in range(1, 9)}
    for step, batch in enumerate(batches(text, steps, seed), start=1):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step in marks:
            found[step] = perplexity(model, held_out)
    return found


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor, windows: int = 96) -> float:
    """Over windows of the context's length, apart from each other, from the beginning on."""
    rows = text[: windows * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    losses = [
        F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum").double()
        for part in rows.split(16)
    ]
    return math.exp(float(torch.stack(losses).sum()) / (rows.shape[0] * CONTEXT))


def curves(steps: int, seeds: int) -> dict[str, dict[int, float]]:
    """By model, geometric means over seeds."""
    from rewriter.demo.weights import play

    text = torch.cat([characters(play(name)) for name in training_plays()])
    held_out = characters(play(HELD_OUT))
    runs: dict[str, list[dict[int, float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, model in models().items():
            runs.setdefault(name, []).append(train(model, text, held_out, steps, seed))
            print(f"{name}, seed {seed}: {list(runs[name][-1].values())[-1]:.3f}", flush=True)
    return {
        name: {step: math.exp(sum(math.log(run[step]) for run in found) / len(found)) for step in found[0]}
        for name, found in runs.items()
    }


# ------------------------------------------------------------ report


def rows_of(found: Mapping[str, Mapping[int, float]]) -> list[Row]:
    """One row for each model and mark; the last ones carry the goal."""
    rows = []
    for name in ("flash-quad", "flash"):
        for step, ours in found[name].items():
            peer, last = found["transformer"][step], step == max(found[name])
            goal = GOAL if last else None
            rows.append(Row("perplexity", f"{name}, {step} steps", ours, peer, "Transformer", "per character",
                            peer / ours, goal, ours / peer <= GOAL if last else None))  # fmt: skip
    return rows


def report(found: Mapping[str, Mapping[int, float]], seeds: int) -> str:
    about = machine()
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models().items()}
    told = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    text = (
        f"`python -m benchmarks.from_scratch` on {about['processor']}: perplexity per character of {HELD_OUT}, trained "
        f"on all other works, context {CONTEXT}, {BATCH * CONTEXT} characters a step, mean of {seeds} "
        f"seeds. Parameters: {told}. FLASH's chunk is {CHUNK}.\n\n"
    )
    base = found["transformer"]
    ratios = {step: [found[name][step] / value for name in ("flash-quad", "flash")] for step, value in base.items()}
    lines = [[step, *(found[name][step] for name in found), *ratios[step]] for step in base]
    return text + markdown_table(["steps", *found, "flash-quad / transformer", "flash / transformer"], lines)


def drawing(found: Mapping[str, Mapping[int, float]]) -> str:
    values = [value for curve in found.values() for value in curve.values()]
    last = max(step for curve in found.values() for step in curve)
    return svg(found, f"steps, to {last}; perplexity {min(values):.2f} to {max(values):.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args(arguments)
    if min(options.steps, options.seeds) < 1:
        parser.error("--steps and --seeds must be at least 1")
    found = curves(options.steps, options.seeds)
    if options.json:
        write_json(options.json, rows_of(found), steps=options.steps, seeds=options.seeds)
    if options.markdown:
        put_section(options.markdown, "From scratch", report(found, options.seeds))
    if options.svg:
        options.svg.write_text(drawing(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
