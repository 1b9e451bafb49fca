"""`rewriter.profile`: time, memory and operators of a model before and after, whatever kind of model it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codegen.scratch import scratch_folder
from rewriter.errors import UsageError
from rewriter.given_path import existing
from rewriter.model_kinds import is_onnx, is_torch
from rewriter.optimize import Rewritten
from rewriter.profile.providers import provider_name
from rewriter.profile.result import Profile
from rewriter.profile.workload import Workload


def profile(
    before: Any,
    after: Any,
    *,
    provider: str = "cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    runs: int = 20,
    threads: int = 2,
    example_inputs: Any = None,
    kernels: str | Path | None = None,
    mode: str = "forward",
    prompt: int | None = None,
    new_tokens: int | None = None,
    batch: int | None = None,
    cuda_graph: bool = False,
) -> Profile:
    """Measure two models on the same inputs, in turn, so that the machine's other work falls on both.

    Args:
        before, after: .onnx files (paths, an onnx.ModelProto, an onnx_ir.Model), or PyTorch models (paths of Hugging
            Face directories, modules, exported programs), or what `optimize` made of a path; both of a kind.
        provider: "cpu", "cuda" or, for .onnx files, "tensorrt".
        shapes: sizes of inputs by name; the rest follows. By default one sequence of 128 tokens, or one token
            behind a past of 512 where the file takes a key/value cache (shorter where the model is).
        runs: timed runs of each, after a warm-up.
        threads: of the runtime; onnxruntime's do not spin (for PyTorch's set OMP_WAIT_POLICY=passive beforehand).
        example_inputs: what to call PyTorch modules with; Hugging Face models have defaults.
        kernels: for .onnx files a folder that `rewriter kernels` wrote, or "off", which is the default; for PyTorch
            modules "off" to leave generated kernels out, which otherwise are used as `optimize` was told.
        mode: "forward" calls the models on the inputs above. "prefill" runs `batch` prompts of `prompt` tokens into an
            empty key/value cache. "decode" then generates `new_tokens` tokens one by one, the cache staying on the
            device; times are of one of them, without the prefill. Models must take and return a cache: .onnx files
            with past and present, decoders of transformers.
        prompt, new_tokens, batch: 512, 32 and 1 by default.
        cuda_graph: on a graphics card, in mode "forward": the call is captured once as a CUDA graph, and replays of it
            are timed, without what launching each kernel costs. Operators and memory are measured without it.

    Times are of whole calls, from sessions that nothing instruments, on the wall and of all processors used. Operator
    times come from separate profiled runs. Peak memory of .onnx files is measured in a child process that does nothing
    else: its private memory on the CPU, the card's on a graphics card. Of PyTorch modules it is parameters and buffers
    plus the tensors that live at once during a call.

    Raises:
        UnsupportedModel: the provider is not there (onnxruntime falling back to the CPU is never accepted), or a
            model does not run.
        UsageError: unknown provider, no such file, shapes that do not fit, two kinds of model, or a CUDA graph where
            there can be none.
        InvalidModelFile: a file is broken.
    """
    provider_name(provider)
    if runs < 1 or threads < 1:
        raise UsageError("runs and threads must be at least 1", hint="e.g. --runs 20 --threads 2")
    workload = Workload.of(mode, batch, prompt, new_tokens, shaped=bool(shapes) or example_inputs is not None)
    if cuda_graph:
        _require_graph(provider, workload)
    before, after = (model.model if isinstance(model, Rewritten) else model for model in (before, after))
    kinds = [_kind(model) for model in (before, after)]
    if kinds[0] != kinds[1]:
        raise UsageError("the two models are of different kinds", hint="give two .onnx files or two PyTorch models")
    if kinds[0] == "onnx":
        from rewriter.kernels.folder import library_in
        from rewriter.profile.onnx_models import profile_onnx

        library = None if kernels in (None, "off") else library_in(Path(kernels))
        with _files(before, after) as files:
            return profile_onnx(
                *files,
                provider=provider,
                shapes=shapes,
                runs=runs,
                threads=threads,
                library=library,
                workload=workload,
                cuda_graph=cuda_graph,
            )
    from rewriter.profile.torch_models import profile_torch

    if kernels not in (None, "off"):
        raise UsageError("a folder of kernels is for .onnx files", hint="PyTorch models build their own; leave it out")
    modules = [_module(model) for model in (before, after)]
    with _kernels_off(modules) if kernels == "off" else contextlib.nullcontext():
        return profile_torch(
            *modules,
            provider=provider,
            shapes=shapes,
            runs=runs,
            threads=threads,
            example_inputs=example_inputs,
            workload=workload,
            cuda_graph=cuda_graph,
        )


def _require_graph(provider: str, workload: Workload) -> None:
    if provider == "cpu":
        raise UsageError("a CUDA graph is of a graphics card", hint="use --provider cuda, or leave --cuda-graph out")
    if workload.mode != "forward":
        raise UsageError(
            f"a CUDA graph replays one call of fixed sizes, and in mode {workload.mode} a cache grows",
            hint="leave --mode out, or --cuda-graph",
        )


@contextlib.contextmanager
def _kernels_off(modules: Sequence[Any]) -> Iterator[None]:
    """Without generated kernels, for as long as it is measured."""
    from rewriter.install.torch_module import mixers

    found = [(mixer, mixer.kernels) for module in modules for mixer in mixers(module).values()]
    try:
        for mixer, _ in found:
            mixer.kernels = "off"
        yield
    finally:
        for mixer, before in found:
            mixer.kernels = before


def _kind(model: Any) -> str:
    if isinstance(model, str | Path):
        return "torch" if existing(model).is_dir() else "onnx"
    if is_onnx(model):
        return "onnx"
    if not is_torch(model):
        raise UsageError(
            f"a {type(model).__name__} cannot be profiled", hint="give an .onnx file, a folder or a PyTorch module"
        )
    return "torch"


@contextlib.contextmanager
def _files(*models: Any) -> Iterator[list[Path]]:
    """Where the models lie; those in memory are written to a temporary folder."""
    with scratch_folder() as folder:
        yield [_file(model, folder / f"{name}.onnx") for model, name in zip(models, ("before", "after"), strict=True)]


def _file(model: Any, place: Path) -> Path:
    if isinstance(model, str | Path):
        return Path(model)
    import onnx_ir

    from rewriter.capture.onnx_load import from_proto
    from rewriter.install.onnx_write import save

    save(model if isinstance(model, onnx_ir.Model) else from_proto(model), place)
    return place


def _module(model: Any) -> Any:
    if isinstance(model, str | Path):
        import rewriter

        return rewriter.load(model)
    import torch

    return model.module() if isinstance(model, torch.export.ExportedProgram) else model
