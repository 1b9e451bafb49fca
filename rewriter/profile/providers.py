"""Opens sessions on the provider that was asked for, or refuses: onnxruntime itself would quietly take the CPU."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rewriter.capture.memory_limit import too_much
from rewriter.errors import UnsupportedModel, UsageError, first_line
from rewriter.verify.session import session_options

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
GRAPH_OPTIONS = {"cuda": {"enable_cuda_graph": "1"}, "tensorrt": {"trt_cuda_graph_enable": "1"}}
"""What makes a provider capture a run as a CUDA graph, and replay it from then on."""


def provider_name(provider: str) -> str:
    """onnxruntime's name of a provider; raises UsageError for an unknown one."""
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}", hint=f"one of {', '.join(PROVIDERS)}")
    return PROVIDERS[provider]


def open_session(
    path: Path,
    provider: str,
    threads: int,
    *,
    profile_prefix: Path | None = None,
    library: Path | None = None,
    cuda_graph: bool = False,
) -> Any:
    """A session whose first provider is the one asked for, with the operators of `library` if there is one.

    `cuda_graph`: of a card's provider; runs are captured and replayed, so inputs and outputs must keep their places.

    Raises:
        UnsupportedModel: the model does not load, or onnxruntime fell back to another provider.
    """
    import onnxruntime as ort

    name = provider_name(provider)
    if name not in ort.get_available_providers():
        raise UnsupportedModel(f"this onnxruntime has no {provider} provider", hint=_install_hint())
    options = session_options(threads)
    options.use_deterministic_compute = False
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    if library is not None:
        options.register_custom_ops_library(str(library))
    try:
        with _quiet_start(provider):
            session = ort.InferenceSession(
                str(path), options, providers=_wanted(provider, cuda_graph), enable_fallback=0
            )
    except Exception as error:  # onnxruntime's errors share no public base class
        raise too_much(error) or UnsupportedModel(
            f"onnxruntime cannot open {path.name} on {provider}: {first_line(error)}",
            hint=_open_hint(provider, cuda_graph),
        ) from error
    refuse_fallback(session.get_providers(), provider)
    return session


def _wanted(provider: str, cuda_graph: bool) -> list[Any]:
    """Providers, first choice first: what TensorRT leaves over goes to CUDA before it goes to the processor."""
    import onnxruntime as ort

    name = PROVIDERS[provider]
    first = (name, GRAPH_OPTIONS[provider]) if cuda_graph else name
    if provider == "cpu":
        return [first]
    between = [PROVIDERS["cuda"]] if provider == "tensorrt" else []
    there = ort.get_available_providers()
    return [first, *(other for other in between if other in there), PROVIDERS["cpu"]]


def _open_hint(provider: str, cuda_graph: bool) -> str:
    if provider == "cpu":
        return "see what is wrong with the file: rewriter verify"
    if cuda_graph:
        return "a graph takes models that run on the card as a whole; try it without the CUDA graph"
    return _install_hint()


@contextlib.contextmanager
def _quiet_start(provider: str) -> Iterator[None]:
    """A provider that cannot start says so in the error that we raise; onnxruntime's own log would repeat it."""
    import onnxruntime as ort

    if provider == "cpu":
        yield
        return
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def refuse_fallback(active: list[str], provider: str) -> None:
    """Raise UnsupportedModel unless `provider` is the one that the session uses first."""
    if not active or active[0] != provider_name(provider):
        raise UnsupportedModel(
            f"onnxruntime could not start its {provider} provider and fell back to {', '.join(active) or 'nothing'}",
            hint=_install_hint(),
        )


def _install_hint() -> str:
    """Both wheels share one folder, and the CPU one wins without a word."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        return "onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install onnxruntime-gpu"
    if installed == ["onnxruntime"]:
        return "install onnxruntime-gpu instead of onnxruntime"
    return "check the driver and the CUDA and cuDNN libraries, or use --provider cpu"


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def device_name(provider: str) -> str:
    """The processor or graphics card that a provider computes on."""
    return _cpu_name() if provider == "cpu" else _gpu_name()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "cuda:0"
