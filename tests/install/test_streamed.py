"""Checkpoints that are rewritten tensor by tensor: the same files as if they had been loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rewriter
from rewriter import model_kinds, progress
from rewriter.errors import InvalidModelFile, UnsupportedModel, UsageError
from rewriter.install import safetensors_stream
from rewriter.streamed_rewrite import StreamedCheckpoint

SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-bias": ("Qwen2ForCausalLM", {}),
    "qwen3-norms": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "olmo2-norms": ("Olmo2ForCausalLM", {}),
}


def checkpoint(folder: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    import transformers

    model_class = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SIZES, **MODELS[name][1])).to(dtype)
    for name_, parameter in model.named_parameters():
        if "norm" not in name_:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_as_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", name, max_shard_size="60kB")
    assert len(list(source.glob("*.safetensors"))) > 2
    streamed = rewriter.optimize(source, "gqa2", streamed=True)
    loaded = rewriter.optimize(source, "gqa2", streamed=False)
    assert isinstance(streamed.model, StreamedCheckpoint)
    streamed.save(tmp_path / "streamed")
    loaded.save(tmp_path / "loaded")
    assert same(tensors(tmp_path / "streamed"), tensors(tmp_path / "loaded"))
    configs = [json.loads((tmp_path / w / "config.json").read_text()) for w in ("streamed", "loaded")]
    assert configs[0] == configs[1] and configs[0]["num_key_value_heads"] == 2
    assert (tmp_path / "streamed" / "tokenizer_config.json").exists()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        one, other = (rewriter.load(tmp_path / w)(ids).logits for w in ("streamed", "loaded"))
    assert torch.equal(one, other)
    ours, theirs = streamed.rewrite_report, loaded.rewrite_report
    assert ours.parameters == theirs.parameters and ours.kv_bytes_per_token == theirs.kv_bytes_per_token
    rows = [[(r.name, r.before, r.after, r.exact) for r in report.sites] for report in (ours, theirs)]
    assert rows[0] == rows[1] and ours.fidelity is None and ours.flops is None and "streamed" in str(ours)


class Watcher:
    """Keeps what work says about itself."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, float | None, str]] = []
        self.done: list[float] = []

    def begin(self, what: str, total: float | None, unit: str) -> progress.Advance:
        self.begun.append((what, total, unit))
        return self.done.append

    def end(self) -> None:
        pass


def test_writing_says_how_far_it_has_come(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "llama", max_shard_size="60kB")
    done = rewriter.optimize(source, "gqa2", streamed=True)
    watcher = Watcher()
    token = progress._watcher.set(watcher)
    try:
        done.save(tmp_path / "out")
    finally:
        progress._watcher.reset(token)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert watcher.begun == [("writing", size, "B")]
    assert watcher.done == sorted(watcher.done) and watcher.done[-1] == size
    assert len(watcher.done) == len(tensors(source)), "it is told tensor by tensor"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_rounded_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "llama", dtype)
    for way in (True, False):
        rewriter.optimize(source, "mqa", streamed=way, verify=False).save(tmp_path / str(way))
    assert same(tensors(tmp_path / "True"), tensors(tmp_path / "False"))
    changed = tensors(tmp_path / "True")
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1
    assert not same(changed, tensors(tmp_path / "False")), "the control"


def test_equal_heads_are_exact(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "llama")
    weights = tensors(source)
    for name in weights:
        if "layers.1" in name and ("k_proj" in name or "v_proj" in name):
            weights[name] = weights[name][:16].repeat(4, 1)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    rows = rewriter.optimize(source, "mqa", streamed=True).rewrite_report.sites
    assert [row.exact for row in rows] == [False, True, False]


def test_what_is_larger_than_memory_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "in", "llama")
    assert not model_kinds.larger_than_memory(source)
    monkeypatch.setattr(sys.modules[rewriter.optimize.__module__], "larger_than_memory", lambda folder: True)
    assert isinstance(rewriter.optimize(source, "mqa").model, StreamedCheckpoint)


def test_in_place_and_over_an_older_output(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "llama", max_shard_size="60kB")
    (source / "notes.txt").write_text("kept")
    done = rewriter.optimize(source, "gqa2", streamed=True)
    done.save(tmp_path / "out")
    done.save(source)
    assert same(tensors(source), tensors(tmp_path / "out")) and (source / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"target": "fnet"}, UnsupportedModel),
        ({"target": "gqa2", "layers": "0-1"}, UnsupportedModel),
        ({"target": "gqa3"}, UsageError),
        ({"target": "gqa2", "calibration": torch.zeros(2, 8, dtype=torch.int64)}, UsageError),
    ],
    ids=["another target", "some layers", "illegal heads", "calibration"],
)
def test_what_streaming_cannot_do_is_refused(options: Any, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind) as refused:
        rewriter.optimize(checkpoint(tmp_path / "in", "llama"), streamed=True, **options)
    assert getattr(refused.value, "hint", "")


def test_architectures_without_the_number_in_their_config_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedModel) as refused:
        rewriter.optimize(tmp_path / "in", "mqa", streamed=True)
    assert "--not-streamed" in refused.value.hint


@pytest.mark.parametrize("inner", [False, True], ids=["own", "of_a_part"])
def test_quantised_checkpoints_are_refused(inner: bool, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "llama")
    config = json.loads((source / "config.json").read_text())
    quantised: Any = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (source / "config.json").write_text(json.dumps(config | ({"text_config": quantised} if inner else quantised)))
    for streamed in (True,) if inner else (True, False):
        with pytest.raises(UnsupportedModel, match="quantised by gptq") as refused:
            rewriter.optimize(source, "gqa2", streamed=streamed)
        assert "float or bfloat16 checkpoint" in refused.value.hint
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert rewriter.optimize(source, "gqa2", streamed=True).rewrite_report.sites, "the control"


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "llama", max_shard_size="60kB")
    index = source / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("model-00001", "../model-00001"))
    with pytest.raises(InvalidModelFile, match="outside"):
        rewriter.optimize(source, "mqa", streamed=True)
    index.write_text("{")
    with pytest.raises(InvalidModelFile):
        rewriter.optimize(source, "mqa", streamed=True)
    index.write_text(good)
    first = sorted(source.glob("*.safetensors"))[0]
    content = first.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"\xff" * 64, content[:100]):
        first.write_bytes(damage)
        with pytest.raises(InvalidModelFile):
            rewriter.optimize(source, "mqa", streamed=True)
    first.unlink()
    with pytest.raises(InvalidModelFile):
        rewriter.optimize(source, "mqa", streamed=True)


def test_a_file_is_rewritten_in_pieces(tmp_path: Path) -> None:
    held = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64), "c": torch.zeros(0, 2)}
    save_file(held, tmp_path / "in.safetensors")
    half = {"a": ((1, 3), lambda t: t[:1] * 2)}
    total = safetensors_stream.rewrite(tmp_path / "in.safetensors", tmp_path / "out.safetensors", half)
    found = load_file(tmp_path / "out.safetensors")
    assert same(found, {**held, "a": held["a"][:1] * 2}) and total == 12 + 32
    with pytest.raises(RuntimeError, match="instead of"):
        safetensors_stream.rewrite(
            tmp_path / "in.safetensors", tmp_path / "x.safetensors", {"a": ((1, 3), lambda t: t)}
        )
