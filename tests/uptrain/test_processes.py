"""Runs in processes of their own: killed and resumed, and spread over two of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.uptrain.small_models import equal, largest_difference

REPOSITORY = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "tests.uptrain.worker"]
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "tests.uptrain.worker"),
]
"""Accelerate starts several processes of one machine by the launcher it names after GPUs; the environment says CPU."""

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(*arguments: str | Path, launcher: list[str] = WORKER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an undisturbed run."""
    out = tmp_path_factory.mktemp("straight") / "weights.safetensors"
    finished(start(out))
    return out


def test_a_killed_run_that_is_resumed_is_the_same_run(straight: Path, tmp_path: Path) -> None:
    """Killed at random moments, three times, also in the middle of writing a checkpoint; then left alone."""
    folder, out = tmp_path / "run", tmp_path / "weights.safetensors"
    moments = random.Random(0)
    resumed_later = False
    for _ in range(3):
        resume = ["--resume"] if list(folder.glob("step-*/run.json")) else []
        process = start(out, "--checkpoints", folder, "--delay", "0.3", *resume)
        assert process.stdout is not None
        first = process.stdout.readline()
        resumed_later |= bool(resume) and int(first) > 1
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not out.exists()
    assert resumed_later
    finished(start(out, "--checkpoints", folder, "--resume"))
    assert equal(load_file(out), load_file(straight))
    assert not list(folder.glob(".draft*"))


def test_the_control_another_seed_is_another_run(straight: Path, tmp_path: Path) -> None:
    finished(start(tmp_path / "other.safetensors", "--seed", "1"))
    assert not equal(load_file(tmp_path / "other.safetensors"), load_file(straight))


@pytest.mark.parametrize("options", [[], ["--accumulate", "2"]], ids=["", "accumulated"])
def test_two_processes_make_the_steps_of_one(straight: Path, tmp_path: Path, options: list[str]) -> None:
    out, folder = tmp_path / "weights.safetensors", tmp_path / "run"
    printed = finished(start(out, "--checkpoints", folder, *options, launcher=LAUNCH))
    assert printed.split() == [str(step) for step in range(1, 7)]  # one of them reports
    assert sorted(f.name for f in folder.iterdir()) == ["step-000000005", "step-000000006"]
    assert len(list((folder / "step-000000006").glob("random_states_*.pkl"))) == 2
    one, two = load_file(straight), load_file(out)
    assert largest_difference(one, two) < 2e-5
    with pytest.raises(AssertionError):
        torch.testing.assert_close({n: w + 1e-3 for n, w in two.items()}, one, atol=2e-5, rtol=0)


def test_sharded_parameters_get_the_gradients_of_whole_ones(tmp_path: Path) -> None:
    """torch's fully_shard, in both phases; Accelerate itself shards on accelerators only."""
    out = tmp_path / "gradients.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished(start(out, launcher=[*launch, "-m", "tests.uptrain.sharded_worker"]))
    found = load_file(out)
    whole, sharded = (
        {n.removeprefix(f"{kind}/"): g for n, g in found.items() if n.startswith(f"{kind}/")}
        for kind in ("whole", "sharded")
    )
    assert set(whole) < set(sharded)
    assert {name.split("/")[0] for name in whole} == {"layers", "output"}
    for name, gradient in sharded.items():
        wished = whole.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wished, atol=2e-6, rtol=1e-4)
    assert all(float(whole[n].abs().max()) > 1e-3 for n in whole if n.endswith("v_proj.weight"))
