"""ONNX students: trained through their torch twins, found by their numbers, or refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import rewriter
from rewriter import Recipe
from rewriter.errors import UnsupportedModel
from rewriter.uptrain.onnx_twin import homes
from tests.uptrain.small_models import VOCABULARY, llama, student_of, token_ids

RECIPE = Recipe(steps=30, batch=4, window=16, learning_rate=3e-3, validation=8)


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(input_ids)  # without one, transformers looks for packed sequences
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return logits


def exported(model: Any, path: Path) -> Path:
    ids = torch.randint(0, VOCABULARY, (2, 16))
    axes = {"input_ids": {0: "batch", 1: "sequence"}}
    torch.onnx.export(
        Logits(model), (ids,), path, input_names=["input_ids"], output_names=["logits"], dynamic_axes=axes,
        dynamo=False, opset_version=17,
    )  # fmt: skip
    return path


def answer(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import onnxruntime as ort

    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {"input_ids": ids})[0]
    return found


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """(teacher, student), with norms that can be told apart, as trained ones can."""
    teacher, generator = llama(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return teacher, student_of(teacher)


@pytest.mark.filterwarnings("ignore")
def test_a_file_is_trained_through_its_twin(pair: tuple[Any, Any], tmp_path: Path) -> None:
    teacher, student = pair
    before = {name: p.clone() for name, p in student.named_parameters()}
    file = exported(student, tmp_path / "student.onnx")
    done = rewriter.uptrain(file, teacher, token_ids(), twin=student, recipe=RECIPE)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    done.save(tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    same = copy.deepcopy(student)
    rewriter.uptrain(same, teacher, token_ids(), recipe=RECIPE)
    ids = token_ids(64).reshape(4, 16)
    with torch.no_grad():
        wished, old = (m(torch.from_numpy(ids)).logits.numpy() for m in (same, student))
    np.testing.assert_allclose(answer(tmp_path / "out.onnx", ids), wished, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(answer(file, ids), old, atol=1e-4, rtol=1e-3)
    assert np.abs(wished - old).max() > 0.05
    assert done.after.kl < done.before.kl  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
def test_the_twin_may_lie_beside_the_file(pair: tuple[Any, Any], tmp_path: Path) -> None:
    teacher, student = pair
    rewriter.save(student, tmp_path / "folder")
    file = exported(student, tmp_path / "folder" / "model.onnx")
    done = rewriter.uptrain(file, teacher, token_ids(), recipe=RECIPE)
    assert done.after.kl < done.before.kl  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
def test_files_that_are_no_twins_are_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    teacher, student = pair
    file = exported(student, tmp_path / "student.onnx")
    other = student_of(llama(seed=7))
    scaled = copy.deepcopy(student)
    with torch.no_grad():  # every weight that was rewritten is there, but something else is not
        scaled.model.layers[0].mlp.gate_proj.weight.mul_(2)
    for twin, what in ((None, "none is known"), (other, "does not hold"), (scaled, "does not compute|does not hold")):
        with pytest.raises(UnsupportedModel, match=what) as caught:
            rewriter.uptrain(file, teacher, token_ids(), twin=twin, recipe=RECIPE)
        assert "export" in caught.value.hint
    with pytest.raises(UnsupportedModel, match="teacher is an ONNX"):
        rewriter.uptrain(student, file, token_ids(), recipe=RECIPE)


def test_equal_tensors_are_not_told_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            nn.init.zeros_(self.a.bias)
            nn.init.zeros_(self.b.bias)

    import onnx_ir as ir

    module = Two()
    stored = {"x": module.a.weight, "y": module.b.weight.T, "z": module.a.bias}
    values = [ir.Value(name=n, const_value=ir.tensor(t.detach().numpy().copy(), name=n)) for n, t in stored.items()]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18}), ir_version=9)
    found = homes(model, module)
    assert {n: (h.value.name, h.transposed) for n, h in found.items()} == {
        "a.weight": ("x", False),
        "b.weight": ("y", True),
    }
