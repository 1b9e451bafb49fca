"""Activations in standard ONNX operators, valid at any opset from 12 on.

They are spelled as exporters spell them, so that runtimes fuse them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from codegen.ops.function_body import FunctionBody
from codegen.spec import Activation


def activate(body: FunctionBody, kind: Activation, x: ir.Value, name: str) -> ir.Value:
    """Element by element, in x's dtype: numbers are cast to it."""
    match kind:
        case Activation.RELU:
            return body.op("Relu", [x], name)
        case Activation.RELU_SQUARED:
            rectified = body.op("Relu", [x], f"{name}_relu")
            return body.op("Mul", [rectified, rectified], name)
        case Activation.GELU:
            inner = body.op(
                "Erf", [body.op("Div", [x, _number(body, math.sqrt(2), x)], f"{name}_scaled")], f"{name}_erf"
            )
            return _half_of_one_more(body, inner, x, name)
        case Activation.GELU_TANH:
            half = body.op("Mul", [x, _number(body, 0.5, x)], f"{name}_half")
            more = _one_more(body, body.op("Tanh", [_cubic(body, x, name)], f"{name}_tanh"), x, name)
            return body.op("Mul", [half, more], name)
        case Activation.QUICK_GELU:
            scaled = body.op("Mul", [x, _number(body, 1.702, x)], f"{name}_scaled")
            return body.op("Mul", [x, body.op("Sigmoid", [scaled], f"{name}_sigmoid")], name)
        case Activation.SILU:
            return body.op("Mul", [x, body.op("Sigmoid", [x], f"{name}_sigmoid")], name)
        case Activation.TANH:
            return body.op("Tanh", [x], name)


def _cubic(body: FunctionBody, x: ir.Value, name: str) -> ir.Value:
    """sqrt(2 / pi) (x + 0.044715 x³)"""
    cube = body.op("Pow", [x, _number(body, 3.0, x)], f"{name}_cube")
    small = body.op("Mul", [_number(body, 0.044715, x), cube], f"{name}_small")
    total = body.op("Add", [x, small], f"{name}_sum")
    return body.op("Mul", [_number(body, math.sqrt(2 / math.pi), x), total], f"{name}_inner")


def _half_of_one_more(body: FunctionBody, inner: ir.Value, x: ir.Value, name: str) -> ir.Value:
    """x (1 + inner) / 2"""
    twice = body.op("Mul", [x, _one_more(body, inner, x, name)], f"{name}_twice")
    return body.op("Mul", [twice, _number(body, 0.5, x)], name)


def _one_more(body: FunctionBody, inner: ir.Value, x: ir.Value, name: str) -> ir.Value:
    return body.op("Add", [inner, _number(body, 1.0, x)], f"{name}_more")


def _number(body: FunctionBody, number: float, like: ir.Value) -> ir.Value:
    """A scalar in the function's `dtype`."""
    tensor = ir.tensor(np.array(number, np.float32))
    constant = body.op("Constant", [], "number", [ir.AttrTensor("value", tensor)])
    return body.cast(constant, "dtype", "number")
