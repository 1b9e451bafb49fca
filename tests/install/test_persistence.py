"""Saving and loading rewritten torch models, and what must stop instead of loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewriter.errors import InvalidModelFile, UnsupportedModel, UsageError
from rewriter.install import checkpoint_saving
from rewriter.install.checkpoint_loading import load
from rewriter.install.checkpoint_saving import save
from rewriter.install.torch_module import mixers
from tests.install.canonical import owners, rewrite
from tests.install.test_huggingface import tied, turn
from tests.zoo.models import ZOO

MIXED = ["gpt2-sdpa", "gpt2-eager", "bert-sdpa", "vit-eager", "t5-sdpa", "bart-sdpa", "whisper-sdpa", "bloom-eager"]
PLAIN = ["nanogpt-sdpa", "torch-encoder", "mha-sequence-first"]


def rewritten(name: str, kv_heads: int = 2) -> Any:
    case = ZOO[name]
    model = case.build()
    rewrite(model, case.inputs(2, 9, 0), case.heads, kv_heads, causal=case.causal)
    return model


@pytest.mark.parametrize("name", MIXED)
def test_a_hugging_face_model_comes_back_whole(name: str, tmp_path: Path) -> None:
    case, model = ZOO[name], rewritten(name)
    model.save_pretrained(tmp_path / "deep" / "saved")
    assert json.loads((tmp_path / "deep" / "saved" / "rewrite.json").read_text())["format"] == 1
    loaded: Any = load(tmp_path / "deep" / "saved")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert set(mixers(loaded)) == set(mixers(model))
    assert loaded.config._attn_implementation == model.config._attn_implementation
    inputs = case.inputs(3, 8, 1)
    assert torch.equal(case.run(loaded, inputs), case.run(model, inputs))
    names = {id(p): n for n, p in model.named_parameters()}
    assert {n for n, _ in loaded.named_parameters()} == set(names.values())
    with torch.no_grad():
        next(iter(mixers(loaded).values())).v_proj.weight[0, 0] += 0.5
    assert not torch.equal(case.run(loaded, inputs), case.run(model, inputs))


@pytest.mark.parametrize("name", ["gpt2-sdpa", "t5-sdpa"])
def test_the_loaded_model_generates_the_same(name: str, tmp_path: Path) -> None:
    case, model = ZOO[name], rewritten(name)
    save(model, tmp_path / "saved")
    loaded: Any = load(tmp_path / "saved")
    ids = case.inputs(2, 9, 0)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 1}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(**given, **settings), model.generate(**given, **settings))
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


def test_ties_dtype_and_training_survive(tmp_path: Path) -> None:
    model = rewritten("gpt2-sdpa").to(torch.bfloat16)
    save(model, tmp_path / "saved")
    loaded: Any = load(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in loaded.parameters())
    assert [m.protocol for m in mixers(loaded).values()] == [m.protocol for m in mixers(model).values()]


@pytest.mark.parametrize("name", PLAIN)
def test_other_modules_come_back_into_a_fresh_one(name: str, tmp_path: Path) -> None:
    case, model = ZOO[name], rewritten(name)
    save(model, tmp_path / "saved")
    with pytest.raises(UsageError, match="built by you") as error:
        load(tmp_path / "saved")
    assert "module=" in error.value.hint
    fresh = case.build()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    loaded = load(tmp_path / "saved", module=fresh)
    assert loaded is fresh
    inputs = case.inputs(3, 8, 1)
    assert torch.equal(case.run(loaded, inputs), case.run(model, inputs))


def test_weights_that_a_module_shares_stay_shared(tmp_path: Path) -> None:
    model = rewritten("nanogpt-sdpa")
    save(model, tmp_path / "saved")
    loaded: Any = load(tmp_path / "saved", module=ZOO["nanogpt-sdpa"].build())
    assert loaded.lm_head.weight is loaded.wte.weight
    assert json.loads((tmp_path / "saved" / "rewrite.json").read_text())["tied"]


@pytest.mark.parametrize("way", ["auto", "concrete", "base"])
@pytest.mark.parametrize("name", ["gpt2-sdpa", "bert-sdpa"])
def test_a_plain_from_pretrained_stops(name: str, way: str, tmp_path: Path) -> None:
    import transformers

    model = rewritten(name)
    save(model, tmp_path / "saved")
    kinds: dict[str, Any] = {
        "auto": transformers.AutoModel,
        "concrete": type(model),
        "base": transformers.AutoModelForCausalLM,
    }
    with pytest.raises((ValueError, OSError)) as error:
        kinds[way].from_pretrained(tmp_path / "saved")
    assert "rewriter" in str(error.value)


def test_some_layers_by_the_knob_go_through_the_manifest(tmp_path: Path) -> None:
    case = ZOO["llama-sdpa"]
    model = tied(case, 2)
    turn(model, case, 2, slice(0, 1))
    model.save_pretrained(tmp_path / "saved")
    loaded: Any = load(tmp_path / "saved")
    inputs = case.inputs(3, 8, 1)
    assert torch.equal(case.run(loaded, inputs), case.run(model, inputs))
    assert loaded.model.layers[0].self_attn.k_proj.out_features == 16
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(case.run(load(tmp_path / "again"), inputs), case.run(model, inputs))
    turn(loaded, case, 2, slice(1, 2))
    loaded.save_pretrained(tmp_path / "again")  # now the config tells all
    assert not (tmp_path / "again" / "rewrite.json").exists()
    ordinary = type(loaded).from_pretrained(tmp_path / "again")
    assert torch.equal(case.run(ordinary, inputs), case.run(loaded, inputs))
    assert torch.equal(case.run(load(tmp_path / "again"), inputs), case.run(loaded, inputs))


def test_knob_and_mixer_together(tmp_path: Path) -> None:
    case = ZOO["qwen3-sdpa"]
    model = tied(case, 2)
    rewrite(model, case.inputs(2, 9, 0), case.heads, 2, causal=True, only=owners(model, case.heads)[:1])
    turn(model, case, 2, slice(1, None))
    save(model, tmp_path / "saved")
    inputs = case.inputs(3, 8, 1)
    assert torch.equal(case.run(load(tmp_path / "saved"), inputs), case.run(model, inputs))


def test_given_weights_are_written_instead(tmp_path: Path) -> None:
    model = rewritten("gpt2-sdpa")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=zeros)
    assert all((p == 0).all() for p in load(tmp_path / "saved").parameters())


# ---------------------------------------------------------------------- folders


def test_saving_over_an_earlier_save_switches_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, folder = ZOO["gpt2-sdpa"], tmp_path / "saved"
    first, second = rewritten("gpt2-sdpa", 2), rewritten("gpt2-sdpa", 1)
    inputs = case.inputs(2, 9, 0)
    save(first, folder)
    (folder / "tokenizer.json").write_text("{}")
    replace_json = checkpoint_saving._replace_json

    def fail(file: Path, data: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_saving, "_replace_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save(second, folder)
    assert torch.equal(case.run(load(folder), inputs), case.run(first, inputs))  # still the first
    monkeypatch.setattr(checkpoint_saving, "_replace_json", replace_json)
    save(second, folder)
    assert torch.equal(case.run(load(folder), inputs), case.run(second, inputs))
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert (folder / "tokenizer.json").exists()


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, data: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_saving, "_replace_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save(rewritten("gpt2-sdpa"), tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_saving_over_an_ordinary_checkpoint_leaves_none_of_it(tmp_path: Path) -> None:
    case = ZOO["gpt2-sdpa"]
    original: Any = case.build()
    original.save_pretrained(tmp_path / "saved")
    save(rewritten("gpt2-sdpa"), tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    with pytest.raises((ValueError, OSError)):
        type(original).from_pretrained(tmp_path / "saved")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    model = rewritten("nanogpt-sdpa")
    with pytest.raises(UsageError, match="not a folder"):
        save(model, tmp_path / "missing" / "saved")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        save(model, tmp_path / "file")
    with pytest.raises(UsageError, match="not a folder"):
        load(tmp_path / "missing")
    with pytest.raises(InvalidModelFile, match=r"neither config\.json nor rewrite\.json"):
        load(tmp_path)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    save(rewritten("gpt2-sdpa"), tmp_path / "saved")
    assert {file.suffix for file in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}


# ---------------------------------------------------------------------- broken folders


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "rewrite.json").read_text())
    change(manifest)
    (folder / "rewrite.json").write_text(json.dumps(manifest))


BREAKS: dict[str, Any] = {
    "format": lambda m: m.update(format=99),
    "no owners": lambda m: m.pop("owners"),
    "owner elsewhere": lambda m: m["owners"].update({"transformer.nowhere": next(iter(m["owners"].values()))}),
    "spec": lambda m: next(iter(m["owners"].values()))["spec"].update(kv_heads=3),
    "spec field": lambda m: next(iter(m["owners"].values()))["spec"].update(colour="red"),
    "shapes": lambda m: next(iter(m["owners"].values()))["shapes"].update(k=[7, 32, True]),
    "protocol": lambda m: next(iter(m["owners"].values()))["protocol"].pop("order"),
    "one owner less": lambda m: m["owners"].popitem(),
    "kind": lambda m: next(iter(m["owners"].values())).pop("kind"),
    "ties": lambda m: m.update(tied={}),
    "weights": lambda m: m.update(weights="elsewhere.safetensors"),
    "weights above": lambda m: m.update(weights="../rewritten.safetensors.bak"),
}


@pytest.mark.parametrize("what", list(BREAKS))
def test_a_manifest_that_does_not_fit_is_invalid(what: str, tmp_path: Path) -> None:
    save(rewritten("gpt2-sdpa"), tmp_path / "saved")
    load(tmp_path / "saved")
    edit(tmp_path / "saved", BREAKS[what])
    with pytest.raises(InvalidModelFile):
        load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["os.system", "PreTrainedModel.x", "logging", "AutoConfig", ""])
def test_only_model_classes_are_built(name: str, tmp_path: Path) -> None:
    save(rewritten("gpt2-sdpa"), tmp_path / "saved")
    edit(tmp_path / "saved", lambda m: m["architecture"].update({"class": name}))
    with pytest.raises(UsageError, match="no model class"):
        load(tmp_path / "saved")


@pytest.mark.parametrize("file", ["rewrite.json", "rewritten.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_files_are_invalid(file: str, damage: str, tmp_path: Path) -> None:
    save(rewritten("gpt2-sdpa"), tmp_path / "saved")
    target = tmp_path / "saved" / file
    content = target.read_bytes()
    target.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"[1, 2]"}[damage])
    with pytest.raises(InvalidModelFile):
        load(tmp_path / "saved")


def test_another_architecture_is_invalid(tmp_path: Path) -> None:
    save(rewritten("nanogpt-sdpa"), tmp_path / "saved")
    with pytest.raises(InvalidModelFile):
        load(tmp_path / "saved", module=nn.Linear(3, 3))
    with pytest.raises(InvalidModelFile):
        load(tmp_path / "saved", module=ZOO["torch-encoder"].build())


def test_folders_that_hold_something_else_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match="neither") as nothing:
        load(tmp_path)
    assert "a Hugging Face checkpoint" in nothing.value.hint
    ZOO["llama-sdpa"].build().save_pretrained(tmp_path / "text_encoder")  # type: ignore[operator]
    with pytest.raises(InvalidModelFile) as pipeline:
        load(tmp_path)
    assert "give one of the models in it: text_encoder" in pipeline.value.hint
    load(tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "adapter_config.json").write_text("{}")  # libraries add it to the model, or do not
    with pytest.raises(UnsupportedModel, match="adapter that was not merged") as adapter:
        load(tmp_path / "text_encoder")
    assert "merge_and_unload" in adapter.value.hint
