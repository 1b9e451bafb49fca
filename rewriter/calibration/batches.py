"""Calibration batches out of token ids, texts, a DataLoader, or batches of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from passes.dataflow import Array
from rewriter.errors import UsageError, first_line

WINDOW = 512
"""Tokens of a sequence that is cut out of a long text."""
ROWS = 16
"""Padded texts in one batch."""
LONGEST = 128
"""Tokens at which a padded text is cut off."""

SAMPLED = "sampled"
"""What to give as calibration so that the model writes it."""

HINT = "give token ids, (texts, tokenizer), a DataLoader, or a list of batches (dicts, tuples or tensors)"


@dataclass(frozen=True)
class Batch:
    """One call's inputs: by position, by name, or both. Values are torch tensors or numpy arrays."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = ()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", tuple(map(_on_the_processor, self.args)))
        object.__setattr__(self, "kwargs", {k: _on_the_processor(v) for k, v in dict(self.kwargs).items()})


def not_taken(error: Exception) -> UsageError:
    """What to say of a batch on which the model fails, e.g. for ids beyond its vocabulary."""
    return UsageError(
        f"the model does not take a calibration batch: {first_line(error)}",
        hint="tokenise with the tokenizer of this model",
    )


def _on_the_processor(value: Any) -> Any:
    """Tensors of a graphics card come along, since models are rewritten on the processor."""
    return value.cpu() if hasattr(value, "cpu") else value


def batches(calibration: Any, *, causal: bool, tokenizer: Any = None) -> list[Batch]:
    """Normalise what a person gives as calibration.

    Args:
        calibration: integer ids ([N] is cut into windows of 512 tokens, [B, T] taken row by row), a pair of texts and
            tokenizer (or texts alone where `tokenizer` is known), one mapping of inputs, or an iterable of batches.
        causal: texts are joined and cut into windows; else each is padded in a batch of its own.

    Raises UsageError for anything else, and for nothing.
    """
    found = _batches(calibration, causal, tokenizer)
    if not found:
        raise UsageError("calibration holds no tokens", hint=HINT)
    return found


def is_sampled(calibration: Any) -> bool:
    """Whether the model is to write its own calibration text."""
    return isinstance(calibration, str) and calibration == SAMPLED


def _batches(calibration: Any, causal: bool, tokenizer: Any) -> list[Batch]:
    if is_sampled(calibration):
        raise UsageError("graphs and .onnx files do not write calibration text by themselves", hint=HINT)
    if isinstance(calibration, tuple) and len(calibration) == 2 and callable(calibration[1]):
        calibration, tokenizer = calibration
    if isinstance(calibration, str):
        calibration = [calibration]
    if isinstance(calibration, Sequence) and calibration and all(isinstance(t, str) for t in calibration):
        return _texts(calibration, tokenizer, causal)
    if isinstance(calibration, Mapping):
        return [Batch((), calibration)]
    if _is_array(calibration):
        return _ids(calibration)
    if isinstance(calibration, Sequence) and calibration and all(isinstance(n, int) for n in calibration):
        return _ids(np.asarray(calibration, dtype=np.int64))
    if isinstance(calibration, Iterable):
        return [_batch(b) for b in calibration]
    raise UsageError(f"calibration is a {type(calibration).__name__}", hint=HINT)


def _batch(given: Any) -> Batch:
    if isinstance(given, Mapping):
        return Batch((), {k: v for k, v in given.items() if k != "labels"})
    if _is_array(given):
        return _one(given) if _is_integer(given) else Batch((given,))
    if isinstance(given, (tuple, list)) and given and all(_is_array(t) for t in given):
        return Batch(tuple(given))
    raise UsageError(f"a calibration batch is a {type(given).__name__}", hint=HINT)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_integer(value: Any) -> bool:
    return "int" in str(value.dtype)


def _one(ids: Any) -> Batch:
    return Batch((), {"input_ids": ids if len(ids.shape) == 2 else ids[None]})


def _ids(ids: Any) -> list[Batch]:
    if not _is_integer(ids) or len(ids.shape) not in (1, 2):
        raise UsageError(f"calibration ids have dtype {ids.dtype} and shape {tuple(ids.shape)}", hint=HINT)
    if len(ids.shape) == 2:
        return [_one(ids[i : i + 1]) for i in range(ids.shape[0])]
    length = min(WINDOW, int(ids.shape[0]))
    return [_one(ids[i : i + length]) for i in range(0, int(ids.shape[0]) - length + 1, length)] if length > 1 else []


def _texts(texts: Sequence[str], tokenizer: Any, causal: bool) -> list[Batch]:
    if tokenizer is None:
        raise UsageError("calibration texts need a tokenizer", hint="pass calibration=(texts, tokenizer), or token ids")
    if causal:
        joined: Any = tokenizer("\n".join(texts), return_tensors="np", verbose=False)
        return _ids(np.asarray(joined["input_ids"], dtype=np.int64).reshape(-1))
    options = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]]
    rows: list[Batch] = []
    for start in range(0, len(texts) - len(texts) % ROWS or len(texts), ROWS):
        part: Any = tokenizer(list(texts[start : start + ROWS]), max_length=max(lengths), **options)
        rows.append(Batch((), {k: np.asarray(v, dtype=np.int64) for k, v in part.items()}))
    return rows


def as_numpy(value: Any) -> Array:
    """A tensor or array as numpy."""
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
