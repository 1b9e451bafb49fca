"""Activation functions that have a name in the field, as functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from passes.dataflow import Array


def erf(x: Array) -> Array:
    """The error function in float64, within 2e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    t = 1.0 / (1.0 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(np.sign(x) * (1.0 - series * np.exp(-x * x)))


def sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(x, 0.0))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))))


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))


NONLINEARITIES: Mapping[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: np.asarray(0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))),
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": lambda x: np.asarray(x * sigmoid(1.702 * x)),
    "silu": lambda x: np.asarray(x * sigmoid(x)),
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
    "mish": lambda x: np.asarray(x * np.tanh(softplus(x))),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "softplus": softplus,
    "elu": _elu,
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0.0))),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "hard_swish": lambda x: np.asarray(x * np.clip(x + 3.0, 0.0, 6.0) / 6.0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "identity": lambda x: x,
}
"""By name. "gelu" is the exact one, "gelu_quick" x·sigmoid(1.702 x), "silu" x·sigmoid(x) (swish), "relu2" relu(x)²."""
