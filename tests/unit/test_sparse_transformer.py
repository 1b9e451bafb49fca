"""Sparse Transformers from scratch: sizes, what queries see, positions, cached decoding, and that they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from codegen.sight import visible
from passes.targets.sparse import SparseFixed, SparseStrided
from rewriter.architectures.sparse_transformer import (
    CIFAR10,
    ENWIK8,
    IMAGENET64,
    SparseLayer,
    SparseTransformer,
    SparseTransformerConfig,
    parameters,
)

SMALL = SparseTransformerConfig(
    vocabulary=13, hidden=24, layers=2, heads=2, query_width=16, feed_forward=48, coordinates=(6, 8),
    attention=SparseFixed(8, 2), dropout=0.0,
)  # fmt: skip
PATTERNS = {
    "fixed": SparseFixed(8, 2),
    "fixed, alternating": SparseFixed(8, 2, "alternating"),
    "fixed, by head": SparseFixed(8, 2, "heads"),
    "strided": SparseStrided(8),
    "strided, alternating": SparseStrided(8, "alternating"),
}


def model(config: SparseTransformerConfig, seed: int = 0) -> SparseTransformer:
    """With weights large enough that every part counts."""
    torch.manual_seed(seed)
    made = SparseTransformer(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 13, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("config", "millions", "tokens"), [(ENWIK8, 95, 12288), (CIFAR10, 59, 3072), (IMAGENET64, 152, 12288)],
    ids=["enwik8", "cifar10", "imagenet64"],
)  # fmt: skip
def test_published_sizes_have_the_papers_parameters(
    config: SparseTransformerConfig, millions: int, tokens: int
) -> None:
    assert round(parameters(config) / 1e6) == millions and config.length == tokens


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide query_width"):
        replace(SMALL, query_width=15)
    with pytest.raises(ValueError, match="positive sizes"):
        replace(SMALL, coordinates=())
    with pytest.raises(ValueError, match="positions end at 48"):
        SparseTransformer(SMALL)(ids(1, 49))


def test_initial_weights_are_the_papers() -> None:
    torch.manual_seed(0)
    made = SparseTransformer(replace(SMALL, hidden=256, query_width=256, feed_forward=1024, layers=8))
    layer = made.layers[3]
    assert isinstance(layer, SparseLayer)
    for weight, expected in (
        (layer.attention.query.weight, 0.125 / 16), (layer.up.weight, 0.125 / 16),
        (layer.attention.out.weight, 0.125 / 16 / 4), (layer.down.weight, 0.125 / 32 / 4),
        (made.embedding.weight, 0.125 / 16), (made.positions[0].weight, 0.125 / 16 / 2**0.5),
    ):  # fmt: skip
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1)
    assert not made.output.weight.any() and not layer.up.bias.any()


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_layer_is_what_the_paper_writes(pattern: SparseFixed | SparseStrided) -> None:
    """Dense scores with the pattern as a mask, in double precision."""
    made, x = model(replace(SMALL, attention=pattern)), torch.randn(2, 40, 24)
    for number, layer in enumerate(made.layers):
        assert isinstance(layer, SparseLayer)
        found = layer(x)[0]
        places = torch.arange(40)
        sights = pattern.sights(2, number, causal=True)
        seen = torch.stack([visible(sights[h % len(sights)], places[:, None], places) for h in range(2)])
        assert torch.allclose(found.double(), written_out(layer, x.double(), seen), rtol=1e-4, atol=1e-4)
        other = written_out(layer, x.double(), torch.ones(40, 40, dtype=torch.bool).tril())
        assert not torch.allclose(found.double(), other, rtol=1e-2, atol=1e-2), "the control: dense attention differs"


def written_out(layer: SparseLayer, x: Tensor, seen: Tensor) -> Tensor:
    def linear(of: torch.nn.Linear, t: Tensor) -> Tensor:
        return t @ of.weight.double().T + of.bias.double()

    def norm(of: torch.nn.LayerNorm, t: Tensor) -> Tensor:
        return functional.layer_norm(t, (t.shape[-1],), of.weight.double(), of.bias.double(), of.eps)

    attention, h = layer.attention, norm(layer.first, x)
    q, k, v = (
        linear(of, h).unflatten(-1, (2, -1)).transpose(1, 2) for of in (attention.query, attention.key, attention.value)
    )
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    x = x + linear(attention.out, (weights @ v).transpose(1, 2).flatten(2))
    inner = linear(layer.up, norm(layer.second, x))
    return x + linear(layer.down, inner * torch.sigmoid(1.702 * inner))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_two_layers_reach_every_earlier_token_and_no_later_one(pattern: SparseFixed | SparseStrided) -> None:
    made = model(replace(SMALL, attention=pattern))
    x = made.embedding(ids(1, 40)).detach().requires_grad_()
    h = x
    for layer in made.layers:
        h = layer(h)[0]
    (reached,) = torch.autograd.grad(h[0, 39].sum(), x)
    assert reached[0].abs().sum(-1).gt(0).all(), "factorised: everything is two steps away"
    h = x
    for layer in made.layers:
        h = layer(h)[0]
    (later,) = torch.autograd.grad(h[0, 20].sum(), x)
    assert not later[0, 21:].any()


def test_positions_are_counted_by_coordinates() -> None:
    made = model(replace(SMALL, coordinates=(2, 3, 4)))
    with torch.no_grad():
        scores = made(torch.zeros(1, 24, dtype=torch.long))
        first, second, third = made.positions
        assert torch.allclose(made._placed(torch.tensor([17])), first.weight[1] + second.weight[1] + third.weight[1])
    assert scores.shape == (1, 24, 13) and len(torch.unique(scores[0], dim=0)) == 24


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_cached_decoding_is_the_whole_forward(pattern: SparseFixed | SparseStrided) -> None:
    made, given = model(replace(SMALL, attention=pattern)), ids(2, 30)
    with torch.no_grad():
        whole = made(given)
        parts, caches = made.step(given[:, :11])
        for token in given[:, 11:].split(1, dim=1):
            more, caches = made.step(token, caches)
            parts = torch.cat((parts, more), dim=1)
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)
        skipped = made.step(given[:, 12:], made.step(given[:, :11])[1])[0]
        assert not torch.allclose(whole[:, 12:], skipped, rtol=1e-2, atol=1e-2), "the control: a token left out"
    generated = made.generate(given, 6)
    with torch.no_grad():
        likeliest = made(generated[:, :-1])[:, 29:].argmax(-1)
    assert torch.equal(generated[:, 30:], likeliest) and torch.equal(generated[:, :30], given)


def test_it_learns_what_its_stride_shows() -> None:
    """Each row repeats its first 17 tokens: one layer can know the next one only by a key two strides of 8 away."""
    assert trained(SparseStrided(8)) < 0.5 < 2 < trained(SparseStrided(7)), "the control's stride leads elsewhere"


def trained(pattern: SparseStrided) -> float:
    """The loss after some steps."""
    torch.manual_seed(0)
    sizes = replace(SMALL, hidden=32, layers=1, query_width=32, coordinates=(34,), attention=pattern)
    made = SparseTransformer(sizes)
    optimiser = torch.optim.Adam(made.parameters(), 1e-2)
    found = 0.0
    for step in range(150):
        half = ids(32, 17, step)
        given = torch.cat((half, half), dim=1)
        scores = made(given[:, :-1])[:, 16:]
        loss = functional.cross_entropy(scores.flatten(0, 1), given[:, 17:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found = float(loss.detach())
    return found
