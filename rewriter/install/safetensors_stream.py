"""Rewrites .safetensors files tensor by tensor: one that changes is in memory, all others are copied by the kernel.

The format (huggingface.co/docs/safetensors): the length of a header as 8 bytes, the header as JSON, then all tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rewriter.copy_bytes import copy_range
from rewriter.errors import InvalidModelFile

Change = Callable[[Tensor], Tensor]
"""A new tensor of the same dtype for an old one."""

_WORD = 8


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        dtype: as the format calls it, e.g. "BF16". begin, end: bytes from the beginning of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


def stored(file: Path) -> dict[str, Stored]:
    """What a file holds, in the order in which it lies there; nothing but the header is read.

    Raises InvalidModelFile if the file is broken.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # checks sizes, places and overlaps
            pass
        with file.open("rb") as content:
            length = int.from_bytes(content.read(_WORD), "little")
            header = json.loads(content.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise InvalidModelFile(f"{file} cannot be read: {error}", hint="download or save it again") from error
    base = _WORD + length
    found = {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), *(base + x for x in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))


def read(tensor: Stored, name: str) -> Tensor:
    """The tensor, in memory."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as content:
        found: Tensor = content.get_tensor(name)
        return found.clone()  # not a view of the mapped file


def rewrite(
    source: Path,
    target: Path,
    changes: Mapping[str, tuple[tuple[int, ...], Change]],
    advance: Callable[[float], None] = lambda done: None,
) -> int:
    """Write `source` to `target` with some tensors changed, each given by its new shape and how it comes about.

    `advance` is told after each tensor how many bytes of `source` are done. Returns the bytes of all tensors written.
    Raises InvalidModelFile if `source` is broken.
    """
    before = stored(source)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in before.items():
        shape = changes[name][0] if name in changes else tensor.shape
        size = tensor.end - tensor.begin
        if name in changes:
            size = size // max(tensor.count, 1) * _product(shape)
        header[name] = {"dtype": tensor.dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _WORD)
    with source.open("rb") as old, target.open("wb") as new:
        new.write(len(text).to_bytes(_WORD, "little") + text)
        for name, tensor in before.items():
            if name not in changes:
                copy_range(old, tensor.begin, tensor.end - tensor.begin, new)
            else:
                made = changes[name][1](read(tensor, name))
                if tuple(made.shape) != tuple(changes[name][0]):
                    raise RuntimeError(f"{name} became {tuple(made.shape)} instead of {changes[name][0]}")
                new.write(_bytes(made))
            advance(tensor.end)
    return place


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    content: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
