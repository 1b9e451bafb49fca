"""From rows to one call of a model: padding, masks, and which tokens count."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewriter.capture.example_inputs import takes_a_mapping
from rewriter.errors import UsageError
from rewriter.uptrain.rows import Row

PAD_TO = 8
"""Padded batches are as long as a multiple of this many tokens, so that few shapes occur."""


@dataclass(frozen=True)
class Batch:
    """Several examples.

    Attributes:
        inputs: tensors [B, ...] by name.
        valid: [B, T], True where a token is no padding; None if every token counts.
    """

    inputs: Mapping[str, Tensor]
    valid: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens that count; rows where there are no token ids."""
        if self.valid is not None:
            return int(self.valid.sum())
        ids = self.inputs.get("input_ids")
        return len(next(iter(self.inputs.values()))) if ids is None else ids.numel()

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    def to(self, device: torch.device) -> Batch:
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, None if self.valid is None else self.valid.to(device))


def collate(rows: Sequence[Row], pad: int = 0) -> Batch:
    """Stack rows. Token ids of unequal lengths are padded on the right with `pad`, and an attention_mask is added.

    Raises UsageError if rows have different inputs, or other inputs of unequal shapes.
    """
    names = set(rows[0])
    if any(set(row) != names for row in rows):
        raise UsageError("rows of the data have different inputs", hint="give each row the same names")
    lengths = {len(row["input_ids"]) for row in rows} if "input_ids" in names else {0}
    arrays = {name: [np.asarray(row[name]) for row in rows] for name in sorted(names)}
    if len(lengths) > 1:
        longest = -(-max(lengths) // PAD_TO) * PAD_TO
        if "attention_mask" not in arrays:
            arrays["attention_mask"] = [np.ones(len(ids), np.int64) for ids in arrays["input_ids"]]
        fill = {"input_ids": pad}
        arrays = {n: [_padded(a, longest, fill.get(n, 0)) for a in column] for n, column in arrays.items()}
    if any(len({a.shape for a in column}) > 1 for column in arrays.values()):
        raise UsageError("inputs of a batch differ in shape", hint="only token ids are padded; make the others equal")
    inputs = {name: torch.from_numpy(np.stack(column)) for name, column in arrays.items()}
    inputs = {name: t if t.is_floating_point() or t.dtype == torch.bool else t.long() for name, t in inputs.items()}
    mask = inputs.get("attention_mask")
    return Batch(inputs, mask.bool() if mask is not None and mask.dim() == 2 else None)


def _padded(array: np.ndarray[Any, Any], longest: int, fill: int) -> np.ndarray[Any, Any]:
    return np.pad(array, (0, longest - len(array)), constant_values=fill) if array.ndim == 1 else array


class Caller:
    """How a model is called with named inputs: by name, in one mapping, or by position where it has other names.

    Keeps caches off where the forward can be told so.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(module.forward).parameters
        self._in_one = takes_a_mapping(module)
        self._anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._names = set(parameters)
        self._options = {"use_cache": False} if "use_cache" in self._names else {}

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._in_one:
            ids = batch.inputs.get("input_ids")
            whole = {} if ids is None else {"attention_mask": torch.ones_like(ids)}  # read without asking
            return ({**whole, **batch.inputs},), dict(self._options)
        if self._anything or set(batch.inputs) <= self._names:
            return (), {**batch.inputs, **self._options}
        if len(batch.inputs) > 1 and "attention_mask" in batch.inputs:
            raise UsageError(
                "the model takes no attention_mask, and the data have rows of unequal lengths",
                hint="give token ids in one array, which are cut into windows",
            )
        return tuple(batch.inputs.values()), dict(self._options)


def check_vocabulary(batch: Batch, model: nn.Module, who: str) -> None:
    """Raises UsageError for token ids that `model` has no embedding of; models that do not say are not checked."""
    ids = batch.inputs.get("input_ids")
    embeddings: Any = None
    if ids is not None and callable(getattr(model, "get_input_embeddings", None)):
        try:
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            return
    count = getattr(embeddings, "num_embeddings", None)
    if ids is not None and isinstance(count, int) and ids.numel() and int(ids.max()) >= count:
        raise UsageError(
            f"the data hold token {int(ids.max())}, and the {who} has a vocabulary of {count}",
            hint="tokenise the data with the tokenizer of these models",
        )
