"""Models whose attentions became mixes, and what their mixers are called with and answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import rewriter
from rewriter.install.token_mixer import TokenMixer, absorbed, token_mixers
from tests.targets.lossless_twin import distance
from tests.zoo.case import ZooCase

Array = NDArray[Any]


def relative(a: Any, b: torch.Tensor) -> float:
    a = a.detach() if isinstance(a, torch.Tensor) else a
    return distance(a, b.detach()) / max(float(b.abs().max()), 1e-30)


def rewritten(case: ZooCase, target: Any, **options: Any) -> Any:
    return rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 7, 0), **options)


class Watched:
    """What every mixer of a model was called with and answered, [B, S, E], and what came behind it."""

    def __init__(self, model: nn.Module) -> None:
        self.mixes: dict[str, tuple[Array, Array]] = {}
        self.passed: dict[str, Array] = {}
        for path, mixer in token_mixers(model).items():
            mixer.register_forward_hook(lambda *a, at=path, **k: self._mixed(at, *a, **k), with_kwargs=True)
        for path in absorbed(model):
            hook = self._absorbed(path)
            model.get_submodule(path).register_forward_hook(hook)

    def _mixed(self, path: str, mixer: TokenMixer, args: Any, kwargs: Any, output: Any) -> None:
        hidden = mixer.protocol.read(args, kwargs)["hidden"]
        hidden = hidden if mixer.input_norm is None else mixer.input_norm(hidden)
        answer = output if isinstance(output, torch.Tensor) else output[0]
        assert not (mixer.protocol.adds_input or mixer.output_norm)
        pair = [x if mixer.protocol.batch_first else x.transpose(0, 1) for x in (hidden, answer)]
        self.mixes[path] = (pair[0].detach().numpy(), pair[1].detach().numpy())

    def _absorbed(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.passed[path] = output.detach().numpy()

        return hook


def off(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
