"""The command line: inspect, rewrite, verify, profile, kernels, uptrain, targets, demo.

Every command prints tables for people or, with --json, one JSON object on standard output. Errors are one line and
a hint on standard error; the exit code says whose fault it is (see `rewriter.errors`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codegen.errors import KernelError
from rewriter import progress as progress_bars
from rewriter.drafts import DATA_SUFFIX, require_place
from rewriter.errors import CannotWrite, RewriteError, UsageError, VerificationFailed, first_line
from rewriter.given_path import existing
from rewriter.report.printable import jsonable, printable
from rewriter.whole_folder import recover

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    name="rewriter",
    help="Rewrite the token mixing of a trained transformer, verify it and measure it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class ExternalData(StrEnum):
    """Where the weights of an .onnx output go."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Merge(StrEnum):
    """How the key/value heads of a group become one."""

    MEAN = "mean"
    ALIGNED = "aligned"
    JOINT = "joint"


class Grouping(StrEnum):
    """Which key/value heads share one."""

    CONTIGUOUS = "contiguous"
    SIMILAR = "similar"


class Kernels(StrEnum):
    """Which generated kernels a rewritten PyTorch model may use."""

    AUTO = "auto"
    OFF = "off"
    TRITON = "triton"
    CUDA = "cuda"
    CPP = "cpp"


class Train(StrEnum):
    """Which parameters uptraining changes."""

    ALL = "all"
    BLOCKS = "blocks"
    REWRITTEN = "rewritten"


class Precision(StrEnum):
    """What uptraining multiplies in."""

    NO = "no"
    BF16 = "bf16"
    FP16 = "fp16"


class Mode(StrEnum):
    """What a profile measures."""

    FORWARD = "forward"
    PREFILL = "prefill"
    DECODE = "decode"


class Provider(StrEnum):
    """What the models run on."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


@dataclass(frozen=True)
class _Flags:
    """Options of every command that errors must know too, even where the rest of the line could not be parsed."""

    json: bool = False
    debug: bool = False
    progress: bool = False

    @staticmethod
    def of(arguments: Sequence[str]) -> _Flags:
        options = set(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        return _Flags("--json" in options, "--debug" in options, "--progress" in options)


_flags = _Flags()

_INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
Progress = Annotated[bool, typer.Option("--progress", help="Report progress even without a terminal.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file or a Hugging Face directory.")]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="Fail if the mean KL divergence is larger (nats).")]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one self-contained page, too.")
]
MinCosine = Annotated[float | None, typer.Option("--min-cosine", help="Fail if the mean cosine is smaller.")]


def _print_version(value: bool) -> None:
    if value:
        from importlib import metadata

        try:
            typer.echo(f"rewriter {metadata.version('rewriter')}")
        except metadata.PackageNotFoundError:
            typer.echo("rewriter (run from its sources, not installed)")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """Rewrite the token mixing of a trained transformer, verify it and measure it."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(UsageError.exit_code)


# --- commands ------------------------------------------------------------------------------------


@app.command()
def inspect(
    model: Model,
    graph: Annotated[
        Path | None, typer.Option("--graph", metavar="FILE", help="Draw matched subgraphs: .html all sites, .svg one.")
    ] = None,
    site: Annotated[str | None, typer.Option("--site", help="The site to draw; without it the first.")] = None,
    as_json: Json = False,
    progress: Progress = False,
    debug: Debug = False,
) -> None:
    """Show every attention and feed-forward site: what it is, what it can become, or why it cannot be rewritten."""
    _require_model(model)
    if site is not None and graph is None:
        raise UsageError("--site names the site to draw, and nothing is drawn", hint="add --graph site.svg")
    if graph is not None:
        from rewriter.report.site_drawing import require_drawable

        require_drawable(graph)
    with _working("inspecting"):
        import rewriter

        found = rewriter.inspect(str(model))
        if graph is not None:
            found.save_graph(graph, site=site)
    _show(found.to_dict(), "inspection")


@app.command()
def rewrite(
    model: Annotated[Path, typer.Argument(metavar="IN", help="An .onnx file or a Hugging Face directory.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the rewritten model goes.")],
    target: Annotated[str, typer.Option("--target", "-t", help="What sites become; see: rewriter targets.")],
    layers: Annotated[
        str | None, typer.Option("--layers", help='Which sites: "all", "0-7", "-4:", "encoder", a regex on names.')
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", help='Texts (.txt, .jsonl), ids (.npy), inputs (.npz, .safetensors), or "sampled".'
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="LIMITS", help="For --target auto: kv=0.5, speed=1.3, drift=0.02, or several."
        ),
    ] = None,
    merge: Annotated[
        Merge | None, typer.Option("--merge", help="How heads become one; joint with --calibration, else mean.")
    ] = None,
    grouping: Annotated[
        Grouping | None, typer.Option("--grouping", help="Which heads share one: neighbours, or those most alike.")
    ] = None,
    kernels: Annotated[Kernels, typer.Option("--kernels", help="Generated kernels to use.")] = Kernels.AUTO,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the result before writing it.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan, cost and drift; write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if any selected site is refused.")] = False,
    max_kl: MaxKl = None,
    min_cosine: MinCosine = None,
    external_data: Annotated[
        ExternalData, typer.Option("--external-data", help="Keep weights in a file beside the .onnx.")
    ] = ExternalData.AUTO,
    html: Html = None,
    streamed: Annotated[
        bool | None,
        typer.Option("--streamed/--not-streamed", help="Never hold a whole checkpoint; by itself if it is too large."),
    ] = None,
    as_json: Json = False,
    progress: Progress = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model's attention and write the result."""
    _require_model(model)
    _require_output(model, output)
    _require_page(html)
    _require_limits(max_kl, min_cosine)
    if not verify and (max_kl is not None or min_cosine is not None):
        raise UsageError("--max-kl and --min-cosine need the verification", hint="drop --no-verify")
    with _working(f"rewriting to {target}"):
        import rewriter

        done = rewriter.optimize(
            str(model),
            _target(target, merge, grouping),
            layers=layers,
            budget=budget,
            calibration=_calibration(calibration),
            kernels=kernels.value,
            verify=verify,
            streamed=streamed,
        )
        report = done.rewrite_report.to_dict()
        _refuse_if_strict(strict, report["refused"])
        _refuse_drift(report["fidelity"], max_kl, min_cosine)
        if not dry_run:
            done.save(output, **({} if model.is_dir() else {"external_data": external_data.value}))
        if html is not None:
            done.rewrite_report.save_html(html)
    places = {"target": report.pop("target"), "input": str(model), "output": str(output), "dry_run": dry_run}
    _show({**places, **report}, "rewrite")
    if report["refused"]:
        first = report["refused"][0]
        _complain(
            f"{len(report['refused'])} of {len(report['refused']) + len(report['sites'])} sites were refused",
            f"{first['name']}: {first['reason']}",
            label="note",
        )


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The rewritten model.")],
    against: Annotated[Path, typer.Option("--against", metavar="IN", help="The original.")],
    max_kl: MaxKl = None,
    min_cosine: MinCosine = None,
    as_json: Json = False,
    progress: Progress = False,
    debug: Debug = False,
) -> None:
    """Check a rewritten model against its original: valid, runs, finite, untouched parts identical, drift."""
    _require_model(output)
    _require_model(against)
    _require_limits(max_kl, min_cosine)
    with _working("verifying"):
        import rewriter

        found = rewriter.verify(str(output), str(against)).to_dict()
    found = _with_limits(found, max_kl, min_cosine)
    _show(found, "verification")
    if not found["ok"]:
        failed = next(check for check in found["checks"] if not check["ok"])
        _complain(f"check {failed['name']!r} failed: {failed['detail']}", "compare with the original in detail: --json")
        raise typer.Exit(VerificationFailed.exit_code)


@app.command()
def profile(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="The original.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The rewritten model.")],
    provider: Annotated[Provider, typer.Option("--provider", help="What to run on.")] = Provider.CPU,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="NAME=2x128", help="Size of an input; may be repeated.")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Timed runs of each model.")] = 20,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")] = 2,
    kernel_folder: Annotated[
        str | None,
        typer.Option("--kernels", metavar="DIR|off", help="Kernels to use: what `rewriter kernels` wrote, or none."),
    ] = None,
    mode: Annotated[
        Mode, typer.Option("--mode", help="One call, a prompt into an empty cache, or the tokens behind it.")
    ] = Mode.FORWARD,
    prompt: Annotated[int | None, typer.Option("--prompt", help="Tokens of a prompt; 512 by default.")] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", help="Tokens generated in mode decode; 32 by default.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Prompts at once; 1 by default.")] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="On a card: capture the call as a CUDA graph, and time its replays.")
    ] = False,
    html: Html = None,
    as_json: Json = False,
    progress: Progress = False,
    debug: Debug = False,
) -> None:
    """Time two models in turn on the same inputs, with memory and time by operator."""
    _require_model(before)
    _require_model(after)
    _require_page(html)
    shapes = _shapes(shape or ())
    with _working("profiling"):
        import rewriter

        found = rewriter.profile(
            str(before),
            str(after),
            provider=provider.value,
            shapes=shapes or None,
            runs=runs,
            threads=threads,
            kernels=kernel_folder,
            mode=mode.value,
            prompt=prompt,
            new_tokens=new_tokens,
            batch=batch,
            cuda_graph=cuda_graph,
        )
        if html is not None:
            from rewriter.inspection import pictures_of

            found.save_html(html, pictures_of(before))
    _show(found.to_dict(), "profile")


@app.command()
def kernels(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where everything is written.")],
    arch: Annotated[
        str, typer.Option("--arch", help="What to build for, e.g. cpu, cpu:avx2, sm_90, gfx942; several with commas.")
    ] = "cpu",
    as_json: Json = False,
    progress: Progress = False,
    debug: Debug = False,
) -> None:
    """Write the kernels that a rewritten model can use: sources, binaries, a library for onnxruntime, a manifest."""
    _require_model(model)
    _require_output(model, output, folder=True)
    with _working("building kernels"):
        from rewriter.kernels.emit import emit

        found = emit(model, output, [part.strip() for part in arch.split(",") if part.strip()])
    _show(found, "kernels")


@app.command()
def uptrain(
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT", help="The rewritten model: a folder, or an .onnx file.")
    ],
    teacher: Annotated[Path, typer.Option("--teacher", metavar="T", help="The original: a Hugging Face directory.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data", metavar="F…", help="Token ids, texts or inputs in files; or `sampled`: the teacher writes."
        ),
    ],
    more_data: Annotated[list[Path] | None, typer.Argument(metavar="F", hidden=True)] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    fraction: Annotated[
        float | None, typer.Option("--fraction", help="Part of the pre-training to repeat; 0.05 in the GQA paper.")
    ] = None,
    pretraining_tokens: Annotated[
        float | None, typer.Option("--pretraining-tokens", help="Tokens the teacher was trained on, e.g. 2e12.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="The result; STUDENT-uptrained by default.")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option("--checkpoints", metavar="DIR", help="Where checkpoints go; OUT.run by default.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on from the newest checkpoint in this folder.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option("--validation", help="Held-out data, in a file of its own.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences in a step, over all processes.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens of a sequence.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="At its peak.")] = None,
    layer_phase: Annotated[
        float | None, typer.Option("--layer-phase", help="Part of the steps that trains each block on its own.")
    ] = None,
    language_model: Annotated[
        float | None, typer.Option("--language-model", help="Weight of next-token prediction beside distillation.")
    ] = None,
    train: Annotated[Train | None, typer.Option("--train", help="Which parameters learn.")] = None,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="Of products; weights stay float32.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option("--accumulate", help="Parts of a step run one by one.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Save memory.")
    ] = None,
    group_by_length: Annotated[
        bool | None,
        typer.Option("--group-by-length/--no-group-by-length", help="Batches of sequences about equally long."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the data's order.")] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", help="Steps between checkpoints.")] = None,
    validate_every: Annotated[int | None, typer.Option("--validate-every", help="Steps between validations.")] = None,
    twin: Annotated[
        Path | None, typer.Option("--twin", help="The torch model that an .onnx student was exported from.")
    ] = None,
    html: Html = None,
    as_json: Json = False,
    progress: Progress = False,
    debug: Debug = False,
) -> None:
    """Train a rewritten model towards its original; under `accelerate launch` with several processes."""
    from rewriter.uptrain.command import Places, run_command

    for model in (student, teacher, *([] if twin is None else [twin])):
        _require_model(model)
    places = Places.of(student, output, checkpoints, resume)
    _require_output(student, places.output)
    _require_page(html)
    settings = {
        "steps": steps, "fraction": fraction, "pretraining_tokens": pretraining_tokens, "batch": batch,
        "window": window, "learning_rate": learning_rate, "layer_phase": layer_phase, "language_model": language_model,
        "train": train and train.value, "precision": precision and precision.value, "accumulate": accumulate,
        "gradient_checkpointing": gradient_checkpointing, "group_by_length": group_by_length, "seed": seed,
        "save_every": save_every, "validate_every": validate_every,
    }  # fmt: skip
    with _quiet():
        found = run_command(
            student,
            teacher,
            [*data, *(more_data or ())],
            places,
            settings,
            validation=validation,
            twin=twin,
            progress=_flags.progress,
            html=html,
        )
    if found is not None:
        _show(found, "uptrained")


@app.command()
def targets(as_json: Json = False, debug: Debug = False) -> None:
    """List what attention can be rewritten to."""
    import rewriter

    _show({"targets": list(rewriter.targets())}, "targets")


@app.command()
def demo(as_json: Json = False, progress: Progress = False, debug: Debug = False) -> None:
    """Run the main job on real weights, start to finish."""
    from rewriter.demo.run import run_demo

    run_demo(json=as_json)


# --- arguments -----------------------------------------------------------------------------------


def _require_model(path: Path) -> None:
    if not os.path.exists(path) and os.path.isdir(path.absolute().parent):
        recover(path.absolute())  # a command that was killed may have moved it aside
    existing(path)


def _require_output(model: Path, output: Path, *, folder: bool = False) -> None:
    """`folder`: a folder is written, whatever the model is. What a killed command left half-written there goes."""
    parent = output.absolute().parent
    if not os.path.isdir(parent):
        raise UsageError(f"the output folder {parent} does not exist", hint="create it first")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"the output folder {parent} is not writable", hint="check its permissions")
    require_place(output, longer=0 if folder or model.is_dir() else len(DATA_SUFFIX))
    recover(output.absolute())
    if folder:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is a file", hint="name a folder")
        return
    if model.is_file() and output.is_dir():
        raise UsageError(f"{output} is a folder", hint="name the output file, e.g. out.onnx")
    if model.is_dir() and output.is_file():
        raise UsageError(f"{output} is a file", hint="name a folder: the input is one")


def _require_page(path: Path | None) -> None:
    if path is not None:
        from rewriter.report.html_page import require_page

        require_page(path)


def _calibration(path: Path | None) -> Any:
    if path is None:
        return None
    from rewriter.calibration.batches import SAMPLED
    from rewriter.calibration.files import read_calibration

    return SAMPLED if str(path) == SAMPLED and not path.exists() else read_calibration(path)


def _target(name: str, merge: Merge | None, grouping: Grouping | None) -> Any:
    """The target of this name with the asked merge; names that are unknown are left for `optimize` to refuse."""
    given = {"merge": merge and merge.value, "grouping": grouping and grouping.value}
    asked: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if not asked:
        return name
    from passes.targets import Auto, DecoupledHeads, GroupedQuery
    from passes.targets.catalogue import find

    found = find(name)
    if isinstance(found, DecoupledHeads) and grouping is not None:
        raise UsageError("--grouping is for keys and values that are grouped alike", hint="leave it out")
    if found is not None and not isinstance(found, (Auto, DecoupledHeads, GroupedQuery)):
        raise UsageError(f"--{next(iter(asked))} says how heads become one, and {name} has none", hint="leave it out")
    return name if found is None else replace(found, **asked)


def _shapes(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for text in given:
        name, _, sizes = text.rpartition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split("x")) if sizes else ()
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--shape {text!r} is no shape", hint="write it as name=2x128")
    return shapes


# --- limits --------------------------------------------------------------------------------------


def _refuse_if_strict(strict: bool, refused: Sequence[Mapping[str, Any]]) -> None:
    if strict and refused:
        first = refused[0]
        raise RewriteError(
            f"{len(refused)} sites were refused, the first: {first['name']}: {first['reason']}",
            hint="drop --strict to rewrite the others, or select sites with --layers",
        )


def _require_limits(max_kl: float | None, min_cosine: float | None) -> None:
    if max_kl is not None and not max_kl >= 0:
        raise UsageError(f"--max-kl {max_kl:g} is no divergence", hint="give 0 or more, e.g. 0.1")
    if min_cosine is not None and not -1 <= min_cosine <= 1:
        raise UsageError(f"--min-cosine {min_cosine:g} is no cosine", hint="give one of at most 1, e.g. 0.99")


def _refuse_drift(drift: Mapping[str, Any] | None, max_kl: float | None, min_cosine: float | None) -> None:
    for check in _limit_checks(drift, max_kl, min_cosine):
        if not check["ok"]:
            raise VerificationFailed(
                f"too far from the original: {check['detail']}; nothing was written",
                hint="choose more K/V heads, or rewrite fewer layers with --layers",
            )


def _limit_checks(
    drift: Mapping[str, Any] | None, max_kl: float | None, min_cosine: float | None
) -> Iterator[dict[str, Any]]:
    """Checks of the limits that the user set; a quantity that was not measured is within no limit."""
    for name, limit, key, within in (
        ("max-kl", max_kl, "kl", operator.le),
        ("min-cosine", min_cosine, "cosine", operator.ge),
    ):
        if limit is None:
            continue
        value = drift.get(key) if drift else None
        shown = "was not measured (the output holds no logits)" if value is None else f"is {value:.6g}"
        ok = value is not None and within(value, limit)
        yield {"name": name, "ok": ok, "detail": f"{key} {shown}, the limit is {limit:g}"}


def _with_limits(found: dict[str, Any], max_kl: float | None, min_cosine: float | None) -> dict[str, Any]:
    checks = [*found["checks"], *_limit_checks(found["fidelity"], max_kl, min_cosine)]
    return {**found, "checks": checks, "ok": all(check["ok"] for check in checks)}


# --- output --------------------------------------------------------------------------------------


def _show(found: Mapping[str, Any], kind: str) -> None:
    if _flags.json:
        _print(json.dumps(jsonable(found), allow_nan=False))
        return
    from rewriter.report import tables

    render: Callable[[Mapping[str, Any]], RenderableType] = getattr(tables, kind)
    text = ""
    with _to_output():  # rich writes to it, too
        text = tables.text(render(found))
    _print(text)


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    with _to_output():
        print(text.encode(encoding, "replace").decode(encoding), flush=True)


@contextlib.contextmanager
def _to_output() -> Iterator[None]:
    """Whoever reads standard output may have seen enough and gone, which is no error; raises CannotWrite for others."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at exit
        if not isinstance(error, BrokenPipeError):
            raise CannotWrite(
                f"standard output cannot be written: {first_line(error)}", hint="free some space, or send it elsewhere"
            ) from error


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """Progress on standard error, and whatever libraries print kept off standard output."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(progress_bars.showing(what, asked=_flags.progress))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Whatever libraries print is kept off standard output, and their progress bars away."""
    with contextlib.redirect_stdout(sys.stderr), _environment(_quiet_libraries()):
        yield


def _quiet_libraries() -> dict[str, str]:
    """Settings under which libraries keep their progress bars and remarks to themselves, and idle threads sleep."""
    settings = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    if not (sys.stderr.isatty() or _flags.progress):
        settings["TQDM_DISABLE"] = "1"
    if not _flags.debug:
        settings |= {"TRANSFORMERS_VERBOSITY": "error", "KINETO_LOG_LEVEL": "6"}
    return {name: value for name, value in settings.items() if name not in os.environ}


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)


def _complain(message: str, hint: str = "", *, label: str = "error") -> None:
    print(f"{label}: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"  {'first' if label == 'note' else 'hint'}: {printable(hint)}", file=sys.stderr)


# --- entry ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and leaves with its exit code."""
    _open_streams()
    ended: list[int] = []
    with _ending_signals(ended.append):
        code = run(arguments)
    sys.exit(128 + ended[0] if ended and code == _INTERRUPTED else code)


def _open_streams() -> None:
    """Streams that whoever started us had closed lead nowhere: else the next file takes their number, and what
    libraries print goes into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


@contextlib.contextmanager
def _ending_signals(note: Callable[[int], None]) -> Iterator[None]:
    """What asks a process to end (a batch system, a closed terminal) ends a command as Ctrl-C does: tidily.

    A signal that whoever started us has it ignore, as nohup does, stays ignored.
    """

    def end(number: int, frame: object) -> None:
        note(number)
        raise KeyboardInterrupt

    def asked(number: int) -> bool:
        return signal.getsignal(number) is signal.SIG_DFL

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [n for n in numbers if threading.current_thread() is threading.main_thread() and asked(n)]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises."""
    global _flags
    words = list(arguments) if arguments is not None else sys.argv[1:]
    _flags = _Flags.of(words)
    try:
        answer = app(words, prog_name="rewriter", standalone_mode=False)
        code = answer if isinstance(answer, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        return _fail(error)
    if code == _INTERRUPTED:  # typer may turn the interruption into this exit code itself
        _complain("interrupted; nothing was left half-written")
    return code


def _fail(error: Exception) -> int:
    """Say what went wrong in one line, with a hint; returns the exit code."""
    message, hint, code = _explain(error)
    if _flags.debug:
        for line in "".join(traceback.format_exception(error)).splitlines():
            print(printable(line), file=sys.stderr)
    if _flags.json:
        kind = type(error).__name__
        _print(json.dumps({"error": {"type": kind, "message": message, "hint": hint, "exit_code": code}}))
    _complain(message, hint)
    return code


def _explain(error: Exception) -> tuple[str, str, int]:
    if isinstance(error, RewriteError):
        return str(error), error.hint, error.exit_code
    if isinstance(error, KernelError):
        return str(error), error.hint, 1
    if hasattr(error, "format_message"):  # click's, whether typer carries a copy of click or imports it
        command = getattr(getattr(error, "ctx", None), "command_path", "rewriter")
        return str(error.format_message()), f"see: {command} --help", UsageError.exit_code
    if isinstance(error, MemoryError):
        return "out of memory", "free some, or store the model with external data", 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", "free some space, or name another disk for temporary files in TMPDIR", 1
    if isinstance(error, FileNotFoundError) and not _stands_somewhere():
        return "the working directory is gone", "change to another one", UsageError.exit_code
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}", "this is a bug in rewriter; --debug shows where", 1


def _stands_somewhere() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
