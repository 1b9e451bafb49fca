"""Feed-forward blocks that route tokens, in torch: behind the router by a generated kernel where one was measured to be
faster or is asked for, else by torch.

Shape legend: B batch, S tokens, H features, N = B S, E experts, M places of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from codegen.conditional import ConditionalFeedForward
from codegen.device import Device, Language, host
from codegen.errors import KernelError
from codegen.launch.operands import DTYPES
from codegen.launch.routed_operator import routed_feed_forward
from codegen.launch.torch_op import graphics_card
from codegen.ops.conditional_feed_forward import torch_body as conditional_body
from codegen.ops.mixture_of_experts import torch_body as mixture_body
from codegen.ops.mixture_of_experts.torch_body import Routed
from codegen.registry import select
from codegen.routed import RoutedFeedForward, of_heavy_branch, of_mixture
from codegen.spec import MixtureOfExperts
from codegen.tuning.routed import faster

LEAST_SLICE = 64
"""Features of a result that the C++ kernel gives to a thread at least. Its tables were measured on one thread."""


def mixture(spec: MixtureOfExperts, x: Tensor, parameters: Mapping[str, Tensor], *, kernels: str = "auto") -> Routed:
    """Of x [B, S, H] and parameters of `MixtureOfExperts.shapes`; the router is torch's in any case.

    With "auto" torch's operators stay where no kernel was measured to be faster, where a gradient is wanted, in
    captured graphs and under autocast. By name the kernel is one operator everywhere, with torch's gradients.

    Raises:
        NotLegal: kernels is "cpp", "triton" or "cuda", and there is no such kernel of this here.
        ValueError: operands that contradict the spec.
    """
    own = of_mixture(spec)
    held = {name: parameters[name] for name in own.shapes if name in parameters}

    def places() -> int:
        tokens = x.shape[0] * x.shape[1]
        groups = spec.groups(tokens)
        return groups * spec.capacity(tokens // groups)

    def by_kernel(language: Language) -> Routed:
        def blocks(flat: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
            return routed_feed_forward(own, flat, rows, weights, held, language=language)

        return mixture_body.routed_through(spec, x, blocks, **parameters)

    language = _language(own, x, parameters, kernels, places)
    return _computed(by_kernel, lambda: mixture_body.routed(spec, x, **parameters), language, kernels)


def conditional(
    spec: ConditionalFeedForward,
    x: Tensor,
    parameters: Mapping[str, Tensor],
    shown: Tensor | None = None,
    *,
    soft: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """[B, S, H] of x [B, S, H]; arguments as `conditional_body.conditional_feed_forward`, `kernels` as in `mixture`."""
    own = of_heavy_branch(spec)
    held = {name: parameters[f"heavy_{name}"][None] for name in own.shapes if f"heavy_{name}" in parameters}

    def by_kernel(language: Language) -> Tensor:
        def heavy(light: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
            flat = x.reshape(-1, spec.hidden)
            return routed_feed_forward(own, flat, rows, weights, held, light, language=language)

        return conditional_body.conditional_through(spec, x, heavy, shown, soft=soft, **parameters)

    def by_torch() -> Tensor:
        return conditional_body.conditional_feed_forward(spec, x, shown, soft=soft, **parameters)

    kept = functools.partial(spec.router.kept, soft=soft)
    language = _language(own, x, parameters, kernels, lambda: x.shape[0] * kept(x.shape[1]))
    return _computed(by_kernel, by_torch, language, kernels)


Found = TypeVar("Found")


def _computed(
    by_kernel: Callable[[Language], Found], by_torch: Callable[[], Found], language: Language | None, kernels: str
) -> Found:
    if language is None:
        return by_torch()
    try:
        return by_kernel(language)
    except KernelError:
        if kernels != "auto":
            raise
        return by_torch()  # there is no compiler, or no room for what it makes


def _language(
    spec: RoutedFeedForward, x: Tensor, parameters: Mapping[str, Tensor], kernels: str, places: Callable[[], int]
) -> Language | None:
    """Of the kernel that is asked for, or, with "auto", was measured to be faster; None for torch."""
    if kernels not in ("auto", "off"):
        return Language(kernels)
    dtype = DTYPES.get(x.dtype)
    if kernels == "off" or dtype is None or x.dim() != 3 or not x.numel() or not _plain(x, parameters):
        return None
    device = _device(x)
    if device is not None and device.kind == "cpu" and spec.hidden < LEAST_SLICE * torch.get_num_threads():
        return None  # slices of the result's features would be fewer than threads
    choice = None if device is None else select(spec, device, dtype)
    if device is None or choice is None or not faster(spec, dtype, device.arch, places()):
        return None
    return choice.kernel.language


def _plain(x: Tensor, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a kernel would be run now, by itself, without a backward pass to come."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export():
        return False
    if torch.is_autocast_enabled(x.device.type) or any(t.dtype != x.dtype for t in parameters.values()):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters.values())))


def _device(x: Tensor) -> Device | None:
    if x.is_cuda:
        return graphics_card(x.device)[0]
    return host() if x.device.type == "cpu" else None
