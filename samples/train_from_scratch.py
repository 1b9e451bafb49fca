"""The papers' architectures, small, from scratch on plays: loss against attention's, at equal time of the processor.

Encoders guess masked characters, causal models the next one. At 128 characters attention costs little, so do not
expect much: what the others save grows with the length.

    python samples/train_from_scratch.py [FILE.svg] [SECONDS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from passes.targets import SparseFixed
from rewriter.architectures.colt5 import CoLT5Config, CoLT5Encoder
from rewriter.architectures.flash import Flash, FlashConfig
from rewriter.architectures.fnet import FNetConfig, Mixer, fnet
from rewriter.architectures.mixing_encoder import EncoderSizes
from rewriter.architectures.sparse_mixer import SparseMixerConfig, sparse_mixer
from rewriter.architectures.sparse_transformer import SparseTransformer, SparseTransformerConfig
from rewriter.demo.weights import play

CONTEXT, BATCH, WIDTH, LAYERS = 128, 8, 96, 4
CHARACTERS, MASK = 129, 128
"""All characters beyond ASCII become spaces; one more number stands for what is masked."""


class Guesser(nn.Module):
    """An encoder with scores of characters."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.scores = encoder, nn.Linear(WIDTH, CHARACTERS)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.scores(self.encoder(ids))
        return found


def encoders() -> dict[str, Callable[[], nn.Module]]:
    sizes = EncoderSizes(CHARACTERS, WIDTH, CONTEXT, dropout=0.0)
    base = FNetConfig(sizes, LAYERS, 4 * WIDTH, Mixer.ATTENTION, heads=4)
    experts = SparseMixerConfig(
        sizes, LAYERS, 4 * WIDTH, attention_layers=1, heads=4, expert_layers=2, experts=4, expert_hidden=4 * WIDTH
    )
    routed = CoLT5Config(
        vocabulary=CHARACTERS, hidden=WIDTH, feed_forward=4 * WIDTH, layers=LAYERS, heads=4, head_dim=24
    )
    return {
        "attention": lambda: fnet(base),
        "FNet": lambda: fnet(replace(base, mixer=Mixer.FOURIER)),
        "Sparse Mixer": lambda: sparse_mixer(experts),
        "CoLT5's encoder": lambda: Guesser(CoLT5Encoder(routed)),
    }


def decoders() -> dict[str, Callable[[], nn.Module]]:
    dense = SparseTransformerConfig(
        CHARACTERS, WIDTH, LAYERS, 4, WIDTH, 4 * WIDTH, (CONTEXT,), SparseFixed(CONTEXT, 1), dropout=0.0
    )  # one block holds everything
    units = FlashConfig(CHARACTERS, WIDTH, 2 * LAYERS, 2 * WIDTH, base=64, chunk=64, length=CONTEXT, projections=None)
    return {
        "attention": lambda: SparseTransformer(dense),
        "Sparse Transformer": lambda: SparseTransformer(replace(dense, attention=SparseFixed(16, 4))),
        "FLASH": lambda: Flash(units),
    }


def masked(rows: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows with a seventh masked, what stood there and -100 elsewhere)."""
    hidden = torch.rand(rows.shape, generator=draw) < 0.15
    return rows.masked_fill(hidden, MASK), rows.masked_fill(~hidden, -100)


def loss_of(model: nn.Module, rows: Tensor, causal: bool, draw: torch.Generator) -> Tensor:
    given, wanted = (rows[:, :-1], rows[:, 1:]) if causal else masked(rows[:, :-1], draw)
    found = model(given)
    logits = found if isinstance(found, Tensor) else found.logits
    routing = 0.0 if isinstance(found, Tensor) else 0.01 * found.router_loss
    return cross_entropy(logits.flatten(0, 1), wanted.flatten()) + (routing if model.training else 0.0)


def rows_of(text: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """[count, context + 1] from random places."""
    places = torch.randint(0, len(text) - CONTEXT - 1, (count,), generator=draw).tolist()
    return torch.stack([text[place : place + CONTEXT + 1] for place in places])


def train(model: nn.Module, causal: bool, seconds: float) -> list[tuple[float, float]]:
    """(seconds of the processor, loss on a play that is not trained on), four times."""
    text, unseen = (torch.tensor([c if c < 128 else 32 for c in map(ord, play(n))]) for n in ("macbeth", "hamlet"))
    draw = torch.Generator().manual_seed(0)
    # Sparse Transformers begin with small weights and no output: with larger steps single ones throw them back
    optimiser = torch.optim.AdamW(model.parameters(), 7e-4 if causal else 2e-3, betas=(0.9, 0.95))
    spent, course = 0.0, list[tuple[float, float]]()
    warming = torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, total_iters=20)
    while len(course) < 4:
        start = time.process_time()
        optimiser.zero_grad()
        loss_of(model, rows_of(text, BATCH, draw), causal, draw).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        warming.step()
        spent += time.process_time() - start
        if spent >= seconds * (len(course) + 1) / 4:
            course.append((spent, measured(model, unseen, causal)))
    return course


@torch.no_grad()
def measured(model: nn.Module, text: Tensor, causal: bool) -> float:
    draw = torch.Generator().manual_seed(1)
    model.eval()
    found = float(loss_of(model, rows_of(text, 16, draw), causal, draw))
    model.train()
    return found


def drawing(courses: dict[str, list[tuple[float, float]]], seconds: float) -> str:
    """The curves as an SVG: time to the right, loss upwards."""
    low, high = (f(loss for course in courses.values() for _, loss in course) for f in (min, max))
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="12">']
    for number, (name, course) in enumerate(courses.items()):
        points = " ".join(f"{40 + 420 * s / seconds:.1f},{320 - 280 * (x - low) / (high - low):.1f}" for s, x in course)
        dash = 'stroke-dasharray="6 4"' if "next" in name else ""
        colour = f"hsl({number * 51} 60% 40%)"
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" {dash}/>')
        parts.append(f'<text x="475" y="{40 + 18 * number}" fill="{colour}">{name}: {course[-1][1]:.2f}</text>')
    parts.append(f'<text x="40" y="350">{seconds:g} s of the processor; loss {low:.2f} to {high:.2f} nats</text></svg>')
    return "\n".join(parts) + "\n"


def main(target: str | None = None, seconds: float = 8.0) -> None:
    courses = {}
    print("task    model               parameters  loss, nats a character")
    for causal, models in ((False, encoders()), (True, decoders())):
        task = "next" if causal else "masked"
        for name, build in models.items():
            torch.manual_seed(0)
            model = build().train()
            course = courses[f"{task}, {name}"] = train(model, causal, seconds)
            size = sum(p.numel() for p in model.parameters())
            print(f"{task:6}  {name:18}  {size:10,}  {'  '.join(f'{loss:.3f}' for _, loss in course)}", flush=True)
    if target is not None:
        Path(target).write_text(drawing(courses, seconds), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:2], *map(float, sys.argv[2:3]))
