"""Broken checkpoint folders: every one must end in a typed error or in a model, whatever was done to its files.

    python -m benchmarks.folder_fuzz [--first SEED] [--count N] [--json F] [--markdown F] [--quick]

A seed takes one of a few small folders (an ordinary checkpoint, one in shards, and rewritten ones whose manifests say
how to rebuild each kind of module) and breaks it: an entry of config.json, rewrite.json, an index or a tokenizer
becomes something absurd, text or weights are damaged as bytes, the header of the weights lies, a file becomes a link.
The folder is then loaded, and sometimes streamed or asked for its kernels. Anything but a typed error, more than a
minute, or a file left behind is a fault of ours: `--first SEED --count 1` repeats it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rewriter
from benchmarks import fuzzing
from benchmarks.fuzz import NAMES, NUMBERS, Random
from benchmarks.fuzzing import Found, attempted
from benchmarks.options import parser, seeds

REWRITTEN = ("mqa", "dha:2,1", "fnet", "toeplitz", "sparse-mixer", "colt5", "flash", "window", "linear")
"""Targets whose manifests are broken."""
KINDS = ("plain", "shards", *REWRITTEN)
VALUES: tuple[Any, ...] = (
    None, True, "", "x", [], {}, [[]], [None], {"a": 1}, 0.5, float("nan"), 1e308, *NUMBERS, *NAMES, "../../x",
    "/etc/passwd", "someone/attention", ["a"] * 50, "bfloat16", [10**12, 10**12], "a.b.c", "__class__",
)  # fmt: skip
SECONDS = 60
SHARD = "20KB"
WORDS = ("to", "be", "or", "not", "that", "is", "the", "question")


def _model(kind: str) -> Any:
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    made: Any = BertModel(BertConfig(**sizes))
    if kind in ("plain", "shards", "linear", "window"):
        made = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4))
    return made.eval()


@functools.cache
def sound(kind: str) -> dict[str, bytes]:
    """The files of a sound folder, by name."""
    model = _model(kind)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if kind in REWRITTEN:
            rewriter.save(rewriter.optimize(model, kind, verify=False), folder)
        else:
            model.save_pretrained(folder, max_shard_size=SHARD if kind == "shards" else "1GB")
            _tokenizer(folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(WORDS)}}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)


def broken(seed: int, folder: Path) -> str:
    """Write a folder that was broken in one or two ways, always the same for a seed; returns its kind."""
    r = Random(seed)
    kind = r.choice(KINDS)
    files = dict(sound(kind))
    for _ in range(r.choice([1, 1, 2])):
        r.choice(WAYS)(files, r)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if r.random() < 0.05:
        _link_away(folder, r)
    return kind


# ---------------------------------------------------------------------- ways to break a folder


def change_entry(files: dict[str, bytes], r: Random) -> None:
    """Some value of some JSON file becomes another, goes, or comes twice."""
    names = sorted(name for name in files if name.endswith(".json"))
    if not names:
        return
    name = r.choice(names)
    try:
        document = json.loads(files[name])
    except (ValueError, RecursionError):  # broken already
        return
    known = list(places(document))
    if not known:
        return
    holder, key = r.choice(known)
    action = r.random()
    if action < 0.8:
        holder[key] = r.choice(VALUES)
    elif action < 0.9:
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}{r.choice(NAMES)}"] = holder[key]
    else:
        holder.append(holder[key])
    files[name] = json.dumps(document).encode()


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    if isinstance(document, dict | list):
        for key in list(document) if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from places(document[key])


def damage_bytes(files: dict[str, bytes], r: Random) -> None:
    name = r.choice(sorted(files))
    data = bytearray(files[name])
    match r.choice(["cut off", "flip", "empty", "random", "brackets"]):
        case "cut off":
            del data[r.randrange(len(data) + 1) :]
        case "flip" if data:
            for _ in range(r.choice([1, 4, 16])):
                data[r.randrange(min(len(data), 3000))] = r.randrange(256)
        case "empty":
            data.clear()
        case "random":
            data[:] = r.randbytes(64)
        case "brackets":
            data[:] = b"[" * 100_000
    files[name] = bytes(data)


def lie_in_header(files: dict[str, bytes], r: Random) -> None:
    """The header of the weights says other types, shapes or places than there are, or another length."""
    names = sorted(name for name in files if name.endswith(".safetensors"))
    if not names:
        return
    name = r.choice(names)
    content = files[name]
    length = int.from_bytes(content[:8], "little")
    if r.random() < 0.2:
        lengths = (0, 1, length - 1, length + 8, 10**9, 2**63, 2**64 - 1)
        files[name] = r.choice(lengths).to_bytes(8, "little") + content[8:]
        return
    try:
        header = json.loads(content[8 : 8 + length])
        entry = header[r.choice(sorted(header))]
    except (ValueError, KeyError, IndexError, RecursionError, AttributeError):  # broken already
        return
    match r.randrange(5):
        case 0:
            entry["dtype"] = r.choice(["F64", "I8", "BOOL", "F8_E4M3", "X", 7, None])
        case 1:
            entry["shape"] = r.choice([[], [0], [-1], [10**12, 10**12], [2**63], "x", None, [[1]]])
        case 2:
            entry["data_offsets"] = r.choice([[0, 0], [0, 2**63], [-1, 4], [8, 0], [], "x"])
        case 3:
            header[r.choice(NAMES)] = header.pop(r.choice(sorted(header)))
        case _:
            header["__metadata__"] = r.choice([{"format": "pt" * 1000}, {"format": "flax"}, [], "x", {"a": 1}])
    text = json.dumps(header).encode()
    files[name] = len(text).to_bytes(8, "little") + text + content[8 + length :]


def take_file(files: dict[str, bytes], r: Random) -> None:
    if len(files) > 1:
        del files[r.choice(sorted(files))]


def change_file(files: dict[str, bytes], r: Random) -> None:
    """A file takes the content of another."""
    a, b = r.choice(sorted(files)), r.choice(sorted(files))
    files[a] = files[b]


Way = Callable[[dict[str, bytes], Random], None]

WAYS: tuple[Way, ...] = (
    change_entry, change_entry, change_entry, change_entry, damage_bytes, lie_in_header, take_file, change_file,
)  # fmt: skip


def _link_away(folder: Path, r: Random) -> None:
    """Some file leads out of the folder, to nothing, to itself, or to a device."""
    victim = r.choice(sorted(folder.iterdir()))
    victim.unlink()
    victim.symlink_to(r.choice(["/etc/passwd", "nowhere", victim.name, "/dev/zero", ".", ".."]))


# ---------------------------------------------------------------------- what comes of it


def outcome(seed: int, scratch: Path) -> Found:
    """What using the broken folder comes to; what it leaves behind is a fault too."""
    folder = scratch / str(seed)
    kind = broken(seed, folder)
    before = sorted(scratch.rglob("*"))

    def work() -> None:
        with _within(SECONDS):
            use(folder, kind, seed)

    found = attempted(work)
    after = [path for path in sorted(scratch.rglob("*")) if path not in before]
    if found[0] != "fault" and after:
        return "fault", f"something was left behind: {after[:3]}"
    shutil.rmtree(folder)
    return found


def use(folder: Path, kind: str, seed: int) -> None:
    """Load it, and do one thing more that commands do."""
    from rewriter.calibration.tokenizer import tokenizer_beside
    from rewriter.kernels.needed import needs

    choice = seed % 3
    if kind in ("plain", "shards") and choice == 0:
        with tempfile.TemporaryDirectory() as out:
            rewriter.optimize(folder, "gqa2", streamed=True).save(Path(out) / "out")
    elif kind in REWRITTEN and choice == 0:
        needs(folder)
    else:
        rewriter.load(folder)
    tokenizer_beside(folder)


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    options = seeds(parser(__doc__, quick=f"{fuzzing.QUICK} seeds", markdown=True), count=2000).parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    for kind in KINDS:
        sound(kind)
    return fuzzing.run("folder_fuzz", outcome, options)


if __name__ == "__main__":
    sys.exit(main())
