"""What `benchmarks.faults` disturbs: commands that replace an older output, and what a reader of the output finds."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IN, OUT = "in", "out"


@dataclass(frozen=True)
class Operation:
    """One command.

    Attributes:
        prepare: makes the inputs, and an older output, in an empty folder.
        words: what is typed, given the folder.
        seen: a digest of what a reader of the output finds; raises if that is broken.
        environment: variables of the command, given the folder.
    """

    name: str
    prepare: Callable[[Path], None]
    words: Callable[[Path], list[str]]
    seen: Callable[[Path], str]
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}


def command(name: str, folder: Path) -> int:
    """Run an operation's command in this process; returns its exit code."""
    from rewriter.cli import run

    operation = OPERATIONS[name]
    os.environ.update(operation.environment(folder))
    return run(operation.words(folder))


def names(folder: Path) -> list[str]:
    """Everything in the folder; random parts of names and the cache of kernels are left out."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(re.sub(r"\.[0-9a-f]{8}(?=\.data$)", "", n) for n in found if not n.startswith("cache/"))


# ---------------------------------------------------------------------- files


def _export(path: Path, seed: int) -> None:
    from benchmarks.campaign import export
    from benchmarks.random_attention import Net, draw

    a = draw(seed)
    export(a, Net(a).eval(), path)


def _onnx(*, external: bool, onto: str = OUT) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        import onnx_ir as ir

        from rewriter.capture.onnx_load import load
        from rewriter.install.onnx_write import save

        how: Any = "always" if external else "never"
        _export(folder / "exported.onnx", 0)
        model = load(folder / "exported.onnx")
        save(model, folder / f"{IN}.onnx", external_data=how)
        if onto == OUT:  # an older output: the same with other weights
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
                    value.const_value = ir.tensor(tensor.numpy() + 1, name=tensor.name)
            save(model, folder / f"{OUT}.onnx", external_data=how)
        (folder / "exported.onnx").unlink()

    return prepare


def _rewrite_onnx(onto: str = OUT) -> Callable[[Path], list[str]]:
    return lambda folder: ["rewrite", str(folder / f"{IN}.onnx"), str(folder / f"{onto}.onnx"), "-t", "mqa"]


def _onnx_seen(name: str = OUT) -> Callable[[Path], str]:
    def seen(folder: Path) -> str:
        from rewriter.capture.onnx_load import load

        digest = hashlib.sha256()
        model = load(folder / f"{name}.onnx")
        digest.update(repr([(n.op_type, [v and v.name for v in n.inputs]) for n in model.graph]).encode())
        for key, value in sorted(model.graph.initializers.items()):
            assert value.const_value is not None
            digest.update(key.encode() + value.const_value.tobytes())
        return digest.hexdigest()

    return seen


# ---------------------------------------------------------------------- folders


def _llama(seed: int = 0) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _gpt2(seed: int = 0) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def _folder(build: Callable[[int], Any], *, onto: str = OUT) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        build(0).save_pretrained(folder / IN)
        (folder / IN / "tokenizer_config.json").write_text("{}")
        if onto == OUT:
            build(1).save_pretrained(folder / OUT)
        (folder / onto / "notes.txt").write_text("kept")
        (folder / onto / "logs").mkdir()
        (folder / onto / "logs" / "first.txt").write_text("kept")

    return prepare


def _rewrite_folder(onto: str = OUT, *options: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["rewrite", str(folder / IN), str(folder / onto), "-t", "mqa", *options]


def _folder_seen(name: str = OUT) -> Callable[[Path], str]:
    def seen(folder: Path) -> str:
        import rewriter

        place = folder / name
        if not place.exists():
            return "nothing"
        digest = hashlib.sha256()
        for key, tensor in rewriter.load(place).state_dict().items():
            digest.update(key.encode() + tensor.numpy().tobytes())
        for kept in ("notes.txt", "logs/first.txt"):
            if (place / kept).read_text() != "kept":
                raise ValueError(f"{kept} is gone")
        return digest.hexdigest()

    return seen


# ---------------------------------------------------------------------- kernels


def _kernels(folder: Path) -> None:
    """Another model's kernels are the older output; the compiler is this machine's, through a script that counts
    and hurries: it only matters that they are built."""
    import rewriter

    (folder / "bin").mkdir()
    counting = folder / "bin" / "c++"
    counting.write_text('#!/bin/sh\ncase "$1" in --version) ;; *) echo built >> "$0.log";; esac\nexec g++ "$@" -O0\n')
    counting.chmod(0o755)
    for name, target in ((IN, "mqa"), ("other", "gqa2")):
        rewriter.optimize(_gpt2(), target).save_pretrained(folder / name)
    os.environ.update(_kernel_environment(folder))
    from rewriter.kernels.emit import emit

    emit(folder / "other", folder / OUT, ["cpu"])
    (folder / OUT / "notes.txt").write_text("kept")


def _kernel_environment(folder: Path) -> dict[str, str]:
    return {"REWRITER_CACHE": str(folder / "cache"), "REWRITER_CXX": str(folder / "bin" / "c++")}


def _write_kernels(folder: Path) -> list[str]:
    return ["kernels", str(folder / IN), "-o", str(folder / OUT)]


def _kernels_seen(folder: Path) -> str:
    from rewriter.kernels.folder import digest, read_manifest

    manifest = read_manifest(folder / OUT)
    for row in manifest["kernels"]:
        if digest(folder / OUT / row["binary"]) != row["sha256"] or not (folder / OUT / row["source"]).is_file():
            raise ValueError(f"{row['binary']} is not what the manifest says")
    if (folder / OUT / "notes.txt").read_text() != "kept":
        raise ValueError("notes.txt is gone")
    return json.dumps([[row["name"], row["spec"]] for row in manifest["kernels"]])


# ---------------------------------------------------------------------- training


def _uptrain(folder: Path) -> None:
    import numpy as np

    import rewriter

    _llama().save_pretrained(folder / "teacher")
    rewriter.save(rewriter.optimize(_llama(), "mqa"), folder / IN)
    steps = np.random.default_rng(0).integers(1, 4, 3000)
    np.save(folder / "data.npy", np.cumsum(steps) % 96)


def _train(folder: Path) -> list[str]:
    """Resumes where there is something to resume from, as a person would."""
    run = folder / "run"
    found = ["--resume", str(run)] if list(run.glob("step-*/run.json")) else ["--checkpoints", str(run)]
    return [
        "uptrain", str(folder / IN), "--teacher", str(folder / "teacher"), "--data", str(folder / "data.npy"),
        "-o", str(folder / OUT), "--steps", "5", "--batch", "2", "--window", "16", "--save-every", "1", *found,
    ]  # fmt: skip


def _trained(folder: Path) -> str:
    import rewriter

    if not (folder / OUT).exists():
        return "nothing"
    digest = hashlib.sha256()
    for key, tensor in rewriter.load(folder / OUT).state_dict().items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("rewrite onnx", _onnx(external=False), _rewrite_onnx(), _onnx_seen()),
        Operation("rewrite onnx with external data", _onnx(external=True), _rewrite_onnx(), _onnx_seen()),
        Operation(
            "rewrite onnx with external data in place", _onnx(external=True, onto=IN), _rewrite_onnx(IN), _onnx_seen(IN)
        ),
        Operation("rewrite folder", _folder(_llama), _rewrite_folder(), _folder_seen()),
        Operation("rewrite folder in place", _folder(_llama, onto=IN), _rewrite_folder(IN), _folder_seen(IN)),
        Operation("rewrite folder streamed", _folder(_llama), _rewrite_folder(OUT, "--streamed"), _folder_seen()),
        Operation("rewrite folder to a manifest", _folder(_gpt2), _rewrite_folder(), _folder_seen()),
        Operation("kernels", _kernels, _write_kernels, _kernels_seen, _kernel_environment),
        Operation("uptrain", _uptrain, _train, _trained),
    )
}
