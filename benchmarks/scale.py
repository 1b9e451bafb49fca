"""Large files, long graphs, many rewrites, and a checkpoint that no memory holds: what they take.

    python -m benchmarks.scale [--json F] [--markdown F] [--quick] [--only WORDS] [--cpu-time]

Each is rewritten by a process of its own, whose anonymous memory (RssAnon) is sampled every few milliseconds. Time is
set beside a plain copy of as many bytes as the rewrite has to write, taken in the same minute on the same disk. With
--cpu-time both are processor time of one thread, for a machine that has other work.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import parser, quick_or
from benchmarks.rows import Row, markdown_table, put_section, write_json
from benchmarks.scale_models import NODES_A_LAYER, Stack, write

MB, GB = 10**6, 10**9
ROOT = Path(__file__).resolve().parents[1]

CPU_TIME = "BENCHMARKS_SCALE_CPU_TIME"


def clock() -> float:
    """Seconds: of the processor where --cpu-time asked for them, here and in the processes that this one starts."""
    return time.process_time() if os.environ.get(CPU_TIME) else time.perf_counter()


_WATCHED = """
import json, os, sys, threading, time
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
from benchmarks import scale
work = getattr(scale, sys.argv[1])
scale.warm(sys.argv[1])
base, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
start = scale.clock()
found = work(*sys.argv[2:])
seconds = scale.clock() - start
done.set()
watcher.join()
print("FOUND " + json.dumps({"seconds": seconds, "peak": peak[0], "base": base, **(found or {})}))
"""


def warm(work: str) -> None:
    """What a process imports once is no part of the time that a model takes; files need no torch."""
    if work != "rewrite_checkpoint":
        import rewriter.onnx_rewrite

        return
    import torch
    import transformers  # noqa: F401

    import rewriter.streamed_rewrite
    import rewriter.torch_rewrite  # noqa: F401

    torch.set_num_threads(1)


def watched(work: str, *arguments: object) -> dict[str, Any]:
    """Run a function of this module in a new process; also gives its seconds and the peak of anonymous memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    words = [sys.executable, "-c", _WATCHED, work, *map(str, arguments)]
    done = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


# ---------------------------------------------------------------------- what is run there


def rewrite_file(source: str, output: str, target: str) -> dict[str, Any]:
    from rewriter.capture.onnx_load import load
    from rewriter.install.onnx_write import save
    from rewriter.onnx_rewrite import rewrite_onnx

    model = load(source)
    report = rewrite_onnx(model, load(source), target, layers=None, verify=True, clock=clock)
    start = clock()
    save(model, output)
    return {"write": clock() - start, "stages": dict(report.seconds)}


def rewrite_checkpoint(source: str, output: str, target: str) -> dict[str, Any]:
    import rewriter

    done = rewriter.optimize(source, target, streamed=True)
    start = clock()
    done.save(output)
    return {"write": clock() - start, "parameters": done.rewrite_report.parameters.to_dict()}


def rewrite_often(source: str, output: str, times: str) -> dict[str, Any]:
    """Anonymous memory and open files after each rewrite."""
    import rewriter

    memory, files = [], []
    for _ in range(int(times)):
        rewriter.optimize(source, "mqa").save(output)
        with open("/proc/self/status") as status:
            memory.append(next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024)
        files.append(len(os.listdir("/proc/self/fd")))
    return {"memory": memory, "files": files}


# ---------------------------------------------------------------------- rows


def large_file(scratch: Path, stack: Stack, case: str) -> list[Row]:
    source, output = write(stack, scratch / "in.onnx"), scratch / "out.onnx"
    os.sync()
    found = watched("rewrite_file", source, output, "mqa")
    written = sum(512 * path.stat().st_blocks for path in scratch.glob("out.onnx*"))
    copy = plain_copy(scratch, written)
    limit = 2 * stack.largest + 300 * MB
    stages: dict[str, float] = found["stages"]
    more = {"file_gb": round(stack.bytes / GB, 2), "largest_mb": stack.largest // MB, "imports_mb": found["base"] // MB}
    for path in scratch.iterdir():
        path.unlink()
    changed = stages["transform"] + stages["install"] + found["write"]
    checked = found["seconds"] - stages["verify"]
    beside = "plain copy of the bytes written"
    return [
        Row("scale", f"{case}: anonymous memory", found["peak"] / MB, limit / MB, "largest tensor x 2 + 300 MB", "MB",
            limit / found["peak"], limit / MB, found["peak"] <= limit, more),
        Row("scale", f"{case}: transforming, installing, writing", changed, copy, beside, "s", copy / changed, 1 / 1.5,
            changed <= 1.5 * copy, {"written_gb": round(written / GB, 2), "stages": _rounded(stages)}),
        Row("scale", f"{case}: the same, capturing and matching", checked, copy, beside, "s", copy / checked,
            None, None),
        Row("scale", f"{case}: the same, and verifying", found["seconds"], copy, beside, "s", copy / found["seconds"],
            None, None),
    ]  # fmt: skip


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


def plain_copy(scratch: Path, size: int) -> float:
    """Seconds to copy `size` bytes by reading and writing, until they are on disk."""
    block = np.random.default_rng(0).bytes(1 << 24)
    source, target = scratch / "copy.in", scratch / "copy.out"
    with source.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    os.sync()
    begin = clock()
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 24)
        written.flush()
        os.fsync(written.fileno())
    seconds = clock() - begin
    source.unlink()
    target.unlink()
    return seconds


def long_graphs(scratch: Path, layers: Sequence[int]) -> list[Row]:
    """Seconds by nodes, and the exponent that fits them; the shortest graphs show what any rewrite takes."""
    nodes, seconds, ours = [], [], []
    for count in layers:
        stack = Stack(count, hidden=16, inner=16, heads=4)
        source = write(stack, scratch / "in.onnx", external=False)
        found = watched("rewrite_file", source, scratch / "out.onnx", "mqa")
        nodes.append(count * NODES_A_LAYER)
        seconds.append(found["seconds"])
        ours.append(found["seconds"] - found["stages"]["verify"])
        print(f"    {nodes[-1]} nodes: {seconds[-1]:.1f} s {found['stages']}", flush=True)
    span = f"{nodes[0]:,} to {nodes[-1]:,} nodes: exponent of time"
    return [_exponent(case, nodes, taken) for case, taken in ((span, seconds), (f"{span} without verification", ours))]


def _exponent(case: str, nodes: Sequence[int], seconds: Sequence[float]) -> Row:
    exponent = float(np.polyfit(np.log(nodes), np.log(seconds), 1)[0])
    more = {"nodes": list(nodes), "seconds": [round(s, 2) for s in seconds]}
    return Row("scale", case, exponent, None, None, "", None, 1.1, exponent <= 1.1, more)


def many_rewrites(scratch: Path, times: int) -> list[Row]:
    """Growth from the second quarter to the last, so that what is filled once does not count."""
    source = write(Stack(1, hidden=32, inner=32, heads=4), scratch / "in.onnx", external=False)
    found = watched("rewrite_often", source, scratch / "out.onnx", times)
    quarter = times // 4
    medians = [float(np.median(found["memory"][a : a + quarter])) for a in (quarter, 3 * quarter)]
    growth = (medians[1] - medians[0]) / MB
    counts = [min(found["files"][a : a + quarter]) for a in (quarter, 3 * quarter)]
    files = counts[1] - counts[0]  # the least, since the one that samples memory has a file open now and then
    allowed = 0.01 * times / 2  # MB: 10 kB a rewrite is the noise of an allocator
    rate = {"kb_a_rewrite": round(1000 * growth / (times / 2), 2), "seconds": round(found["seconds"], 1)}
    return [
        Row("scale", f"{times} rewrites: growth of memory", growth, None, None, "MB", None, allowed, growth <= allowed,
            rate),
        Row("scale", f"{times} rewrites: growth of open files", files, None, None, "files", None, 0, files <= 0),
    ]  # fmt: skip


# ---------------------------------------------------------------------- a checkpoint of 70 billion parameters

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
    "intermediate_size": 28672, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
"""config.json of Meta-Llama-3-70B, as it is published."""


def checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = 5 * GB) -> int:
    """A sharded bfloat16 checkpoint: keys and values are numbers, the rest is holes. Returns its bytes."""
    h, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, shape in (("q", (h, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, h))):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
        shapes |= {f"{layer}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (v, h)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(s) for s in shards[-1].values()) + 2 * math.prod(shape) > shard_bytes and shards[-1]:
            shards.append({})
        shards[-1][name] = shape
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if "k_proj" in name or "v_proj" in name:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                values = np.random.default_rng(len(name) + shape[0]).standard_normal(shape, np.float32) * 0.02
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        file.truncate(8 + len(text) + place)


def huge_checkpoint(scratch: Path, layers: int) -> list[Row]:
    config = {**LLAMA_70B, "num_hidden_layers": layers}
    (scratch / "in").mkdir()
    total = checkpoint(scratch / "in", config)
    found = watched("rewrite_checkpoint", scratch / "in", scratch / "out", "gqa4")
    written = sum(512 * path.stat().st_blocks for path in (scratch / "out").iterdir())
    copy = plain_copy(scratch, written)
    wrong = _wrong(scratch / "in", scratch / "out", layers)
    for folder in ("in", "out"):
        shutil.rmtree(scratch / folder)
    case = f"{found['parameters']['before'] / 1e9:.1f} billion parameters as Hugging Face shards, {total / GB:.0f} GB"
    more = {"written_gb": round(written / GB, 2), "seconds": round(found["seconds"], 1)}
    return [
        Row("scale", f"{case}: anonymous memory", found["peak"] / MB, 4000, "4 GB", "MB",
            4000 * MB / found["peak"], 4000, found["peak"] <= 4000 * MB, more),
        Row("scale", f"{case}: writing", found["write"], copy, "plain copy of the bytes written", "s",
            copy / found["write"], 1 / 1.5, found["write"] <= 1.5 * copy),
        Row("scale", f"{case}: wrong tensors of those looked at", wrong, None, None, "tensors", None, 0, not wrong),
    ]  # fmt: skip


def _wrong(before: Path, after: Path, layers: int) -> int:
    """Tensors of the first and the last layer that are not what they should be: means of two heads, or unchanged."""
    import torch
    from safetensors import safe_open

    def read(folder: Path, name: str) -> torch.Tensor:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        with safe_open(folder / index[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    wrong = 0
    for i in (0, layers - 1):
        for part in "kv":
            name = f"model.layers.{i}.self_attn.{part}_proj.weight"
            old, new = read(before, name), read(after, name)
            mean = old.double().reshape(4, 2, 128, -1).mean(1).reshape(512, -1).float().to(old.dtype)
            wrong += not torch.equal(mean, new) or bool((new == 0).all())
        name = f"model.layers.{i}.post_attention_layernorm.weight"
        wrong += not torch.equal(read(before, name), read(after, name))
    return wrong


# ---------------------------------------------------------------------- command line

_VERDICTS = {True: "ok", False: "MISSED", None: ""}


def main(arguments: Sequence[str] | None = None) -> int:
    options_parser = parser(__doc__, quick="smaller files, shorter graphs, fewer rewrites", markdown=True)
    options_parser.add_argument(
        "--only", default="", metavar="CASE", help="file, wide file, sparse file, graph, rewrites or checkpoint"
    )
    options_parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    options = options_parser.parse_args(arguments)
    if options.cpu_time:
        os.environ[CPU_TIME] = "1"
    medium = Stack(18, hidden=2048, inner=8192, heads=16)
    large = Stack(25, hidden=4096, inner=16384, heads=32, sparse=True)
    wide = Stack(3, hidden=4096, inner=4096, heads=32, sparse=True)
    small = Stack(6, hidden=1024, inner=4096, heads=16)
    cases: dict[str, Callable[[Path], list[Row]]] = {
        "file": lambda p: large_file(p, quick_or(options, small, medium), quick_or(options, "0.3 GB", "3 GB")),
        "wide file": lambda p: large_file(p, wide, "1.2 GB, 3 layers as wide as those of 20 GB"),
        "sparse file": lambda p: large_file(p, large, "20 GB, sparse"),
        "graph": lambda p: long_graphs(p, quick_or(options, (50, 100, 200), (600, 1200, 2400, 4800))),
        "rewrites": lambda p: many_rewrites(p, quick_or(options, 60, 1000)),
        "checkpoint": lambda p: huge_checkpoint(p, quick_or(options, 2, 80)),
    }
    if options.quick:
        del cases["sparse file"], cases["wide file"]
    rows: list[Row] = []
    for name, case in cases.items():
        if options.only and options.only != name:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            for row in case(Path(scratch)):
                rows.append(row)
                print(f"{row.case}: {row.ours:.3g} {row.unit} (goal {row.goal}, {row.peer_name}: {row.peer}) "
                      f"{_VERDICTS[row.ok]} {dict(row.more)}", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, rows)
    if options.markdown:
        header = ("case", "ours", "unit", "beside it", "", "goal met")
        lines = [(r.case, r.ours, r.unit, r.peer, r.peer_name, r.ok) for r in rows]
        put_section(options.markdown, "Scale", f"`python -m benchmarks.scale`.\n\n{markdown_table(header, lines)}")
    return 0 if all(row.ok is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
