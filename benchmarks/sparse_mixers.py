"""Sparse Mixer and Fast Sparse Mixer beside BERT-base: 512 tokens, batch 1, one thread, in onnxruntime and in torch.

The goals are the ratios of inference speed that the paper found (arXiv 2205.12399; there on an accelerator). All
weights are random and the vocabulary is small, in all models alike. In onnxruntime BERT runs as exported and as fused
by onnxruntime's own optimizer; ours run as exported, at their one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from benchmarks import peers
from benchmarks.rows import Clock, Row, interleaved
from rewriter.architectures.sparse_mixer import SparseMixerConfig, fast, sparse_mixer_encoder

TOKENS = 512

OPSET = 20
"""Of models as exported: from it on GELU is one operator, before it is six passes over all features inside."""

GOALS: Mapping[str, float] = {"sparse-mixer": 1.61, "fast-sparse-mixer": 1.98}

ERROR_LIMIT = 1e-4
"""Of a file against its module, relative to the largest output."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """Of both models: the papers' base sizes, or a part of them in width, depth and experts' features: 1, 2 or 4.

    `depth`, if given, is the number of layers of either.
    """

    part: int = 1
    depth: int | None = None

    def mixer(self) -> SparseMixerConfig:
        base, part = SparseMixerConfig(), self.part
        return replace(
            base,
            sizes=replace(base.sizes, vocabulary=1000, hidden=base.sizes.hidden // part),
            heads=base.heads // part,
            feed_forward=base.feed_forward // part,
            expert_hidden=base.expert_hidden // part,
            layers=self.depth or base.layers // part,
            attention_layers=base.attention_layers // part,
            expert_layers=base.expert_layers // part,
        )

    def bert(self, attention: str) -> nn.Module:
        return Bert(self.part, self.depth or 12 // self.part, attention)

    def __str__(self) -> str:
        return "base sizes" if self == Sizes() else f"1/{self.part} of the width, experts and depth"


class Bert(nn.Module):
    """BERT-base, or a part of it, called by position."""

    def __init__(self, part: int, layers: int, attention: str) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(vocab_size=1000, hidden_size=768 // part, num_attention_heads=12 // part,
                            intermediate_size=3072 // part, num_hidden_layers=layers)  # fmt: skip
        config._attn_implementation = attention
        self.bert = BertModel(config, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return output


def sparse_mixer_rows(folder: Path, runs: int, clock: Clock, sizes: Sizes) -> list[Row]:
    """Rows of errors and times; the goals hold at the base sizes only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return _rows(folder, sizes, runs, clock)
    finally:
        torch.set_num_threads(before)


def _rows(folder: Path, sizes: Sizes, runs: int, clock: Clock) -> list[Row]:
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    given = (ids, torch.ones_like(ids))
    feeds = dict(zip(("input_ids", "attention_mask"), (t.numpy() for t in given), strict=True))
    torch.manual_seed(0)
    config = sizes.mixer()
    models = {"sparse-mixer": sparse_mixer_encoder(config).eval(), "fast-sparse-mixer": None}
    models["fast-sparse-mixer"] = sparse_mixer_encoder(fast(config)).eval()
    rows, opened = [], {}
    for name, model in models.items():
        assert model is not None
        opened[name] = _session(_exported(model, given, folder / f"{name}.onnx", OPSET))
        expected = model(*given).numpy()
        error = float(np.abs(opened[name].run(None, feeds)[0] - expected).max() / np.abs(expected).max())
        rows.append(Row("error", f"{name} file, as exported, {TOKENS} tokens", error, ERROR_LIMIT, "the module",
                        "relative", None, ERROR_LIMIT, error <= ERROR_LIMIT))  # fmt: skip
    theirs = {form: _session(path) for form, path in _bert_files(sizes, given, feeds, folder).items()}
    in_files: dict[str, Call] = {n: (lambda s=s: s.run(None, feeds)) for n, s in {**opened, **theirs}.items()}
    rows += _timed("onnxruntime", sizes, in_files, runs, clock)
    bert = sizes.bert("sdpa")
    in_torch: dict[str, Call] = {n: (lambda m=m: m(*given)) for n, m in {**models, "eager, sdpa": bert}.items()}
    return rows + _timed("torch", sizes, in_torch, runs, clock)


def _timed(where: str, sizes: Sizes, works: Mapping[str, Call], runs: int, clock: Clock) -> list[Row]:
    """A row for each of ours and each peer; the fastest peer's carries the goal."""
    for work in works.values():
        work()
    times = dict(zip(works, interleaved(runs, *works.values(), clock=clock), strict=True))
    others = {name: t for name, t in times.items() if name not in GOALS}
    best = min(others, key=lambda name: others[name].minimum)
    rows = []
    for name, wanted in GOALS.items():
        for other, theirs in others.items():
            ours, ratio = times[name], theirs.minimum / times[name].minimum
            goal = wanted if other == best and sizes == Sizes() else None
            more = {"best_peer": other == best, "ours_form": "as built", "ours_median": ours.median * 1e3,
                    "peer_median": theirs.median * 1e3, "shape": str(sizes)}  # fmt: skip
            case = f"{name}, {where}, {TOKENS} tokens" + ("" if sizes == Sizes() else f", {sizes}")
            rows.append(Row("time", case, ours.minimum * 1e3, theirs.minimum * 1e3, f"{where}, BERT, {other}", "ms",
                            ratio, goal, None if goal is None else ratio >= goal, more))  # fmt: skip
            print(f"{case}: {rows[-1].ours:.3g} / {rows[-1].peer:.3g} ms ({other}) = {ratio:.2f}", flush=True)
    return rows


def _bert_files(sizes: Sizes, given: tuple[torch.Tensor, ...], feeds: Any, folder: Path) -> dict[str, Path]:
    plain = _exported(sizes.bert("sdpa"), given, folder / "bert.onnx", OPSET)
    found, fused = {"as exported": plain}, folder / "bert-fused.onnx"
    eager = _exported(sizes.bert("eager"), given, folder / "bert-eager.onnx", 17, dynamo=False)
    width, heads = 768 // sizes.part, 12 // sizes.part
    if peers.by_onnxruntime(eager, fused, "bert", heads, width, feeds).fused:
        found["fused by onnxruntime"] = fused
    return found


def _exported(
    model: nn.Module, given: tuple[torch.Tensor, ...], path: Path, opset: int, *, dynamo: bool = True
) -> Path:
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "tokens"} for name in names}  # the optimizer knows the pattern of open axes only
    options: dict[str, Any] = {"external_data": False} if dynamo else {"dynamic_axes": axes}
    with peers.quiet():
        torch.onnx.export(model, given, str(path), input_names=names, output_names=["output"], opset_version=opset,
                          dynamo=dynamo, **options)  # fmt: skip
    return path


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
