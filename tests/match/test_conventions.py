"""Conventions that whole families write attention in, each in one small module: found, and rewritten where it can be.

Every module goes through the three doors as a lossless twin; its control has one head that is not tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.match.attention import find_attention
from passes.targets.grouped_query import GroupedQuery
from passes.targets.linear_attention import LinearHeads
from rewriter.capture.torch_export import capture
from tests.zoo.randomize import randomize

WIDTH, HEADS, DIM, TOKENS = 32, 4, 8, 6
EXACT, MOVED = 1e-5, 1e-3


class Attends(nn.Module):
    """``x [B, T, 32]`` to the same; `weigh` is what a convention does between the projections and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (m(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for m in (self.query, self.key, self.value))
        mixed = self.weigh(*heads)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return out

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def shared(self) -> Iterable[Tensor]:
        """What keys and values are projected by; heads are the leading axis of each, times their width."""
        return [*self.key.parameters(), *self.value.parameters()]


class Tempered(Attends):
    """Cosines of queries and keys, times a number that each head has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cosines = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1)
        weights: Tensor = (cosines * (5.0 * self.logit_scale).exp()).softmax(-1)
        return weights @ v


class Cooled(Attends):
    """Scores divided by a number that each head has learned, then capped."""

    def __init__(self) -> None:
        super().__init__()
        self.warmth = nn.Parameter(torch.zeros(1, HEADS, 1, 1))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / (1.0 + self.warmth.abs())
        weights: Tensor = (3.0 * torch.tanh(scores / 3.0)).softmax(-1)
        return weights @ v


class Windowed(Attends):
    """Windows of two tokens are the batch; a mask by window meets scores laid out as [images, windows, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, TOKENS // 3, WIDTH)
        return super().forward(windows).reshape(x.shape)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / DIM**0.5
        mask = torch.zeros(3, 1, 2, 2)
        mask[2, 0, 0, 1] = mask[1, 0, 1, 0] = -100.0
        weights: Tensor = (scores.view(-1, 3, *scores.shape[1:]) + mask[None]).view(scores.shape).softmax(-1)
        return weights @ v


class Blanked(Attends):
    """Masked weights are set to zero once more behind the softmax; a number is added to all scores alike."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / DIM**0.5 + 2.0
        later = torch.arange(TOKENS)[None] > torch.arange(TOKENS)[:, None]
        weights: Tensor = scores.masked_fill(later, float("-inf")).softmax(-1)
        return weights.masked_fill(later, 0.0) @ v


class MaskedLate(Attends):
    """Weights are masked, and normalised again by what is left of their sum."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        earlier = torch.arange(TOKENS)[None] <= torch.arange(TOKENS)[:, None]
        weights: Tensor = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1) * earlier
        return weights / (weights.sum(-1, keepdim=True) + 1e-9) @ v


class BiasByHead(Attends):
    """The value's bias is a parameter of its own, laid out by heads before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(WIDTH))

    def shared(self) -> Iterable[Tensor]:
        return [*super().shared(), self.v_bias]

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v + self.v_bias.view(1, 1, HEADS, DIM).permute(0, 2, 1, 3)
        weights: Tensor = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1)
        return weights @ v


class HeadsBeforeBatch(Attends):
    """Heads are cut apart and laid out before the batch; scores are [heads * batch, tokens, tokens]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.cat(m(x).chunk(HEADS, dim=-1)) for m in (self.query, self.key, self.value))
        mixed = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / DIM**0.5).softmax(-1), v)
        out: Tensor = self.out(torch.cat(mixed.chunk(HEADS), dim=-1))
        return out


class UnreadBias(Attends):
    """Scores by an operator that could add a bias, whose factor is 0: what stands there is uninitialised memory."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        scores = torch.baddbmm(
            torch.full((len(q), TOKENS, TOKENS), 9.0), q, k.transpose(-2, -1), beta=0, alpha=DIM**-0.5
        )
        return scores.unflatten(0, (-1, HEADS)).softmax(-1) @ v


class ByTensordot(Attends):
    """Projections are written as tensordot with a stored matrix."""

    def __init__(self) -> None:
        super().__init__()
        del self.query, self.key, self.value
        self.matrices = nn.ParameterList(torch.zeros(WIDTH, WIDTH) for _ in range(3))

    def shared(self) -> Iterable[Tensor]:
        return [m.T for m in self.matrices[1:]]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.tensordot(x, m, dims=1).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for m in self.matrices)
        mixed = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return out


class ByEinsum(ByTensordot):
    """Likewise as einsum, with the matrix turned and first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("dc,bnc->bnd", m, x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for m in self.matrices
        )
        mixed = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return out

    def shared(self) -> Iterable[Tensor]:
        return list(self.matrices[1:])


class JoinedBias(Attends):
    """One matrix; its bias is joined from a parameter, zeros and a parameter. A bias of positions is in the module."""

    def __init__(self) -> None:
        super().__init__()
        del self.query, self.key, self.value
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)
        self.places = nn.Parameter(torch.zeros(HEADS, TOKENS, TOKENS))

    def shared(self) -> Iterable[Tensor]:
        return [*self.qkv.weight.chunk(3)[1:], self.v_bias]

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        heads = nn.functional.linear(x, self.qkv.weight, bias).view(*x.shape[:2], 3, HEADS, DIM)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1) / DIM**0.5 + self.places).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return out


class TurnedByMatrices(Attends):
    """Pairs of neighbouring features are rotated by an einsum with a matrix of two rows for each position and pair."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.arange(TOKENS)[:, None] / 10 ** torch.arange(DIM // 2)
        rows = ((angles.cos(), -angles.sin()), (angles.sin(), angles.cos()))
        matrices = torch.stack([torch.stack(row, -1) for row in rows], -2)
        pairs = (x.unflatten(-1, (DIM // 2, 2)) for x in (q, k))
        q, k = (torch.einsum("tpij,bhtpj->bhtpi", matrices, x).flatten(-2) for x in pairs)
        weights: Tensor = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1)
        return weights @ v


class Convolved(Attends):
    """Keys and values of every other token, convolved channel by channel alike in all heads, then normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Conv1d(DIM, DIM, 3, 2, 1, groups=DIM)
        self.norm = nn.LayerNorm(DIM)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (self.norm(self.pool(t.flatten(0, 1).transpose(1, 2)).transpose(1, 2)) for t in (k, v))
        k, v = (t.unflatten(0, (-1, HEADS)) for t in (k, v))
        weights: Tensor = (q @ k.transpose(-2, -1)).softmax(-1)
        return weights @ v


class ScaledByPosition(Attends):
    """xPos on queries and keys; tokens of values are projected to fewer, as in a Linformer."""

    def __init__(self) -> None:
        super().__init__()
        self.fewer = nn.Linear(TOKENS, TOKENS)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.arange(TOKENS)[:, None] / 10 ** torch.arange(DIM // 2)
        growth = (1 + torch.arange(DIM // 2) / DIM) ** torch.arange(TOKENS)[:, None]
        q, k = self._turned(q, angles, growth), self._turned(k, angles, 1 / growth)
        weights: Tensor = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1)
        return weights @ self.fewer(v.transpose(-2, -1)).transpose(-2, -1)

    def _turned(self, t: Tensor, angles: Tensor, growth: Tensor) -> Tensor:
        (a, b), cos, sin = t.chunk(2, -1), angles.cos() * growth, angles.sin() * growth
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


CONVENTIONS: dict[str, Callable[[], Attends]] = {
    "temperatures": Tempered,
    "temperatures-capped": Cooled,
    "masks-by-window": Windowed,
    "masked-twice": Blanked,
    "masked-late": MaskedLate,
    "bias-by-head": BiasByHead,
    "heads-before-batch": HeadsBeforeBatch,
    "unread-bias": UnreadBias,
    "tensordot": ByTensordot,
    "projections-by-einsum": ByEinsum,
    "joined-bias": JoinedBias,
    "turned-by-matrices": TurnedByMatrices,
    "convolved-heads": Convolved,
    "scaled-by-position": ScaledByPosition,
}


def _twin(name: str, *, perturbed: bool = False) -> Attends:
    """The module with heads tied in pairs; `perturbed`: all but the last."""
    module = CONVENTIONS[name]()
    randomize(module)
    _tie(module.shared(), perturbed=perturbed)
    return module


@torch.no_grad()
def _tie(parameters: Iterable[Tensor], *, perturbed: bool) -> None:
    for parameter in parameters:
        by_head = parameter.unflatten(0, (HEADS // 2, 2, DIM))
        by_head[:, 1] = by_head[:, 0]
        if perturbed:
            by_head[-1, 1] += 0.5


def _x(seed: int = 0) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _through_module(module: nn.Module) -> float:
    model = nn.Sequential(module)
    new = rewriter.optimize(model, "gqa2", example_inputs=(_x(),))
    return _distance(new(_x(1)), model(_x(1)))


def _through_graph(module: nn.Module) -> float:
    new = rewriter.optimize(torch.export.export(module, (_x(),)), "gqa2")
    return _distance(new.module()(_x(1)), module(_x(1)))


def _through_file(module: nn.Module, folder: Path) -> float:
    path, out = folder / "old.onnx", folder / "new.onnx"
    torch.onnx.export(module, (_x(),), str(path), dynamo=False, opset_version=17, input_names=["x"])
    rewriter.optimize(path, "gqa2").save(out)
    before, after = (_run(p) for p in (path, out))
    return float(np.abs(before - after).max())


def _run(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": _x(1).numpy()})[0]
    return result


@pytest.mark.parametrize("name", CONVENTIONS)
@torch.no_grad()
def test_a_twin_is_rewritten_without_loss_through_every_door(name: str, tmp_path: Path) -> None:
    for door in (_through_module, _through_graph, partial(_through_file, folder=tmp_path)):
        assert door(_twin(name)) < EXACT
        assert door(_twin(name, perturbed=True)) > MOVED


class Plain(Attends):
    """Nothing but a scale."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights: Tensor = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1)
        return weights @ v


class Repeating(nn.Module):
    """One attention at the first and the third layer, another of the same structure between them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = Plain(), Plain()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.shared, self.own, self.shared):
            x = x + layer(x)
        return x


@pytest.mark.parametrize("untied", [None, "shared", "own"])
@torch.no_grad()
def test_initializers_that_layers_share_stay_shared_and_are_not_taken_for_others(
    untied: str | None, tmp_path: Path
) -> None:
    module = Repeating()
    randomize(module)
    for name, layer in module.named_children():
        _tie([*layer.key.parameters(), *layer.value.parameters()], perturbed=name == untied)  # type: ignore[union-attr]
    error = _through_file(module, tmp_path)
    assert error > MOVED if untied else error < EXACT
    new = onnx.load(tmp_path / "new.onnx")
    halved = [i.dims for i in new.graph.initializer if sorted(i.dims) == [WIDTH // 2, WIDTH]]
    assert len(halved) == 4  # keys and values of two attentions, not of three


class TemperedLate(Attends):
    """Temperatures that are multiplied in behind a bias."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = torch.arange(1.0, HEADS + 1).view(HEADS, 1, 1)
        scores = q @ k.transpose(-2, -1) + torch.arange(TOKENS).float()
        return (scores * steps).softmax(-1) @ v


class Linear(Attends):
    """Linear attention: keys times values first."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (nn.functional.elu(x) + 1.0 for x in (q, k))
        return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2)[..., None])


class LinearByEinsum(Attends):
    """The same with heads behind tokens, which einsums sum over."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (nn.functional.elu(q) + 1.0, nn.functional.elu(k) + 1.0, v))
        total = torch.einsum("nlhd,nhd->nlh", q, k.sum(1))
        mixed = torch.einsum("nlhd,nhdv->nlhv", q, torch.einsum("nshd,nshv->nhdv", k, v)) / total[..., None]
        return mixed.transpose(1, 2)


class Squared(Attends):
    """Squared scores instead of a softmax."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.relu(q @ k.transpose(-2, -1) / DIM).square() @ v


class Experts(nn.Module):
    """Two experts whose matrices a router chooses for each token: products with weights, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Parameter(torch.zeros(4, WIDTH, 48)), nn.Parameter(torch.zeros(4, 48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        hidden = torch.relu(x[:, :, None] @ self.up[chosen])
        return (hidden @ self.down[chosen])[:, :, 0]


@pytest.mark.parametrize("made", [Linear, LinearByEinsum, Squared], ids=["linear", "einsum", "squared"])
def test_attention_without_a_softmax_is_refused_once_in_module_and_file(
    made: Callable[[], nn.Module], tmp_path: Path
) -> None:
    module = randomize(nn.Sequential(made(), Experts(), Tempered()))
    path = tmp_path / "file.onnx"
    torch.onnx.export(module, (_x(),), str(path), dynamo=False, opset_version=17, input_names=["x"])
    for seen in (rewriter.inspect(module, example_inputs=(_x(),)), rewriter.inspect(path)):
        assert len(seen.sites) == 1
        assert ["without a softmax" in r.reason for r in seen.refusals] == [True]
    assert seen.refusals[0].name.startswith("0")


def test_temperatures_behind_a_bias_are_refused_with_that_reason() -> None:
    (site,) = find_attention(capture(randomize(TemperedLate()), (_x(),), {}).flow).sites
    assert GroupedQuery(2).refuses(site) == "a temperature for each head follows another step on the scores"


def test_targets_that_compute_scores_anew_refuse_temperatures() -> None:
    flow = capture(_twin("temperatures"), (_x(),), {}).flow
    (site,) = find_attention(flow).sites
    assert GroupedQuery(2).refuses(site) is None
    assert "temperature" in (LinearHeads().refuses(site) or "")


class ObjectQueries(nn.Module):
    """Learned queries attend to each other before they attend to the input ``x [1, T, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        self.among, self.across = Plain(), Plain()
        self.queries = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.across(self.queries + self.among(self.queries) + x)
        return out


class Fused(Attends):
    """All of it in one operator."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class FusedObjectQueries(ObjectQueries):
    """Likewise, by a fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.among, self.across = Fused(), Fused()


class Deformable(nn.Module):
    """Values are sampled at places that a projection computes, and weighed by another projection."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.places, self.weights = nn.Linear(WIDTH, HEADS * 2 * 2), nn.Linear(WIDTH, HEADS * 2)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        image = self.value(x).view(batch, 2, TOKENS // 2, HEADS, DIM).permute(0, 3, 4, 1, 2).flatten(0, 1)
        places = self.places(x).view(batch, TOKENS, HEADS, 2, 2).transpose(1, 2).flatten(0, 1).tanh()
        sampled = nn.functional.grid_sample(image, places, align_corners=False)
        weights = self.weights(x).view(batch, TOKENS, HEADS, 2).softmax(-1).transpose(1, 2).reshape(-1, 1, TOKENS, 2)
        mixed = (sampled * weights).sum(-1).view(batch, WIDTH, TOKENS).transpose(1, 2)
        out: Tensor = self.out(mixed)
        return out


@pytest.mark.parametrize(
    ("made", "reason", "sites"),
    [
        (ObjectQueries, "all that it attends to is learned", 1),
        (FusedObjectQueries, "all that it attends to is learned", 1),
        (Deformable, "sampled at computed places", 0),
    ],
    ids=["object-queries", "fused-object-queries", "deformable"],
)
def test_attention_without_keys_of_fed_data_is_refused(
    made: Callable[[], nn.Module], reason: str, sites: int, tmp_path: Path
) -> None:
    module, path = randomize(nn.Sequential(made())), tmp_path / "file.onnx"
    torch.onnx.export(
        module, (_x(),), str(path), dynamo=False, opset_version=17, input_names=["x"], do_constant_folding=False
    )
    for seen in (rewriter.inspect(module, example_inputs=(_x(),)), rewriter.inspect(path)):
        assert [reason in r.reason for r in seen.refusals] == [True]
        assert len(seen.sites) == sites


class CrossAttention(Plain):
    """An attention by its name."""


class Optional(nn.Module):
    """Runs its second attention only if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = CrossAttention(), CrossAttention()

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        x = self.first(x)
        out: Tensor = self.second(x) if both else x
        return out


def test_an_attention_that_was_not_called_is_refused_for_that() -> None:
    module = randomize(Optional())
    seen = rewriter.inspect(module, example_inputs={"x": _x()})
    assert [(r.name, "not called" in r.reason) for r in seen.refusals] == [("second", True)]
    assert rewriter.inspect(module, example_inputs={"x": _x(), "both": True}).refusals == ()
