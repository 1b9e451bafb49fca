"""The commands: each checks its arguments, calls the library, and shows what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli.arguments import calibration_of, require_model, require_output, require_page, shapes_of, target_of
from rewriter.cli.flags import current
from rewriter.cli.limits import memory_for, refuse_drift, refuse_if_strict, require_limits, with_limits
from rewriter.cli.options import (
    Debug,
    ExternalData,
    Grouping,
    Html,
    Json,
    Kernels,
    MaxKl,
    Merge,
    MinCosine,
    Mode,
    Model,
    Precision,
    Progress,
    Provider,
    Train,
)  # fmt: skip
from rewriter.cli.output import complain, quiet, show, working
from rewriter.errors import UsageError, VerificationFailed

app = typer.Typer(
    name="rewriter",
    help="Rewrite the token mixing of a trained transformer, verify it and measure it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    require_model(model)
    if site is not None and graph is None:
        raise UsageError("--site names the site to draw, and nothing is drawn", hint="add --graph site.svg")
    if graph is not None:
        from rewriter.report.site_drawing import require_drawable

        require_drawable(graph)
    with working("inspecting", memory_for(model)):
        import rewriter

        found = rewriter.inspect(str(model))
        if graph is not None:
            found.save_graph(graph, site=site)
    show(found.to_dict(), "inspection")


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
    keep_hidden_bias: Annotated[
        bool,
        typer.Option("--keep-hidden-bias", help="Share heads also where hidden states bias the scores; that stays."),
    ] = False,
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
    require_model(model)
    require_output(model, output)
    require_page(html)
    require_limits(max_kl, min_cosine)
    if not verify and (max_kl is not None or min_cosine is not None):
        raise UsageError("--max-kl and --min-cosine need the verification", hint="drop --no-verify")
    with working(f"rewriting to {target}", memory_for(model, calibrated=calibration is not None)):
        import rewriter

        done = rewriter.optimize(
            str(model),
            target_of(target, merge, grouping, keep_hidden_bias),
            layers=layers,
            budget=budget,
            calibration=calibration_of(calibration),
            kernels=kernels.value,
            verify=verify,
            streamed=streamed,
        )
        report = done.rewrite_report.to_dict()
        refuse_if_strict(strict, report["refused"])
        refuse_drift(report["fidelity"], max_kl, min_cosine)
        if not dry_run:
            done.save(output, **({} if model.is_dir() else {"external_data": external_data.value}))
        if html is not None:
            done.rewrite_report.save_html(html)
    places = {"target": report.pop("target"), "input": str(model), "output": str(output), "dry_run": dry_run}
    show({**places, **report}, "rewrite")
    if report["refused"]:
        first = report["refused"][0]
        complain(
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
    require_model(output)
    require_model(against)
    require_limits(max_kl, min_cosine)
    with working("verifying", memory_for(output, against)):
        import rewriter

        found = rewriter.verify(str(output), str(against)).to_dict()
    found = with_limits(found, max_kl, min_cosine)
    show(found, "verification")
    if not found["ok"]:
        failed = next(check for check in found["checks"] if not check["ok"])
        complain(f"check {failed['name']!r} failed: {failed['detail']}", "compare with the original in detail: --json")
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
    require_model(before)
    require_model(after)
    require_page(html)
    shapes = shapes_of(shape or ())
    with working("profiling", memory_for() if provider is Provider.CPU else None):
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
    show(found.to_dict(), "profile")


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
    require_model(model)
    require_output(model, output, folder=True)
    with working("building kernels"):
        from rewriter.kernels.emit import emit

        found = emit(model, output, [part.strip() for part in arch.split(",") if part.strip()])
    show(found, "kernels")


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
        require_model(model)
    places = Places.of(student, output, checkpoints, resume)
    require_output(student, places.output)
    require_page(html)
    settings = {
        "steps": steps, "fraction": fraction, "pretraining_tokens": pretraining_tokens, "batch": batch,
        "window": window, "learning_rate": learning_rate, "layer_phase": layer_phase, "language_model": language_model,
        "train": train and train.value, "precision": precision and precision.value, "accumulate": accumulate,
        "gradient_checkpointing": gradient_checkpointing, "group_by_length": group_by_length, "seed": seed,
        "save_every": save_every, "validate_every": validate_every,
    }  # fmt: skip
    with quiet():
        found = run_command(
            student,
            teacher,
            [*data, *(more_data or ())],
            places,
            settings,
            validation=validation,
            twin=twin,
            progress=current().progress,
            html=html,
        )
    if found is not None:
        show(found, "uptrained")


@app.command()
def targets(as_json: Json = False, debug: Debug = False) -> None:
    """List what attention can be rewritten to."""
    import rewriter

    show({"targets": list(rewriter.targets())}, "targets")


@app.command()
def demo(as_json: Json = False, progress: Progress = False, debug: Debug = False) -> None:
    """Run the main job on real weights, start to finish."""
    from rewriter.demo.run import run_demo

    run_demo(json=as_json)
