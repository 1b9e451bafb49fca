"""The main job on torch modules: lossless twins come out exact, and the result is used like the original."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.targets import GroupedQuery
from rewriter.errors import NothingToRewrite, UnknownTarget, UnsupportedModel, UsageError
from rewriter.verify.result import Check, Fidelity, Verification
from tests.targets.lossless_twin import distance, legal_pool, tied
from tests.targets.padding import padded
from tests.zoo.models import MAIN, ZOO, Inputs, ZooCase
from tests.zoo.through import one_of_each_family

ATTENDING = [c for c in MAIN.values() if not c.tags & {"none", "refuse"}]
DECODERS = [c for c in ATTENDING if c.causal and "hf" in c.tags]
EXACT, LOSSY = 1e-4, 1e-2
BFLOAT16_EXACT, BFLOAT16_LOSSY = 0.03, 0.05
"""Parts of the largest output: a handful of bfloat16 roundings, against what one perturbed head does."""


def target(case: ZooCase) -> str:
    return GroupedQuery(legal_pool(case)).name


def params(chosen: list[ZooCase]) -> list[object]:
    return [pytest.param(case, id=case.name) for case in chosen]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same_state(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], t) for name, t in before.items())


def key_value_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The new projections' parameters: mixers and edited Hugging Face modules call them alike."""
    found = [p for n, p in module.named_parameters() if ".k_proj." in n or ".v_proj." in n]
    assert found
    return found


# ------------------------------------------------------------------ exact, and lossy


@pytest.mark.parametrize("case", one_of_each_family(ATTENDING))
def test_a_lossless_twin_comes_out_exact_and_a_perturbed_one_does_not(case: ZooCase) -> None:
    model = tied(case)
    before = state(model)
    fast = rewriter.optimize(model, target(case), example_inputs=case.inputs(2, 7, 0))
    report = fast.rewrite_report
    assert len(report.sites) == case.sites and report.refused == ()
    assert all(row.exact for row in report.sites)
    assert report.fidelity.max_abs <= EXACT
    assert report.kv_bytes_per_token.before == 2 * report.kv_bytes_per_token.after
    assert report.parameters.before == sum(p.numel() for p in model.parameters())
    assert report.parameters.after == sum(p.numel() for p in fast.parameters())
    for size in [(2, 7, 0), (3, 10, 1), (1, 5, 2)]:
        inputs = case.inputs(*size)
        assert distance(case.run(fast, inputs), case.run(model, inputs)) <= EXACT
    assert type(fast) is type(model) and fast is not model
    assert same_state(model, before), "the original was changed"

    other = tied(case, perturbed=True)
    lossy = rewriter.optimize(other, target(case), example_inputs=case.inputs(2, 7, 0))
    assert not any(row.exact for row in lossy.rewrite_report.sites)
    assert lossy.rewrite_report.fidelity.max_abs > LOSSY
    inputs = case.inputs(3, 10, 1)
    assert distance(case.run(lossy, inputs), case.run(other, inputs)) > LOSSY
    assert all(row.error > 1e-3 for row in lossy.rewrite_report.sites if row.error is not None)


@pytest.mark.parametrize("case", one_of_each_family(ATTENDING))
def test_bfloat16(case: ZooCase) -> None:
    model = tied(case).to(torch.bfloat16)
    inputs = cast(case.inputs(2, 7, 0), torch.bfloat16)
    fast = rewriter.optimize(model, target(case), example_inputs=inputs)
    assert all(row.exact for row in fast.rewrite_report.sites) and len(fast.rewrite_report.sites) == case.sites
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    later = cast(case.inputs(3, 10, 1), torch.bfloat16)
    expected = case.run(model, later)
    size = float(expected.float().abs().max())
    assert case.run(fast, later).dtype == torch.bfloat16
    assert distance(case.run(fast, later), expected) <= BFLOAT16_EXACT * size

    other = tied(case, perturbed=True).to(torch.bfloat16)
    lossy = rewriter.optimize(other, target(case), example_inputs=inputs)
    assert not any(row.exact for row in lossy.rewrite_report.sites)
    assert distance(case.run(lossy, later), case.run(other, later)) > BFLOAT16_LOSSY * size


def test_the_report_reads_well() -> None:
    case = ZOO["gpt2-sdpa"]
    report = rewriter.optimize(case.build(), "mqa", example_inputs=case.inputs(2, 7, 0)).rewrite_report
    text = str(report)
    assert "target mqa: 2 rewritten, 0 refused" in text
    assert "transformer.h.0.attn" in text and "mha4" in text and "lossy" in text
    shown = json.loads(json.dumps(report.to_dict()))
    assert [row["to"] for row in shown["sites"]] == ["mqa", "mqa"]
    assert set(shown["seconds"]) == {"capture", "match", "transform", "install", "verify"}
    assert all(0 < row["error"] < row["floor"] + 1 for row in shown["sites"])


def test_what_is_found_and_verified_prints_as_the_command_line_shows_it() -> None:
    case = ZOO["deberta-eager"]
    found = rewriter.inspect(case.build(), example_inputs=case.inputs(2, 7, 0))
    lines = str(found).splitlines()
    assert "0 of 2 attention sites can be rewritten" in lines and "hidden states" in lines[3]
    assert len(repr(found)) < 100 and "0 attentions, 2 feed-forward blocks, 2 refused" in repr(found)
    assert "\x1b" not in str(found)
    verified = Verification(Fidelity(0.5, 0.25), (Check("runs", False, "it does not"),))
    assert "FAILED" in str(verified) and str(verified).endswith("not verified")


def test_pooling_less_moves_the_output_less() -> None:
    """The numbers mean something: half the heads cost less than all but one, and a zeroed output costs most."""
    case = ZOO["bert-sdpa"]
    model, inputs = case.build(), case.inputs(2, 7, 0)
    half, one = (rewriter.optimize(model, t, example_inputs=inputs).rewrite_report for t in ("gqa2", "mqa"))
    assert sum(r.error for r in half.sites) < sum(r.error for r in one.sites) < sum(r.floor for r in one.sites)
    assert half.fidelity.cosine > one.fidelity.cosine


# ------------------------------------------------------------------ padding, generation, training, export


TEXT = [c for c in ATTENDING if "attention_mask" in c.axes]
RELATIVE = [c for c in TEXT if c.name.startswith(("llama", "qwen3"))]
PADDED = [(c, "right") for c in TEXT if not c.name.startswith("roberta")] + [(c, "left") for c in RELATIVE]
"""roberta reads positions off padding ids; only relative positions make a left-padded row equal to an unpadded one."""


@pytest.mark.parametrize(("case", "side"), [pytest.param(c, s, id=f"{c.name}-{s}") for c, s in PADDED])
def test_padded_batches_equal_unpadded_rows(case: ZooCase, side: str) -> None:
    fast = rewriter.optimize(tied(case), target(case), example_inputs=case.inputs(2, 7, 0))
    lengths, full = [7, 4, 6], case.inputs(3, 7, 5)
    batch = case.run(fast, padded(full, lengths, side))
    for row, length in enumerate(lengths):
        ids = full["input_ids"][row : row + 1, :length]
        alone = case.run(fast, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
        inside = batch[row, :length] if side == "right" else batch[row, 7 - length :]
        assert distance(inside, alone) <= EXACT
    ignored = case.run(fast, {**padded(full, lengths, side), "attention_mask": torch.ones(3, 7, dtype=torch.int64)})
    if side == "left" or not case.causal:
        assert distance(ignored[1, -4:], batch[1, -4:]) > LOSSY, "the mask matters"


def test_torch_encoder_padding() -> None:
    case = ZOO["torch-encoder-padded"]
    fast = rewriter.optimize(tied(case), "gqa2", example_inputs=case.inputs(2, 7, 0))
    x = case.inputs(2, 7, 3)["x"]
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    batch = case.run(fast, {"x": x, "padding": padding})
    alone = case.run(fast, {"x": x[1:, :4], "padding": padding[1:, :4]})
    assert distance(batch[1, :4], alone[0]) <= EXACT
    assert distance(case.run(fast, {"x": x, "padding": torch.zeros_like(padding)})[1, :4], alone[0]) > LOSSY


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "no_repeat_ngram_size": 2}


@pytest.mark.parametrize("case", one_of_each_family(DECODERS))
def test_generation_with_the_cache(case: ZooCase) -> None:
    model: Any = tied(case)
    fast = rewriter.optimize(model, target(case))
    ids = case.inputs(2, 6, 1)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    expected = model.generate(**given, **GREEDY)
    assert torch.equal(fast.generate(**given, **GREEDY), expected)
    assert torch.equal(fast.generate(**given, **GREEDY, use_cache=False), expected)
    assert torch.equal(fast.generate(**given, **GREEDY, num_beams=2), model.generate(**given, **GREEDY, num_beams=2))
    cache = fast(**given, use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers} == {legal_pool(case)}
    assert {layer.keys.shape[1] for layer in model(**given, use_cache=True).past_key_values.layers} == {case.kv_heads}
    worse = rewriter.optimize(tied(case, perturbed=True), target(case))
    assert not torch.equal(worse.generate(**given, **GREEDY), expected)


@pytest.mark.parametrize("case", params([ZOO[n] for n in ("bert-sdpa", "gpt2-sdpa", "llama-eager", "torch-encoder")]))
def test_training_reaches_the_new_weights(case: ZooCase) -> None:
    inputs = case.inputs(2, 7, 0)
    fast = rewriter.optimize(case.build(), "gqa2", example_inputs=inputs).train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    new = key_value_parameters(fast)
    assert {p.shape[0] for p in new} == {2 * 8}
    before = [p.detach().clone() for p in new]
    result = fast(**inputs)
    out = result if isinstance(result, Tensor) else result[0]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    for parameter in new:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    moved = [p for p in new if p.ndim == 2]
    assert all(float(p.grad.abs().max()) > 1e-6 for p in moved if p.grad is not None)
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(new, before, strict=True) if p.ndim == 2)


def test_the_mode_and_what_is_frozen_stay() -> None:
    case = ZOO["gpt2-sdpa"]
    model = case.build().train()
    assert rewriter.optimize(model, "gqa2").training and model.training
    frozen = case.build().eval().requires_grad_(False)
    fast = rewriter.optimize(frozen, "gqa2")
    assert not fast.training and not any(p.requires_grad for p in fast.parameters())


@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2-eager", "llama-sdpa", "nanogpt-softmax", "mha-sequence-first"])
def test_the_result_exports_and_compiles(name: str) -> None:
    case = ZOO[name]
    inputs = case.inputs(2, 7, 0)
    fast = rewriter.optimize(tied(case), "gqa2", example_inputs=inputs)
    constants: Any = {"use_cache": False} if name.startswith(("gpt2", "llama")) else {}
    exported = torch.export.export(fast, (), {**inputs, **constants}, strict=False)
    expected = case.run(fast, inputs)
    assert distance(case.run(exported.module(), {**inputs, **constants}), expected) <= EXACT
    compiled: Any = torch.compile(fast, backend="eager", fullgraph=False)
    assert distance(case.run(compiled, inputs), expected) <= EXACT


@pytest.mark.parametrize("name", ["llama-eager", "nanogpt-softmax", "gpt2-sdpa", "bert-eager", "mha-batch-first"])
def test_a_rewritten_module_can_be_rewritten_again(name: str) -> None:
    """Also where query heads are folded into rows, as rewritten modules do."""
    case = ZOO[name]
    inputs = case.inputs(2, 7, 0)
    once = rewriter.optimize(case.build(), "gqa2", example_inputs=inputs)
    found = rewriter.inspect(once, example_inputs=inputs).to_dict()["sites"]
    rows = [row for row in found if row["kind"] == "attention"]
    assert [(row["status"], row["heads"], row["kv_heads"]) for row in rows] == [("rewritable", 4, 2)] * 2
    twice = rewriter.optimize(once, "mqa", example_inputs=inputs)
    assert [(r.before, r.after) for r in twice.rewrite_report.sites] == [("gqa2", "mqa")] * 2
    direct = rewriter.optimize(case.build(), "mqa", example_inputs=inputs)
    assert distance(case.run(twice, inputs), case.run(direct, inputs)) <= EXACT
    assert distance(case.run(twice, inputs), case.run(once, inputs)) > LOSSY / 10


# ------------------------------------------------------------------ in place, on disk


@pytest.mark.parametrize("name", ["gpt2-sdpa", "llama-gqa-sdpa", "nanogpt-sdpa"])
def test_in_place_edits_the_model_that_was_given(name: str) -> None:
    case = ZOO[name]
    inputs = case.inputs(2, 7, 0)
    model = case.build()
    before = state(model)
    fast = rewriter.optimize(model, "mqa", example_inputs=inputs, inplace=True)
    assert fast is model and not same_state(model, before)
    copied = rewriter.optimize(case.build(), "mqa", example_inputs=inputs)
    assert distance(case.run(model, inputs), case.run(copied, inputs)) == 0


@pytest.mark.parametrize("wish", [{"target": "gqa3"}, {"target": "mqa", "layers": "9"}, {"target": "mystery"}])
def test_a_failed_edit_in_place_leaves_the_model_alone(wish: Any) -> None:
    case = ZOO["gpt2-sdpa"]
    model = case.build()
    before, kinds = state(model), [type(m) for m in model.modules()]
    with pytest.raises(UsageError):
        rewriter.optimize(model, inplace=True, **wish)
    assert same_state(model, before) and [type(m) for m in model.modules()] == kinds


def test_a_grouped_architecture_gets_an_ordinary_config(tmp_path: Path) -> None:
    import transformers

    case = ZOO["llama-sdpa"]
    model: Any = tied(case)
    fast = rewriter.optimize(model, "gqa2")
    assert (fast.config.num_key_value_heads, model.config.num_key_value_heads) == (2, 4)
    assert not [m for m in fast.modules() if "Mixer" in type(m).__name__]
    fast.save_pretrained(tmp_path / "ours")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert plain.config.num_key_value_heads == 2
    inputs = case.inputs(2, 7, 0)
    assert distance(case.run(plain, inputs), case.run(model, inputs)) <= EXACT


@pytest.mark.parametrize("name", ["gpt2-sdpa", "bert-eager", "llama-gqa-sdpa", "vit-sdpa"])
def test_a_folder_in_a_folder_out(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    model: Any = tied(case)
    model.save_pretrained(tmp_path / "source")
    files = {p: p.read_bytes() for p in (tmp_path / "source").iterdir()}
    result = rewriter.optimize(tmp_path / "source", target(case))
    assert isinstance(result, rewriter.Rewritten)
    assert all(row.exact for row in result.rewrite_report.sites)
    result.save(tmp_path / "out")
    loaded = rewriter.load(tmp_path / "out")
    inputs = case.inputs(2, 7, 0)
    assert distance(case.run(loaded, inputs), case.run(model, inputs)) <= EXACT
    checked = rewriter.verify(tmp_path / "out", tmp_path / "source")
    assert checked.ok and checked.fidelity is not None and checked.fidelity.max_abs <= EXACT
    assert {p: p.read_bytes() for p in (tmp_path / "source").iterdir()} == files
    assert {site.kv_heads for site in rewriter.inspect(tmp_path / "out").sites} == {legal_pool(case)}


def test_a_plain_module_is_saved_and_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    case = ZOO["nanogpt-softmax"]
    inputs = case.inputs(2, 7, 0)
    fast = rewriter.optimize(case.build(), "gqa2", example_inputs=inputs)
    rewriter.save(fast, tmp_path / "saved")
    fresh = case.build()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    loaded = rewriter.load(tmp_path / "saved", module=fresh)
    assert distance(case.run(loaded, inputs), case.run(fast, inputs)) == 0


# ------------------------------------------------------------------ which sites, which targets


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1]), ("0", [0]), ("1-5", [1]), ("-1:", [1]), (r"h\.0\.", [0])]
)
def test_layer_selectors(layers: str, expected: list[int]) -> None:
    case = ZOO["gpt2-sdpa"]
    model = case.build()
    fast = rewriter.optimize(model, "mqa", layers=layers)
    assert [row.name for row in fast.rewrite_report.sites] == [f"transformer.h.{i}.attn" for i in expected]
    assert [site.kv_heads for site in rewriter.inspect(fast).sites] == [1 if i in expected else 4 for i in range(2)]
    for index in {0, 1} - set(expected):
        kept = fast.get_submodule(f"transformer.h.{index}.attn")
        assert type(kept) is type(model.get_submodule(f"transformer.h.{index}.attn"))


@pytest.mark.parametrize(
    ("selector", "part"), [("encoder", "encoder"), ("decoder", "decoder"), ("cross", "encoder_at")]
)
def test_parts_of_an_encoder_decoder(selector: str, part: str) -> None:
    case = ZOO["bart-sdpa"]
    report = rewriter.optimize(
        case.build(), "gqa2", layers=selector, example_inputs=case.inputs(2, 7, 0)
    ).rewrite_report
    assert len(report.sites) == 2
    assert all(part in row.name for row in report.sites)


def test_a_mapping_gives_layers_different_targets() -> None:
    case = ZOO["llama-sdpa"]
    fast = rewriter.optimize(case.build(), {"0": "gqa2", "1": GroupedQuery(1)})
    assert [row.after for row in fast.rewrite_report.sites] == ["gqa2", "mqa"]
    assert [site.kv_heads for site in rewriter.inspect(fast).sites] == [2, 1]
    with pytest.raises(UsageError, match="mapping"):
        rewriter.optimize(case.build(), {"0": "gqa2"}, layers="1")


def test_an_illegal_head_count_names_sites_and_legal_counts() -> None:
    with pytest.raises(UsageError, match="4 query heads, 2 key/value heads") as error:
        rewriter.optimize(ZOO["llama-gqa-sdpa"].build(), "gqa3")
    assert "1, 2" in error.value.hint and "layers.0.self_attn" in error.value.hint
    assert error.value.exit_code == 2


def test_an_unknown_target_lists_what_there_is() -> None:
    with pytest.raises(UnknownTarget, match="gqa0") as error:
        rewriter.optimize(ZOO["llama-sdpa"].build(), "gqa0")
    assert "mqa" in error.value.hint and "gqaN" in error.value.hint


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mlp", "no attention"), ("conv", "no attention"), ("router", "no attention"), ("deberta-eager", "hidden states")],
)
def test_a_model_in_which_nothing_can_be_rewritten_says_why(name: str, reason: str) -> None:
    case = ZOO[name]
    with pytest.raises(NothingToRewrite, match=reason) as error:
        rewriter.optimize(case.build(), "mqa", example_inputs=case.inputs(2, 7, 0))
    assert error.value.exit_code == 1
    rewriter.inspect(case.build(), example_inputs=case.inputs(2, 7, 0))  # never raises for lack of sites


def test_adapters_and_library_quantisation_are_refused() -> None:
    for attribute, value, word in (
        ("peft_config", {"default": object()}, "adapters"),
        ("merge_and_unload", lambda: None, "adapters"),
        ("hf_quantizer", object(), "quantised"),
        ("is_quantized", True, "quantised"),
    ):
        model: Any = ZOO["llama-sdpa"].build()
        setattr(model, attribute, value)
        with pytest.raises(UnsupportedModel, match=word) as error:
            rewriter.optimize(model, "mqa")
        assert error.value.hint
        with pytest.raises(UnsupportedModel, match=word):
            rewriter.inspect(model)


def test_modules_that_hide_their_weights_or_their_code_are_refused() -> None:
    for model, word in (
        (ZOO["llama-sdpa"].build().to("meta"), "meta device"),
        (torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "TorchScript"),
    ):
        with pytest.raises(UnsupportedModel, match=word) as error:
            rewriter.optimize(model, "mqa", example_inputs=(torch.zeros(2, 2),))
        assert error.value.hint


@pytest.mark.parametrize("shared", [("k_proj",), ("k_proj", "v_proj")])
def test_layers_that_share_one_projection_and_not_the_others(shared: tuple[str, ...]) -> None:
    """Both keep their heads, or they would no longer be tied; a third, which shares nothing, does not, and the model
    stays whole, as a twin in which nothing is lost shows."""
    case = ZOO["llama-sdpa"]
    inputs = case.inputs(2, 9, 0)
    moved = []
    for lossless in (True, False):
        model = case.build().eval()
        model.model.layers.append(copy.deepcopy(model.model.layers[0]))
        model.config.num_hidden_layers = 3
        model.model.layers[2].self_attn.layer_idx = 2
        first, second = (model.get_submodule(f"model.layers.{i}.self_attn") for i in range(2))
        for name in shared:
            second.get_submodule(name).weight = first.get_submodule(name).weight
        if lossless:
            case.tie(model, 2)
        small = rewriter.optimize(model, "gqa2")
        assert [row.name for row in small.rewrite_report.sites] == ["model.layers.2.self_attn"]
        assert len(small.rewrite_report.refused) == 2
        assert all("tied parameters" in refusal.reason for refusal in small.rewrite_report.refused)
        first, second = (small.get_submodule(f"model.layers.{i}.self_attn") for i in range(2))
        assert all(first.get_submodule(n).weight is second.get_submodule(n).weight for n in shared)
        moved.append(float((case.run(small, inputs) - case.run(model, inputs)).abs().max()))
    assert moved[0] <= 1e-4 < moved[1]


def test_missing_or_wrong_example_inputs_are_explained() -> None:
    case = ZOO["nanogpt-sdpa"]
    with pytest.raises(UsageError, match="no default inputs") as error:
        rewriter.optimize(case.build(), "mqa")
    assert "example_inputs" in error.value.hint
    with pytest.raises(UnsupportedModel, match=r"torch\.export"):
        rewriter.optimize(case.build(), "mqa", example_inputs={"wrong": torch.zeros(1)})


def test_other_objects_and_other_options_are_usage_errors() -> None:
    model = ZOO["llama-sdpa"].build()
    with pytest.raises(UsageError, match="dict"):
        rewriter.optimize({}, "mqa")
    with pytest.raises(UsageError, match="kernels"):
        rewriter.optimize(model, "mqa", kernels="quantum")
    with pytest.raises(UsageError, match="different kinds"):
        rewriter.verify(model, object())


# ------------------------------------------------------------------ flat graphs


@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2-eager", "llama-gqa-sdpa", "nanogpt-sdpa"])
def test_an_exported_program_comes_back_as_one(name: str) -> None:
    case = ZOO[name]
    inputs: Any = {**case.inputs(2, 7, 0), **({"use_cache": False} if name.startswith(("gpt2", "llama")) else {})}
    model = tied(case)
    program = torch.export.export(model, (), inputs, strict=False)
    before = copy.deepcopy(program.state_dict)
    fast = rewriter.optimize(program, target(case))
    assert isinstance(fast, torch.export.ExportedProgram)
    report = getattr(fast, "rewrite_report")  # noqa: B009
    assert all(row.exact for row in report.sites) and len(report.sites) == 2
    assert distance(case.run(fast.module(), inputs), case.run(model, case.inputs(2, 7, 0))) <= EXACT
    assert all(torch.equal(program.state_dict[n], t) for n, t in before.items())
    lossy = rewriter.optimize(torch.export.export(tied(case, perturbed=True), (), inputs, strict=False), target(case))
    assert distance(case.run(lossy.module(), inputs), case.run(model, case.inputs(2, 7, 0))) > LOSSY


@pytest.mark.parametrize("name", ["nanogpt-softmax", "mha-batch-first", "torch-encoder"])
def test_a_graph_module_comes_back_as_one(name: str) -> None:
    case = ZOO[name]
    inputs = case.inputs(2, 7, 0)
    model = tied(case)
    graph = torch.export.export(model, (), inputs, strict=False).module()
    assert isinstance(graph, torch.fx.GraphModule)
    fast = rewriter.optimize(graph, "gqa2", example_inputs=inputs)
    assert type(fast).__mro__[1:] == type(graph).__mro__[1:] and fast is not graph
    assert all(row.exact for row in fast.rewrite_report.sites)
    assert distance(case.run(fast, inputs), case.run(model, inputs)) <= EXACT
    assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in graph.parameters())


# ------------------------------------------------------------------ a module that rotates by itself


def half_rotation(y: Tensor) -> Tensor:
    angle = torch.cat([_angles(y)] * 2, -1)
    first, second = y.chunk(2, -1)
    return y * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


def interleaved_rotation(y: Tensor) -> Tensor:
    cos, sin = _angles(y).cos(), _angles(y).sin()
    even, odd = y[..., ::2], y[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def l2_norm(y: Tensor) -> Tensor:
    return y / torch.sqrt((y * y).sum(-1, keepdim=True))


def _angles(y: Tensor) -> Tensor:
    return torch.arange(y.shape[-2])[:, None] * 10.0 ** -torch.arange(y.shape[-1] // 2) + 0.3


class SelfMade(nn.Module):
    """Four heads; `turn` is applied to queries and keys inside the module that holds the projections."""

    def __init__(self, turn: Any, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.turn = turn
        if tied:
            with torch.no_grad():
                for parameter in (*self.k.parameters(), *self.v.parameters()):
                    groups = torch.unflatten(parameter, 0, (2, 2, 8))
                    groups[:, 1] = groups[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.unflatten(p(x), -1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("turn", [half_rotation, interleaved_rotation, l2_norm], ids=lambda turn: turn.__name__)
def test_self_made_rotations_and_norms(turn: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    model, other = (nn.Sequential(nn.Linear(32, 32), SelfMade(turn, tied=t)) for t in (True, False))
    fast = rewriter.optimize(torch.export.export(model, (x,)), "gqa2")
    assert [row.exact for row in fast.rewrite_report.sites] == [True]
    assert distance(fast.module()(x).detach(), model(x).detach()) <= EXACT
    lossy = rewriter.optimize(torch.export.export(other, (x,)), "gqa2")
    assert distance(lossy.module()(x).detach(), other(x).detach()) > LOSSY

    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=False, opset_version=17)
    report = rewriter.optimize(tmp_path / "m.onnx", "gqa2").rewrite_report
    assert [row.exact for row in report.sites] == [True] and report.fidelity.max_abs <= EXACT

    try:
        module = rewriter.optimize(model, "gqa2", example_inputs=(x,))
    except NothingToRewrite as refused:
        assert "could not be reproduced" in str(refused)
    else:
        assert distance(module(x).detach(), model(x).detach()) <= EXACT


def test_verify_tells_weights_that_nobody_declared_changed() -> None:
    case = ZOO["gpt2-sdpa"]
    model = case.build()
    inputs = case.inputs(2, 7, 0)
    rewritten = rewriter.optimize(model, "gqa2", example_inputs=inputs)
    assert rewriter.verify(rewritten, model, example_inputs=inputs).ok
    with torch.no_grad():
        rewritten.transformer.wpe.weight[0, 0] += 1e-3
    failed = rewriter.verify(rewritten, model, example_inputs=inputs).failures
    assert [c.name for c in failed] == ["untouched"]
    assert "wpe" in failed[0].detail


def test_inspecting_leaves_nothing_of_the_exporter_in_the_model() -> None:
    """This model's forward keeps its position bias as a buffer; under export that is a fake tensor."""
    case = ZOO["x-alibi"]
    model, inputs = case.build(), case.inputs(2, 7, 0)
    expected = case.run(case.build(), inputs)
    assert rewriter.inspect(model, example_inputs=inputs).sites
    assert not [n for n, t in model.named_buffers() if type(t).__name__ == "FakeTensor"]
    assert torch.equal(case.run(model, inputs), expected)
