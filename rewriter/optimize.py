"""The public pipeline: capture → match → plan → transform → install → verify, whatever kind of model it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.auto_choice import with_budget
from rewriter.calibration.tokenizer import tokenizer_beside
from rewriter.decision import assignment, require_supported
from rewriter.errors import UsageError
from rewriter.given_path import existing
from rewriter.model_kinds import is_onnx, is_torch, larger_than_memory
from rewriter.report.rewrite_report import RewriteReport
from rewriter.verify.result import Verification


@dataclass(frozen=True)
class Rewritten:
    """What `optimize` returns for a path.

    Attributes:
        model: the rewritten model: an onnx_ir.Model, a torch module, or a checkpoint that is only rewritten on saving.
        rewrite_report: site by site what changed, how exact, and what was refused and why.
        source: the Hugging Face directory that was read; its tokenizer and other small files go along on saving.
    """

    model: Any
    rewrite_report: RewriteReport
    source: Path | None = None

    def save(self, path: str | Path, *, external_data: str = "auto") -> None:
        """Write it: an .onnx file (``external_data`` as on the command line) or a Hugging Face directory."""
        if is_torch(self.model):
            from rewriter.install.checkpoint_saving import save as write_folder

            write_folder(self.model, path, source=self.source)
            return
        if self.source is not None:
            self.model.write(Path(path))
            return
        from rewriter.install.onnx_write import save as write

        write(self.model, path, external_data=external_data)  # type: ignore[arg-type]


def optimize(
    model: Any,
    target: Any,
    *,
    layers: str | None = None,
    budget: Any = None,
    calibration: Any = None,
    example_inputs: Any = None,
    kernels: str = "auto",
    inplace: bool = False,
    verify: bool = True,
    streamed: bool | None = None,
) -> Any:
    """Rewrite a model's attention to `target` and return a model of the same kind.

    Args:
        model: a torch.nn.Module (also a torch.fx.GraphModule), a torch.export.ExportedProgram, an onnx.ModelProto,
            an onnx_ir.Model, or a path to an .onnx file or a Hugging Face directory.
        target: a name ("mqa", "gqa4"), a target object, or a mapping from layer selectors to either.
        layers: which sites: "all", "0-7", "-4:", "encoder", "decoder", "cross", or a regular expression on names.
        budget: for the target "auto": a `Budget` or its text, "kv=0.5" (at most half of the K/V bytes), "speed=1.3"
            (1.3 times fewer flops) or "drift=0.02" (KL divergence in nats per token where the model gives logits, else
            1 - cosine, on calibration batches held out).
        calibration: what to take statistics of: token ids (an integer array, [N] or [B, T]), a pair (texts, tokenizer)
            or texts alone where the model's folder holds a tokenizer, a DataLoader, or a list of batches (dicts, tuples
            or tensors); or "sampled", for which a causal language model of transformers writes 8,192 tokens itself
            (`rewriter.calibration.sampled`). Heads are then merged jointly unless the target says otherwise, and each
            site's output projection is refitted; without it the mean is the default. Sequences should be as long as
            those the model is used on.
        example_inputs: inputs to capture a torch model with; Hugging Face models have defaults.
        kernels: at rewritten attentions and routed feed-forward blocks of torch models: "auto" (a generated kernel
            where it is legal and measured to be faster than torch's own operators), "off", or "cpp", "triton" or "cuda"
            (always; an error where it is not legal). Graphs and .onnx files hold standard operators; see `rewriter
            kernels` for the latter.
        inplace: edit the given torch module instead of a copy.
        verify: compare with the original before returning.
        streamed: of a Hugging Face directory, rewrite the weights one by one on saving and never hold all of them; by
            default if they take more than half the free memory. `rewriter.streamed_rewrite` says what that leaves out.

    Returns:
        The same kind as `model`. Torch models carry the report as ``rewrite_report``, an onnx_ir.Model in
        ``meta["rewrite_report"]``; a ModelProto has room only for what its metadata says. For a path a `Rewritten`.

    Raises:
        UnknownTarget, UsageError: a wrong name, selector or head count.
        NothingToRewrite: no site could be rewritten; the message lists reasons.
        UnsupportedModel: the model cannot be captured.
        InvalidModelFile: a broken file.
        VerificationFailed: the result is wrong; nothing is returned.
    """
    require_supported(kernels)
    target = with_budget(target, budget)
    assignment(target, layers)
    if isinstance(model, (str, Path)):
        return _optimize_path(Path(model), target, layers, calibration, example_inputs, kernels, verify, streamed)
    if is_onnx(model):
        _refuse_by_name(kernels, "an ONNX model")
        return _optimize_onnx(model, target, layers, calibration, verify)
    if is_torch(model):
        return _optimize_torch(model, target, layers, calibration, example_inputs, kernels, inplace, verify)
    raise UsageError(
        f"cannot optimize a {type(model).__name__}",
        hint="pass a torch module, an exported program, an ONNX model, or a path",
    )


def _refuse_by_name(kernels: str, kind: str) -> None:
    """What holds standard operators alone is not told which kernel to run."""
    if kernels not in ("auto", "off"):
        raise UsageError(
            f"{kind} does not say which kernel computes it, so kernels={kernels!r} means nothing",
            hint="leave it out; for .onnx files `rewriter kernels` makes a library to register with onnxruntime",
        )


def _optimize_path(
    path: Path,
    target: Any,
    layers: str | None,
    calibration: Any,
    example_inputs: Any,
    kernels: str,
    verify: bool,
    streamed: bool | None,
) -> Rewritten:
    if existing(path).is_dir():
        if streamed or (streamed is None and calibration is None and larger_than_memory(path)):
            from rewriter.streamed_rewrite import rewrite_streamed

            if calibration is not None:
                raise UsageError("a streamed checkpoint is not run, so it cannot be calibrated", hint="leave one out")
            return Rewritten(*rewrite_streamed(path, target, layers=layers), path)
        tokenizer = tokenizer_beside(path) if calibration is not None else None
        module = _optimize_torch(
            load(path), target, layers, calibration, example_inputs, kernels, True, verify, tokenizer
        )
        return Rewritten(module, module.rewrite_report, path)
    if streamed:
        raise UsageError(
            "only Hugging Face directories are streamed", hint=".onnx files never are in memory as a whole"
        )
    _refuse_by_name(kernels, "an .onnx file")
    from rewriter.capture.onnx_load import load as load_onnx
    from rewriter.onnx_rewrite import rewrite_onnx

    model = load_onnx(path)
    tokenizer = tokenizer_beside(path.parent) if calibration is not None else None
    options = {"layers": layers, "verify": verify, "calibration": calibration, "tokenizer": tokenizer}
    return Rewritten(model, rewrite_onnx(model, load_onnx(path), target, **options))


def _optimize_onnx(model: Any, target: Any, layers: str | None, calibration: Any, verify: bool) -> Any:
    import onnx_ir

    from rewriter.capture.onnx_load import from_proto, to_proto
    from rewriter.onnx_rewrite import rewrite_onnx

    given_ir = isinstance(model, onnx_ir.Model)
    proto = to_proto(model) if given_ir else model
    edited = from_proto(proto)
    report = rewrite_onnx(edited, from_proto(proto), target, layers=layers, verify=verify, calibration=calibration)
    edited.meta["rewrite_report"] = report
    return edited if given_ir else to_proto(edited)


def _optimize_torch(
    model: Any,
    target: Any,
    layers: str | None,
    calibration: Any,
    example_inputs: Any,
    kernels: str,
    inplace: bool,
    verify: bool,
    tokenizer: Any = None,
) -> Any:
    import torch

    if isinstance(model, (torch.export.ExportedProgram, torch.fx.GraphModule)):
        from rewriter.graph_rewrite import rewrite_graph

        _refuse_by_name(kernels, "an exported graph")
        return rewrite_graph(
            model, target, layers=layers, example_inputs=example_inputs, verify=verify, calibration=calibration
        )
    from rewriter.torch_rewrite import rewrite_torch

    module, report = rewrite_torch(
        model,
        target,
        layers=layers,
        example_inputs=example_inputs,
        inplace=inplace,
        verify=verify,
        calibration=calibration,
        tokenizer=tokenizer,
        kernels=kernels,
    )
    module.rewrite_report = report  # type: ignore[assignment]
    return module


def use_kernels(model: Any, kernels: str = "auto", *, example_inputs: Any = None) -> Any:
    """Let a torch model's attentions call generated kernels, in place, weights untouched; returns the model.

    Reaches attention modules that `optimize` replaced, and every attention of a Hugging Face model that runs on torch's
    fused attention ("sdpa"). The model has to give the same outputs as before.

    Args:
        kernels: "auto" where the tuning table says that they are faster, "cpp", "triton" or "cuda" always, "off" to
            undo.
        example_inputs: a call of the model; Hugging Face models have defaults.

    Raises UsageError if `kernels` names a language and nothing can call it, or there are no example inputs.
    """
    from rewriter.capture.example_inputs import prepare
    from rewriter.install.kernel_choice import choose_kernels

    require_supported(kernels)
    args, kwargs = prepare(model, example_inputs)
    choose_kernels(model, kernels, args, kwargs, everywhere=True)
    return model


def verify(after: Any, before: Any, *, example_inputs: Any = None) -> Verification:
    """Compare a rewritten model with its original: valid, runs, finite, untouched parts identical, and drift.

    Both are paths, ONNX models or torch modules. Raises UsageError if they are of different kinds.
    """
    if isinstance(after, (str, Path)) and isinstance(before, (str, Path)):
        folders = existing(after).is_dir(), existing(before).is_dir()
        if folders == (True, True):
            return _verify_torch(load(after), load(before), example_inputs)
        if any(folders):
            raise UsageError("a folder and a file cannot be compared", hint="give two models of one kind")
        from rewriter.verify.onnx_pair import verify_onnx

        return verify_onnx(after, before)
    if is_onnx(after) and is_onnx(before):
        import onnx_ir

        from rewriter.capture.onnx_load import from_proto
        from rewriter.verify.onnx_pair import verify_onnx

        pair = [m if isinstance(m, onnx_ir.Model) else from_proto(m) for m in (after, before)]
        return verify_onnx(pair[0], pair[1])
    if is_torch(after) and is_torch(before):
        return _verify_torch(after, before, example_inputs)
    raise UsageError("the two models are of different kinds", hint="give two models of one kind")


def _verify_torch(after: Any, before: Any, example_inputs: Any) -> Verification:
    from rewriter.capture.example_inputs import prepare
    from rewriter.verify.torch_pair import run, untouched, verify_torch

    args, kwargs = prepare(before, example_inputs)
    found = verify_torch(run(before, args, kwargs), run(after, args, kwargs), kwargs, exact=False)
    return Verification(found.fidelity, (untouched(before, after), *found.checks))


def load(path: str | Path, *, module: Any = None) -> Any:
    """Load a model that `save` wrote, or a Hugging Face directory.

    Args:
        module: a fresh instance of the original architecture, for models that are not Hugging Face's.

    Raises UsageError, UnsupportedModel or InvalidModelFile.
    """
    from rewriter.install.checkpoint_loading import load as read

    return read(path, module=module)


def save(model: Any, path: str | Path) -> None:
    """Write a rewritten torch module: an ordinary Hugging Face checkpoint where the architecture can say it,
    else weights (safetensors) with rewrite.json, which only `load` reads."""
    from rewriter.install.checkpoint_saving import save as write

    write(model, path)


__all__ = ["Rewritten", "load", "optimize", "save", "use_kernels", "verify"]
