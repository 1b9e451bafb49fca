"""Experts that tokens choose, in a file: our function of standard operators beside onnxruntime's com.microsoft.MoE.

    python -m benchmarks.file_experts [--runs N] [--markdown F]

Processor time of one thread. Every choice is served, since the operator knows no capacity, so both compute the same:
the column of errors says how far apart they are, relative to the largest output.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.machine import machine
from benchmarks.rows import interleaved, markdown_table, put_section
from codegen.ops.mixture_of_experts import microsoft_moe, onnx_body
from codegen.spec import Activation, MixtureOfExperts, Routing

OPSET = 18


@dataclass(frozen=True)
class Case:
    """`experts` of `inner` features, of which each of `tokens` asks for `selected`."""

    hidden: int
    inner: int
    selected: int
    activation: Activation
    tokens: int = 512
    experts: int = 16
    gated: bool = False

    @property
    def spec(self) -> MixtureOfExperts:
        return MixtureOfExperts(
            self.hidden, self.inner, self.experts, Routing.TOKENS_CHOOSE, self.activation,
            capacity_factor=self.experts, selected=self.selected, gated=self.gated,
        )  # fmt: skip

    def __str__(self) -> str:
        kind = f"{self.activation.value}{', gated' if self.gated else ''}"
        return (
            f"{self.selected} of {self.experts} experts of {self.inner} features, {kind}, {self.tokens} x {self.hidden}"
        )


def cases() -> list[Case]:
    """Whole blocks of the paper's base model, and BERT-base's block in 16, at half and a quarter of its work."""
    shapes = ((512, 2048, 1), (768, 192, 8), (768, 192, 4))
    plain = [Case(*shape, act) for shape in shapes for act in (Activation.RELU, Activation.GELU_TANH)]
    return [*plain, Case(768, 192, 8, Activation.SILU, gated=True), Case(768, 192, 8, Activation.RELU, tokens=16)]


def measured(case: Case, runs: int) -> list[object]:
    """A line: ours, theirs, their ratio and the difference."""
    spec, random = case.spec, np.random.default_rng(0)
    held = {n: (random.standard_normal(s) / s[-2] ** 0.5 if len(s) > 1 else random.standard_normal(s) / 10).astype("f4")
            for n, s in spec.shapes.items()}  # fmt: skip
    x = random.standard_normal((1, case.tokens, case.hidden)).astype(np.float32)
    ours = _session(onnx_body.function(spec, OPSET), held, onnx_body.attributes(ir.DataType.FLOAT), case)
    theirs = _session(microsoft_moe.function(spec, OPSET), microsoft_moe.stored(spec, held), [], case)
    answers = [np.asarray(session.run(None, {"x": x})[0]) for session in (ours, theirs)]
    error = float(np.abs(answers[0] - answers[1]).max() / np.abs(answers[0]).max())
    works = [lambda s=s: s.run(None, {"x": x}) for s in (ours, theirs)]
    a, b = interleaved(runs, *works, clock=time.process_time)
    return [str(case), a.minimum * 1e3, a.median * 1e3, b.minimum * 1e3, b.median * 1e3, b.minimum / a.minimum, error]


def _session(
    body: ir.Function,
    held: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
    call: list[ir.Attr],
    case: Case,
) -> ort.InferenceSession:
    """Of one call, parameters being initializers."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    stored = [ir.Value(name=n, type=kind, shape=ir.Shape(a.shape), const_value=ir.tensor(a)) for n, a in held.items()]
    x = ir.Value(name="x", type=kind, shape=ir.Shape([None, None, case.hidden]))
    node = ir.Node(body.domain, body.name, [x, *stored], call, num_outputs=1)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", kind, ir.Shape([None, None, case.hidden])
    imports = {"": OPSET, body.domain: 1} | body.opset_imports
    graph = ir.Graph([x], [y], nodes=[node], name="g", opset_imports=imports, initializers=stored)
    content = ir.serde.serialize_model(ir.Model(graph, ir_version=8, functions=[body])).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def main(arguments: Sequence[str] | None = None, *, wanted: Sequence[Case] | None = None) -> int:
    """`wanted` are other cases than the usual ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    lines = []
    for case in cases() if wanted is None else wanted:
        lines.append(measured(case, options.runs))
        print(*(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in lines[-1]), sep="  ", flush=True)
    if options.markdown:
        header = ["case", "ours, min ms", "median", "com.microsoft.MoE, min ms", "median", "ratio of minima", "apart"]
        about = machine()
        text = (
            f"`python -m benchmarks.file_experts` on {about['processor']}, onnxruntime {ort.__version__}: processor "
            f"time of one thread, {options.runs} rounds by turns, load {about['load_before'][0]} at the end."
        )
        put_section(options.markdown, "Experts in files", f"{text}\n\n{markdown_table(header, lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
