"""Mixing matrices in place of attention, through every door, and how they are fitted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import rewriter
from codegen.ops.token_mixing import token_mixing as oracle
from codegen.spec import LinearMixing, Structure
from passes.targets import LinearMixer
from passes.targets.catalogue import find
from passes.weights.matrices import MatrixFit, MatrixFitting
from rewriter.errors import NothingToRewrite, UsageError
from rewriter.install.token_mixer import token_mixers
from tests.targets.lossless_twin import run_file
from tests.targets.watched_mixes import Watched, off, relative, rewritten
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

Array = NDArray[Any]
ZooOnnx = Callable[..., Path]
CLOSE = 1e-5
"""Relative to the largest number of the answer: float32, sums over whole sequences."""

NAMES = {Structure.DENSE: "linear-mixer", Structure.CIRCULANT: "circulant", Structure.TOEPLITZ: "toeplitz"}
STRUCTURES = [pytest.param(s, id=s.value) for s in Structure]
CASES = [pytest.param(ZOO[n], id=n) for n in ("bert-sdpa", "mha-sequence-first")]


def short(structure: Structure) -> str:
    """A target for up to 12 tokens."""
    return f"{NAMES[structure]}:12"


def parameters(mixer: nn.Module) -> dict[str, Array]:
    return {name: p.detach().numpy() for name, p in mixer.named_parameters(recurse=False)}


# ------------------------------------------------------------------ doors


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("calibrated", [False, True], ids=["initial", "fitted"])
def test_a_rewritten_module_is_the_oracle_of_its_input(case: ZooCase, structure: Structure, calibrated: bool) -> None:
    calibration = [case.inputs(3, 9, seed) for seed in range(3)] if calibrated else None
    model = rewritten(case, short(structure), calibration=calibration)
    mixed, report = token_mixers(model), model.rewrite_report
    assert len(mixed) == len(report.sites) == 2
    assert {row.after for row in report.sites} == {short(structure)} and not any(row.exact for row in report.sites)
    assert {row.merge for row in report.sites} == {"matrices" if calibrated else "initialised"}
    watched = Watched(model)
    for size in ((2, 7, 0), (3, 12, 1)):
        case.run(model, case.inputs(*size))
        for path, (hidden, answer) in watched.mixes.items():
            held = parameters(mixed[path])
            assert off(answer, oracle(mixed[path].spec, hidden, **held)) < CLOSE
            moved = held | {"sequence": np.roll(held["sequence"], 1)}
            assert off(answer, oracle(mixed[path].spec, hidden, **moved)) > 1e-2  # the control
    assert report.parameters.after == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="13 tokens is longer than the mixing matrix, which has 12"):
        case.run(model, case.inputs(2, 13, 0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_graphs_and_files_compute_what_the_module_does(
    case: ZooCase, structure: Structure, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    inputs, out = case.inputs(2, 7, 0), tmp_path / "mixed.onnx"
    module = rewritten(case, short(structure))
    expected = case.run(module, inputs)
    program = rewriter.optimize(torch.export.export(case.build(), (), inputs, strict=False), short(structure))
    assert relative(case.run(program.module(), inputs), expected) < CLOSE
    source = zoo_onnx(case, "dynamo18")
    rewriter.optimize(source, short(structure)).save(out)
    assert sum(n.domain == "rewriter.ops" for n in onnx.load(out).graph.node) == 2
    for size in ((2, 7, 0), (3, 12, 1)):
        inputs = case.inputs(*size)
        assert relative(run_file(out, inputs), case.run(module, inputs)) < CLOSE
        assert relative(run_file(source, inputs), case.run(module, inputs)) > 1e-2  # the control
    assert rewriter.verify(out, source).ok
    with pytest.raises(Exception, match="at_most_12_tokens"):
        run_file(out, case.inputs(2, 13, 0))


def test_a_program_keeps_its_dynamic_length(tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    inputs, tokens = case.inputs(2, 8, 0), torch.export.Dim("tokens", min=2, max=12)
    shapes = {name: {1: tokens} for name in inputs}
    program = torch.export.export(case.build(), (), inputs, dynamic_shapes=shapes, strict=False)
    for structure in (Structure.DENSE, Structure.CIRCULANT):
        after = rewriter.optimize(program, short(structure))
        torch.export.save(after, tmp_path / "mixed.pt2")
        again = torch.export.load(tmp_path / "mixed.pt2").module()
        module = rewritten(case, short(structure))
        for length in (8, 5, 12):
            more = case.inputs(2, length, 1)
            assert relative(case.run(again, more), case.run(module, more)) < CLOSE


def test_both_doors_fit_alike(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case, out = ZOO["bert-sdpa"], tmp_path / "mixed.onnx"
    batches = [{n: v.numpy() for n, v in case.inputs(4, 9, 100 + seed).items()} for seed in range(4)]
    module = rewritten(case, "toeplitz:12", calibration=batches)
    rewriter.optimize(zoo_onnx(case, "dynamo18"), "toeplitz:12", calibration=batches).save(out)
    inputs = case.inputs(2, 7, 0)
    assert relative(run_file(out, inputs), case.run(module, inputs)) < 1e-3
    other = rewritten(case, "toeplitz:12", calibration=batches[:2])
    assert relative(run_file(out, inputs), case.run(other, inputs)) > 1e-2  # the control: other batches


def test_a_rewritten_module_trains_exports_and_is_saved(tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    model = rewritten(case, {"0": "toeplitz:12", "1": "linear-mixer:12"})
    inputs = case.inputs(2, 12, 0)
    model.train()(**inputs).last_hidden_state.square().sum().backward()
    for mixer in token_mixers(model).values():
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in mixer.parameters())
    expected = case.run(model.eval(), inputs)
    program = torch.export.export(model, (), inputs, strict=False)
    assert relative(program.module()(**inputs).last_hidden_state, expected) < CLOSE
    model.save_pretrained(tmp_path / "mixed")
    again = rewriter.load(tmp_path / "mixed")
    assert [m.spec for m in token_mixers(again).values()] == [m.spec for m in token_mixers(model).values()]
    assert torch.equal(case.run(again, inputs), expected)


# ------------------------------------------------------------------ names and refusals


def test_names_say_structure_and_length() -> None:
    for structure, name in NAMES.items():
        assert find(name) == LinearMixer(structure) and LinearMixer(structure).name == name
        assert find(f"{name}:64") == LinearMixer(structure, 64) and LinearMixer(structure, 64).name == f"{name}:64"
        assert find(f"{name}:0") is None and find(f"{name}:") is None
    with pytest.raises(ValueError, match="tokens"):
        LinearMixer(tokens=0)
    bert = rewriter.inspect(ZOO["bert-sdpa"].build())
    assert all(set(NAMES.values()) <= set(bert.targets[site.name]) for site in bert.sites)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("gpt2-sdpa", "is causal", id="causal"),
        pytest.param("torch-decoder", "cross-attention", id="cross"),
        pytest.param("bert-sdpa", "7 tokens are longer than the matrix of 4.*linear-mixer:7", id="long"),
    ],
)
def test_refusals_say_why(name: str, reason: str) -> None:
    with pytest.raises(NothingToRewrite, match=reason):
        rewritten(ZOO[name], "linear-mixer:4")


def test_calibration_longer_than_the_matrix_is_refused() -> None:
    case = ZOO["bert-sdpa"]
    with pytest.raises(NothingToRewrite, match="9 tokens are longer than the matrix of 8"):
        rewritten(case, "linear-mixer:8", calibration=[case.inputs(2, 9, 0)])


def test_there_is_no_kernel_to_ask_for() -> None:
    with pytest.raises(UsageError, match="cannot reach"):
        rewritten(ZOO["bert-sdpa"], "linear-mixer:12", kernels="triton")


# ------------------------------------------------------------------ fits


def planted(structure: Structure, tokens: int, hidden: int, batch: int, noise: float = 0.0) -> tuple[Array, Array]:
    """Hidden states, and what a mix of this structure makes of them."""
    rng = np.random.default_rng(3)
    spec = LinearMixing(hidden, tokens, structure, bias=True)
    drawn = {name: rng.standard_normal(shape) for name, shape in spec.shapes.items()}
    x = rng.standard_normal((batch, tokens, hidden))
    y = oracle(spec, x, **drawn)
    return x, y + noise * rng.standard_normal(y.shape)


def fit(structure: Structure, x: Array, y: Array, asking: Array, tokens: int) -> MatrixFit:
    fitting = MatrixFitting(LinearMixing(x.shape[2], tokens, structure, bias=True))
    for part in np.array_split(np.arange(len(x)), 3):
        fitting.add(x[part], y[part], asking[part])
    return fitting.solve()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_planted_mix_is_found_again(structure: Structure) -> None:
    """Up to the ridge; and the figures are those of the answer itself."""
    x, y = planted(structure, 6, 5, 80)
    found = fit(structure, x, y, np.ones(x.shape[:2], bool), 6)
    left = float(np.sum((found.output(x) - y) ** 2)) / float(np.sum(y**2))
    assert np.isclose(found.explained, 1 - left, atol=1e-6) and found.explained > 0.99
    mean = y.mean(axis=(0, 1))
    assert np.isclose(found.constant, x.shape[0] * 6 * float(np.sum(mean**2)) / float(np.sum(y**2)))
    assert found.constant < 0.5  # the control: a constant does not do it
    wrong = fit(structure, x[:, ::-1], y, np.ones(x.shape[:2], bool), 6) if structure is Structure.DENSE else None
    assert wrong is None or wrong.explained > 0.99  # a dense matrix can turn tokens around
    shuffled = fit(structure, x[::-1], y, np.ones(x.shape[:2], bool), 6)
    assert shuffled.explained < 0.8  # the control: outputs of other inputs


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_step_is_least_squares(structure: Structure) -> None:
    """No parameter that is moved a little explains more: the fit stands at a minimum, up to the ridge."""
    x, y = planted(structure, 5, 4, 60, noise=3.0)
    found = fit(structure, x, y, np.ones(x.shape[:2], bool), 5)

    def error(**changed: Array) -> float:
        return float(np.sum((oracle(found.spec, x, **{**found.tensors, **changed}) - y) ** 2))

    best, rng = error(), np.random.default_rng(0)
    for name, array in found.tensors.items():
        step = 0.1 * float(np.abs(array).max()) * rng.standard_normal((8, *array.shape))
        assert all(error(**{name: array + s}) > best for s in step)


def test_padding_is_left_out_and_short_batches_are_taken() -> None:
    x, y = planted(Structure.DENSE, 6, 5, 80)
    asking = np.ones(x.shape[:2], bool)
    asking[::2, 4:] = False
    spoiled = np.where(asking[..., None], y, 1e3)
    clean = fit(Structure.DENSE, x, y, np.ones(x.shape[:2], bool), 9)
    found = fit(Structure.DENSE, x, spoiled, asking, 9)
    size = float(np.abs(y).max())
    assert np.abs(found.output(x) - clean.output(x)).max() < 0.05 * size
    assert np.abs(fit(Structure.DENSE, x, spoiled, np.ones(x.shape[:2], bool), 9).output(x) - y).max() > size
    assert not found.sequence[6:].any() and not found.sequence[:, 6:].any()  # nothing is known of these positions
    fitting = MatrixFitting(LinearMixing(5, 9, bias=True))
    fitting.add(x[:40], y[:40], asking[:40])
    fitting.add(x[40:, :3], y[40:, :3], np.ones((40, 3), bool))
    assert fitting.solve().sequence[:6, :6].any()


def test_a_report_says_what_matrices_explain() -> None:
    """On the zoo's BERT: more than the factors by which FNet is fitted, and than a constant."""
    case = ZOO["bert-sdpa"]
    batches = [case.inputs(8, 10, seed) for seed in range(4)]
    told = {}
    for target in ("fnet", "circulant:10", "toeplitz:10", "linear-mixer:10"):
        first = rewritten(case, target, calibration=batches).rewrite_report.sites[0]
        note = next(note for note in first.notes if "explains" in note)
        told[target] = [float(number) for number in re.findall(r"([\d.]+)%", note)]
    assert all(fitted > constant for fitted, constant in told.values())
    assert told["linear-mixer:10"][0] > told["fnet"][0]
