"""Reads the variables of a CTranslate2 ``model.bin``, version 6, without running any of its code.

Layout (little-endian; python/ctranslate2/specs/model_spec.py of OpenNMT/CTranslate2): version u32, name of the
specification, its revision u32, count u32; each variable: name, rank u8, sizes u32, type u8, bytes u32, data; then a
count u32 of aliases, each two names. A string is its length u16, its bytes and a zero, which is counted.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from passes.dataflow import Array
from rewriter.errors import InvalidModelFile

VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def variables(path: Path) -> dict[str, Array]:
    """Every variable by its name, aliases too.

    Raises:
        InvalidModelFile: the file is of another version, or ends too early.
    """
    cursor = _Cursor(path.read_bytes(), path)
    if (version := cursor.number("I")) != VERSION:
        raise InvalidModelFile(f"{path}: CTranslate2 version {version}", hint=f"version {VERSION} is read")
    cursor.text(), cursor.number("I")
    found: dict[str, Array] = {}
    for _ in range(cursor.number("I")):
        name = cursor.text()
        shape = [cursor.number("I") for _ in range(cursor.number("B"))]
        dtype = DTYPES[cursor.number("B")]
        found[name] = np.frombuffer(cursor.take(cursor.number("I")), dtype).reshape(shape)
    for _ in range(cursor.number("I")):
        alias, name = cursor.text(), cursor.text()
        found[alias] = found[name]
    return found


class _Cursor:
    def __init__(self, data: bytes, path: Path) -> None:
        self._data, self._at, self._path = data, 0, path

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise InvalidModelFile(f"{self._path} ends too early", hint="install the package that carries it again")
        self._at += count
        return taken

    def number(self, kind: str) -> int:
        value: int = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]
        return value

    def text(self) -> str:
        return self.take(self.number("H"))[:-1].decode()
