"""The target colt5: light and heavy branches out of trained encoders, exact where every token is routed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import rewriter
from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_attention.reference import conditional_attention
from passes.targets import Colt5, ConditionalBlocks, ConditionalHeads
from passes.targets.catalogue import find
from rewriter.errors import NothingToRewrite, UnknownTarget
from rewriter.install.conditional_block import conditional_blocks
from rewriter.install.padding import shown_tokens
from rewriter.install.token_mixer import token_mixers
from tests.zoo.case import Inputs, ZooCase
from tests.zoo.feeds import HEADS, INNER
from tests.zoo.models import ZOO

EXACT = 2e-5
CAUSAL = "it is causal, and who is routed depends on later tokens"


def everything(fraction: float = 1.0, radius: int = 64) -> Colt5:
    """All tokens go to heavy branches, and light heads see all of a short sequence."""
    return Colt5(ConditionalHeads(fraction=fraction, radius=radius), ConditionalBlocks(fraction=fraction))


def rewritten(case: ZooCase, target: Any, **options: Any) -> Any:
    return rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 9, 0), **options)


def changed(model: Any) -> dict[str, str]:
    return {row.name: row.after for row in model.rewrite_report.sites}


def encoded(case: ZooCase, model: Any, inputs: Inputs) -> Tensor:
    """What stands at tokens that are no padding, of the encoder where there is a decoder too."""
    with torch.no_grad():
        if hasattr(model, "get_encoder") and "decoder_input_ids" in inputs:
            found = model.get_encoder()(inputs["input_ids"], inputs.get("attention_mask")).last_hidden_state
        else:
            found = case.run(model, inputs)
    mask = inputs.get("attention_mask")
    if mask is None and "padding" in inputs:
        mask = ~inputs["padding"]
    return found if mask is None else found[mask.bool()]


def off(case: ZooCase, model: Any, original: Any, inputs: Inputs) -> float:
    found, wanted = encoded(case, model, inputs), encoded(case, original, inputs)
    return float((found - wanted).abs().max() / wanted.abs().max())


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize(
    "name",
    [
        "bert-sdpa", "vit-sdpa", "t5-eager", "mha-sequence-first", "torch-encoder-padded",
    ],
)  # fmt: skip
def test_with_every_token_routed_it_is_the_original(name: str) -> None:
    """Whatever the light branches are: the heavy ones complete them. Controls: fewer routed, another window."""
    case = ZOO[name]
    original, other = case.build(), case.inputs(3, 11, 1)
    layers = {"layers": "encoder"} if "t5" in name else {}
    whole = rewritten(case, everything(), **layers)
    assert off(case, whole, original, other) < EXACT
    rows = whole.rewrite_report.sites
    assert {row.after for row in rows} == {"colt5"} and all(row.error < EXACT for row in rows)
    assert {row.exact for row in rows if row.before.startswith("ffn")} <= {True}
    assert not any(row.exact for row in rows if row.before.startswith("mha"))  # windows end somewhere
    assert off(case, rewritten(case, everything(fraction=0.5), **layers), original, other) > 1e-2
    if name == "bert-sdpa":
        assert off(case, rewritten(case, everything(radius=1), **layers), original, other) > 1e-3


def test_biases_by_distance_are_read_as_t5_has_them() -> None:
    case = ZOO["t5-sdpa"]
    original, other = case.build(), case.inputs(3, 24, 1)  # longer than what was recorded
    whole = rewritten(case, everything(), layers="encoder")
    specs = [m.spec for m in token_mixers(whole).values()]
    assert [(s.buckets, s.farthest) for s in specs if isinstance(s, ConditionalAttention)] == [(8, 16)] * 2
    assert off(case, whole, original, other) < EXACT
    with torch.no_grad():
        next(iter(token_mixers(whole).values())).distances[-1] += 1.0  # the control: the last bucket matters
    assert off(case, whole, original, other) > 1e-3


# ------------------------------------------------------------------ what it does


def test_what_stands_in_the_module_is_the_oracle_and_heeds_padding() -> None:
    case = ZOO["bert-sdpa"]
    done, inputs = rewritten(case, "colt5:2"), case.inputs(3, 11, 1)
    path, mixer = next(iter(token_mixers(done).items()))
    seen: list[Any] = []
    mixer.register_forward_hook(lambda m, a, k, o: seen.append((a, k, o)), with_kwargs=True)
    case.run(done, inputs)
    args, kwargs, answer = seen[0]
    call = mixer.protocol.read(args, kwargs)
    shown = shown_tokens(mixer.protocol, call, *call["hidden"].shape[:2])
    assert shown is not None and torch.equal(shown, inputs["attention_mask"].bool())
    held = {name: p.detach().numpy() for name, p in mixer.named_parameters(recurse=False)}
    spec = mixer.spec
    assert isinstance(spec, ConditionalAttention) and (spec.light_heads, spec.heavy_heads) == (1, 3)
    expected = conditional_attention(spec, call["hidden"].numpy(), shown.numpy(), soft=False, **held)
    assert np.abs(answer[0].numpy() - expected).max() < 1e-5 * np.abs(expected).max(), path
    ignoring = conditional_attention(spec, call["hidden"].numpy(), None, soft=False, **held)
    assert np.abs(ignoring - expected).max() > 1e-3 * np.abs(expected).max()  # the control
    block = next(iter(conditional_blocks(done).values())).spec
    assert (block.light, block.heavy, block.router.fraction) == (INNER // 2, INNER, 1 / 2)


def test_masks_that_hide_more_than_padding_are_refused_at_the_call() -> None:
    case = ZOO["bert-eager"]
    done = rewritten(case, "colt5")
    mixer = next(iter(token_mixers(done).values()))
    x = torch.randn(2, 6, mixer.spec.hidden)
    allowed = torch.zeros(2, 1, 1, 6)
    allowed[1, ..., 4:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        one = mixer(x, allowed)[0]
        assert torch.allclose(mixer(x, allowed.expand(2, 1, 6, 6).contiguous())[0], one)
        assert not torch.allclose(mixer(x)[0], one)
        with pytest.raises(TypeError, match="hides more"):
            mixer(x, torch.full((6, 6), float("-inf")).triu(1).expand(2, 1, 6, 6).contiguous())
        with pytest.raises(TypeError, match="does not fit"):
            mixer(x, allowed[..., :5])


def test_an_encoder_decoder_becomes_one_of_colt5() -> None:
    case = ZOO["t5-sdpa"]
    done = rewritten(case, "colt5")
    cross = {f"decoder.block.{i}.layer.1.EncDecAttention": "mqa" for i in (0, 1)}
    blocks = {f"encoder.block.{i}.layer.1.DenseReluDense": "colt5" for i in (0, 1)}
    assert changed(done) == {f"encoder.block.{i}.layer.0.SelfAttention": "colt5" for i in (0, 1)} | blocks | cross
    reasons = {r.name: r.reason for r in done.rewrite_report.refused}
    assert reasons["decoder.block.0.layer.0.SelfAttention"] == CAUSAL
    assert "causal stack" in reasons["decoder.block.0.layer.2.DenseReluDense"]
    assert all(mixer.position is None for mixer in token_mixers(done).values())  # nobody is left to read the bias
    ids = case.inputs(2, 9, 0)["input_ids"]
    assert done.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 4)
    upper = rewritten(case, "colt5", layers=r"encoder\.block\.0\.layer\.0")
    assert [mixer.position is None for mixer in token_mixers(upper).values()] == [False]


def test_training_routes_softly_and_routers_learn() -> None:
    case = ZOO["bert-sdpa"]
    done, inputs = rewritten(case, "colt5:4"), case.inputs(2, 9, 0)
    routers = {name: p for name, p in done.named_parameters() if "router" in name}
    assert len(routers) == 6
    for training in (True, False):
        done.train(training).zero_grad()
        case_output = done(**inputs).last_hidden_state
        case_output.square().sum().backward()
        learned = {name for name, p in routers.items() if p.grad is not None and bool(p.grad.any())}
        assert learned == (set(routers) if training else set())


def test_with_calibration_less_is_lost() -> None:
    case = ZOO["bert-sdpa"]
    batches = [case.inputs(4, 32, seed) for seed in range(4)]
    plain, fitted = (rewritten(case, "colt5:8", calibration=given) for given in (None, batches))
    held_out = case.inputs(4, 32, 9)
    original = case.build()
    losses = [float((encoded(case, m, held_out) - encoded(case, original, held_out)).norm()) for m in (plain, fitted)]
    assert losses[1] < losses[0]
    rows = {row.name: row for row in fitted.rewrite_report.sites}
    assert {row.merge for row in rows.values()} == {"fitted"}
    attention = rows["encoder.layer.0.attention.self"]
    assert any("routers explain" in note for note in attention.notes)
    assert any("light branch explains" in note for note in rows["encoder.layer.0.feed_forward"].notes)
    assert {row.merge for row in plain.rewrite_report.sites} == {"selected"}


@pytest.mark.parametrize("name", ["bert-sdpa", "t5-sdpa"])
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    done, inputs = rewritten(case, "colt5:4"), case.inputs(3, 11, 1)
    done.save_pretrained(tmp_path / "saved")
    loaded: Any = rewriter.load(tmp_path / "saved")
    assert torch.equal(case.run(loaded, inputs), case.run(done, inputs))
    assert set(token_mixers(loaded)) == set(token_mixers(done)) != set()
    assert set(conditional_blocks(loaded)) == set(conditional_blocks(done)) != set()
    with torch.no_grad():
        next(iter(conditional_blocks(loaded).values())).light_down_weight[0] += 1.0
    assert not torch.equal(case.run(loaded, inputs), case.run(done, inputs))  # the control
    with pytest.raises((OSError, ValueError, KeyError)):
        type(case.build()).from_pretrained(tmp_path / "saved")


def test_it_is_exported_and_compiled() -> None:
    case = ZOO["bert-sdpa"]
    done, given, other = rewritten(case, "colt5:4"), case.inputs(2, 9, 0), case.inputs(3, 9, 1)
    compiled = torch.compile(done, backend="eager", fullgraph=True)
    assert torch.allclose(case.run(compiled, other), case.run(done, other), atol=1e-6)
    program = torch.export.export(done, (), given, strict=False)
    assert torch.allclose(case.run(program.module(), given), case.run(done, given), atol=1e-6)
    assert not torch.allclose(case.run(done, given)[:2], case.run(done, other)[:2], atol=1e-3)  # the control


# ------------------------------------------------------------------ files


def answer(path: Path, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0])


def by_pairs(path: Path, feeds: dict[str, Any]) -> list[str]:
    """Values of a graph that have a number for each pair of tokens."""
    model, tokens = onnx.load(path), next(iter(feeds.values())).shape[1]
    del model.graph.output[:]
    names = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return [name for name, value in zip(names, values, strict=True) if np.shape(value).count(tokens) > 1]


@pytest.mark.parametrize("exporter", ["dynamo18", "torchscript17"])
def test_files_get_the_same_branches(exporter: str, zoo_onnx: Callable[..., Path], tmp_path: Path) -> None:
    case, inputs = ZOO["bert-sdpa"], ZOO["bert-sdpa"].inputs(3, 11, 1)
    source, feeds = zoo_onnx(case, exporter), {n: t.numpy() for n, t in inputs.items()}
    shown = inputs["attention_mask"].bool().numpy()
    found = {}
    for name, target in (("whole", everything()), ("some", "colt5:4")):
        done = rewriter.optimize(source, target)
        done.save(tmp_path / f"{name}.onnx")
        assert [after.split(":")[0] for after in changed(done).values()] == ["colt5"] * 4
        assert done.rewrite_report.refused == ()
        found[name] = answer(tmp_path / f"{name}.onnx", feeds)[shown]
    original = answer(source, feeds)[shown]
    assert np.abs(found["whole"] - original).max() < EXACT * np.abs(original).max()
    twin = encoded(case, rewritten(case, "colt5:4"), inputs).numpy()
    assert np.abs(found["some"] - twin).max() < 1e-4 * np.abs(twin).max(), "both doors give the same weights"
    assert np.abs(found["some"] - original).max() > 1e-2 * np.abs(original).max()  # the control
    longer = {n: t.numpy() for n, t in case.inputs(2, 17, 2).items()}
    assert answer(tmp_path / "some.onnx", longer).shape[:2] == (2, 17)
    assert by_pairs(tmp_path / "some.onnx", longer) == [] != by_pairs(source, longer)


class Spread(torch.nn.Module):
    """An attention whose mask gets a row for each query before it is turned into numbers, as in older transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens = mask.shape
        rows = mask[:, None, None, :].expand(batch, 1, tokens, tokens).to(x.dtype)
        hidden = 1.0 - rows
        hidden = hidden.masked_fill(hidden.to(torch.bool), torch.finfo(x.dtype).min)
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / 8**0.5 + hidden).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)) + x


def test_masks_that_were_spread_over_queries_have_one_row(tmp_path: Path) -> None:
    model, x = Spread().eval(), torch.randn(2, 19, 32)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, 12:] = 0
    source, axes = tmp_path / "spread.onnx", {0: "batch", 1: "tokens"}
    torch.onnx.export(model, (x, mask), str(source), input_names=["x", "mask"], output_names=["y"], dynamo=False,
                      opset_version=17, dynamic_axes={"x": axes, "mask": axes})  # fmt: skip
    feeds = {"x": x.numpy(), "mask": mask.numpy()}
    target = Colt5(ConditionalHeads(fraction=1.0, radius=64), ConditionalBlocks())
    done = rewriter.optimize(source, target)
    done.save(tmp_path / "whole.onnx")
    assert by_pairs(tmp_path / "whole.onnx", feeds) == [] != by_pairs(source, feeds)
    shown = mask.bool().numpy()
    original, whole = (answer(path, feeds)[shown] for path in (source, tmp_path / "whole.onnx"))
    assert np.abs(whole - original).max() < EXACT * np.abs(original).max()
    unmasked = answer(tmp_path / "whole.onnx", feeds | {"mask": np.ones_like(feeds["mask"])})[shown]
    assert np.abs(unmasked - original).max() > 1e-3 * np.abs(original).max()  # the control: the mask counts


def test_a_file_of_an_encoder_decoder(zoo_onnx: Callable[..., Path], tmp_path: Path) -> None:
    """Its mask is added to a bias by distance; padding is told without working that out."""
    case, inputs = ZOO["t5-sdpa"], ZOO["t5-sdpa"].inputs(2, 13, 1)
    source, feeds = zoo_onnx(case, "torchscript17"), {n: t.numpy() for n, t in inputs.items()}
    done = rewriter.optimize(source, everything(), layers="encoder")
    assert set(changed(done).values()) == {"colt5"} and len(changed(done)) == 4
    done.save(tmp_path / "whole.onnx")

    def tables(path: Path) -> int:
        graph = onnx.load(path).graph
        return sum(list(i.dims) == [8, HEADS] for i in graph.initializer if "distances" not in i.name)

    assert (tables(source), tables(tmp_path / "whole.onnx")) == (2, 1)  # the decoder's stays
    original, whole = answer(source, feeds), answer(tmp_path / "whole.onnx", feeds)
    assert np.abs(whole - original).max() < 1e-4 * np.abs(original).max()
    assert not [name for name in by_pairs(tmp_path / "whole.onnx", feeds) if "encoder" in name]
    some = rewriter.optimize(source, "colt5:4", layers="encoder")
    some.save(tmp_path / "some.onnx")
    assert np.abs(answer(tmp_path / "some.onnx", feeds) - original).max() > 1e-3 * np.abs(original).max()


# ------------------------------------------------------------------ names and refusals


def test_names() -> None:
    plain, quarter = find("colt5"), find("CoLT5:4 ")
    assert isinstance(plain, Colt5) and isinstance(quarter, Colt5)
    assert (plain.name, plain.mixing.fraction, plain.blocks.fraction) == ("colt5", 1 / 16, 1 / 16)
    assert (quarter.name, quarter.mixing.fraction, quarter.blocks.fraction) == ("colt5:4", 1 / 4, 1 / 4)
    assert find("colt5:0") is None and find("colt5:") is None and find("auto:colt5") is None
    with pytest.raises(UnknownTarget):
        rewritten(ZOO["bert-sdpa"], "colt5:x")
    for wrong in ({"fraction": 0.0}, {"fraction": 1.5}, {"radius": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ConditionalHeads(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="light"):
        ConditionalBlocks(light=0.0)


def test_what_has_no_conditional_form_is_refused() -> None:
    with pytest.raises(NothingToRewrite, match="causal"):
        rewritten(ZOO["gpt2-sdpa"], "colt5")
    refused = rewritten(ZOO["modernbert-sdpa"], "colt5").rewrite_report.refused
    assert len(refused) == 2 and all("rotated by position" in r.reason for r in refused)
    with pytest.raises(NothingToRewrite, match="more than a number by head and distance"):
        rewritten(ZOO["windows"], "colt5")
    longt5 = {r.name: r.reason for r in rewritten(ZOO["longt5-eager"], "colt5").rewrite_report.refused}
    assert "no attention that is understood" in longt5["encoder.block.0.layer.1.DenseReluDense"]
    assert "an attention between all tokens" in longt5["encoder.block.0.layer.0.LocalSelfAttention"]


def test_what_attends_in_blocks_is_taken_by_its_weights() -> None:
    """As the refusal says: LongT5's are T5's, which is local with a window, and becomes conditional."""
    import transformers

    original = ZOO["longt5-eager"].build().get_encoder()
    config = {**original.config.to_dict(), "is_encoder_decoder": False, "use_cache": False}
    plain = transformers.T5EncoderModel(transformers.T5Config(**config)).eval()
    renamed = {n.replace("LocalSelfAttention", "SelfAttention"): t for n, t in original.state_dict().items()}
    plain.encoder.load_state_dict(renamed)
    given = {"input_ids": torch.arange(46).reshape(2, 23) % 19, "attention_mask": torch.ones(2, 23, dtype=torch.long)}
    given["attention_mask"][1, 15:] = 0

    def states(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**given).last_hidden_state[given["attention_mask"].bool()]
        return found

    radius, wanted = original.config.local_radius, states(original)
    for keys, close in ((radius + 1, True), (radius, False)):
        near = states(rewriter.optimize(plain, f"window:{keys},0", example_inputs=given, kernels="off"))
        assert (float((near - wanted).abs().max() / wanted.abs().max()) < EXACT) is close
    target = Colt5(ConditionalHeads(radius=radius), ConditionalBlocks())
    done = rewriter.optimize(plain, target, example_inputs=given)
    assert done.rewrite_report.refused == () and set(changed(done).values()) == {"colt5"}


def test_inspection_lists_it_where_it_can_be() -> None:
    def able(name: str) -> dict[str, bool]:
        case = ZOO[name]
        found = rewriter.inspect(case.build(), example_inputs=case.inputs(2, 9, 0)).to_dict()["sites"]
        return {row["name"]: "colt5" in row["targets"] for row in found if row["status"] == "rewritable"}

    assert all(able("bert-sdpa").values())
    t5 = able("t5-sdpa")
    assert {name for name, can in t5.items() if can} == {
        name for name in t5 if name.startswith("encoder") or "EncDec" in name
    }
    assert not any(can for name, can in able("modernbert-sdpa").items() if "attn" in name)
    assert not any(able("gpt2-sdpa").values())
