"""Runs generated Triton kernels in Triton's interpreter, in a process of its own: the interpreter is chosen on import.

Reads one JSON object a line ({"op", "spec", "operands", "output"} and options), answers "done" or an error.

The stock interpreter multiplies bfloat16 as if its bits were integers; here products get single-precision operands,
which hold every bfloat16 exactly.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from codegen.launch import chunk_triton, fourier_op, linear_operator, linear_triton, routed_triton
from codegen.launch.triton_op import launch
from codegen.routed import RoutedFeedForward
from codegen.sight import from_json
from codegen.spec import (
    Activation,
    FeatureMap,
    FourierMixing,
    GroupedQueryAttention,
    LinearAttention,
    MixedChunkAttention,
    PositionBias,
)


def widen_bfloat16() -> None:
    """Make the interpreter's dot product right for bfloat16."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    stock = builder.create_dot

    def single(handle: Any) -> Any:
        if handle.get_element_ty().scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return stock(self, single(a), single(b), *rest)

    builder.create_dot = create_dot


def linear_spec(described: dict[str, Any]) -> LinearAttention:
    """Of what JSON keeps; the feature map by its value."""
    plain = GroupedQueryAttention(**{**described["attention"], "pattern": ()})
    return LinearAttention(plain, described["chunk"], FeatureMap(described["features"]))


def chunk_spec(described: dict[str, Any]) -> MixedChunkAttention:
    """Of what JSON keeps; enums by their values."""
    kinds = {n: described[n] if described[n] is None else Activation(described[n]) for n in ("gate", "value", "latent")}
    return MixedChunkAttention(**{**described, **kinds, "bias": PositionBias(described["bias"])})


def main() -> None:
    widen_bfloat16()
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            x = torch.load(task["operands"], weights_only=True)
            if task["op"] == "fourier":
                out = fourier_op.launch(FourierMixing(**task["spec"]), *x, arch=task["arch"])
            elif task["op"] == "chunks":
                spec = chunk_spec(task["spec"])
                out = chunk_triton.launch(spec, *x[:2], x[2:6], *x[6:], arch=task["arch"])
            elif task["op"] == "routed":
                described = {**task["spec"], "activation": Activation(task["spec"]["activation"])}
                block = RoutedFeedForward(**described)
                held = dict(zip(block.shapes, x[4:], strict=True))
                out = routed_triton.launch(block, *x[:3], held, x[3], arch=task["arch"])
            elif task["op"] == "linear":
                named = {n: t for n, t in zip(linear_operator.PARAMETERS, x[4:], strict=True) if t is not None}
                out = linear_triton.launch(linear_spec(task["spec"]), *x[:3], named, x[3], arch=task["arch"])
            else:
                plain = GroupedQueryAttention(**{**task["spec"], "pattern": from_json(task["spec"]["pattern"])})
                out = launch(plain, *x, arch=task["arch"], processors=task["processors"])
            torch.save(out, task["output"])
            print("done", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
