"""Healing on two processes: MiniLM with half its K/V heads is distilled from the original, under Accelerate.

A few steps only, to show how it is done; the report is a page. On real hardware give it hours, and more text, and
calibrate the student first (`calibration=(texts, tokenizer)`), which training then starts from.

    python samples/uptrain_two_processes.py [FOLDER]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rewriter import optimize, save
from rewriter.demo.weights import hamlet, minilm

PROCESSES = 2
STEPS = 8
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(PROCESSES)),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
"""`accelerate launch` for several processes; --multi_gpu means just that, and the environment below says CPU."""


def prepare(folder: Path) -> None:
    """The original, the student and the text, as anybody would have them."""
    model, tokenizer = minilm()
    lines = [line.strip() for line in hamlet().splitlines() if 30 < len(line.strip()) < 80][:200]
    (folder / "lines.txt").write_text("\n".join(lines))
    save(model, folder / "original")
    tokenizer.save_pretrained(folder / "original")
    few = dict(tokenizer(lines[:4], padding=True, return_tensors="pt"))
    save(optimize(model, "gqa6", example_inputs=few), folder / "student")
    tokenizer.save_pretrained(folder / "student")


def main(folder: Path) -> None:
    prepare(folder)
    command = [
        *("uptrain", folder / "student", "--teacher", folder / "original", "--data", folder / "lines.txt"),
        *("--steps", STEPS, "--batch", 32, "--window", 24, "--learning-rate", 3e-4, "--layer-phase", 0.0),
        *("-o", folder / "healed", "--html", folder / "healing.html", "--json"),
    ]
    done = subprocess.run(
        [*LAUNCH, "-m", "rewriter", *map(str, command)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    print(f"processes {found['processes']}, steps {found['steps']}, tokens {found['tokens']:,}")
    for when in ("before", "after"):
        print(f"{when:6} sentence cosine {found[when]['pooled_cosine']:.4f}")
    print(f"page   {folder / 'healing.html'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
