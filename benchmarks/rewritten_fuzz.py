"""Broken .onnx files that a rewrite had written: their functions, calls and records are a stranger's like all else.

    python -m benchmarks.rewritten_fuzz [--first SEED] [--count N] [--json F] [--markdown F] [--quick]

A seed takes a small file rewritten to one of the targets and breaks it once or twice: a function's wiring, operators,
signature or versions, a call's name or attributes, the metadata in which the rewrite is recorded, or anything that
`benchmarks.fuzz` breaks. The file is then asked for its kernels, inspected, verified against the sound one and
rewritten once more. Anything but a result or a typed error is a fault of ours: `--first SEED --count 1` repeats it.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

import rewriter
from benchmarks import fuzz, fuzzing
from benchmarks.folder_fuzz import VALUES, places
from benchmarks.fuzz import NAMES, NUMBERS, OPERATORS, Random
from benchmarks.fuzzing import Found, attempted
from benchmarks.options import parser, seeds
from benchmarks.scale_models import Stack, write

TARGETS = ("mqa", "gqa2", "fnet", "toeplitz", "linear", "window", "flash", "sparse-mixer", "colt5")
SUFFIXES = ("Bias", "X", "Sparse", "Tiled", "\x1b", "_0")
DOMAIN = "rewriter"


@functools.cache
def sound(target: str) -> bytes:
    """A rewritten file's content."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Stack(1, hidden=16, inner=16, heads=4), Path(folder) / "sound.onnx", external=False)
        rewriter.optimize(path, target, verify=False).save(path)
        return path.read_bytes()


def broken(seed: int) -> tuple[str, bytes]:
    """(target, file), always the same for a seed."""
    r = Random(seed)
    target = r.choice(TARGETS)
    model = onnx.load_from_string(sound(target))
    for _ in range(r.choice([1, 1, 2])):
        way = r.choice(WAYS) if r.random() < 0.75 else r.choice(fuzz.STRUCTURE)
        way(model, r)
    return target, bytes(model.SerializeToString())


# ---------------------------------------------------------------------- ways to break a rewritten file


def _function(model: onnx.ModelProto, r: Random) -> onnx.FunctionProto | None:
    return r.choice(model.functions) if model.functions else None


def _inside(model: onnx.ModelProto, r: Random) -> onnx.NodeProto | None:
    function = _function(model, r)
    return r.choice(function.node) if function is not None and function.node else None


def _call(model: onnx.ModelProto, r: Random) -> onnx.NodeProto | None:
    calls = [n for n in model.graph.node if n.domain.startswith(DOMAIN)]
    return r.choice(calls) if calls else None


def rewire_body(model: onnx.ModelProto, r: Random) -> None:
    """A node in a function reads or writes something else: a name of its own function, none, or a hostile one."""
    function, node = _function(model, r), None
    if function is not None and function.node:
        node = r.choice(function.node)
    if function is None or node is None:
        return
    known = [name for n in function.node for name in n.output]
    names = node.input if node.input and r.random() < 0.8 else node.output
    names[r.randrange(len(names))] = r.choice([r.choice(known), r.choice(known), *NAMES])


def change_body_operator(model: onnx.ModelProto, r: Random) -> None:
    if (node := _inside(model, r)) is not None:
        node.op_type = r.choice(OPERATORS)


def change_body_attribute(model: onnx.ModelProto, r: Random) -> None:
    """A number or a tensor in a function's body."""
    found = [a for f in model.functions for n in f.node for a in n.attribute]
    if found:
        fuzz.break_attribute(r.choice(found), r)


def change_signature(model: onnx.ModelProto, r: Random) -> None:
    """A function loses an input or output, names one twice, or takes an attribute that nobody gives."""
    if (function := _function(model, r)) is None:
        return
    match r.randrange(4):
        case 0 if function.input:
            del function.input[r.randrange(len(function.input))]
        case 1 if function.output:
            del function.output[r.randrange(len(function.output))]
        case 2:
            function.input.append(r.choice([*function.input, *NAMES]))
        case _:
            function.attribute.append(r.choice([*function.attribute, "epsilon", *NAMES]))


def change_body_version(model: onnx.ModelProto, r: Random) -> None:
    if (function := _function(model, r)) is not None and function.opset_import:
        function.opset_import[0].version = r.choice([0, 1, 7, 12, 18, 99, -1])


def take_or_double_function(model: onnx.ModelProto, r: Random) -> None:
    """A function goes, comes twice, is called otherwise, or calls itself."""
    if (function := _function(model, r)) is None:
        return
    match r.randrange(4):
        case 0:
            model.functions.remove(function)
        case 1:
            model.functions.append(function)
        case 2:
            function.name += r.choice(SUFFIXES)
        case _:
            call = onnx.NodeProto(op_type=function.name, domain=function.domain)
            call.input.extend(function.input)
            call.output.extend(f"again_{name}" for name in function.output)
            function.node.append(call)


def change_call(model: onnx.ModelProto, r: Random) -> None:
    """A call's attribute becomes absurd or goes, or it calls something of a name alike."""
    if (node := _call(model, r)) is None:
        return
    if not node.attribute or r.random() < 0.3:
        node.op_type += r.choice(SUFFIXES)
        return
    attribute = r.choice(node.attribute)
    match attribute.type:
        case onnx.AttributeProto.INT if r.random() < 0.8:
            attribute.i = r.choice(NUMBERS)
        case onnx.AttributeProto.FLOAT if r.random() < 0.8:
            attribute.f = r.choice([float("nan"), float("inf"), 0.0, -1.0, 1e38])
        case _:
            node.attribute.remove(attribute)


def damage_record(model: onnx.ModelProto, r: Random) -> None:
    """Bytes of what a rewrite records about itself."""
    if not model.metadata_props:
        return
    entry = r.choice(model.metadata_props)
    text = bytearray(entry.value.encode())
    for _ in range(3 if text else 0):
        text[r.randrange(len(text))] = r.randrange(32, 127)
    entry.value = r.choice([text.decode("utf-8", "replace"), "[" * 99_999, "{}", "null", "\x1b[31m", "1" * 9_999])


def change_record(model: onnx.ModelProto, r: Random) -> None:
    """A value in the JSON that a rewrite records becomes an absurd one, or goes."""
    found: list[tuple[Any, Any]] = []
    for entry in model.metadata_props:
        try:
            found.append((entry, json.loads(entry.value)))
        except (ValueError, RecursionError):  # no JSON, or broken already
            continue
    if not found:
        return
    entry, document = r.choice(found)
    where = list(places(document))
    if where:
        holder, key = r.choice(where)
        if r.random() < 0.85:
            holder[key] = r.choice(VALUES)
        else:
            del holder[key]
    entry.value = json.dumps(document)


Way = Callable[[onnx.ModelProto, Random], None]

WAYS: tuple[Way, ...] = (
    rewire_body, change_body_operator, change_body_attribute, change_signature, change_body_version,
    take_or_double_function, change_call, change_call, damage_record, change_record,
)  # fmt: skip


# ---------------------------------------------------------------------- what comes of it


def outcome(seed: int, folder: Path) -> Found:
    """What every door comes to; the first fault, else the first typed error, else a result.

    A sound file that shares its heads already has nothing to rewrite, so that this is a result too.
    """
    target, content = broken(seed)
    path, whole, output = folder / f"{seed}.onnx", folder / f"{seed}.sound.onnx", folder / f"{seed}.out.onnx"
    path.write_bytes(content)
    whole.write_bytes(sound(target))
    found = [(name, *attempted(lambda door=door: door(path, whole, output))) for name, door in DOORS.items()]
    for file in (path, whole, output):
        file.unlink(missing_ok=True)
    wrong = [(kind, f"{target}, {name}: {text}") for name, kind, text in found if text]
    errors = [(kind, "") for _, kind, _ in found if kind not in ("result", "NothingToRewrite")]
    return next(iter([*(w for w in wrong if w[0] == "fault"), *wrong, *errors]), ("result", ""))


def _needs(path: Path, whole: Path, output: Path) -> None:
    from rewriter.kernels.needed import needs

    needs(path)


def _again(path: Path, whole: Path, output: Path) -> None:
    rewriter.optimize(path, "mqa", verify=False).save(output)


def _reported(path: Path, whole: Path, output: Path) -> None:
    """What `rewriter profile` reads in a rewritten file."""
    from rewriter.capture.onnx_load import load
    from rewriter.report import stored

    report = stored.from_text(load(path).metadata_props.get(stored.PROPERTY))
    if report is not None:
        json.dumps(report.to_dict())


DOORS: dict[str, Callable[[Path, Path, Path], object]] = {
    "kernels": _needs,
    "inspect": lambda path, whole, output: rewriter.inspect(path).to_dict(),
    "verify": lambda path, whole, output: rewriter.verify(path, whole).to_dict(),
    "rewrite": _again,
    "report": _reported,
}


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__, quick=f"{fuzzing.QUICK} seeds", markdown=True)
    options = seeds(made, count=1000).parse_args(arguments)
    warnings.simplefilter("ignore")
    for target in TARGETS:
        sound(target)
    return fuzzing.run("rewritten_fuzz", outcome, options)


if __name__ == "__main__":
    sys.exit(main())
