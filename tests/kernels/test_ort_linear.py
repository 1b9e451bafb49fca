"""Linear attention in the library of onnxruntime operators: beside the function in a file, and the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from codegen.device import DType
from codegen.launch.ort_op import build
from codegen.ops.linear_attention.onnx_body import DOMAIN, attributes, function, function_name, stored
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention
from tests.kernels.linear_problems import K, Operands, distance, draw
from tests.kernels.ort_sessions import operators_run, profiled_session
from tests.kernels.problems import choice, here

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

Array = NDArray[Any]

LEARNED = LinearAttention(GroupedQueryAttention(4, 2, 6, 5, 0.4, causal=True), 5)
ELU = LinearAttention(GroupedQueryAttention(3, 3, 16, 8, 0.25), 4, FeatureMap.ELU1)
SPECS = {"learned": LEARNED, "elu": ELU}
SINGLE = ir.DataType.FLOAT


@pytest.fixture(scope="module")
def library(kernel_cache: Path) -> Path:
    return build([*(choice(s, DType.FLOAT32) for s in SPECS.values()), choice(LEARNED, DType.FLOAT16)]).path


def _model(spec: LinearAttention, x: Operands, dtype: ir.DataType, gains: tuple[float, float]) -> bytes:
    """q, k, v and what is shown to y; parameters are initializers, as in a rewritten file."""
    body = function(spec, 18, shown=x.shown is not None)
    inputs = [ir.Value(name=n, type=ir.TensorType(dtype), shape=ir.Shape([None] * 4)) for n in "qkv"]
    named = {name: p.double().numpy() for name, p in x.parameters.items()}
    tensors = {name: ir.tensor(array) for name, array in stored(spec, named, dtype).items()}
    held = [
        ir.Value(name=name, type=ir.TensorType(t.dtype), shape=t.shape, const_value=t) for name, t in tensors.items()
    ]
    if x.shown is not None:
        inputs.append(ir.Value(name="shown", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([None, None])))
    called = [*inputs[:3], *held, *inputs[3:]]
    node = ir.Node(DOMAIN, body.name, called, attributes(spec, dtype, *gains), num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(dtype)
    opsets = {"": 18, DOMAIN: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], name="g", opset_imports=opsets, initializers=held)
    model = ir.Model(graph, ir_version=8, functions=[body])
    return bytes(ir.serde.serialize_model(model).SerializeToString())


class Run:
    """One session on the operands of one spec; `library` None for the functions of the file."""

    def __init__(
        self, spec: LinearAttention, x: Operands, library: Path | None, folder: Path,
        dtype: ir.DataType = SINGLE, gains: tuple[float, float] = (1.0, 1.0),
    ) -> None:  # fmt: skip
        self.gains = gains
        self.session = profiled_session(_model(spec, x, dtype, gains), library, folder)

    def __call__(self, x: Operands) -> torch.Tensor:
        q, k = x.q * self.gains[0], x.k * self.gains[1]
        feeds: dict[str, Array] = {n: t.contiguous().numpy() for n, t in zip("qkv", (q, k, x.v), strict=True)}
        if x.shown is not None:
            feeds["shown"] = x.shown.numpy()
        return torch.from_numpy(self.session.run(None, feeds)[0])


@pytest.mark.parametrize("hide", [False, True], ids=["all shown", "some hidden"])
@pytest.mark.parametrize("name", SPECS)
def test_with_the_library_the_kernel_runs_and_without_it_the_function(
    name: str, hide: bool, library: Path, tmp_path: Path
) -> None:
    spec = SPECS[name]
    first = draw(spec, torch.float32, 2, 1, 1, hide=hide)
    plain, fast = (Run(spec, first, lib, tmp_path) for lib in (None, library))
    for queries, keys in ((1, 1), (4, 7), (1, 40), (40, 40), (33, 41)):
        x = draw(spec, torch.float32, 2, queries, keys, hide=hide)
        x = replace(x, parameters=first.parameters)
        found = fast(x)
        assert max(distance(spec, x, found), distance(spec, x, plain(x))) <= K, (queries, keys)
    assert distance(spec, replace(x, v=x.v * 1.001), found) > K  # the control
    assert operators_run(fast.session) == {function_name(spec, hide)}
    assert "MatMul" in operators_run(plain.session)


def test_what_memory_held_before_does_not_matter(library: Path, tmp_path: Path) -> None:
    """Twelve features are no whole vectors: what lay behind them was multiplied by zero, which NaN survives."""
    x = draw(LEARNED, torch.float32, 2, 40, 40)
    fast = Run(LEARNED, x, library, tmp_path)
    wished = fast(x)
    for _ in range(30):
        junk = [np.full(size, np.nan, np.float32) for size in (256, 1024, 4096, 16384) * 8]
        del junk
        assert torch.equal(fast(x), wished)


@pytest.mark.parametrize("name", SPECS)
def test_operands_that_are_scaled_already(name: str, library: Path, tmp_path: Path) -> None:
    """A file whose queries are divided by the root of the head's size has that in its node's numbers."""
    spec, gains = SPECS[name], (0.5, 2.0**0.5)
    x = draw(spec, torch.float32, 2, 30, 40)
    fast = Run(spec, x, library, tmp_path, gains=gains)
    found = fast(x)
    assert distance(spec, x, found) <= K
    other = Run(spec, x, library, tmp_path, gains=(1.0, 1.0))
    assert distance(spec, x, other(replace(x, q=x.q * 0.5))) > K  # the control


def test_what_is_shown_is_broadcast(library: Path, tmp_path: Path) -> None:
    x = draw(LEARNED, torch.float32, 2, 30, 40, hide=True)
    assert x.shown is not None
    fast = Run(LEARNED, x, library, tmp_path)
    for shown in (x.shown[:1], x.shown[:, :1], torch.tensor([[False], [True]]), torch.ones(1, 1, dtype=torch.bool)):
        narrow = replace(x, shown=shown)
        wide = replace(x, shown=shown.expand(2, 40).contiguous())
        assert distance(LEARNED, wide, fast(narrow)) <= K, shown.shape
    with pytest.raises(Exception, match="broadcast"):
        fast(replace(x, shown=x.shown[:, :7]))


def test_half_precision_and_no_tokens(library: Path, tmp_path: Path) -> None:
    x = draw(LEARNED, torch.float16, 2, 40, 40)
    fast = Run(LEARNED, x, library, tmp_path, ir.DataType.FLOAT16)
    found = fast(x)
    assert found.dtype == torch.float16 and distance(LEARNED, x, found) <= K
    nothing = replace(x, q=x.q[:, :, :0])
    assert fast(nothing).shape == (2, 4, 0, 5)


def test_what_the_library_lacks_is_said(library: Path, tmp_path: Path) -> None:
    x = draw(LEARNED, torch.float32, 2, 9, 9)
    with pytest.raises(Exception, match=r"chunks of 6 tokens.*rewriter kernels"):
        Run(replace(LEARNED, chunk=6), x, library, tmp_path)
    fast = Run(LEARNED, x, library, tmp_path)
    wide = draw(replace(LEARNED, attention=replace(LEARNED.attention, heads=8, kv_heads=4)), torch.float32, 1, 3, 3)
    with pytest.raises(Exception, match=r"8 heads of 6 features.*rewriter kernels"):
        fast(wide)
    with pytest.raises(Exception, match="contradict"):
        fast(replace(x, v=x.v[:, :, :4]))
