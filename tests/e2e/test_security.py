"""Files that mean harm: nothing outside is read, no code runs, no control code reaches a terminal or a page.

Links and places of external data are in tests/unit/test_onnx_load.py, the cache of kernels in
tests/kernels/test_cache.py, what may reach a template in tests/kernels/test_render.py. docs/security.md is the promise.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch
from safetensors.torch import load_file, save_file

import rewriter
from benchmarks import folder_fuzz, fuzz
from benchmarks.scale_models import Stack, write
from rewriter import cli
from rewriter.calibration.files import read_calibration
from rewriter.calibration.tokenizer import tokenizer_beside
from rewriter.errors import InvalidModelFile, RewriteError, UsageError
from rewriter.install.checkpoint_folder import copy_side_files
from rewriter.kernels.folder import library_in
from rewriter.kernels.needed import needs
from tests.uptrain.small_models import bert, llama, student_of, token_ids

EVIL = "\x1b[31m\x07</title><script>alert(1)</script>\"'{{7*7}}{% x %}`touch pwned`$(touch pwned)/../../\u202ex\r\n"


class Runs:
    """Unpickled by anything but a careful unpickler, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


# ---------------------------------------------------------------------- names


def hostile(path: Path) -> Path:
    """A sound model in which everything that has a name has an evil one."""
    model = onnx.load_from_string(fuzz.sound(0))
    names: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        return names.setdefault(name, f"{EVIL}{len(names)}")

    outside = {x.name for x in (*model.graph.input, *model.graph.output)}
    names.update({name: name for name in outside})
    for node in model.graph.node:
        node.name = f"/layers.0/attn{EVIL}{node.name}"
        node.doc_string = EVIL
        for values in (node.input, node.output):
            values[:] = [renamed(name) for name in values]
    for tensor in model.graph.initializer:
        tensor.name = renamed(tensor.name)
    del model.graph.value_info[:]
    model.graph.name = model.producer_name = model.producer_version = EVIL
    model.metadata_props.add(key=EVIL, value=EVIL)
    onnx.save(model, path)
    return path


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.add(tag)


def said(*words: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(list(words))
    return code, out.getvalue() + err.getvalue()


def harmless(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text)


def test_evil_names_go_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every command that reads a file, down to the files that it writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    path, out = str(hostile(tmp_path / "in.onnx")), str(tmp_path / "out.onnx")
    commands = (
        ("inspect", path, "--graph", "page.html"),
        ("inspect", path, "--graph", "site.svg"),
        ("rewrite", path, out, "-t", "mqa"),
        ("verify", out, "--against", path),
        ("profile", path, out, "--runs", "1"),
        ("kernels", out, "-o", "built"),
    )
    for words in commands:
        code, text = said(*words)
        assert code == 0 and harmless(text), (words, code, ascii(text[-500:]))
    code, text = said("rewrite", path, out, "-t", "gqa7", "--debug")
    assert code == 2 and harmless(text) and "attn" in text
    assert {"pwned"}.isdisjoint(p.name for p in tmp_path.rglob("*"))
    assert {p.name for p in tmp_path.iterdir()} == {
        "in.onnx", "out.onnx", "page.html", "site.svg", "built", "cache",
    }  # fmt: skip
    for page in ("page.html", "site.svg"):
        text = (tmp_path / page).read_text()
        assert "script" not in Elements(text).found and "alert" in text, "the control: the name is there, as text"
        assert not [c for c in text if not (c.isprintable() or c in "\n\t")]
    for source in (tmp_path / "built").glob("*.cpp"):
        assert "alert" not in source.read_text() and "7*7" not in source.read_text()
    _, text = said("inspect", path, "--json")
    assert harmless(text) and EVIL in json.loads(text.splitlines()[0])["producer"]
    assert not harmless(EVIL), "the control: the name is not harmless in itself"


def test_a_page_with_the_raw_name_would_be_noticed() -> None:
    assert "script" in Elements(f"<title>{EVIL}</title>").found


# ---------------------------------------------------------------------- pickles


def test_a_pickled_checkpoint_runs_nothing(tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "pwned"
    llama().save_pretrained(folder)
    state = {k: v.clone() for k, v in llama().state_dict().items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert rewriter.load(folder) is not None, "the control: plain tensors are read"
    torch.save({**state, "x": Runs(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(InvalidModelFile) as refused:
        rewriter.load(folder)
    assert refused.value.hint and not marker.exists()
    assert said("inspect", str(folder))[0] == 3
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the control: another reader would have run it"


def test_a_pickle_in_a_checkpoint_of_training_runs_nothing(tmp_path: Path) -> None:
    marker, run = tmp_path / "pwned", tmp_path / "run"
    recipe = rewriter.Recipe(steps=2, batch=2, window=16, validation=2, save_every=1)
    teacher = llama()
    rewriter.uptrain(student_of(teacher), teacher, token_ids(600), recipe=recipe, checkpoints=run)
    newest = sorted(run.glob("step-*"))[-1]
    torch.save(Runs(marker), newest / "optimizer.bin")
    with pytest.raises(InvalidModelFile, match="damaged"):
        rewriter.uptrain(student_of(teacher), teacher, token_ids(600), recipe=recipe, checkpoints=run, resume=True)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickled_arrays_run_nothing(tmp_path: Path, suffix: str) -> None:
    marker, path = tmp_path / "pwned", tmp_path / f"data{suffix}"
    array = np.array([Runs(marker)], dtype=object)
    (np.save if suffix == ".npy" else np.savez)(path, array)
    model = fuzz.sound(0)
    (tmp_path / "in.onnx").write_bytes(model)
    words = ["rewrite", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "-t", "mqa", "--calibration", str(path)]
    assert said(*words)[0] == 2 and not marker.exists()
    loaded = np.load(path, allow_pickle=True)
    assert (loaded if suffix == ".npy" else loaded["arr_0"]) is not None and marker.exists(), "the control"


# ---------------------------------------------------------------------- checkpoints that name code, or other files


def edited(folder: Path, file: str, **entries: Any) -> Path:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **entries}))
    return folder


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "someone/attention"},
        {"_attn_implementation": "someone/attention@v1:forward"},
        {"text_config": {"attn_implementation": "someone/attention"}},
        {"attn_implementation": {"": "someone/attention"}},
    ],
    ids=["plain", "private", "nested", "by part"],
)
def test_a_config_that_asks_for_code_is_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    llama().save_pretrained(tmp_path / "model")
    edited(tmp_path / "model", "config.json", _attn_implementation="eager")
    assert rewriter.load(tmp_path / "model") is not None, "the control"
    with pytest.raises(InvalidModelFile, match="code from elsewhere"):
        rewriter.load(edited(tmp_path / "model", "config.json", **entries))


def test_code_beside_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "pwned"
    llama().save_pretrained(folder)
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    edited(folder, "config.json", auto_map=auto)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "T"}))
    assert rewriter.load(folder) is not None
    tokenizer_beside(folder)
    assert not marker.exists()
    exec((folder / "code.py").read_text())
    assert marker.exists(), "the control"


def refused(folder: Path) -> str:
    """What is said of a folder, by the command too: one line, a hint, exit code 3."""
    with pytest.raises(InvalidModelFile) as caught:
        rewriter.load(folder)
    code, text = said("inspect", str(folder))
    assert code == 3 and "hint: " in text and "Traceback" not in text and caught.value.hint
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint."""
    llama().save_pretrained(tmp_path / "model")
    assert rewriter.load(tmp_path / "model") is not None, "the control"
    return tmp_path / "model"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_link_out_of_a_checkpoint_is_not_followed(folder: Path, file: str) -> None:
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    for other in elsewhere.iterdir():
        (folder / other.name).write_bytes(other.read_bytes())
    (folder / file).unlink()
    (folder / file).symlink_to(elsewhere / file)
    assert "leads out" in refused(folder)
    (folder.parent / "linked").symlink_to(elsewhere)
    assert rewriter.load(folder.parent / "linked") is not None, "the control: a link to a whole folder"


def test_a_download_cache_is_followed(folder: Path) -> None:
    hub = folder.parent / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "1").mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        file.rename(hub / "blobs" / str(number))
        (hub / "snapshots" / "1" / file.name).symlink_to(f"../../blobs/{number}")
    assert rewriter.load(hub / "snapshots" / "1") is not None


def test_data_of_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    for number, words in (
        (95, ""),
        (96, "does not take a calibration batch"),
        (-1, "does not take a calibration batch"),
    ):
        np.save(tmp_path / "ids.npy", np.full((4, 8), number))
        target, out = str(tmp_path / "ids.npy"), str(tmp_path / "out")
        code, text = said("rewrite", str(folder), out, "-t", "gqa2", "--calibration", target)
        assert code == (2 if words else 0) and words in text and "bug" not in text, (number, text[-300:])


def test_a_calibration_archive_that_unpacks_to_anything(tmp_path: Path) -> None:
    def archive(rows: int) -> Path:
        np.savez_compressed(tmp_path / "x.npz", input_ids=np.zeros((rows, 1 << 12), np.int64))
        return tmp_path / "x.npz"

    assert len(read_calibration(archive(16))) == 1, "the control"
    path = archive(1 << 13)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UsageError, match="would take 268,"):
        read_calibration(path)


def test_a_broken_tokenizer_is_none(folder: Path) -> None:
    folder_fuzz._tokenizer(folder)
    assert tokenizer_beside(folder) is not None, "the control"
    for entries in ({"tokenizer_class": [1]}, {"added_tokens_decoder": {"x": 7}}):
        assert tokenizer_beside(edited(folder, "tokenizer_config.json", **entries)) is None
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("[" * 100_000)
    assert tokenizer_beside(folder) is None


def test_links_of_a_tokenizer(folder: Path) -> None:
    """Into a download cache they are followed, below a snapshot too; elsewhere they are not."""
    hub = folder.parent / "models--a--b"
    place = hub / "snapshots" / "1" / "tokenizer"
    place.mkdir(parents=True)
    (hub / "blobs").mkdir()
    folder_fuzz._tokenizer(place)
    for file in list(place.iterdir()):
        file.rename(hub / "blobs" / file.name)
        file.symlink_to(f"../../../blobs/{file.name}")
    assert tokenizer_beside(place.parent) is not None
    (place / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(InvalidModelFile, match="leads out"):
        tokenizer_beside(place.parent)


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "{absolute}", "sub/x.safetensors", "x.gguf"])
def test_an_index_names_files_of_its_folder(folder: Path, place: str) -> None:
    weights = (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": place.format(absolute=weights)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its folder" in refused(folder)
    with pytest.raises(InvalidModelFile, match="outside its folder"):
        rewriter.optimize(folder, "gqa2", streamed=True)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"num_hidden_layers": 10**9}, "makes no sense"),
        ({"num_hidden_layers": 90_000}, "far larger model"),
        ({"num_labels": 10**12}, "makes no sense"),
        ({"text_config": {"depths": [2, 10**9]}}, "makes no sense"),
        ({"intermediate_size": 10**13}, "far larger model"),
        ({"hidden_size": 40}, "other shapes"),
        ({"num_key_value_heads": 0}, "cannot be read"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_config_that_asks_for_more_than_there_is(folder: Path, entries: dict[str, Any], words: str) -> None:
    assert words in refused(edited(folder, "config.json", **entries))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_brackets_without_end(folder: Path, file: str) -> None:
    (folder / file).write_text("[" * 100_000)
    refused(folder)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[f"{EVIL}"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks 1 tensors that its architecture has, the first of them {name}" in refused(folder)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten model that its config alone cannot describe."""
    folder = tmp_path_factory.mktemp("pooled") / "model"
    rewriter.save(rewriter.optimize(bert(), "mqa", verify=False), folder)
    assert rewriter.load(folder) is not None, "the control"
    return folder


def _change(**entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update(entries)


def _first(manifest: dict[str, Any]) -> Any:
    return next(iter(manifest["owners"].values()))


def _of_first(part: str, name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: _first(manifest)[part].update({name: value})


SPEC: tuple[tuple[str, Any], ...] = (
    ("heads", True), ("heads", 4.0), ("kv_heads", -1), ("bias", {}), ("scale", "1; evil()"),
)  # fmt: skip
PROTOCOL: tuple[tuple[str, Any], ...] = (
    ("order", "abc"), ("order", [1]), ("returns", None), ("roles", []), ("roles", {"mask": 1}), ("defaults", {"x": []}),
    ("bare", "no"), ("trains", 1), ("causal", "sometimes"), ("flat_mask", EVIL), ("rotary", None),
    ("attention_dropout", -1), ("output_dropout", "0.1"), ("input_norm", 7),
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        _change(architecture=[1]),
        _change(architecture={"kind": "transformers", "class": "LlamaForCausalLM"}),
        _change(owners=[]),
        _change(tied=[1]),
        _change(weights="../elsewhere.safetensors"),
        lambda m: m["architecture"]["config"].update(hidden_size="wide"),
        lambda m: m["architecture"]["config"].update(hidden_size=10**12),
        lambda m: m["architecture"]["config"].update(num_hidden_layers=10**9),
        lambda m: m["architecture"]["config"].update(num_hidden_layers=90_000),
        lambda m: m["architecture"].update(attention="flash_attention_2"),
        lambda m: _first(m).update(kind="another"),
        *(_of_first("spec", name, value) for name, value in SPEC),
        *(_of_first("protocol", name, value) for name, value in PROTOCOL),
    ],
    ids=[
        "architecture",
        "no config",
        "owners",
        "tied",
        "weights",
        "type",
        "width",
        "layers",
        "many layers",
        "attention",
        "kind",
        *(f"spec {name} {type(value).__name__}" for name, value in SPEC),
        *(f"call {name} {type(value).__name__}" for name, value in PROTOCOL),
    ],
)
def test_a_manifest_that_makes_no_sense(
    pooled: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pooled, folder)
    manifest = json.loads((folder / "rewrite.json").read_text())
    change(manifest)
    (folder / "rewrite.json").write_text(json.dumps(manifest))
    refused(folder)


def test_side_files_that_lead_elsewhere_do_not_go_along(tmp_path: Path) -> None:
    """A checkpoint that links to a private file must not carry it into an output that may be published."""
    hub = tmp_path / "models--a--b"
    folder, blobs, out = hub / "snapshots" / "1", hub / "blobs", tmp_path / "out"
    for made in (folder, blobs, out):
        made.mkdir(parents=True)
    (tmp_path / "id_rsa").write_text("secret")
    (blobs / "abc").write_text("words")
    (folder / "vocab.txt").symlink_to("../../blobs/abc")
    (folder / "notes.txt").symlink_to(tmp_path / "id_rsa")
    copy_side_files(folder, out)
    assert {p.name for p in out.iterdir()} == {"vocab.txt"} and not (out / "vocab.txt").is_symlink()


def test_a_library_that_everybody_may_change_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="every user may write"):
        library_in(tmp_path)
    tmp_path.chmod(0o700)
    with pytest.raises(UsageError, match="no library"):
        library_in(tmp_path)


# ---------------------------------------------------------------------- rewritten files that were broken since


def _in_body(op_type: str, change: Callable[[onnx.NodeProto], object]) -> Callable[[onnx.ModelProto], object]:
    """Change the first such node of the first function."""
    return lambda m: change(next(n for f in m.functions for n in f.node if n.op_type == op_type))


def _nodes_of_ours(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "rewriter.ops"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_in_body("MatMul", lambda n: n.input.__setitem__(0, EVIL)), "which nothing makes"),
        (_in_body("MatMul", lambda n: n.input.pop()), "has 1 inputs"),
        (_in_body("Constant", lambda n: n.attribute.pop()), "has 0 attributes"),
        (_in_body("MatMul", lambda n: setattr(n, "op_type", "Relu")), "has 2 inputs"),
        (lambda m: [n.attribute.pop() for n in _nodes_of_ours(m) for _ in range(len(n.attribute))], "wrong attributes"),
        (lambda m: [m.graph.value_info.pop() for _ in range(len(m.graph.value_info))]
         and _in_body("MatMul", lambda n: n.input.reverse())(m), "onnxruntime does not open|does not run"),
    ],
    ids=["unknown input", "too few", "no constant", "too many", "no attributes", "turned"],
)  # fmt: skip
def test_a_rewritten_file_that_was_broken(
    tmp_path: Path, change: Callable[[onnx.ModelProto], object], words: str
) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    write(Stack(1, hidden=16, inner=16, heads=4), source, external=False)
    rewriter.optimize(source, "mqa", verify=False).save(out)
    assert needs(out), "the control"
    model = onnx.load(out)
    change(model)
    onnx.save(model, out)
    with pytest.raises(RewriteError, match=words):
        needs(out)
    for words_of_command in (("inspect", str(out)), ("rewrite", str(out), str(source), "-t", "mqa")):
        code, text = said(*words_of_command)
        assert "bug in rewriter" not in text and harmless(text) and (code == 0 or "hint: " in text)


def test_a_function_of_another_version_is_refused(tmp_path: Path) -> None:
    """What is written out to be looked at has to speak the version of the file."""
    path = write(Stack(1, hidden=16, inner=16, heads=4), tmp_path / "m.onnx", external=False)
    rewriter.optimize(path, "window", verify=False).save(path)
    model = onnx.load(path)
    for function in model.functions:
        function.opset_import[0].version = 16
    onnx.save(model, path)
    with pytest.raises(RewriteError, match="cannot be written out") as caught:
        rewriter.inspect(path).to_dict()
    assert caught.value.hint


def test_a_constant_of_an_unknown_domain(tmp_path: Path) -> None:
    """To onnxruntime it is a constant; what it makes of one is read, not what the standard says."""
    path = write(Stack(1, hidden=16, inner=16, heads=4), tmp_path / "m.onnx", external=False)
    sound, model = rewriter.inspect(path).to_dict()["sites"], onnx.load(path)
    for weight in list(model.graph.initializer):
        model.graph.initializer.remove(weight)
        made = onnx.helper.make_node("Constant", [], [weight.name], value=weight)
        made.domain = "elsewhere" if weight.name == "layers.0.q" else ""
        model.graph.node.insert(0, made)
    onnx.save(model, path)
    found = rewriter.inspect(path).to_dict()["sites"]
    assert [(s["name"], s["status"]) for s in found] == [(s["name"], s["status"]) for s in sound]


# ---------------------------------------------------------------------- loops


def with_a_constant(path: Path, numbers: int) -> Path:
    """A sound model, and beside it a constant of so many numbers whose sum is added to what comes out."""
    model = onnx.load(write(Stack(1, hidden=16, inner=16, heads=4), path, external=False))
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["inner" if name == output else name for name in node.output]
    model.graph.initializer.append(nh.from_array(np.array([numbers]), "size"))
    model.graph.node.extend([
        oh.make_node("ConstantOfShape", ["size"], ["large"]), oh.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
        oh.make_node("Add", ["inner", "sum"], [output]),
    ])  # fmt: skip
    onnx.save(model, path)
    return path


def test_memory_beyond_what_a_file_of_this_size_needs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (str(with_a_constant(tmp_path / f"{n}.onnx", n)) for n in (1000, 2 * 10**9))
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    assert said("rewrite", small, str(tmp_path / "out.onnx"), "-t", "mqa")[0] == 0, "the control"
    commands = (("inspect", large), ("rewrite", large, str(tmp_path / "out.onnx"), "-t", "mqa"),
                ("verify", large, "--against", large))  # fmt: skip
    for words in commands:
        code, text = said(*words)
        assert code == 1 and "more than the 4.0 GB of memory" in text and "hint: " in text, (words, text[-300:])
    monkeypatch.setenv("REWRITER_MEMORY_LIMIT", "0.5")
    medium = str(with_a_constant(tmp_path / "medium.onnx", 2 * 10**8))
    code, text = said("profile", medium, medium, "--runs", "1")
    assert code == 1 and "more than the 0.5 GB of memory" in text and "hint: " in text, text[-300:]
    monkeypatch.setenv("REWRITER_MEMORY_LIMIT", "a lot")
    code, text = said("inspect", small)
    assert code == 2 and "REWRITER_MEMORY_LIMIT='a lot' is no number of GB" in text
    assert resource.getrlimit(resource.RLIMIT_DATA) == unlimited


def with_loop(path: Path, rounds: int) -> Path:
    """A sound model behind a loop that goes round so many times."""
    model = onnx.load(write(Stack(1, hidden=16, inner=16, heads=4), path, external=False))
    kinds = {"i": onnx.TensorProto.INT64, "on": onnx.TensorProto.BOOL, "x": onnx.TensorProto.FLOAT}
    ports = {name: oh.make_tensor_value_info(name, kind, [] if name != "x" else None) for name, kind in kinds.items()}
    outputs = [oh.make_tensor_value_info(f"{n}_out", kinds[n], [] if n == "on" else None) for n in ("on", "x")]
    nodes = [oh.make_node("Identity", ["on"], ["on_out"]), oh.make_node("Relu", ["x"], ["x_out"])]
    body = oh.make_graph(nodes, "body", list(ports.values()), outputs)
    model.graph.initializer.extend([nh.from_array(np.array(rounds), "rounds"), nh.from_array(np.array(True), "go")])
    for node in model.graph.node:
        node.input[:] = ["looped" if name == "h0" else name for name in node.input]
    model.graph.node.insert(0, oh.make_node("Loop", ["rounds", "go", "h0"], ["looped"], body=body))
    onnx.save(model, path)
    return path


def test_a_loop_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, path = str(with_loop(tmp_path / "short.onnx", 3)), str(with_loop(tmp_path / "in.onnx", 2**62))
    out = str(tmp_path / "out.onnx")
    assert said("rewrite", short, out, "-t", "mqa")[0] == 0, "the control"
    monkeypatch.setenv("REWRITER_RUN_TIMEOUT", "0.5")
    commands = (("inspect", path), ("rewrite", path, out, "-t", "mqa"), ("verify", path, "--against", path),
                ("profile", path, path, "--runs", "1"))  # fmt: skip
    for words in commands:
        code, text = said(*words)
        assert code == 1 and "did not end within 0.5 seconds" in text and "hint: " in text, (words, text[-300:])
    monkeypatch.setenv("REWRITER_RUN_TIMEOUT", "soon")
    code, text = said("inspect", path)
    assert code == 2 and "REWRITER_RUN_TIMEOUT='soon' is no number of seconds" in text


def test_a_node_without_end_ends_the_command(tmp_path: Path) -> None:
    """onnxruntime stops between two nodes; a convolution of 10^14 products is one."""
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    for side in (3, 6_000):
        model = onnx.load(write(Stack(1, hidden=16, inner=16, heads=4), path, external=False))
        sizes = [nh.from_array(np.array([1, 1, n, n]), name) for n, name in ((side, "image"), (side // 2, "kernel"))]
        model.graph.initializer.extend([*sizes, nh.from_array(np.array(0.0, np.float32), "nothing")])
        nodes = [oh.make_node("ConstantOfShape", [n], [f"{n}_made"]) for n in ("image", "kernel")]
        nodes += [
            oh.make_node("Mul", ["image_made", "zero"], ["drawn"]),
            oh.make_node("Conv", ["drawn", "kernel_made"], ["seen"]),
        ]
        nodes += [
            oh.make_node("ReduceSum", ["h0"], ["zero"], keepdims=0),
            oh.make_node("ReduceMax", ["seen"], ["most"], keepdims=0),
        ]
        nodes += [oh.make_node("Mul", ["most", "nothing"], ["none"]), oh.make_node("Add", ["h0", "none"], ["shifted"])]
        for node in model.graph.node:
            node.input[:] = ["shifted" if name == "h0" else name for name in node.input]
        nodes = [nodes[4], nodes[0], nodes[1], nodes[2], nodes[3], *nodes[5:]]
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        onnx.save(model, path)
        command = [sys.executable, "-m", "rewriter", "rewrite", str(path), str(out), "-t", "mqa", "--json"]
        limited = {**os.environ, "REWRITER_RUN_TIMEOUT": "5"}
        done = subprocess.run(command, capture_output=True, text=True, env=limited, timeout=200)
        if side == 3:
            assert done.returncode == 0, done.stderr[-500:]
            out.unlink()
    assert done.returncode == 1 and "did not end within 5 seconds" in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "RunsTooLong" and not out.exists()
