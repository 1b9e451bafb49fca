"""How long matching takes on 32 layers: beside torch.export, and beside ONNX Runtime's optimizer on the same file."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from benchmarks.peers import by_onnxruntime, quiet
from benchmarks.rows import Row, interleaved, timed
from passes.dataflow import Flow
from passes.match.attention import find_attention
from passes.match.feed_forward import find_feed_forward
from rewriter.capture.torch_export import view
from rewriter.inspection import inspect
from tests.zoo.exports import WithPast
from tests.zoo.feeds import HEADS, VOCAB, WIDTH
from tests.zoo.hugging_face import DECODER
from tests.zoo.randomize import randomize

LAYERS, KV_HEADS = 32, 2
SHARE_OF_EXPORT, SHARE_OF_OPTIMIZER = 0.05, 0.1


def rows(runs: int) -> list[Row]:
    """The two goals, and matching with its recording for comparison."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with quiet():
        return [*_beside_export(runs), *_beside_optimizer(runs)]


def _llama(implementation: str) -> nn.Module:
    import transformers

    settings: dict[str, Any] = {**DECODER, "num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS}
    config = transformers.LlamaConfig(**settings)
    make: Any = transformers.LlamaForCausalLM._from_config
    return randomize(make(config, attn_implementation=implementation))


def _beside_export(runs: int) -> list[Row]:
    module = _llama("sdpa")
    ids = torch.randint(5, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def export() -> torch.export.ExportedProgram:
        with torch.no_grad():
            return torch.export.export(module, (), inputs, strict=False)

    program = export()
    flows = [view(program, (), inputs).flow for _ in range(runs + 1)]  # a flow keeps what it worked out
    _match(flows.pop())
    spare = list(flows)
    exporting, matching, both = interleaved(
        runs, export, lambda: _match(spare.pop()), lambda: _match(view(program, (), inputs).flow)
    )
    nodes = {"nodes": len(flows[0].nodes), "sites": len(find_attention(flows[0]).sites)}
    case = f"llama, {LAYERS} layers, torch"
    return [
        _row("matching beside torch.export", case, matching, exporting, "torch.export", 1 / SHARE_OF_EXPORT, nodes),
        _row("recording and matching beside torch.export", case, both, exporting, "torch.export", None, nodes),
    ]


def _match(flow: Flow) -> None:
    """What `inspect` looks for: attentions and feed-forward blocks."""
    find_feed_forward(flow, find_attention(flow).names)


def _beside_optimizer(runs: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.onnx"
        _export_with_past(path)
        nodes: dict[str, Any] = {"nodes": len(onnx.load(path).graph.node)}
        feeds: dict[str, Any] = {}  # it fuses nothing here, so that nothing is run
        optimizing = timed(
            lambda: by_onnxruntime(path, Path(folder) / "out.onnx", "gpt2", HEADS, WIDTH, feeds), max(1, runs - 2)
        )[0]
        inspecting, found = timed(lambda: inspect(path), runs)
        nodes["sites"] = len(found.sites)
    case = f"llama with past, {LAYERS} layers, TorchScript 17"
    name = "capture and matching beside the optimizer"
    return [_row(name, case, inspecting, optimizing, "onnxruntime.transformers", 1 / SHARE_OF_OPTIMIZER, nodes)]


def _export_with_past(path: Path) -> None:
    module = WithPast(_llama("eager"), LAYERS).eval()
    past: list[Tensor] = [torch.randn(2, KV_HEADS, 5, WIDTH // HEADS) for _ in range(2 * LAYERS)]
    ids = torch.randint(5, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    slots = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{s}" for s in slots)]
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 2: "past"} for name in names[2:]}
    axes |= {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    torch.onnx.export(
        module,
        (ids, torch.ones(2, 12, dtype=torch.int64), *past),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=names,
        output_names=["logits", *(f"present.{s}" for s in slots)],
        dynamic_axes=axes,
    )


def _row(name: str, case: str, ours: Any, peer: Any, peer_name: str, goal: float | None, more: dict[str, Any]) -> Row:
    ratio = peer.minimum / ours.minimum
    medians = {"ours_median": ours.median, "peer_median": peer.median, "runs": [len(ours.seconds), len(peer.seconds)]}
    ok = None if goal is None else ratio > goal
    return Row(name, case, ours.minimum, peer.minimum, peer_name, "s", ratio, goal, ok, {**medians, **more})
