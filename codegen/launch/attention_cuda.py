"""Runs the CUDA C++ kernel of grouped-query attention: keys in splits, then the sum over splits.

Shape legend: B batch, H query heads, KV key/value heads, S queries, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

import contextlib
import functools
import math
from ctypes import c_int, c_longlong, c_void_p

import torch
from torch import Tensor

from codegen.device import DType
from codegen.errors import NotLegal
from codegen.launch.cuda_binary import Load, on_card
from codegen.launch.cuda_driver import Argument, Kernel
from codegen.launch.operands import DTYPES, aligned, empty_output, require_fitting, require_near, wide_bias, wide_sinks
from codegen.ops.grouped_query_attention import cuda_kernel
from codegen.ops.grouped_query_attention.cuda_kernel import ROWS, Cut
from codegen.spec import GroupedQueryAttention


def launch(
    spec: GroupedQueryAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    arch: str,
    processors: int,
    cut: Cut | None = None,
    load: Load = on_card,
) -> Tensor:
    """Attention output [B, H, S, E] of q [B, H, S, D], k [B, KV, T, D] and v [B, KV, T, E].

    Any number of queries is right; made for few, since each 16 rows (queries times group) read all keys once more.

    Args:
        bias: broadcastable to [B, H, S, T]; a boolean one keeps a score where it is True.
        sinks: broadcastable to [B, H, S, n].
        arch: of the card, e.g. "sm_90".
        processors: multiprocessors of the card; keys are split until they have work.
        cut: how to cut the work instead of the default, for measurements.
        load: what makes kernels out of a source.

    Raises:
        NotLegal: the spec or the dtype is beyond the kernel, or a tensor is too large for its offsets.
        NoCompiler, CompilationFailed: it cannot be built.
        ValueError: shapes that contradict the spec.
    """
    dtype = DTYPES.get(q.dtype)
    reason = f"there is no kernel in {q.dtype}" if dtype is None else cuda_kernel.legal(spec, dtype)
    if dtype is None or reason is not None:
        raise NotLegal(str(reason), hint='use kernels="auto", "triton" or "off"')
    require_fitting(spec, q, k, v)
    q, k, v = (x if aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    b, _, s, _ = q.shape
    t = k.shape[2]
    wide = None if bias is None else wide_bias(bias, q, t)
    columns = None if sinks is None else wide_sinks(sinks, q)
    require_near(q, k, v, *(x for x in (wide, columns) if x is not None))
    out = empty_output(q, v)
    if not out.numel() or not t:
        return out.zero_()  # without keys, an empty sum
    cut = cut or cuda_kernel.cut_for(spec, arch)
    tiles, rows = math.ceil(s * spec.group / ROWS), s * spec.group
    splits, share = _splits(spec, cut, b * tiles, t, processors)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernels = _kernels(spec, dtype, arch, cut, load, q.device)
        lines = b * tiles * spec.kv_heads * splits * ROWS
        sums = torch.empty(lines * (spec.value_dim + 2), dtype=torch.float32, device=q.device)
        made = c_void_p(sums.data_ptr()), c_void_p(sums.data_ptr() + 4 * lines * spec.value_dim)
        shared = cuda_kernel.shared_memory(spec, cut)
        kernels["_split"]((splits, spec.kv_heads, b * tiles), 32 * cut.warps, shared,
                          (*_operands(q, k, v), *_bias(wide), *made, c_int(s), c_int(t), c_int(share)))  # fmt: skip
        target = (c_void_p(out.data_ptr()), *_strides(out))
        early = arch not in ("sm_80", "sm_86", "sm_89")
        kernels["_join"]((rows, spec.kv_heads, b), spec.value_dim, 0,
                         (*made, *_sinks(columns), *target, c_int(s), c_int(splits)), early=early)  # fmt: skip
    return out


def _splits(spec: GroupedQueryAttention, cut: Cut, tiles: int, t: int, processors: int) -> tuple[int, int]:
    """(how many parts the keys fall into, keys of a part)."""
    step = cut.warps * cuda_kernel.KEYS
    wanted = math.ceil(cut.waves * processors / (tiles * spec.kv_heads))
    share = math.ceil(t / wanted / step) * step
    return math.ceil(t / share), share


def _operands(*tensors: Tensor) -> tuple[Argument, ...]:
    return (*(c_void_p(x.data_ptr()) for x in tensors), *(stride for x in tensors for stride in _strides(x)))


def _strides(x: Tensor) -> tuple[Argument, ...]:
    batch, *others = x.stride()[:3]
    return c_longlong(batch), *(c_int(stride) for stride in others)


def _bias(wide: Tensor | None) -> tuple[Argument, ...]:
    if wide is None:
        return ()
    boolean = c_int(wide.dtype == torch.bool)
    return c_void_p(wide.data_ptr()), *_strides(wide), c_int(wide.stride(3)), boolean


def _sinks(wide: Tensor | None) -> tuple[Argument, ...]:
    if wide is None:
        return ()
    return c_void_p(wide.data_ptr()), c_int(wide.shape[3]), *_strides(wide), c_int(wide.stride(3))


@functools.lru_cache(maxsize=256)
def _kernels(
    spec: GroupedQueryAttention, dtype: DType, arch: str, cut: Cut, load: Load, device: torch.device
) -> dict[str, Kernel]:
    """Loaded for one device; another one's context has kernels of its own."""
    name, text = str(cuda_kernel.kernel_name(spec, dtype, arch)), cuda_kernel.source(spec, dtype, arch, cut=cut)
    return load(name, text, arch, {"_split": cuda_kernel.shared_memory(spec, cut), "_join": 0})
