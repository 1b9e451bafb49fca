"""`rewriter kernels`, `profile --kernels` and `optimize(kernels=…)` on models that were rewritten for it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import rewriter
from codegen.errors import NotLegal
from codegen.launch import torch_op
from codegen.sight import Sight
from codegen.spec import GroupedQueryAttention
from rewriter.cli import run
from rewriter.errors import InvalidModelFile, NothingToRewrite, UsageError
from rewriter.install.torch_module import mixers
from rewriter.kernels.folder import library_in
from rewriter.kernels.needed import needs
from tests.kernels.problems import here

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")


class Mixer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        merged: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return merged


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Mixer(), Mixer()).eval()


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kernels")
    before, after = folder / "before.onnx", folder / "after.onnx"
    torch.onnx.export(
        net, (torch.randn(2, 9, 32),), str(before), dynamo=False, opset_version=17, input_names=["x"],
        output_names=["y"], dynamic_axes={"x": {0: "b", 1: "s"}},
    )  # fmt: skip
    rewriter.optimize(before, "gqa2").save(after)
    return before, after


@pytest.fixture(scope="module")
def emitted(files: tuple[Path, Path], kernel_cache: Path) -> tuple[Path, dict[str, Any]]:
    folder = files[1].parent / "out"
    done = subprocess.run(
        [sys.executable, "-m", "rewriter", "kernels", str(files[1]), "-o", str(folder), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return folder, json.loads(done.stdout)


def test_what_is_written(emitted: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = emitted
    (kernel,) = printed["kernels"]  # both layers share it
    assert set(kernel) >= {"name", "spec", "arch", "source", "binary", "resources"}
    assert kernel["arch"] == "cpu" and kernel["spec"]["kv_heads"] == 2 and kernel["spec"]["dtype"] == "float32"
    assert 0 < kernel["resources"]["stack_bytes"] < 512 * 1024
    assert f"// {kernel['name']}:" in (folder / kernel["source"]).read_text()
    assert {p.name for p in folder.iterdir()} == {
        kernel["source"], kernel["binary"], "rewriter_ops.cpp", "manifest.json",
    }  # fmt: skip
    assert json.loads((folder / "manifest.json").read_text())["kernels"] == printed["kernels"]


def test_the_file_runs_with_and_without_it(files: tuple[Path, Path], emitted: tuple[Path, dict[str, Any]]) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_in(emitted[0])))
    plain = ort.InferenceSession(str(files[1]), providers=["CPUExecutionProvider"])
    fast = ort.InferenceSession(str(files[1]), options, providers=["CPUExecutionProvider"])
    for shape in ((1, 1, 32), (3, 50, 32)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        ours, theirs = (s.run(None, {"x": x})[0] for s in (fast, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_mixed_file_has_kernels_of_both_kinds(files: tuple[Path, Path], tmp_path: Path) -> None:
    mixed, folder = tmp_path / "mixed.onnx", tmp_path / "out"
    names = [site.name for site in rewriter.inspect(files[0]).sites]
    rewriter.optimize(files[0], {names[0]: "gqa2", names[1]: "fnet"}).save(mixed)
    assert [type(need.spec).__name__ for need in needs(mixed)] == ["GroupedQueryAttention", "FourierMixing"]
    assert run(["kernels", str(mixed), "-o", str(folder), "--arch", "cpu"]) == 0
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_in(folder)))
    plain = ort.InferenceSession(str(mixed), providers=["CPUExecutionProvider"])
    fast = ort.InferenceSession(str(mixed), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 50, 32)).astype(np.float32)
    ours, theirs = (s.run(None, {"x": x})[0] for s in (fast, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    found = rewriter.profile(mixed, mixed, shapes={"x": (1, 16, 32)}, runs=1, threads=1, kernels=folder)
    assert {"FourierMixing", "GroupedQueryAttention"} <= set(found.after.ops)


def test_a_sparse_file_has_kernels_of_its_patterns(files: tuple[Path, Path], tmp_path: Path) -> None:
    sparse, folder = tmp_path / "sparse.onnx", tmp_path / "out"
    names = [site.name for site in rewriter.inspect(files[0]).sites]
    rewriter.optimize(files[0], {names[0]: "window:5,1", names[1]: "sparse-strided:4"}).save(sparse)
    patterns = [need.spec.pattern for need in needs(sparse) if isinstance(need.spec, GroupedQueryAttention)]
    assert patterns == [(Sight(reach=5, sinks=1),), (Sight(reach=5, stride=4),)]
    assert run(["kernels", str(sparse), "-o", str(folder), "--arch", "cpu"]) == 0
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_in(folder)))
    plain = ort.InferenceSession(str(sparse), providers=["CPUExecutionProvider"])
    fast = ort.InferenceSession(str(sparse), options, providers=["CPUExecutionProvider"])
    for length in (1, 9, 50):
        x = np.random.default_rng(0).standard_normal((3, length, 32)).astype(np.float32)
        ours, theirs = (s.run(None, {"x": x})[0] for s in (fast, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    full = ort.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.abs(full - ours).max() > 1e-3  # the control


def test_a_file_with_linear_and_with_mixed_chunk_attention_has_kernels_of_both(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    linear, folder = tmp_path / "linear.onnx", tmp_path / "out"
    names = [site.name for site in rewriter.inspect(files[0]).sites]
    rewriter.optimize(files[0], {names[0]: "linear:8", names[1]: "flash:8"}).save(linear)
    specs = [need.spec for need in needs(linear)]
    assert [type(spec).__name__ for spec in specs] == ["LinearAttention", "MixedChunkAttention"]
    assert specs[0].attention.heads == 4 and specs[0].attention.head_dim == 8 and specs[1].chunk == 8
    assert run(["kernels", str(linear), "-o", str(folder), "--arch", "cpu"]) == 0
    kernels = json.loads((folder / "manifest.json").read_text())["kernels"]
    assert all(kernel["resources"]["scratch_bytes"] > 0 for kernel in kernels)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_in(folder)))
    plain = ort.InferenceSession(str(linear), providers=["CPUExecutionProvider"])
    fast = ort.InferenceSession(str(linear), options, providers=["CPUExecutionProvider"])
    for length in (1, 9, 50):
        x = np.random.default_rng(0).standard_normal((3, length, 32)).astype(np.float32)
        ours, theirs = (s.run(None, {"x": x})[0] for s in (fast, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    found = rewriter.profile(linear, linear, shapes={"x": (1, 50, 32)}, runs=1, threads=1, kernels=folder)
    assert {"LinearAttentionLearned", "MixedChunksBiased"} <= set(found.after.ops)


def test_profile_counts_the_kernel(files: tuple[Path, Path], emitted: tuple[Path, dict[str, Any]]) -> None:
    shapes = {"x": (1, 16, 32)}
    found = rewriter.profile(*files, shapes=shapes, runs=1, threads=1, kernels=emitted[0])
    assert "GroupedQueryAttention" in found.after.ops and found.after.peak_bytes is not None
    off = rewriter.profile(*files, shapes=shapes, runs=1, threads=1, kernels="off")
    assert "GroupedQueryAttention" not in off.after.ops and "Softmax" in off.after.ops


def test_a_changed_library_is_not_loaded(emitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for name in ("rewriter_ops.so", "manifest.json"):
        (tmp_path / name).write_bytes((emitted[0] / name).read_bytes())
    assert library_in(tmp_path).name == "rewriter_ops.so"
    with (tmp_path / "rewriter_ops.so").open("ab") as file:
        file.write(b"!")
    with pytest.raises(InvalidModelFile, match="not the library"):
        library_in(tmp_path)
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(InvalidModelFile, match=r"manifest\.json cannot be read"):
        library_in(tmp_path)
    with pytest.raises(UsageError, match="no folder of kernels"):
        library_in(tmp_path / "missing")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["AFTER", "-o", "OUT", "--arch", "sm_30"], 2, "unknown arch"),
        (["AFTER", "-o", "OUT", "--arch", "cpu:mmx"], 2, "unknown arch"),
        (["AFTER", "-o", "MISSING/OUT"], 2, "does not exist"),
        (["BEFORE", "-o", "OUT"], 1, "no rewritten attention"),
        (["NONE", "-o", "OUT"], 2, "no such file"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, message: str, files: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    places = {"AFTER": str(files[1]), "BEFORE": str(files[0]), "OUT": str(tmp_path / "out")}
    places |= {"MISSING/OUT": str(tmp_path / "missing" / "out"), "NONE": str(tmp_path / "none.onnx")}
    assert run(["kernels", *(places.get(a, a) for a in arguments)]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_graphics_cards_that_are_not_here(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("triton")
    folder = tmp_path / "k"
    assert run(["kernels", str(files[1]), "-o", str(folder), "--arch", "sm_90,gfx942", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [Path(k["binary"]).suffix for k in printed["kernels"]] == [".cubin"] * 3 + [".hsaco"] * 3
    for kernel in printed["kernels"]:
        code = (folder / kernel["binary"]).read_bytes()
        assert code[:4] == b"\x7fELF" and hashlib.sha256(code).hexdigest() == kernel["sha256"]
        assert kernel["name"].encode() in code, "the binary does not hold the kernel that it is named after"
        assert "@triton.jit" in (folder / kernel["source"]).read_text()
        assert (kernel["resources"]["stack"], kernel["resources"]["spills"]) == (0, 0)
    assert "triton" in printed
    library = printed["library"]
    assert (library["arch"], library["cards"]) == ("sm_90", ["sm_90"]), "operators for AMD's cards are not made"
    assert hashlib.sha256(library_in(folder).read_bytes()).hexdigest() == library["sha256"]
    assert (folder / "rewriter_ops.cpp").is_file()


def test_another_processor(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    assert run(["kernels", str(files[1]), "-o", str(tmp_path / "k"), "--arch", "cpu:avx2", "--json"]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    assert kernel["isa"] == "avx2" and (tmp_path / "k" / "rewriter_ops.so").exists()


def test_hostile_names_in_a_file_reach_no_source(
    files: tuple[Path, Path], emitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Node, value and initializer names, doc strings and metadata are anyone's text."""
    import onnx

    evil = '*/ int main(){system("id");} /*\n#include "/etc/passwd"\n{{ 7*7 }}'
    model = onnx.load(str(files[1]))
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        node.name, node.doc_string = f"{evil}{node.name}", evil
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name and name not in ("x", "y"):
                    names[i] = renamed.setdefault(name, f"{evil}{len(renamed)}")
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    del model.graph.value_info[:]
    model.graph.name = model.doc_string = model.producer_name = evil
    path = tmp_path / "evil.onnx"
    onnx.save(model, str(path))
    assert run(["kernels", str(path), "-o", str(tmp_path / "k")]) == 0
    texts = [p.read_text() for p in (tmp_path / "k").iterdir() if p.suffix in (".cpp", ".json")]
    assert len(texts) == 3 and not any("system" in t or "passwd" in t or "49" in t.split("\n")[0] for t in texts)
    built = [folder / "rewriter_ops.so" for folder in (tmp_path / "k", emitted[0])]
    assert built[0].read_bytes() == built[1].read_bytes()


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"kv_num_heads": 0}, {"dtype": 7}])
def test_wrong_attributes_in_a_file_are_an_invalid_file(
    change: dict[str, int], files: tuple[Path, Path], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(str(files[1]))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.domain == "rewriter.ops" and attribute.name in change:
                attribute.i = change[attribute.name]
    path = tmp_path / "wrong.onnx"
    onnx.save(model, str(path))
    with pytest.raises(InvalidModelFile, match="wrong attributes"):
        needs(path)


# ---------------------------------------------------------------------- torch modules


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real: Callable[..., Tensor] = torch_op.launch

    def spy(kernel: Any, *rest: Any) -> Tensor:
        seen.append(kernel.name)
        return real(kernel, *rest)

    monkeypatch.setattr(torch_op, "launch", spy)
    return seen


def test_optimize_runs_the_kernel_it_was_told(net: nn.Module, launches: list[str]) -> None:
    x = torch.randn(2, 9, 32)
    fast = rewriter.optimize(net, "gqa2", example_inputs=(x,), kernels="cpp")
    off = rewriter.optimize(net, "gqa2", example_inputs=(x,), kernels="off")
    assert not launches, "proofs are made with torch's own operators"
    with torch.no_grad():
        torch.testing.assert_close(fast(x), off(x), rtol=1e-4, atol=1e-5)
    assert len(launches) == 2
    fast(x).sum().backward()
    assert all(m.k_proj.weight.grad is not None for m in mixers(fast).values())
    auto = rewriter.optimize(net, "gqa2", example_inputs=(x,))
    before = len(launches)
    with torch.no_grad():
        auto(x)
    assert len(launches) == before, "a problem this small is left to torch"


def test_what_no_kernel_can_reach_is_said(net: nn.Module, files: tuple[Path, Path]) -> None:
    x = torch.randn(2, 9, 32)
    program = torch.export.export(net, (x,), strict=False)
    for model in (program, files[0]):
        with pytest.raises(UsageError, match="means nothing"):
            rewriter.optimize(model, "gqa2", kernels="cpp")
    with pytest.raises(UsageError, match="not available"):
        rewriter.optimize(net, "gqa2", example_inputs=(x,), kernels="opencl")
    small = rewriter.optimize(net, "gqa2", example_inputs=(x,), kernels="triton")
    with pytest.raises(NotLegal, match="there is no kernel for cpu"), torch.no_grad():
        small(x)


def test_a_model_without_rewritten_attention_needs_none(files: tuple[Path, Path]) -> None:
    with pytest.raises(NothingToRewrite):
        needs(files[0])
    assert [n.spec.kv_heads for n in needs(files[1])] == [2]
