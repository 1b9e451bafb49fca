"""The two optimizers that fuse attention in ONNX files: ONNX Runtime's and onnxscript's. They change no weights."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

FUSED = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention")
"""Operators of com.microsoft that stand for a whole attention."""

MODEL_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("vit", "dinov2", "siglip", "packed-permute", "clip-vision"), "vit"),
    **dict.fromkeys(("t5", "longt5"), "t5"),
    **dict.fromkeys(("bart", "whisper"), "bart"),
    **dict.fromkeys(("clip-text",), "clip"),
    **dict.fromkeys(("gpt-neox",), "gpt_neox"),
    **dict.fromkeys(("phi-",), "phi"),
    **dict.fromkeys(("qwen3",), "qwen3"),
    **dict.fromkeys(("bert", "roberta", "distilbert", "modernbert", "deberta", "wav2vec2", "torch-", "mha-"), "bert"),
}
"""ONNX Runtime's name for a family, by the start of a case's name; decoders not named are "gpt2"."""

TOLERANCE = 1e-3

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class PeerResult:
    """What an optimizer did to one file.

    Attributes:
        fused: attentions fused into one operator; 0 where the file no longer runs or computes something else.
        seconds: of the optimizer alone.
        note: why nothing counts, if so.
    """

    fused: int
    seconds: float
    note: str = ""


def model_type(case: str) -> str:
    return next((kind for start, kind in MODEL_TYPES.items() if case.startswith(start)), "gpt2")


def by_onnxruntime(path: Path, out: Path, kind: str, heads: int, width: int, feeds: Feeds) -> PeerResult:
    """onnxruntime.transformers.optimizer, with the model type and sizes given."""
    from onnxruntime.transformers.optimizer import optimize_model

    def optimize() -> None:
        made = optimize_model(str(path), model_type=kind, num_heads=heads, hidden_size=width)
        made.save_model_to_file(str(out))

    return _judged(path, out, feeds, optimize)


def by_onnxscript(path: Path, out: Path, feeds: Feeds) -> PeerResult:
    """onnxscript's optimizer (folding), then its fusions for ONNX Runtime."""
    import onnxscript.optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    def optimize() -> None:
        model = ir.load(path)
        onnxscript.optimizer.optimize_ir(model)
        model, _ = optimize_for_ort(model)
        ir.save(model, out)

    return _judged(path, out, feeds, optimize)


def in_tiles(path: Path, out: Path, feeds: Feeds) -> PeerResult:
    """com.microsoft.Attention as MultiHeadAttention without its mask, which onnxruntime's CPU provider then computes
    tile by tile; nothing where these feeds hide a key or scores get another bias."""

    def split() -> None:
        model = ir.load(path)
        found = [n for n in model.graph if n.domain == "com.microsoft" and n.op_type == "Attention"]
        masks = {v.name for n in found for v in n.inputs[3:] if v is not None and v.name}
        if any(np.any(value) for value in _values(path, feeds, sorted(masks))):
            raise ValueError("its masks or biases are not zeros")
        if any(n.domain == "com.microsoft" and n.op_type in FUSED and n not in found for n in model.graph):
            raise ValueError("it has other fused attentions")
        for node in found:
            x, weight, bias = node.inputs[:3]
            heads = ir.AttrInt64("num_heads", node.attributes["num_heads"].as_int())
            product = ir.node("MatMul", [x, weight])
            whole = ir.node("Add", [product.outputs[0], bias])
            parts = ir.node("Split", [whole.outputs[0]], {"axis": -1, "num_outputs": 3}, num_outputs=3)
            attention = ir.Node("com.microsoft", "MultiHeadAttention", list(parts.outputs), [heads])
            model.graph.insert_before(node, [product, whole, parts, attention])
            node.outputs[0].replace_all_uses_with(attention.outputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        ir.save(model, out)

    return _judged(path, out, feeds, split, newly=False)


def _judged(path: Path, out: Path, feeds: Feeds, optimize: object, *, newly: bool = True) -> PeerResult:
    """`newly`: attentions that were fused before do not count."""
    assert callable(optimize)
    start = time.perf_counter()
    try:
        with quiet():
            optimize()
        seconds = time.perf_counter() - start
        fused = _count(out) - (_count(path) if newly else 0)
        if fused > 0 and (error := _difference(path, out, feeds)) > TOLERANCE:
            return PeerResult(0, seconds, f"its result differs by {error:.1e}")
        return PeerResult(max(fused, 0), seconds)
    except Exception as error:  # anything may go wrong inside an optimizer, or with what it wrote
        line = str(error).strip().partition("\n")[0]
        return PeerResult(0, time.perf_counter() - start, f"{type(error).__name__}: {line}"[:160])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logs and no prints of other people's code."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _values(path: Path, feeds: Feeds, names: list[str]) -> list[NDArray[Any]]:
    """What these values of a file are for these feeds."""
    if not names:
        return []
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()})
    return outputs


def _count(path: Path) -> int:
    model = onnx.load(path, load_external_data=False)
    bodies = [model.graph.node, *(f.node for f in model.functions)]
    return sum(n.domain == "com.microsoft" and n.op_type in FUSED for nodes in bodies for n in nodes)


def _difference(before: Path, after: Path, feeds: Feeds) -> float:
    a, b = (run(path, feeds)[0] for path in (before, after))
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def run(path: Path, feeds: Feeds) -> list[NDArray[Any]]:
    """All outputs, from a plain single-threaded session."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return outputs
