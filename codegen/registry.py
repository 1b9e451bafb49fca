"""Which kernel computes a spec on a device: a plain list, asked in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from codegen.device import Device, DType, Isa, Language
from codegen.hooks import Lowered
from codegen.ops.fourier_mixing import cpp_kernel as fourier_cpp
from codegen.ops.fourier_mixing import cuda_kernel as fourier_cuda
from codegen.ops.fourier_mixing import triton_kernel as fourier_triton
from codegen.ops.grouped_query_attention import cpp_kernel as gqa_cpp
from codegen.ops.grouped_query_attention import cuda_kernel as gqa_cuda
from codegen.ops.grouped_query_attention import triton_kernel as gqa_triton
from codegen.ops.linear_attention import cpp_kernel as linear_cpp
from codegen.ops.linear_attention import triton_kernel as linear_triton
from codegen.ops.mixed_chunk_attention import cpp_kernel as chunk_cpp
from codegen.ops.mixed_chunk_attention import triton_kernel as chunk_triton
from codegen.ops.projection import cpp_kernel as projection_cpp
from codegen.ops.routed_feed_forward import cpp_kernel as routed_cpp
from codegen.ops.routed_feed_forward import triton_kernel as routed_triton
from codegen.projection import Projection
from codegen.routed import RoutedFeedForward
from codegen.spec import FourierMixing, GroupedQueryAttention, LinearAttention, MixedChunkAttention


@dataclass(frozen=True)
class Kernel:
    """One way to compute one kind of spec.

    Attributes:
        op: the spec's type; language: of its template.
        device_kind, archs: where it runs.
        dtypes: operands it takes.
        legal: why a spec is beyond it, or None.
        name, source: of a spec in a dtype for an arch.
        resources: what it takes of a thread, where that is known before it is built.
    """

    op: type
    language: Language
    device_kind: str
    archs: Sequence[str]
    dtypes: Sequence[DType]
    legal: Callable[[Any, DType], str | None]
    name: Callable[[Any, DType, Any], Lowered]
    source: Callable[[Any, DType, Any], str]
    resources: Callable[[Any, DType, Any], dict[str, int]] | None = None


@dataclass(frozen=True)
class Choice:
    """A kernel for one spec, dtype and device."""

    kernel: Kernel
    spec: Any
    dtype: DType
    device: Device

    @property
    def name(self) -> str:
        return str(self.kernel.name(self.spec, self.dtype, self._variant))

    def source(self) -> str:
        return self.kernel.source(self.spec, self.dtype, self._variant)

    def resources(self) -> dict[str, int]:
        """What a thread takes; empty where only the binary knows."""
        told = self.kernel.resources
        return {} if told is None else told(self.spec, self.dtype, self._variant)

    @property
    def _variant(self) -> Any:
        return Isa(self.device.arch) if self.device.kind == "cpu" else self.device.arch


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        op=GroupedQueryAttention,
        language=Language.CPP,
        device_kind="cpu",
        archs=tuple(isa.value for isa in Isa),
        dtypes=tuple(DType),
        legal=gqa_cpp.legal,
        name=gqa_cpp.kernel_name,
        source=gqa_cpp.source,
        resources=gqa_cpp.resources,
    ),
    *(
        Kernel(
            op=GroupedQueryAttention,
            language=Language.TRITON,
            device_kind=kind,
            archs=archs,
            dtypes=tuple(DType),
            legal=gqa_triton.legal,
            name=gqa_triton.kernel_name,
            source=gqa_triton.source,
        )
        for kind, archs in gqa_triton.ARCHS.items()
    ),
    Kernel(
        op=GroupedQueryAttention,
        language=Language.CUDA,
        device_kind="cuda",
        archs=gqa_cuda.ARCHS,
        dtypes=gqa_cuda.DTYPES,
        legal=gqa_cuda.legal,
        name=gqa_cuda.kernel_name,
        source=gqa_cuda.source,
    ),
    Kernel(
        op=MixedChunkAttention,
        language=Language.CPP,
        device_kind="cpu",
        archs=tuple(isa.value for isa in Isa),
        dtypes=tuple(DType),
        legal=chunk_cpp.legal,
        name=chunk_cpp.kernel_name,
        source=chunk_cpp.source,
        resources=chunk_cpp.resources,
    ),
    Kernel(
        op=LinearAttention,
        language=Language.CPP,
        device_kind="cpu",
        archs=tuple(isa.value for isa in Isa),
        dtypes=tuple(DType),
        legal=linear_cpp.legal,
        name=linear_cpp.kernel_name,
        source=linear_cpp.source,
        resources=linear_cpp.resources,
    ),
    Kernel(
        op=FourierMixing,
        language=Language.CPP,
        device_kind="cpu",
        archs=tuple(isa.value for isa in Isa),
        dtypes=tuple(DType),
        legal=fourier_cpp.legal,
        name=fourier_cpp.kernel_name,
        source=fourier_cpp.source,
        resources=fourier_cpp.resources,
    ),
    *(
        Kernel(
            op=FourierMixing,
            language=Language.TRITON,
            device_kind=kind,
            archs=archs,
            dtypes=fourier_triton.DTYPES,
            legal=fourier_triton.legal,
            name=fourier_triton.kernel_name,
            source=fourier_triton.source,
        )
        for kind, archs in fourier_triton.ARCHS.items()
    ),
    Kernel(
        op=FourierMixing,
        language=Language.CUDA,
        device_kind="cuda",
        archs=fourier_cuda.ARCHS,
        dtypes=fourier_cuda.DTYPES,
        legal=fourier_cuda.legal,
        name=fourier_cuda.kernel_name,
        source=fourier_cuda.source,
    ),
    *(
        Kernel(
            op=LinearAttention,
            language=Language.TRITON,
            device_kind=kind,
            archs=archs,
            dtypes=tuple(DType),
            legal=linear_triton.legal,
            name=linear_triton.kernel_name,
            source=linear_triton.source,
        )
        for kind, archs in linear_triton.ARCHS.items()
    ),
    *(
        Kernel(
            op=MixedChunkAttention,
            language=Language.TRITON,
            device_kind=kind,
            archs=archs,
            dtypes=tuple(DType),
            legal=chunk_triton.legal,
            name=chunk_triton.kernel_name,
            source=chunk_triton.source,
        )
        for kind, archs in chunk_triton.ARCHS.items()
    ),
    Kernel(
        op=Projection,
        language=Language.CPP,
        device_kind="cpu",
        archs=tuple(isa.value for isa in Isa),
        dtypes=projection_cpp.DTYPES,
        legal=projection_cpp.legal,
        name=projection_cpp.kernel_name,
        source=projection_cpp.source,
        resources=projection_cpp.resources,
    ),
    Kernel(
        op=RoutedFeedForward,
        language=Language.CPP,
        device_kind="cpu",
        archs=tuple(isa.value for isa in Isa),
        dtypes=tuple(DType),
        legal=routed_cpp.legal,
        name=routed_cpp.kernel_name,
        source=routed_cpp.source,
        resources=routed_cpp.resources,
    ),
    *(
        Kernel(
            op=RoutedFeedForward,
            language=Language.TRITON,
            device_kind=kind,
            archs=archs,
            dtypes=tuple(DType),
            legal=routed_triton.legal,
            name=routed_triton.kernel_name,
            source=routed_triton.source,
        )
        for kind, archs in routed_triton.ARCHS.items()
    ),
)


def select(spec: Any, device: Device, dtype: DType = DType.FLOAT32, language: Language | None = None) -> Choice | None:
    """The first kernel that is legal for the spec in this dtype on this device; None if there is none.

    Whether it is also the fastest way is another question: see `codegen.tuning.table`.
    """
    return next((Choice(k, spec, dtype, device) for k in KERNELS if _why_not(k, spec, device, dtype, language) is None),
                None)  # fmt: skip


def why_not(spec: Any, device: Device, dtype: DType, language: Language | None = None) -> str:
    """For a person: why `select` finds nothing."""
    reasons = (_why_not(k, spec, device, dtype, language) for k in KERNELS)
    return "; ".join(dict.fromkeys(r for r in reasons if r is not None)) or "there is no kernel"


def _why_not(kernel: Kernel, spec: Any, device: Device, dtype: DType, language: Language | None) -> str | None:
    if language is not None and kernel.language is not language:
        return f"there is no {language.value} kernel of {type(spec).__name__}"
    if not isinstance(spec, kernel.op):
        return f"there is no kernel of {type(spec).__name__}"
    if device.kind != kernel.device_kind:
        return f"there is no kernel for {device.kind}"
    if device.arch not in kernel.archs:
        return f"a {device.kind} of arch {device.arch!r} has none of {', '.join(kernel.archs)}"
    if dtype not in kernel.dtypes:
        return f"there is no kernel in {dtype.value}"
    return kernel.legal(spec, dtype)
