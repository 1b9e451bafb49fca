"""The training loop: one global batch a step, spread over Accelerate's processes and accumulated parts."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import RewriteError, UsageError
from rewriter.uptrain import checkpoint
from rewriter.uptrain.batch import Batch, check_vocabulary, collate
from rewriter.uptrain.measure import measure
from rewriter.uptrain.objective import Distillation, Phase, Plan, Share, Teacher
from rewriter.uptrain.observe import modes, restore_modes
from rewriter.uptrain.recipe import Recipe
from rewriter.uptrain.result import Drift, Point
from rewriter.uptrain.rows import Row, Rows
from rewriter.uptrain.schedule import layer_steps, learning_rate

POINTS = 1000
"""Points that a loss curve has at most (twice as many in runs that are not much longer)."""
SHORT = 128
"""Tokens of a sequence up to which torch's fused attention is slow to differentiate in bfloat16 on CPUs."""

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called after each step with its number from 1, the number of all steps, and the loss with its terms."""


@dataclass
class State:
    """Where a run stands; what a checkpoint holds besides tensors."""

    step: int
    tokens: int
    seconds: float
    curve: list[Point]
    drift: dict[int, Drift]


class Loop:
    """One run: everything that does not change from step to step, and `run`."""

    def __init__(
        self,
        accelerator: Any,
        distillation: Distillation,
        teacher: nn.Module,
        plan: Plan,
        rows: Rows,
        recipe: Recipe,
        total: int,
        pad: int,
    ) -> None:
        parts = accelerator.num_processes * recipe.accumulate
        if recipe.batch % parts:
            raise UsageError(
                f"a batch of {recipe.batch} sequences does not divide into {accelerator.num_processes} processes with "
                f"{recipe.accumulate} parts each",
                hint="choose a multiple of both",
            )
        self.accelerator, self.plan, self.rows, self.recipe, self.total, self.pad = (
            accelerator, plan, rows, recipe, total, pad
        )  # fmt: skip
        self.layer_steps = layer_steps(recipe, total) if plan.pairs else 0
        self._teacher_model, self._teacher = teacher, Teacher(teacher, plan)
        parameters = [p for p in distillation.parameters() if p.requires_grad]
        self.model, self.optimizer = accelerator.prepare(distillation, _optimizer(parameters, recipe, accelerator))
        held = rows.validation
        size = max(1, recipe.batch // parts)
        self._validation = [self._collated(held[i : i + size]) for i in range(0, len(held), size)]

    @property
    def identity(self) -> str:
        """Changes with the recipe, the data and the shapes of what is trained: only the same run may be resumed."""
        shapes = [(n, list(p.shape)) for n, p in self.accelerator.unwrap_model(self.model).student.named_parameters()]
        facts = [self.recipe.to_dict(), self.rows.fingerprint, self.total]
        sharded = "FSDP" in str(self.accelerator.distributed_type)
        return hashlib.sha256(json.dumps([facts, None if sharded else shapes]).encode()).hexdigest()[:16]

    def run(self, state: State, folder: Path | None, progress: Progress | None) -> State:
        """Train from where `state` stands to the end; checkpoints go to `folder`."""
        recipe, rows = self.recipe, self.rows.since(state.step * self.recipe.batch)
        started = time.perf_counter() - state.seconds
        if not state.drift:
            state.drift[0] = self.measured()
        while state.step < self.total:
            batch = list(itertools.islice(rows, recipe.batch))
            point, tokens = self._step(state.step, batch)
            if state.step % max(1, self.total // POINTS) == 0 or state.step == self.total - 1:
                state.curve.append(point)
            state.step += 1
            state.tokens += tokens
            state.seconds = time.perf_counter() - started
            last = state.step == self.total
            if last or (recipe.validate_every and state.step % recipe.validate_every == 0):
                state.drift[state.step] = self.measured()
            if folder is not None and (last or state.step % recipe.save_every == 0):
                self._save(folder, state)
            if progress is not None and self.accelerator.is_main_process:
                progress(state.step, self.total, {"loss": point.loss, **point.terms})
        return state

    def measured(self) -> Drift:
        """Validation drift; random states stay as they were, so that validating changes nothing."""
        teacher, before = Teacher(self._teacher_model, self.plan), modes(self.model)
        self.model.eval()
        try:
            with _attention(self.accelerator, self._validation):
                return measure(
                    self.model,
                    lambda batch: teacher.targets(batch, Phase.OUTPUT, blocks=False).output,
                    self._validation,
                    self.plan,
                )
        finally:
            restore_modes(before)

    # ------------------------------------------------------------------ one step

    def _step(self, step: int, rows: Sequence[Row]) -> tuple[Point, int]:
        phase = Phase.LAYERS if step < self.layer_steps else Phase.OUTPUT
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, step, self.total)
        whole = self._collated(rows)
        check_vocabulary(whole, self._teacher_model, "teacher")
        tokens = whole.tokens
        sums: dict[str, Tensor] = {}
        parts = list(self._mine(rows))
        with _attention(self.accelerator, parts):
            for index, batch in enumerate(parts):
                last = index == len(parts) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                    for name, term in self._backward(batch, phase, tokens).items():
                        sums[name] = sums[name] + term if name in sums else term
        terms = self._everywhere(sums)
        loss = terms.pop("loss")
        if not math.isfinite(loss):
            raise RewriteError(
                f"the loss is {loss} at step {step}", hint="lower the learning rate, or train in float32 (precision no)"
            )
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Point(step, phase.value, loss, terms), tokens

    def _backward(self, batch: Batch, phase: Phase, tokens: int) -> dict[str, Tensor]:
        count = self.accelerator.num_processes
        share = Share(batch.tokens / tokens * count, batch.rows / self.recipe.batch * count)
        with self.accelerator.autocast():
            targets = self._teacher.targets(batch, phase, blocks=self.recipe.hidden > 0)
        loss, terms = self.model(batch, targets, phase, share)
        self.accelerator.backward(loss)
        return {"loss": loss.detach(), **terms}

    def _mine(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """This process's parts of a step's rows."""
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = len(rows) // (count * self.recipe.accumulate)
        for part in range(self.recipe.accumulate):
            start = (rank * self.recipe.accumulate + part) * size
            yield self._collated(rows[start : start + size])

    def _collated(self, rows: Sequence[Row]) -> Batch:
        return collate(rows, self.pad).to(self.accelerator.device)

    def _everywhere(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over processes: each part was weighted by its share already."""
        names = sorted(sums)
        stacked = torch.stack([sums[name].float() for name in names])
        return dict(zip(names, self.accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))

    def _save(self, folder: Path, state: State) -> None:
        run = {
            "identity": self.identity,
            "recipe": self.recipe.to_dict(),
            "total": self.total,
            "step": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "curve": [point.to_dict() for point in state.curve],
            "drift": {str(step): drift.to_dict() for step, drift in state.drift.items()},
        }
        checkpoint.write(self.accelerator, folder, state.step, run, self.recipe.keep)

    def restore(self, folder: Path) -> State:
        """Take the newest checkpoint up; raises UsageError if it is of another run."""
        found = checkpoint.newest(folder)
        run = checkpoint.read(found)
        if run["identity"] != self.identity:
            raise UsageError(
                f"{found} belongs to another run: its recipe, data or student differ",
                hint="resume with the same arguments, or start the run anew in another folder",
            )
        checkpoint.restore(self.accelerator, found)
        curve = [Point.of(point) for point in run["curve"]]
        drift = {int(step): Drift(**values) for step, values in run["drift"].items()}
        return State(run["step"], run["tokens"], run["seconds"], curve, drift)


def _optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe, accelerator: Any) -> torch.optim.Optimizer:
    """AdamW, fused where parameters are whole tensors; biases and norms do not decay."""
    whole = str(accelerator.distributed_type).rpartition(".")[2] in ("NO", "MULTI_CPU", "MULTI_GPU")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True if whole else None
    )


def _attention(accelerator: Any, batches: Sequence[Batch]) -> contextlib.AbstractContextManager[Any]:
    """On CPUs in bfloat16, torch's fused attention takes longer to differentiate than all else in short sequences
    (MiniLM, 64 x 24 tokens: 0.49 s against 0.19 s for the whole backward pass)."""
    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "bf16":
        return contextlib.nullcontext()
    ids = [b.inputs["input_ids"].shape[1] for b in batches if "input_ids" in b.inputs]
    if not ids or max(ids) > SHORT:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
