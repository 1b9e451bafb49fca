"""Lossless twins of exported files: the export's own bytes, with tied (or perturbed) weights put in place.

Exporting twice takes seconds, replacing weights milliseconds; and the twin's graph is the exporter's to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from tests.zoo.case import Inputs, ZooCase

Array = NDArray[np.generic]


def legal_pool(case: ZooCase) -> int:
    """A head count that the case can be pooled to without loss: half of its key/value heads."""
    return case.kv_heads // 2


def tied(case: ZooCase, *, perturbed: bool = False) -> nn.Module:
    """The module whose K/V heads are equal within groups; `perturbed` undoes that for the last head."""
    module = case.build()
    case.tie(module, legal_pool(case))
    if perturbed:
        case.perturb(module)
    return module


def twin_file(
    case: ZooCase,
    path: Path,
    out: Path,
    *,
    perturbed: bool = False,
    absent: str | None = None,
    module: nn.Module | None = None,
) -> Path:
    """Write the twin of the export at `path` (or `module`) to `out`; fails unless every changed parameter was found in
    the file.

    Where the file holds only a part of the model, parameters whose names match `absent` must not be in it.
    """
    old, new = case.build(), tied(case, perturbed=perturbed) if module is None else module
    changed = {
        name: (before.detach().numpy(), after.detach().numpy())
        for (name, before), after in zip(old.named_parameters(), new.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    model = onnx.load(path)
    found: set[str] = set()
    for tensor in _tensors(model):
        array = numpy_helper.to_array(tensor)
        for name, (before, after) in changed.items():
            for stored, replacement in ((before, after), (before.T, after.T)):
                if array.shape == stored.shape and np.array_equal(array, stored):
                    kept = tensor.name
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(replacement), kept))
                    found.add(name)
                    break
    expected = {name for name in changed if absent is None or not re.search(absent, name)}
    assert found == expected, f"not in the file as they are: {sorted(expected ^ found)}"
    onnx.save(model, out)
    return out


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        yield from (a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value")


def session(model: Path | bytes, *, optimise: bool = True) -> ort.InferenceSession:
    """A plain single-threaded CPU session: no library of ours is registered."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feeds(inputs: Inputs) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def run_file(path: Path, inputs: Inputs) -> Array:
    """The first output."""
    opened = session(path)
    wanted = {i.name for i in opened.get_inputs()}
    out: Array = opened.run(None, {k: v for k, v in feeds(inputs).items() if k in wanted})[0]
    return out


def distance(a: Array | Tensor, b: Array | Tensor) -> float:
    """Largest absolute difference, in float64; infinite for different shapes or anything that is not finite."""
    x, y = (np.asarray(t.float().numpy() if isinstance(t, Tensor) else t, dtype=np.float64) for t in (a, b))
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("inf")
    return float(np.abs(x - y).max(initial=0.0))
