"""Convolutions and batch normalisations in projections, as vision models have them: heads are shared all the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.install.repeated_projection import repeated
from tests.targets.lossless_twin import distance, run_file

WIDTH, HEADS, DIM, SIDE = 32, 4, 8, 3
EXACT, MOVED = 1e-4, 1e-3


class Normed(nn.Module):
    """Attention over an image [B, 32, N, N], of which all projections end in a batch norm.

    Args:
        spelling: "linear" (tokens are flattened for the norm), "packed" (one linear layer makes all three), "conv" or
            "conv with bias".
    """

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        outputs = [3 * WIDTH] if spelling == "packed" else [WIDTH] * 3
        conv, bias = spelling.startswith("conv"), spelling == "conv with bias"
        self.maps = nn.ModuleList(
            nn.Conv2d(WIDTH, n, 1, bias=bias) if conv else nn.Linear(WIDTH, n, bias=False) for n in outputs
        )
        self.norms = nn.ModuleList((nn.BatchNorm2d if conv else nn.BatchNorm1d)(n) for n in outputs)
        self.out = nn.Conv2d(WIDTH, WIDTH, 1)

    def projected(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, each [B, 32, tokens]."""
        if self.spelling.startswith("conv"):
            return [norm(m(x)).flatten(2) for m, norm in zip(self.maps, self.norms, strict=True)]
        rows = x.flatten(2).transpose(1, 2)
        made = [m(rows) for m in self.maps]
        normed = [norm(y.flatten(0, 1)).reshape_as(y).transpose(1, 2) for norm, y in zip(self.norms, made, strict=True)]
        return list(normed[0].chunk(3, dim=1)) if self.spelling == "packed" else normed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(1, (HEADS, DIM)) for y in self.projected(x))
        weights = (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(-1)
        out: Tensor = self.out((v @ weights.transpose(-2, -1)).flatten(1, 2).view_as(x))
        return out


def image(seed: int) -> Tensor:
    return torch.randn(2, WIDTH, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def twin(spelling: str, perturbed: str = "") -> nn.Sequential:
    """Keys and values of two heads at a time are equal behind their norms; `perturbed`: but for one head's numbers of
    that name."""
    module = Normed(spelling)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in module.norms:
            for name, low in (("weight", -1.5), ("bias", -1.0), ("running_mean", -1.0), ("running_var", 0.5)):
                tensor = getattr(norm, name)
                tensor.copy_(low + 2.0 * torch.rand(tensor.shape, generator=generator))
        for part in (*module.maps, *module.norms):
            for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                if tensor.dim() == 0:
                    continue
                rows = tensor.view(-1, HEADS, DIM, *tensor.shape[1:])
                shared = rows[1:] if module.spelling == "packed" else rows
                if part in (module.maps[0], module.norms[0]) and module.spelling != "packed":
                    continue
                shared[:, 1::2] = shared[:, ::2].clone()
                if name == perturbed and part in (module.norms[-1],):
                    shared[-1, -1] += 0.5
    return nn.Sequential(nn.Identity(), module).eval()


class TwoKinds(nn.Module):
    """The same behind another attention, whose queries are the larger of two heads', so that it is refused."""

    def __init__(self, module: nn.Sequential) -> None:
        super().__init__()
        self.refused, self.second = twin("conv"), module

    def forward(self, x: Tensor) -> Tensor:
        first = self.refused[1]
        assert isinstance(first, Normed)
        q, k, v = (y.unflatten(1, (HEADS, DIM)) for y in first.projected(x))
        weights = (torch.maximum(q, q.flip(1)).transpose(-2, -1) @ k).softmax(-1)
        pooled = (v @ weights.transpose(-2, -1)).flatten(1, 2).mean(-1)[..., None, None]
        out: Tensor = self.second(x + pooled)
        return out


def convolutions(graph: torch.fx.Graph) -> int:
    return sum("conv" in str(n.target) for n in graph.nodes)


@pytest.mark.parametrize("kind", ["program", "graph module"])
@pytest.mark.parametrize("spelling", ["packed", "conv with bias"])
def test_graphs_get_linear_layers_for_what_is_rewritten_and_keep_the_rest(spelling: str, kind: str) -> None:
    for perturbed in ("", "bias"):
        module = TwoKinds(twin(spelling, perturbed)).eval()
        program = torch.export.export(module, (image(0),), strict=False)
        given = program if kind == "program" else program.module()
        before = convolutions(given.graph)
        new = rewriter.optimize(given, "gqa2", example_inputs=(image(0),))
        assert [row.exact for row in new.rewrite_report.sites] == [not perturbed] and len(
            new.rewrite_report.refused
        ) == 1
        assert convolutions(given.graph) == before
        assert convolutions(new.graph) == before - (3 if spelling.startswith("conv") else 0)
        assert sum("batch_norm" in str(n.target) for n in new.graph.nodes) == 3
        run = new.module() if kind == "program" else new
        with torch.no_grad():
            error = distance(run(image(1)), module(image(1)))
        assert error > MOVED if perturbed else error < EXACT


@pytest.mark.parametrize(
    ("spelling", "opset"), [("linear", 17), ("packed", 18), ("conv", 17), ("conv with bias", 18)], ids=str
)
def test_files_get_products_for_what_is_rewritten_and_keep_the_rest(spelling: str, opset: int, tmp_path: Path) -> None:
    for perturbed in ("", "bias"):
        module, path, out = TwoKinds(twin(spelling, perturbed)).eval(), tmp_path / "old.onnx", tmp_path / "new.onnx"
        torch.onnx.export(
            module, (image(0),), str(path), dynamo=opset > 17, opset_version=opset, input_names=["x"], verbose=False
        )
        old = operators(path)
        done = rewriter.optimize(path, "gqa2")
        done.save(out)
        onnx.checker.check_model(out, full_check=True)
        assert [row.exact for row in done.rewrite_report.sites] == [not perturbed]
        assert len(done.rewrite_report.refused) == 1
        assert operators(out)["Conv"] == old["Conv"] - (3 if spelling.startswith("conv") else 0)
        assert not operators(out)["BatchNormalization"] and not unread(out)
        with torch.no_grad():
            error = distance(run_file(out, {"x": image(1)}), module(image(1)))
        assert error > MOVED if perturbed else error < EXACT


def unread(path: Path) -> set[str]:
    """Weights that no node reads."""
    graph = onnx.load(path, load_external_data=False).graph
    return {t.name for t in graph.initializer} - {name for node in graph.node for name in node.input}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


SPELLINGS = ["linear", "packed", "conv", "conv with bias"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_norms_behind_projections_are_moved_into_them(spelling: str) -> None:
    module = twin(spelling)
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    new = rewriter.optimize(module, "gqa2", example_inputs=(image(0),))
    assert [row.exact for row in new.rewrite_report.sites] == [True]
    with torch.no_grad():
        assert distance(new(image(1)), module(image(1))) < EXACT
    assert all(torch.equal(kept[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("spelling", ["packed", "conv with bias"])
def test_a_norm_that_tells_heads_apart_makes_the_step_lossy(spelling: str, name: str) -> None:
    module = twin(spelling, name)
    new = rewriter.optimize(module, "gqa2", example_inputs=(image(0),))
    assert [row.exact for row in new.rewrite_report.sites] == [False]
    with torch.no_grad():
        assert distance(new(image(1)), module(image(1))) > MOVED


def test_what_is_kept_with_its_norm_is_saved_and_loaded(tmp_path: Path) -> None:
    module = twin("conv")
    new = rewriter.optimize(module, "gqa2", example_inputs=(image(0),))
    assert [*repeated(new)]
    norm, old = new[1].norms, module[1].norms
    assert torch.equal(norm[0].weight, old[0].weight) and not torch.equal(norm[1].bias, old[1].bias)
    assert torch.equal(norm[1].running_mean, torch.zeros(WIDTH))
    torch.save(new.state_dict(), tmp_path / "weights.pt")
    again = rewriter.optimize(twin("conv", "bias"), "gqa2", example_inputs=(image(0),))
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with torch.no_grad():
        assert distance(again(image(1)), new(image(1))) == 0


def test_in_training_features_keep_the_spread_that_the_norm_gave_them() -> None:
    module = twin("conv")
    new = rewriter.optimize(module, "gqa2", example_inputs=(image(0),))
    with torch.no_grad():
        before, after = (m[1].norms[1].train()(m[1].maps[1](image(2))) for m in (module, new))
    assert torch.allclose(before.std((0, 2, 3)), after.std((0, 2, 3)), rtol=1e-2)  # epsilon has its part
