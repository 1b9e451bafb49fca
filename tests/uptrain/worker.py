"""One run in a process of its own: ``worker.py OUT [--checkpoints DIR] [--resume] [--seed N] [--delay S]``.

Writes the trained weights to OUT (the first process does). `--delay` waits after each step, so that there is time to
be killed in.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import rewriter
from rewriter import Recipe
from tests.uptrain.leaving import leave
from tests.uptrain.small_models import llama, student_of, token_ids, weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def wait(step: int, *_: object) -> None:
        print(step, flush=True)
        time.sleep(options.delay)

    teacher = llama()
    done = rewriter.uptrain(
        student_of(teacher),
        teacher,
        token_ids(),
        recipe=Recipe(
            steps=6, batch=4, window=16, learning_rate=3e-3, validation=8, save_every=1, seed=options.seed,
            accumulate=options.accumulate,
        ),
        checkpoints=options.checkpoints,
        resume=options.resume,
        progress=wait,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(weights(done.model), options.out)


if __name__ == "__main__":
    main()
    leave()
