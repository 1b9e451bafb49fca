"""Feed-forward blocks that route tokens, in torch: behind the router by a generated kernel where one was measured to be
faster or is asked for, else by torch.

Shape legend: B batch, S tokens, H features, N = B S, E experts, M places of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from codegen.conditional import ConditionalFeedForward
from codegen.device import Device, Language
from codegen.errors import NotLegal
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


def mixture(spec: MixtureOfExperts, x: Tensor, parameters: Mapping[str, Tensor], *, kernels: str = "auto") -> Routed:
    """Of x [B, S, H] and parameters of `MixtureOfExperts.shapes`; the router is torch's in any case.

    With "auto" torch's operators stay where no kernel was measured to be faster, where a gradient is wanted, in
    captured graphs and under autocast. With "triton" the kernel is one operator everywhere, with torch's gradients.

    Raises:
        NotLegal: kernels is "triton", and there is no kernel of this here; or "cpp" or "cuda", and there is none.
        ValueError: operands that contradict the spec.
    """
    own = of_mixture(spec)
    tokens = x.shape[0] * x.shape[1] if x.dim() == 3 else 0
    if not _by_kernel(own, x, parameters, kernels, lambda: _places(spec, tokens)):
        return mixture_body.routed(spec, x, **parameters)
    held = {name: parameters[name] for name in own.shapes if name in parameters}

    def blocks(flat: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return routed_feed_forward(own, flat, rows, weights, held)

    return mixture_body.routed_through(spec, x, blocks, **parameters)


def _places(spec: MixtureOfExperts, tokens: int) -> int:
    groups = spec.groups(tokens)
    return groups * spec.capacity(tokens // groups)


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

    def places() -> int:
        return x.shape[0] * spec.router.kept(x.shape[1], soft=soft)

    if not _by_kernel(own, x, parameters, kernels, places):
        return conditional_body.conditional_feed_forward(spec, x, shown, soft=soft, **parameters)
    held = {name: parameters[f"heavy_{name}"][None] for name in own.shapes if f"heavy_{name}" in parameters}

    def heavy(light: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return routed_feed_forward(own, x.reshape(-1, spec.hidden), rows, weights, held, light)

    return conditional_body.conditional_through(spec, x, heavy, shown, soft=soft, **parameters)


def _by_kernel(
    spec: RoutedFeedForward, x: Tensor, parameters: Mapping[str, Tensor], kernels: str, places: Callable[[], int]
) -> bool:
    if kernels == "triton":
        return True
    if kernels not in ("auto", "off"):
        raise NotLegal(
            f"there is no {kernels} kernel of routed feed-forward blocks", hint='use kernels="auto" or "off"'
        )
    return kernels == "auto" and _plain(x, parameters) and _worthwhile(spec, x, places)


def _plain(x: Tensor, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a kernel would be run now, by itself, without a backward pass to come."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export():
        return False
    tensors = (x, *parameters.values())
    if torch.is_autocast_enabled(x.device.type) or any(t.dtype != x.dtype for t in parameters.values()):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _worthwhile(spec: RoutedFeedForward, x: Tensor, places: Callable[[], int]) -> bool:
    device, dtype = _card(x), DTYPES.get(x.dtype)
    if device is None or dtype is None or not x.numel():
        return False
    return select(spec, device, dtype, Language.TRITON) is not None and faster(spec, dtype, device.arch, places())


def _card(x: Tensor) -> Device | None:
    """None on processors: most of the time goes into products there, and a library does those better."""
    return graphics_card(x.device)[0] if x.is_cuda else None
