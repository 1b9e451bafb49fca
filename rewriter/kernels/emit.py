"""`rewriter kernels`: sources, binaries, one library for onnxruntime and a manifest, for the kernels a model needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codegen.device import Device, Isa, host
from codegen.errors import KernelError, NoCompiler
from codegen.launch import host as host_kernels
from codegen.launch import ort_card, ort_op
from codegen.ops.grouped_query_attention.triton_kernel import ARCHS as CARDS
from codegen.registry import Choice, select, why_not
from codegen.toolchain import triton_aot
from codegen.toolchain.cxx import find_compiler
from rewriter import progress
from rewriter.errors import RewriteError, UnsupportedModel, UsageError
from rewriter.kernels import cuda_files, triton_files
from rewriter.kernels.folder import LIBRARY, MANIFEST, copy, described, digest
from rewriter.kernels.needed import Need, needs
from rewriter.whole_file import write_whole
from rewriter.whole_folder import whole_folder


def emit(model: Path, output: Path, archs: Sequence[str]) -> dict[str, Any]:
    """Write everything to the folder `output`, made if need be; returns what ``rewriter kernels --json`` prints.

    Args:
        archs: "cpu" is this machine's processor, "cpu:avx2", "cpu:avx512", "cpu:avx512_bf16" and
            "cpu:avx512_bf16_amx" are others; "sm_90" and "gfx942" are graphics cards, which need not be there.

    Raises:
        UsageError: an arch that there are no kernels for.
        NothingToRewrite, InvalidModelFile, UnsupportedModel: see `rewriter.kernels.needed.needs`; also without a
            legal kernel.
        RewriteError: a kernel cannot be built.
    """
    devices = {arch: _device(arch) for arch in archs or ["cpu"]}
    wanted = needs(model)
    try:
        choices = {arch: [_choice(need, device) for need in wanted] for arch, device in devices.items()}
        with whole_folder(output) as draft:
            found = _write(choices, draft, ort=model.is_file())
    except KernelError as error:
        raise RewriteError(str(error), hint=error.hint) from error
    return {**found, "output": str(output), "manifest": str(output / MANIFEST)}


def _device(arch: str) -> Device:
    if arch == "cpu":
        return host()
    for card, archs in CARDS.items():
        if arch in archs:
            return Device(card, arch)
    kind, _, isa = arch.partition(":")
    if kind != "cpu" or isa not in {i.value for i in Isa}:
        names = ", ".join(["cpu", *(f"cpu:{i.value}" for i in Isa), *(a for archs in CARDS.values() for a in archs)])
        raise UsageError(f"unknown arch {arch!r}", hint=f"one or several of {names}")
    return Device("cpu", isa)


def _choices(wanted: Sequence[Need], device: Device) -> list[Choice]:
    """Each kernel once: some serve several specs."""
    found = [_choice(need, device) for need in wanted]
    return list({choice.name: choice for choice in found}.values())


def _choice(need: Need, device: Device) -> Choice:
    found = select(need.spec, device, need.dtype)
    if found is None:
        raise UnsupportedModel(f"there is no kernel for {need.spec}: {why_not(need.spec, device, need.dtype)}")
    return found


def _write(choices: Mapping[str, Sequence[Choice]], output: Path, *, ort: bool) -> dict[str, Any]:
    """All files, and the manifest that vouches for them."""
    kernels: list[dict[str, Any]] = []
    tools: dict[str, str] = {}
    with progress.task("building", sum(map(len, choices.values())), "kernels") as advance:
        libraries = _libraries(choices, output) if ort else {}
        for arch, own in choices.items():
            if own[0].device.kind != "cpu":
                cuda = cuda_files.compiler()
                for choice in own:
                    kernels += triton_files.write(choice, output, arch)
                    kernels += cuda_files.write(choice, output, arch) if cuda else []
                    advance(len(kernels))
                tools["triton"] = triton_aot.version()
                if cuda:
                    tools["cuda"] = cuda.version
                continue
            tools["compiler"] = find_compiler().version
            for choice in own:
                source = write_whole(choice.source(), output / f"{choice.name}.cpp")
                if ort:
                    binary = libraries[arch]
                else:
                    binary = copy(host_kernels.built(choice).file(host_kernels.BINARY), output / f"{choice.name}.so")
                kernels.append(_row(arch, choice, source, binary))
                advance(len(kernels))
    found: dict[str, Any] = {"kernels": kernels, "library": _described(libraries, choices), **tools}
    write_whole(json.dumps(found, indent=1) + "\n", output / MANIFEST)
    return found


def _libraries(choices: Mapping[str, Sequence[Choice]], output: Path) -> dict[str, Path]:
    """Libraries for onnxruntime by arch: one for each kind of processor, or one of operators for cards alone; operators
    for cards are in all of them."""
    cards = [c for own in choices.values() for c in own if ort_card.why_not(c) is None]
    wanted = {arch: [*own, *cards] for arch, own in choices.items() if own[0].device.kind == "cpu"}
    if not wanted and cards and _there_is_a_compiler():
        wanted = {cards[0].device.arch: cards}
    made: dict[str, Path] = {}
    for arch, own in wanted.items():
        built = ort_op.build(own)
        name = LIBRARY if not made else f"rewriter_ops.{own[0].device.arch}.so"
        made[arch] = copy(built.path, output / name)
        copy(built.sources["library"], output / f"{name.removesuffix('.so')}.cpp")
    return made


def _there_is_a_compiler() -> bool:
    try:
        find_compiler()
    except NoCompiler:
        return False
    return True


def _described(libraries: Mapping[str, Path], choices: Mapping[str, Sequence[Choice]]) -> dict[str, Any] | None:
    """What the manifest says of the library that sessions register, which is the first."""
    if not libraries:
        return None
    arch, path = next(iter(libraries.items()))
    cards = [a for a, own in choices.items() if any(ort_card.why_not(c) is None for c in own)]
    return {"file": path.name, "arch": arch, "cards": cards, "sha256": digest(path)}


def _row(arch: str, choice: Choice, source: Path, binary: Path) -> dict[str, Any]:
    return {
        "name": choice.name,
        "spec": described(choice),
        "arch": arch,
        "isa": choice.device.arch,
        "source": source.name,
        "binary": binary.name,
        "sha256": digest(binary),
        "resources": choice.resources(),
    }
