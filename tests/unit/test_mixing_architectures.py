"""FNet and Sparse Mixer from scratch: sizes, layouts, the same numbers as transformers' FNet, and that they learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from codegen.ops.linear_mixing.reference import linear_mixing
from codegen.ops.mixture_of_experts.reference import mixture_of_experts
from codegen.spec import Routing
from rewriter.architectures.fnet import FNetConfig, Mixer, Transform, fnet, fnet_encoder
from rewriter.architectures.mixing_encoder import Attention, EncoderSizes, Experts, FeedForward, Matrices, Pretraining
from rewriter.architectures.sparse_mixer import SparseMixerConfig, fast, sparse_mixer, sparse_mixer_encoder

TINY = EncoderSizes(vocabulary=24, hidden=32, longest=12, segments=2, dropout=0.0)
SMALL_FNET = FNetConfig(TINY, layers=2, feed_forward=64, heads=4)
SMALL_MIXER = SparseMixerConfig(
    TINY, layers=4, feed_forward=64, attention_layers=1, heads=4, expert_layers=2, experts=4, expert_hidden=64
)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("mixer", "millions"),
    [
        pytest.param(Mixer.FOURIER, 83, id="fnet"),
        pytest.param(Mixer.LINEAR, 94, id="linear"),
        pytest.param(Mixer.ATTENTION, 112, id="bert"),
    ],
)
def test_base_models_have_as_many_parameters_as_the_paper_says(mixer: Mixer, millions: int) -> None:
    with torch.device("meta"):
        model = fnet(FNetConfig(mixer=mixer))
    assert round(parameters(model) / 1e6) == millions
    assert parameters(model) > parameters(model.encoder) > 0.9 * parameters(model)


def test_fnet_base_is_as_large_as_transformers() -> None:
    from transformers import FNetConfig as TheirConfig
    from transformers import FNetForPreTraining

    with torch.device("meta"):
        assert parameters(fnet()) == parameters(FNetForPreTraining(TheirConfig()))


def test_sparse_mixer_base_is_laid_out_as_in_the_papers_code() -> None:
    """Every parameter of the code's layers, written out: 512 wide, 14 layers, 32,000 words."""
    with torch.device("meta"):
        model = sparse_mixer()
    kinds = [(type(layer.mixer), type(layer.feed_forward)) for layer in model.encoder.layers]
    assert [kind for kind, _ in kinds] == [Matrices] * 10 + [Attention] * 4
    assert [kind for _, kind in kinds] == [FeedForward] * 5 + [Experts] * 4 + [FeedForward] * 5
    d, inner, words = 512, 2048, 32_000
    block = d * inner + inner + inner * d + d
    linear, norm = d * d + d, 2 * d
    embeddings = (words + 512 + 4) * d + norm + linear
    mixers = 10 * 2 * d * d + 4 * 4 * linear
    feed_forward = 10 * block + 4 * (16 * block + d * 16 + 16)
    heads = linear + (2 * d + 2) + (linear + norm + words)
    assert parameters(model) == embeddings + mixers + feed_forward + 14 * 2 * norm + heads
    experts = model.encoder.layers[5].feed_forward
    assert isinstance(experts, Experts)
    assert (experts.spec.capacity(512), experts.training_spec.capacity(512)) == (32, 32)
    quick = fast().expert_spec
    assert (quick.capacity(512), quick.routing) == (16, Routing.EXPERTS_CHOOSE)


def test_layouts_that_cannot_be_are_refused() -> None:
    for config, wrong in (
        (SMALL_MIXER, {"attention_layers": 5}),
        (SMALL_MIXER, {"expert_layers": -1}),
        (SMALL_MIXER, {"heads": 5}),
        (SMALL_FNET, {"attention_layers": 3}),
        (SMALL_FNET, {"heads": 5}),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(config, **wrong)  # type: ignore[type-var]
    hybrid = fnet_encoder(replace(SMALL_FNET, attention_layers=1))
    assert [type(layer.mixer) for layer in hybrid.layers] == [Transform, Attention]


# ------------------------------------------------------------------ numbers


def test_fnet_computes_what_transformers_computes() -> None:
    from transformers import FNetConfig as TheirConfig
    from transformers import FNetForPreTraining

    torch.manual_seed(0)
    theirs = FNetForPreTraining(
        TheirConfig(
            vocab_size=24,
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            max_position_embeddings=12,
            type_vocab_size=2,
        )
    ).eval()
    ours = fnet(SMALL_FNET).eval()
    given = [p for n, p in theirs.named_parameters()]
    held = [p for p in ours.encoder.parameters()]
    # in both: embeddings, then each layer; transformers has the norm of the mix before its feed-forward block
    order = [*range(7)]
    for layer in range(2):
        start = 7 + 8 * layer
        order += [start + i for i in (2, 3, 4, 5, 0, 1, 6, 7)]
    for mine, source in zip(held, order, strict=True):
        mine.data.copy_(given[source].data)
    named = dict(theirs.named_parameters())
    for mine, name in (
        (ours.pooler, "fnet.pooler.dense"),
        (ours.transform, "cls.predictions.transform.dense"),
        (ours.transform_norm, "cls.predictions.transform.LayerNorm"),
        (ours.next_sentence, "cls.seq_relationship"),
    ):
        mine.weight.data.copy_(named[f"{name}.weight"].data)
        mine.bias.data.copy_(named[f"{name}.bias"].data)
    ours.word_bias.data.normal_()
    named["cls.predictions.bias"].data.copy_(ours.word_bias.data)
    ids, segments = torch.randint(0, 24, (3, 12)), torch.randint(0, 2, (3, 12))
    with torch.no_grad():
        expected, found = theirs(ids, token_type_ids=segments), ours(ids, None, segments)
        assert torch.allclose(found.logits, expected.prediction_logits, atol=1e-5)
        assert torch.allclose(found.next_sentence, expected.seq_relationship_logits, atol=1e-5)
        other = ours(ids, None, 1 - segments)
    assert not torch.allclose(other.logits, expected.prediction_logits, atol=1e-3)  # the control
    assert found.router_loss == 0


def test_sparse_mixers_layers_are_the_oracles() -> None:
    torch.manual_seed(0)
    encoder = sparse_mixer_encoder(SMALL_MIXER).eval()
    x = torch.randn(2, 12, 32)
    matrices, experts = encoder.layers[0].mixer, encoder.layers[1].feed_forward
    assert isinstance(matrices, Matrices) and isinstance(experts, Experts)
    held = {name: p.detach().numpy() for name, p in matrices.named_parameters()}
    with torch.no_grad():
        assert np.allclose(matrices(x, None).numpy(), linear_mixing(matrices.spec, x.numpy(), **held), atol=1e-5)
        held = {name: p.detach().numpy() for name, p in experts.named_parameters(recurse=False)}
        expected = mixture_of_experts(experts.spec, x.numpy(), **held)
        found, loss = experts(x)
        assert np.allclose(found.numpy(), expected.output, atol=1e-5)
        assert np.isclose(float(loss), 1e-4 * expected.z)
        tokens = sparse_mixer_encoder(replace(SMALL_MIXER, routing=Routing.TOKENS_CHOOSE)).layers[1].feed_forward
        assert isinstance(tokens, Experts)
        held = {name: p.detach().numpy() for name, p in tokens.named_parameters(recurse=False)}
        expected = mixture_of_experts(tokens.spec, x.numpy(), **held)
        assert np.isclose(float(tokens(x)[1]), 0.01 * expected.balance + 1e-4 * expected.z)


def test_capacities_of_training_and_inference_differ_where_told() -> None:
    config = replace(SMALL_MIXER, training_capacity=4.0, capacity=0.5)
    layer = sparse_mixer_encoder(config).layers[1].feed_forward
    assert isinstance(layer, Experts)
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        trained, used = layer.train()(x)[0], layer.eval()(x)[0]
    assert bool((trained.abs().sum(-1) > 0).all()) and not bool((used.abs().sum(-1) > 0).all())


def test_a_mask_holds_for_attention_and_not_for_mixes() -> None:
    ids = torch.randint(0, 24, (2, 12))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    changed = ids.clone()
    changed[:, 8:] = (ids[:, 8:] + 1) % 24
    for mixer, same in ((Mixer.ATTENTION, True), (Mixer.FOURIER, False), (Mixer.LINEAR, False)):
        torch.manual_seed(0)
        encoder = fnet_encoder(replace(SMALL_FNET, mixer=mixer)).eval()
        with torch.no_grad():
            one, two = encoder(ids, mask)[:, :8], encoder(changed, mask)[:, :8]
        assert torch.allclose(one, two, atol=1e-6) is same


# ------------------------------------------------------------------ training and export


def task(rows: int, *, unrelated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that repeat one word, half of it masked; what the word is. Unrelated: some other word."""
    words = torch.randint(1, 24, (rows, 1))
    ids = words.expand(-1, 12).clone()
    ids[torch.rand(ids.shape) < 0.5] = 0
    wanted = torch.randint(1, 24, (rows, 1)) if unrelated else words
    return ids, wanted.expand(-1, 12).masked_fill(ids != 0, -100)


def trained(model: nn.Module, steps: int, *, unrelated: bool = False) -> tuple[float, float]:
    """The loss of the first and of the last ten steps."""
    torch.manual_seed(1)
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        ids, wanted = task(32, unrelated=unrelated)
        answer: Pretraining = model(ids)
        loss = nn.functional.cross_entropy(answer.logits.transpose(1, 2), wanted)
        optimiser.zero_grad()
        (loss + answer.router_loss).backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses[:10])), float(np.mean(losses[-10:]))


@pytest.mark.parametrize(
    ("name", "steps"), [pytest.param("fnet", 80, id="fnet"), pytest.param("mixer", 150, id="mixer")]
)
def test_models_learn_what_takes_mixing(name: str, steps: int) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return fnet(SMALL_FNET) if name == "fnet" else sparse_mixer(SMALL_MIXER)

    first, last = trained(build(), steps)
    assert last < 0.5 * first
    first, last = trained(build(), 40, unrelated=True)
    assert last > 0.9 * first  # the control: nothing to learn


def test_a_sparse_mixer_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, ids = sparse_mixer_encoder(SMALL_MIXER).eval(), torch.randint(0, 24, (1, 12))
    mask, path = torch.ones_like(ids), tmp_path / "mixer.onnx"
    mask[:, 10:] = 0
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(encoder, (ids, mask), path, input_names=names, dynamo=True, opset_version=18, verbose=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        assert np.allclose(found, encoder(ids, mask).numpy(), atol=1e-5)
        assert not np.allclose(found, encoder(ids.flip(1), mask).numpy(), atol=1e-2)  # the control
