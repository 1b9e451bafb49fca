"""Encoders as CoLT5 beside themselves as .onnx files in onnxruntime's CPU provider, one thread, batch 1.

Models are those of `benchmarks/colt5_encoders.py`, exported for any length. Peers are the dense file as exported, as
fused by onnxruntime's optimizer where that knows the model, and with onnxruntime's fused attention without a mask, the
only one that works in tiles; ours is the faster of the first two, rewritten, which heeds masks. All tokens are shown. A
file is left out at lengths at which its scores would take more than an eighth of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import torch
from torch import Tensor, nn

import rewriter
from benchmarks import peers
from benchmarks.rows import Clock, Row, interleaved

NAMES = ("input_ids", "attention_mask")

TILES = "fused, no mask, in tiles"
"""The form that holds no scores of all pairs of tokens."""

SHORT = 40
"""Tokens of the calls that models are exported and compared by."""


class Positional(nn.Module):
    """A model called by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return output


def inputs(tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 1000, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids)


def feeds(tokens: int) -> dict[str, Any]:
    return dict(zip(NAMES, (t.numpy() for t in inputs(tokens)), strict=True))


@dataclass(frozen=True)
class Pair:
    """Files of one model by form, dense and rewritten."""

    dense: Mapping[str, Path]
    conditional: Mapping[str, Path]


def made(build: Callable[[str], nn.Module], kind: str, heads: int, width: int, folder: Path) -> Pair:
    """`build` gives the model that runs the attention it names; `kind` is onnxruntime's name for the family."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = {"as exported": _exported(build("sdpa"), folder / "dense.onnx", 18, dynamo=True)}
    eager, fused = _exported(build("eager"), folder / "eager.onnx", 17, dynamo=False), folder / "fused.onnx"
    if peers.by_onnxruntime(eager, fused, kind, heads, width, feeds(SHORT)).fused:
        dense["fused by onnxruntime"] = fused
    conditional = {}
    for number, (form, path) in enumerate(dense.items()):
        conditional[form] = folder / f"conditional-{number}.onnx"
        rewriter.optimize(path, "colt5").save(conditional[form])
    script, tiles = folder / "script.onnx", folder / "tiles.onnx"
    found = peers.by_onnxscript(dense["as exported"], script, feeds(SHORT))
    if found.fused and peers.in_tiles(script, tiles, feeds(SHORT)).fused:
        dense[TILES] = tiles
    return Pair(dense, conditional)


def _exported(model: nn.Module, path: Path, opset: int, *, dynamo: bool) -> Path:
    axes = {0: "batch", 1: "tokens"}
    options: dict[str, Any] = {"dynamic_axes": dict.fromkeys(NAMES, axes)}
    if dynamo:
        dims = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
        options = {"dynamic_shapes": (dims, dims), "external_data": False}
    with peers.quiet(), torch.no_grad():
        torch.onnx.export(Positional(model.eval()), inputs(SHORT, 2), str(path), input_names=list(NAMES),
                          output_names=["output"], opset_version=opset, dynamo=dynamo, **options)  # fmt: skip
    return path


def rows(case: str, pair: Pair, heads: int, lengths: Sequence[int], runs: int, clock: Clock) -> Iterator[Row]:
    """A row for each length and peer that fits into memory."""
    for tokens in lengths:
        whole_scores = 4 * heads * tokens**2 * 8 > psutil.virtual_memory().total
        dense = {form: path for form, path in pair.dense.items() if form == TILES or not whole_scores}
        if not dense:
            continue
        given = feeds(tokens)
        ours, theirs = (
            {form: _call(path, given) for form, path in files.items()} for files in (pair.conditional, dense)
        )
        works = [*ours.values(), *theirs.values()]
        for work in works:
            work()
        times = interleaved(runs, *works, clock=clock)
        best = min(times[: len(ours)], key=lambda t: t.minimum)
        others = dict(zip(theirs, times[len(ours) :], strict=True))
        fastest = min(t.minimum for t in others.values())
        for form, t in others.items():
            more = {"ours_median": best.median * 1e3, "peer_median": t.median * 1e3, "best_peer": t.minimum == fastest}
            yield Row("colt5", f"{case}, {tokens} tokens", best.minimum * 1e3, t.minimum * 1e3,
                      f"onnxruntime, dense, {form}", "ms", t.minimum / best.minimum, None, None, more)  # fmt: skip


def _call(path: Path, given: Mapping[str, Any]) -> Callable[[], Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: np.asarray(session.run(None, {i.name: given[i.name] for i in session.get_inputs()})[0])
