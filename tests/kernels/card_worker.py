"""Runs operators for cards without a card, in a process of its own: a stand-in for the driver hands launches of the
library that onnxruntime loads to Triton's interpreter, which is chosen on import.

Reads one JSON object: {"driver", "library": files, "arch", "cases": [{"spec", "dtype", "model", "feeds"}]}. Prints one
JSON object: for each case the file of its output or an error, the kernels launched, and the allocations still live.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from codegen.device import Device, DType
from codegen.launch import ort_card, triton_source
from codegen.ops.grouped_query_attention import triton_kernel
from codegen.registry import Choice, select
from codegen.spec import GroupedQueryAttention
from tests.kernels.triton_worker import widen_bfloat16

ITEM = {"*fp32": (4, torch.float32), "*fp16": (2, torch.float16), "*bf16": (2, torch.bfloat16)}


def choice(spec: GroupedQueryAttention, dtype: DType, arch: str) -> Choice:
    found = select(spec, Device("cuda", arch), dtype)
    assert found is not None
    return found


class Card:
    """What launches arrive at."""

    def __init__(self, driver: ctypes.CDLL, choices: Sequence[Choice]) -> None:
        self._driver = driver
        self._kernels: dict[str, tuple[Any, Any, dict[str, int]]] = {}
        for made in choices:
            signatures = triton_kernel.signatures(made.spec, made.dtype)
            for suffix, few in ort_card.PARTS:
                source = ort_card.source_of(made, few=few)
                module = triton_source.kept(source.name, source.text)
                options = {"num_warps": source.tiling.warps, "num_stages": source.tiling.stages}
                name = source.name + suffix
                self._kernels[name] = getattr(module, name), signatures[suffix], options
        self.launched: list[str] = []
        self.known: dict[int, int] = {}
        """Bytes at addresses of operands; memory between kernels is the driver's."""
        self.trouble = ""

    def __call__(self, name: bytes, grid: Any, threads: int, shared: int, arguments: Any) -> None:
        try:
            kernel, signature, options = self._kernels[name.decode()]
            self.launched.append(name.decode())
            assert threads == 32 * options["num_warps"]
            values = list(self._read(signature, arguments))
            kernel[tuple(grid[:3])](*values, **options)
        except Exception as error:  # it cannot go through the library
            self.trouble = f"{type(error).__name__}: {error}"

    def _read(self, signature: Any, arguments: Any) -> Any:
        place = 0
        for argument, kind in signature.types.items():
            if kind == "constexpr":
                yield signature.constants[argument]
                continue
            address = arguments[place]
            place += 1
            if kind == "i32":
                number = ctypes.c_int.from_address(address).value
                assert argument not in signature.aligned or number % 16 == 0, argument
                yield number
            else:
                yield self._tensor(int(ctypes.c_uint64.from_address(address).value), kind)

    def _tensor(self, address: int, kind: str) -> Tensor:
        assert address % 16 == 0
        item, dtype = ITEM[kind]
        size = self.known.get(address)
        if size is None:  # sums, or what lies behind them in one allocation
            self._base = address if self._base is None else self._base
            size = self._driver.room(ctypes.c_void_p(self._base)) - (address - self._base)
        held = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(held, dtype=dtype, count=size // item)

    _base: int | None = None

    def begin(self, feeds: Mapping[str, Any], output: Any) -> None:
        self.known = {a.ctypes.data: a.nbytes for a in (*feeds.values(), output)}
        self.launched, self.trouble, self._base = [], "", None


def run(case: dict[str, Any], card: Card, library: str) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(library)
    feeds = dict(np.load(case["feeds"]))
    q, v = feeds["q"], feeds["v"]
    output = np.full((*q.shape[:3], v.shape[3]), np.nan, q.dtype)
    card.begin(feeds, output)
    try:
        session = ort.InferenceSession(case["model"], options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("y", "cpu", 0, q.dtype.type, output.shape, output.ctypes.data)
        session.run_with_iobinding(binding)
    except Exception as error:
        return {"error": str(error), "launched": card.launched}
    file = case["feeds"] + ".out.npy"
    np.save(file, output)
    return {"output": file, "launched": card.launched, "trouble": card.trouble}


def main() -> None:
    widen_bfloat16()
    torch.set_num_threads(1)
    task = json.loads(sys.stdin.readline())
    driver = ctypes.CDLL(task["driver"], mode=ctypes.RTLD_GLOBAL)
    driver.room.restype = ctypes.c_size_t
    driver.be_of_arch(task["arch"])
    choices = []
    for case in task["cases"]:
        spec = GroupedQueryAttention(**{**case["spec"], "pattern": ()})
        choices.append(choice(spec, DType(case["dtype"]), task["built_for"]))
    card = Card(driver, choices)
    kind = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
        ctypes.POINTER(ctypes.c_void_p),
    )  # fmt: skip
    function = kind(card)
    driver.on_launch(function)
    found = [run(case, card, task["library"]) for case in task["cases"]]
    print(json.dumps({"cases": found, "live": driver.allocations()}))


if __name__ == "__main__":
    main()
