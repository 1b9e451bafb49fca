"""Grouped-query attention as one torch operator that runs a generated kernel where one is legal and worth it.

The operator is opaque to torch.compile and torch.export, and decides at run time; its gradient is that of the torch
body, recomputed. Importing this module defines it as ``rewriter::grouped_query_attention``.

Shape legend: B batch, H query heads, KV key/value heads, S queries, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from codegen.device import Device, Language, host
from codegen.errors import KernelError, NotLegal
from codegen.launch.host import HostKernel, Launch, load
from codegen.launch.operands import (
    DTYPES,
    dense,
    empty_output,
    require_fitting,
    run_on_processor,
    wide_bias,
    wide_sinks,
)
from codegen.launch.recomputed import Operands, gradients
from codegen.ops.grouped_query_attention import torch_body
from codegen.registry import Choice, select, why_not
from codegen.sight import as_numbers, from_numbers
from codegen.spec import GroupedQueryAttention
from codegen.tuning.table import Problem, faster

KERNELS = ("auto", "off", "cpp", "triton", "cuda")
"""What `attention` takes: by the tuning table, never, or always (an error where there is no kernel)."""


def attention(
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    kernels: str = "auto",
) -> Tensor:
    """Attention output [B, H, S, E]; arguments as `torch_body.grouped_query_attention`, which stands in for a kernel
    with "off", with dropout, under autocast, in an exported program unless a kernel was asked for by name, and, with
    "auto", wherever no kernel is legal or the tuning table knows of none that is faster.

    Raises:
        NotLegal: a language was asked for by name and has no kernel of this.
        ValueError: operands that contradict the spec.
    """
    if kernels == "off" or dropout or not _considers(q, k, v, bias, kernels):
        return torch_body.grouped_query_attention(spec, q, k, v, bias, sinks=sinks, dropout=dropout)
    if kernels == "auto" and not torch.compiler.is_compiling() and not _worth_it(spec, q, k):
        return torch_body.grouped_query_attention(spec, q, k, v, bias, sinks=sinks)
    numbers = (spec.kv_heads, spec.scale, spec.causal, spec.softcap, spec.masked_rows_are_zero)
    found: Tensor = _operator(q, k, v, bias, sinks, *numbers, as_numbers(spec.pattern), kernels)
    return found


def _considers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernels: str) -> bool:
    """Whether a kernel could compute this at all; an explicit request goes on to fail with a reason."""
    if kernels != "auto":
        return True
    if q.device.type not in ("cpu", "cuda") or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    if torch.compiler.is_exporting() or torch.is_autocast_enabled(q.device.type):
        return False  # an exported program must run where this library is not
    if q.device.type == "cuda" and torch.compiler.is_compiling():
        return False  # inductor fuses around torch's own operators, and what it makes was not measured
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    # training goes through the torch body in any case: a forward kernel would only add a second forward
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _worth_it(spec: GroupedQueryAttention, q: Tensor, k: Tensor) -> bool:
    choice = _choice(spec, host() if q.device.type == "cpu" else graphics_card(q.device)[0], q.dtype, None)
    if choice is None:
        return False
    problem = Problem(q.shape[0], q.shape[2], k.shape[2], torch.get_num_threads())
    return faster(spec, choice.dtype, choice.device.arch, problem)


def computed(spec: GroupedQueryAttention) -> GroupedQueryAttention:
    """What the torch body computes of this spec, and so the kernel in its place: rows without a visible key are zero
    unless the softmax is written out."""
    written_out = spec.softcap is not None or spec.sinks
    return replace(spec, masked_rows_are_zero=spec.masked_rows_are_zero or not written_out)


@functools.lru_cache(maxsize=512)
def _choice(
    spec: GroupedQueryAttention, device: Device, dtype: torch.dtype, language: Language | None
) -> Choice | None:
    return select(computed(spec), device, DTYPES[dtype], language) if dtype in DTYPES else None


# ---------------------------------------------------------------------- the operator


@torch.library.custom_op("rewriter::grouped_query_attention", mutates_args=(), device_types="cpu")
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    kv_heads: int,
    scale: float,
    causal: bool,
    softcap: float | None,
    masked_rows_are_zero: bool,
    pattern: list[int],
    kernels: str,
) -> Tensor:
    spec = _spec(q, v, bias, sinks, kv_heads, scale, causal, softcap, masked_rows_are_zero, pattern)

    def run(choice: Choice) -> Tensor:
        return launch(load(choice), spec, q, k, v, bias, sinks)

    return _computed(run, host(), spec, q, k, v, bias, sinks, kernels)


@_operator.register_kernel("cuda")
def _on_graphics_card(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    kv_heads: int,
    scale: float,
    causal: bool,
    softcap: float | None,
    masked_rows_are_zero: bool,
    pattern: list[int],
    kernels: str,
) -> Tensor:
    spec = _spec(q, v, bias, sinks, kv_heads, scale, causal, softcap, masked_rows_are_zero, pattern)
    device, processors = graphics_card(q.device)

    def run(choice: Choice) -> Tensor:
        from codegen.launch import attention_cuda, triton_op

        by = attention_cuda.launch if choice.kernel.language is Language.CUDA else triton_op.launch
        return by(choice.spec, q, k, v, bias, sinks, arch=device.arch, processors=processors)

    return _computed(run, device, spec, q, k, v, bias, sinks, kernels)


def _computed(
    run: Callable[[Choice], Tensor],
    device: Device,
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    kernels: str,
) -> Tensor:
    """By `run` where a kernel is worth it or asked for by name; else, and where "auto" cannot have one, by torch."""
    if kernels != "auto":
        return run(_required(spec, device, Language(kernels), q, k, v))
    if _worth_it(spec, q, k):
        choice = _required(spec, device, None, q, k, v)
        try:
            if choice not in _UNBUILDABLE:
                return run(choice)
        except KernelError as error:
            if not isinstance(error, NotLegal):
                _UNBUILDABLE.add(choice)
            _warn_once()
    return _laid_out(torch_body.grouped_query_attention(spec, q, k, v, bias, sinks=sinks))


def _required(
    spec: GroupedQueryAttention, device: Device, language: Language | None, q: Tensor, k: Tensor, v: Tensor
) -> Choice:
    """The kernel that must be there; raises NotLegal with the reason if it is not."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise NotLegal(f"there is no kernel for operands of {q.dtype}, {k.dtype} and {v.dtype}")
    choice = _choice(spec, device, q.dtype, language)
    if choice is None:
        raise NotLegal(why_not(spec, device, DTYPES[q.dtype], language), hint='use kernels="auto" or "off"')
    return choice


@functools.cache
def graphics_card(device: torch.device) -> tuple[Device, int]:
    """What a card is, as far as kernels care, and its number of multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("hip", str(found.gcnArchName).partition(":")[0]), int(found.multi_processor_count)
    return Device("cuda", f"sm_{found.major}{found.minor}"), int(found.multi_processor_count)


@_operator.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return empty_output(q, v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    def by_torch(operands: Operands) -> Tensor:
        q, k, v, bias, sinks = operands
        assert q is not None and k is not None and v is not None
        spec = _spec(q, v, bias, sinks, *ctx.rest[:6])
        return torch_body.grouped_query_attention(spec, q, k, v, bias, sinks=sinks)

    return gradients(ctx, gradient, by_torch)


_operator.register_autograd(_backward, setup_context=_setup)


def _spec(
    q: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    kv_heads: int,
    scale: float,
    causal: bool,
    softcap: float | None,
    masked_rows_are_zero: bool,
    pattern: list[int],
) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        heads=q.shape[1],
        kv_heads=kv_heads,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        scale=scale,
        causal=causal,
        bias=bias is not None,
        softcap=softcap,
        masked_rows_are_zero=masked_rows_are_zero,
        sinks=sinks is not None,
        pattern=from_numbers(pattern),
    )


def _laid_out(output: Tensor) -> Tensor:
    """A tensor of its own, laid out as `empty_output` says."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


_UNBUILDABLE: set[Choice] = set()
"""Kernels that "auto" has tried to build in this process in vain, perhaps for minutes, and does not try again."""


@functools.cache
def _warn_once() -> None:
    import warnings

    warnings.warn(
        "no kernel could be built, torch's own operators are used instead; "
        'kernels="cpp" shows the reason, kernels="off" silences this',
        stacklevel=4,
    )


# ---------------------------------------------------------------------- the call


def launch(
    kernel: HostKernel,
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Run a loaded kernel on CPU tensors of its dtype, with torch's own threads.

    Raises ValueError for shapes that contradict the spec.
    """
    require_fitting(spec, q, k, v)
    out = empty_output(q, v)
    block = Launch()
    held = [dense(x) for x in (q, k, v)]
    for name, tensor in zip(("q", "k", "v"), held, strict=True):
        setattr(block, name, tensor.data_ptr())
        getattr(block, f"{name}_stride")[:] = tensor.stride()[:3]
    block.out = out.data_ptr()
    block.out_stride[:] = out.stride()[:3]
    block.batch, block.queries, block.keys = q.shape[0], q.shape[2], k.shape[2]
    block.threads = torch.get_num_threads()
    if bias is not None:
        wide = wide_bias(bias, q, k.shape[2])
        block.bias, block.bias_is_boolean = wide.data_ptr(), int(wide.dtype == torch.bool)
        block.bias_stride[:] = wide.stride()
        held.append(wide)
    if sinks is not None:
        wide = wide_sinks(sinks, q)
        block.sinks, block.sink_columns = wide.data_ptr(), wide.shape[3]
        block.sink_stride[:] = wide.stride()
        held.append(wide)
    if out.numel() == 0:
        return out
    run_on_processor(kernel, block)
    return out
