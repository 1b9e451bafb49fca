"""One step of each phase with the student's parameters sharded over the processes: ``sharded_worker.py OUT``.

Writes the gathered gradients, and those of the same step without sharding.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from rewriter import Recipe
from rewriter.uptrain.batch import Batch
from rewriter.uptrain.objective import WHOLE, Distillation, Phase, Teacher, plan
from rewriter.uptrain.pairs import changed
from tests.uptrain.leaving import leave
from tests.uptrain.small_models import llama, student_of, token_ids


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    teacher = llama()
    batch = Batch({"input_ids": torch.from_numpy(token_ids(32).reshape(2, 16))}, None)
    found: dict[str, torch.Tensor] = {}
    for kind in ("whole", "sharded"):
        student = student_of(teacher)
        recipe = Recipe(steps=2)
        plans = plan(student, teacher, changed(student, teacher), batch, recipe)
        model = Distillation(student, plans, recipe, sharded=kind == "sharded")
        if kind == "sharded":
            for layer in student.model.layers:
                fully_shard(layer)
            fully_shard(model)
        for phase in Phase:
            loss, _ = model(batch, Teacher(teacher, plans).targets(batch, phase), phase, WHOLE)
            loss.backward()
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                if gradient is not None:
                    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                    found[f"{kind}/{phase.value}/{name}"] = whole.clone()
            model.zero_grad()
    if dist.get_rank() == 0:
        save_file(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
