"""Norms that are written out in parts, recognised by their numbers."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array, Flow, Node, Value
from passes.forms import NormKind


def recognise_norm(flow: Flow, node: Node) -> tuple[NormKind, Value] | None:
    """(kind, normed value) if this Mul or Div is where a norm written out in parts leaves its input.

    Decided on recorded numbers: the result's rows must be the input's rows, centred or not, over their
    root mean square or length.
    """
    if node.op not in {"Mul", "Div"}:
        return None
    for position in (0, 1) if node.op == "Mul" else (0,):
        statistic = flow.value(node.inputs[1 - position])
        operand = node.inputs[position]
        array = np.asarray(flow.value(operand), dtype=np.float64)
        if statistic.ndim != array.ndim or array.shape[-1] == 1 or (statistic != statistic[..., :1]).any():
            continue
        result = np.asarray(flow.value(node.outputs[0]), dtype=np.float64)
        for kind in ("rms", "l2"):
            if _is_normed(result, array, kind):
                centred = _centred_from(flow, operand)
                if centred is not None and kind == "rms":
                    return "layer", centred
                return ("rms" if kind == "rms" else "l2"), operand
    return None


def _is_normed(result: Array, array: Array, kind: str) -> bool:
    energy = (array * array).mean(-1) if kind == "rms" else (array * array).sum(-1)
    after = (result * result).mean(-1) if kind == "rms" else (result * result).sum(-1)
    # x / sqrt(m + eps) has mean square m / (m + eps): one small eps must explain every row that is not zero
    shown = energy > 0
    if not shown.any() or (after[~shown] != 0).any() or (after[shown] == 0).any():
        return False
    epsilon = energy[shown] / after[shown] - energy[shown]
    return bool((np.abs(epsilon) <= 1e-3 * energy[shown] + 2e-5).all())


def _centred_from(flow: Flow, value: Value) -> Value | None:
    node = flow.producer(value)
    if node is None or node.op != "Sub" or not flow.data_dependent(node.inputs[1]):
        return None
    inner = np.asarray(flow.value(node.inputs[0]), dtype=np.float64)
    centred = np.asarray(flow.value(value), dtype=np.float64)
    scale = np.abs(inner).max() + 1e-12
    return node.inputs[0] if np.abs(inner - inner.mean(-1, keepdims=True) - centred).max() < 1e-5 * scale else None
