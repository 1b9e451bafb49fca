"""Float64 oracle of the mixture of experts: the definition of right for every other implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.ops.activation.reference import activate
from codegen.spec import MixtureOfExperts, Routing

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """Attributes:
    output: [B, S, hidden].
    gates: [B, S, experts]: the probability where a token was routed to an expert, 0 elsewhere.
    balance: the load-balancing loss, ``experts · sum over experts of (part of the tokens whose choice it is) · (mean
        probability)``, mean over groups (arXiv 2101.03961); 0 where experts choose.
    z: the mean over tokens of ``logsumexp(logits)²`` (arXiv 2202.08906).
    """

    output: Float64
    gates: Float64
    balance: float
    z: float


def mixture_of_experts(spec: MixtureOfExperts, x: NDArray[Any], **parameters: NDArray[Any]) -> Mixture:
    """Of x [B, S, hidden] and parameters of `MixtureOfExperts.shapes`.

    Raises:
        ValueError: if x or a parameter contradicts the spec, or a parameter is given or missing against it.
    """
    require_fitting(spec, x.shape, {name: array.shape for name, array in parameters.items()})
    held = {name: array.astype(np.float64) for name, array in parameters.items()}
    tokens = x.astype(np.float64).reshape(-1, spec.hidden)
    logits = tokens @ held["router_weight"] + held.get("router_bias", 0)
    highest = logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits - highest)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    groups = np.split(probabilities, spec.groups(len(tokens)))
    gates = routed_gates(spec, probabilities)
    output = np.zeros_like(tokens)
    for expert in range(spec.experts):
        output += gates[:, expert, None] * _expert(spec, expert, tokens, held)
    output += held.get("bias", 0)
    z = np.log(exponentials.sum(axis=1)) + highest[:, 0]
    balance = 0.0
    if spec.routing is Routing.TOKENS_CHOOSE:
        balance = float(np.mean([_balance(spec, group) for group in groups]))
    shape = x.shape[:2]
    return Mixture(output.reshape(x.shape), gates.reshape(*shape, -1), balance, float(np.mean(z**2)))


def routed_gates(spec: MixtureOfExperts, probabilities: Float64) -> Float64:
    """[N, experts]: each token's probabilities [N, experts] where it was routed, 0 elsewhere."""
    groups = np.split(probabilities, spec.groups(len(probabilities)))
    return np.asarray(probabilities * np.concatenate([_routed(spec, group) for group in groups]))


def require_fitting(spec: MixtureOfExperts, x: tuple[int, ...], parameters: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where shapes contradict the spec."""
    if len(x) != 3 or x[-1] != spec.hidden:
        raise ValueError(f"x has shape {x}, which contradicts {spec}")
    if parameters != spec.shapes:
        wrong = {n for n in parameters.keys() | spec.shapes.keys() if parameters.get(n) != spec.shapes.get(n)}
        told = ", ".join(f"{n}: {parameters.get(n)} instead of {spec.shapes.get(n)}" for n in sorted(wrong))
        raise ValueError(f"parameters contradict {spec}: {told}")


def _routed(spec: MixtureOfExperts, probabilities: Float64) -> Float64:
    """[T, experts] of 0 and 1, for one group."""
    tokens, experts = probabilities.shape
    capacity = spec.capacity(tokens)
    wanted = np.zeros((tokens, experts))
    if spec.routing is Routing.EXPERTS_CHOOSE:
        for expert in range(experts):
            wanted[np.argsort(-probabilities[:, expert], kind="stable")[:capacity], expert] = 1
        return wanted
    choices = _choices(spec, probabilities)
    served = np.argsort(-probabilities.max(axis=1), kind="stable")
    room = np.full(experts, capacity)
    for rank in range(spec.selected):
        for token in served:
            expert = choices[token, rank]
            if room[expert]:
                room[expert] -= 1
                wanted[token, expert] = 1
    return wanted


def _choices(spec: MixtureOfExperts, probabilities: Float64) -> NDArray[np.intp]:
    """[T, selected]: experts in the order of each token's preference."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, : spec.selected]


def _balance(spec: MixtureOfExperts, probabilities: Float64) -> float:
    asked = np.zeros_like(probabilities)
    np.put_along_axis(asked, _choices(spec, probabilities), 1.0, axis=1)
    return spec.experts * float(asked.mean(axis=0) @ probabilities.mean(axis=0))


def _expert(spec: MixtureOfExperts, expert: int, tokens: Float64, held: dict[str, Float64]) -> Float64:
    def projected(name: str, x: Float64) -> Float64:
        bias = held.get(f"{name}_bias")
        product = x @ held[f"{name}_weight"][expert]
        return np.asarray(product if bias is None else product + bias[expert])

    up = projected("up", tokens)
    inner = activate(spec.activation, projected("gate", tokens)) * up if spec.gated else activate(spec.activation, up)
    return projected("down", inner)
