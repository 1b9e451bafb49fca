"""FLASH and FLASH-Quad from scratch: sizes, causality, padding, cached decoding, and that they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codegen.spec import GatedAttention, MixedChunkAttention, PositionBias
from rewriter.architectures.flash import Flash, FlashConfig, GatedAttentionUnit, ScaledSinusoid, ScaleNorm

SMALL = FlashConfig(vocabulary=17, hidden=24, layers=2, expanded=48, base=16, chunk=8, length=64)
QUAD = replace(SMALL, chunk=None)
FORMS = {"flash": SMALL, "flash-quad": QUAD}


def model(config: FlashConfig, seed: int = 0) -> Flash:
    """With weights large enough that every part counts."""
    torch.manual_seed(seed)
    made = Flash(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 17, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def test_two_units_are_a_transformer_layer() -> None:
    """The paper replaces each layer, of 12 hidden² weights, by two units of 3 · 2 hidden² and small parts."""
    with torch.device("meta"):
        made, layer = Flash(FlashConfig()), torch.nn.TransformerEncoderLayer(768, 12, 3072)
    assert len(made.layers) == 24
    unit = sum(p.numel() for p in made.layers[0].parameters())
    assert unit == 768 * (2 * 1536 + 128) + 3200 + 1536 * 768 + 768 + 2 * 4 * 128 + 511 + 1
    assert 1.0 < 2 * unit / sum(p.numel() for p in layer.parameters()) < 1.03
    whole = sum(p.numel() for p in made.parameters())
    assert whole == 24 * unit + 32_000 * 768 + 32_000 + 2


def test_the_bias_follows_the_reach() -> None:
    assert FlashConfig().spec == MixedChunkAttention(
        768, 1536, 128, chunk=256, causal=True, bias=PositionBias.TOEPLITZ, span=256
    )
    quad = FlashConfig(chunk=None, length=511).spec
    assert isinstance(quad, GatedAttention) and quad.length == 511
    assert quad.bias is PositionBias.TOEPLITZ and quad.shapes["distances"] == (1021,)
    assert FlashConfig(chunk=None, length=512).spec.bias is PositionBias.ROTARY


@pytest.mark.parametrize("name", FORMS)
def test_narrow_models_may_begin_with_larger_projections(name: str) -> None:
    """Scales do not; the paper's size is the default."""
    torch.manual_seed(0)
    papers, own = (Flash(replace(FORMS[name], projections=size)).layers[0] for size in (0.02, None))
    for role, inputs in (("expand_weight", 24), ("out_weight", 48)):
        assert 0.019 < papers.get_parameter(role).std() < 0.021
        assert 0.95 < own.get_parameter(role).std() * inputs**0.5 < 1.05
    assert FORMS[name].projections == 0.02 and own.get_parameter("scale").abs().max() < 0.1


@pytest.mark.parametrize("name", FORMS)
def test_norms_are_the_papers(name: str) -> None:
    causal = model(FORMS[name])
    masked = model(replace(FORMS[name], causal=False))
    assert all(isinstance(u.norm, ScaleNorm) for u in causal.layers if isinstance(u, GatedAttentionUnit))
    assert all(isinstance(u.norm, torch.nn.LayerNorm) for u in masked.layers if isinstance(u, GatedAttentionUnit))
    x = torch.randn(3, 24)
    made = ScaleNorm()
    assert torch.allclose(made(x), torch.nn.functional.rms_norm(x, (24,), eps=1e-5))


def test_the_sinusoid_goes_on_where_it_stopped() -> None:
    made = ScaledSinusoid(6)
    whole = made(9)
    assert torch.equal(whole[4:], made(5, 4)) and whole.shape == (9, 6)
    assert torch.allclose(whole[3, 0] * 6**0.5, torch.tensor(3.0).sin())


@pytest.mark.parametrize("name", FORMS)
def test_a_causal_model_sees_no_later_token(name: str) -> None:
    before = ids(2, 30)
    after = before.clone()
    after[:, 19] = (after[:, 19] + 1) % 17
    with torch.no_grad():
        for causal in (True, False):
            made = model(replace(FORMS[name], causal=causal))
            a, b = made(before), made(after)
            assert torch.equal(a[:, :19], b[:, :19]) is causal
            assert not torch.allclose(a[:, 19:], b[:, 19:])


@pytest.mark.parametrize("name", FORMS)
def test_cached_decoding_is_the_whole_forward(name: str) -> None:
    made, given = model(FORMS[name]), ids(2, 21)
    with torch.no_grad():
        whole = made(given)
        states = made.start(2)
        parts = torch.cat(
            [made(given[:, :10], states=states), *(made(t, states=states) for t in given[:, 10:].split(1, 1))], 1
        )
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)
        states = made.start(2)
        wrong = torch.cat([made(given[:, :10], states=states), made(given[:, 11:], states=states)], 1)
        assert not torch.allclose(whole[:, 11:], wrong[:, 10:], rtol=1e-2, atol=1e-2)  # the control: a token left out
    generated = made.generate(given, 5)
    for place in range(21, 26):
        with torch.no_grad():
            likeliest = made(generated[:, :place])[:, -1].argmax(-1)
        assert torch.equal(generated[:, place], likeliest)


def test_a_state_of_flash_does_not_grow() -> None:
    made, sizes = model(SMALL), set()
    states = made.start(1)
    with torch.no_grad():
        for token in ids(1, 40).split(1, 1):
            made(token, states=states)
            sizes.add(sum(s.nbytes for s in states))
    assert len(sizes) == 1 and states[0].position == 40


@pytest.mark.parametrize("name", FORMS)
def test_padding_takes_no_part(name: str) -> None:
    """What is left that depends on it is FLASH's divisor, the number of tokens; with FLASH-Quad nothing is left."""
    made = model(replace(FORMS[name], causal=False))
    given, mask = ids(1, 20), torch.ones(1, 20)
    mask[:, 15:] = 0
    other = given.clone()
    other[:, 15:] = (other[:, 15:] + 3) % 17
    with torch.no_grad():
        assert torch.equal(made(given, mask)[:, :15], made(other, mask)[:, :15])
        assert not torch.allclose(made(given)[:, :15], made(other)[:, :15])  # the control
        if name == "flash-quad":
            assert torch.allclose(made(given, mask)[:, :15], made(given[:, :15]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_it_learns_what_stands_in_the_text_before(name: str) -> None:
    """The second half of each row repeats the first: knowable only by looking back twelve tokens, across a chunk."""
    torch.manual_seed(0)
    made = Flash(FORMS[name])
    optimiser = torch.optim.Adam(made.parameters(), 1e-2)
    losses = []
    for step in range(120):
        half = ids(16, 12, step)
        given = torch.cat((half, half), dim=1)
        scores = made(given[:, :-1])[:, 11:]
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), given[:, 12:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2.7 and losses[-1] < 1.0, losses[::20]
