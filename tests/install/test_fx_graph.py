"""Flat graphs rewritten as graphs: equal on lossless twins, dynamic, trainable, and unchanged where nothing matched."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F

from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.targets.grouped_query import GroupedQuery
from passes.targets.replacement import Replacement
from rewriter.errors import UsageError
from rewriter.install import fx_editor
from rewriter.install.fx_graph import Decide, GraphRewrite, is_flat, rewrite_exported_program, rewrite_graph_module
from tests.zoo.case import ZooCase, main_output
from tests.zoo.models import ZOO, cases
from tests.zoo.through import one_of_each_family

FIRST, SECOND = (2, 6, 0), (3, 9, 1)
"""(batch, length, seed): what a program is recorded on, and another size that it must go on taking."""

WIDTH, HEADS, DIM = 32, 4, 8


def to_heads(kv_heads: int) -> Decide:
    target = GroupedQuery(kv_heads)

    def decide(flow: Flow, matches: Matches) -> Sequence[Replacement]:
        return [target.transform(flow, site) for site in matches.sites]

    return decide


def fewer(case: ZooCase) -> int:
    return 2 if case.kv_heads > 2 else 1


def twin(name: str, dtype: torch.dtype = torch.float32) -> tuple[ZooCase, nn.Module, int]:
    """A zoo model whose key/value heads can be merged without loss, and to how many."""
    case = ZOO[name]
    module = case.build().to(dtype)
    config: Any = getattr(module, "config", None)
    if config is not None:
        config.use_cache = False
    case.tie(module, fewer(case))
    return case, module, fewer(case)


def exported(case: ZooCase, module: nn.Module) -> ExportedProgram:
    inputs = case.inputs(*FIRST)
    dynamic = {name: dict.fromkeys(case.axes.get(name, {}), Dim.AUTO) for name in inputs}
    return torch.export.export(module, (), inputs, dynamic_shapes=dynamic, strict=False)


def run(program: ExportedProgram, case: ZooCase, size: tuple[int, int, int]) -> Tensor:
    with torch.no_grad():
        return main_output(program.module()(**case.inputs(*size)))


def calls(graph: torch.fx.Graph, operator: str) -> int:
    return sum(operator in str(n.target) for n in graph.nodes if n.op == "call_function")


class Attention(nn.Module):
    """Four heads; `between` does something to the keys [B, S, H, D] after their projection."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None, result: str = "out") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.between, self.result = between, result
        with torch.no_grad():
            for layer in (self.k_proj, self.v_proj):
                for p in layer.parameters():
                    by_group = p.view(2, 2, DIM, *p.shape[1:])
                    by_group[:, 1] = by_group[:, 0]

    def forward(self, x: Tensor, past: Tensor | None = None) -> Any:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, HEADS, DIM) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.between is not None:
            k = self.between(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if past is not None:
            k, v = (torch.cat([past, t], dim=2) for t in (k, v))
        y = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.result == "caches":
            return y, k, v
        return y + k.mean() if self.result == "leak" else y


def attention_program(module: nn.Module, *inputs: Tensor) -> ExportedProgram:
    dynamic = tuple({0: Dim.AUTO, 2 if x.dim() == 4 else 1: Dim.AUTO} for x in inputs)
    return torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic, strict=False)


def features(batch: int = 2, length: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ exported programs


@pytest.mark.parametrize("case", one_of_each_family(cases()))
def test_lossless_twins_stay_equal_at_two_sizes(case: ZooCase) -> None:
    _, module, heads = twin(case.name)
    program = exported(case, module)
    before = str(program.graph)
    done = rewrite_exported_program(program, to_heads(heads))
    assert len(done.replacements) == case.sites and not done.refused
    assert all(r.exact for r in done.replacements)
    for size in (FIRST, SECOND):
        torch.testing.assert_close(run(done.model, case, size), case.run(module, case.inputs(*size)), atol=1e-5, rtol=0)
    assert str(program.graph) == before
    case.perturb(module)  # the control: the program shares the module's parameters, and no twin is left
    lossy = rewrite_exported_program(program, to_heads(heads))
    assert not any(r.exact for r in lossy.replacements)
    difference = run(lossy.model, case, FIRST) - case.run(module, case.inputs(*FIRST))
    assert float(difference.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["gemma2-eager", "gpt-neox-sdpa", "bloom-eager", "whisper-eager"])
def test_softcap_partial_rotation_position_bias_and_cross_attention(name: str) -> None:
    case, module, heads = twin(name)
    program = exported(case, module)
    done = rewrite_exported_program(program, to_heads(heads))
    assert len(done.replacements) == case.sites
    for size in (FIRST, SECOND):
        torch.testing.assert_close(run(done.model, case, size), case.run(module, case.inputs(*size)), atol=1e-5, rtol=0)
    case.perturb(module)  # and with it the program, whose parameters are the module's
    lossy = rewrite_exported_program(program, to_heads(heads)).model
    assert float((run(lossy, case, FIRST) - case.run(module, case.inputs(*FIRST))).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["nanogpt-sdpa", "gpt2-eager", "llama-eager", "qwen3-eager", "mha-batch-first"])
def test_bfloat16_is_as_near_to_float32_as_the_original(name: str) -> None:
    case, module, heads = twin(name, torch.bfloat16)
    inputs = {n: t.bfloat16() if t.is_floating_point() else t for n, t in case.inputs(*FIRST).items()}
    wide = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    reference = case.run(copy.deepcopy(module).float(), wide)

    def error(result: Tensor) -> float:
        return float((result.detach().float() - reference).norm() / reference.norm())

    program = torch.export.export(module, (), inputs, strict=False)
    done = rewrite_exported_program(program, to_heads(heads))
    assert done.flow.dtype == "bfloat16" and all(r.exact for r in done.replacements)
    assert {t.dtype for t in done.model.parameters()} == {torch.bfloat16}
    rounding = error(case.run(module, inputs))
    assert error(main_output(done.model.module()(**inputs))) <= 1.5 * rounding
    case.perturb(module)
    control = rewrite_exported_program(program, to_heads(heads)).model
    assert error(main_output(control.module()(**inputs))) > 5 * rounding


def test_what_did_not_match_is_the_same() -> None:
    case, module, heads = twin("llama-eager")
    program = exported(case, module)
    done = rewrite_exported_program(program, to_heads(heads))
    old = {n.name: n for n in program.graph.nodes}
    new = {n.name: n for n in done.model.graph.nodes}
    sites = [r.site for r in done.replacements]
    indices = {i for s in sites for o in (s.q, s.k, s.v) for i in (*o.path, o.projection.node)}
    indices |= {i for s in sites for i in s.nodes}
    matched = {done.flow.nodes[i].name for i in indices}
    after = {u.name for s in sites for u in old[s.output].users}
    differing = {n for n in old.keys() & new.keys() if old[n].format_node() != new[n].format_node()}
    readers_of_other_counts = {
        n for n in differing if old[n].args == new[n].args or str(old[n].args) == str(new[n].args)
    }
    assert differing - readers_of_other_counts <= matched | after | {"output"}
    gone = {n for n in old.keys() - new.keys() if old[n].op == "call_function"}
    assert gone and {n for n in gone if "assert" not in n and "repeat" not in n} <= matched | {
        n.name for s in sites for n in done.flow.ancestors(s.output)
    }
    kept = [k for k in program.state_dict if "k_proj" not in k and "v_proj" not in k]
    assert all(done.model.state_dict[k] is program.state_dict[k] for k in kept)
    assert calls(done.model.graph, "scaled_dot_product_attention") == len(sites)
    assert calls(done.model.graph, "softmax") == 0


def test_a_program_keeps_its_call_names_constraints_and_round_trips() -> None:
    case, module, heads = twin("llama-sdpa")
    program = exported(case, module)
    guards = list(program._guards_code)
    new = rewrite_exported_program(program, to_heads(heads)).model
    assert new.call_spec == program.call_spec and new.range_constraints == program.range_constraints
    assert new._guards_code == guards == program._guards_code
    assert [s.arg.name for s in new.graph_signature.input_specs if s.target is None] == list(case.inputs(*FIRST))
    assert set(new.state_dict) == set(program.state_dict)  # separate projections keep their keys
    key = "model.layers.0.self_attn.k_proj.weight"
    assert new.state_dict[key].shape == (heads * DIM, WIDTH) and program.state_dict[key].shape == (WIDTH, WIDTH)
    buffer = io.BytesIO()
    torch.export.save(new, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer)
    assert torch.equal(run(again, case, SECOND), run(new, case, SECOND))
    torch.testing.assert_close(run(new.run_decompositions(), case, FIRST), run(new, case, FIRST), atol=1e-5, rtol=0)
    with pytest.raises(AssertionError):
        new.module()(input_ids=torch.ones(2, 6, dtype=torch.int64), attention_mask=torch.ones(2, 7, dtype=torch.int64))


def test_fused_projections_are_split_and_the_old_weight_goes() -> None:
    case, module, heads = twin("gpt2-sdpa")
    new = rewrite_exported_program(exported(case, module), to_heads(heads)).model
    names = {
        k.rpartition("c_attn.")[2]: v for k, v in new.state_dict.items() if k.startswith("transformer.h.1.attn.c_attn")
    }
    assert {k: tuple(v.shape) for k, v in names.items()} == {
        "q_weight": (WIDTH, WIDTH), "q_bias": (WIDTH,),
        "k_weight": (heads * DIM, WIDTH), "k_bias": (heads * DIM,),
        "v_weight": (heads * DIM, WIDTH), "v_bias": (heads * DIM,),
    }  # fmt: skip


def test_new_parameters_train() -> None:
    case, module, heads = twin("nanogpt-sdpa")
    done = rewrite_exported_program(exported(case, module), to_heads(heads))
    trained = done.model.module()
    main_output(trained(**case.inputs(*SECOND))).square().mean().backward()  # type: ignore[no-untyped-call]
    new = {n: p for n, p in trained.named_parameters() if n.rpartition(".")[2][:2] in {"q_", "k_", "v_"}}
    assert len(new) == 6 * case.sites
    # a key bias shifts all scores of a query alike: its gradient is rounding
    assert all(p.grad is not None and (float(p.grad.abs().max()) > 1e-8 or "k_bias" in n) for n, p in new.items())


def test_frozen_weights_stay_frozen() -> None:
    module = Attention().requires_grad_(False)
    new = rewrite_exported_program(attention_program(module, features()), to_heads(2)).model
    assert not any(p.requires_grad for p in new.parameters())


def test_a_shared_weight_stays_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x + self.layer(x))
            return out

    module = Twice().eval()
    program = attention_program(module, features())
    done = rewrite_exported_program(program, to_heads(1))
    assert len(done.replacements) == 2 and set(done.model.state_dict) == set(program.state_dict)
    widths = {n: tuple(p.shape) for n, p in done.model.named_parameters() if "k_proj" in n or "v_proj" in n}
    assert set(widths.values()) == {(DIM, WIDTH), (DIM,)}


# ------------------------------------------------------------------ what lies between projection and attention


def _folded(k: Tensor) -> Tensor:
    batch, length = k.shape[:2]
    k = F.rms_norm(k, (DIM,)).reshape(batch * length, HEADS, DIM)
    return torch.unflatten(k.reshape(batch, length * HEADS, DIM), 1, (length, HEADS))


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "sizes named by number": lambda k: F.rms_norm(k, (DIM,)).reshape(*k.shape[:2], HEADS * DIM).view(k.shape),
    "sizes computed from heads": _folded,
    "expanded to itself": lambda k: (2.0 * F.rms_norm(k, (DIM,))).expand(*k.shape[:2], HEADS, DIM),
    "norm written out": lambda k: k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_head_counts_on_the_path_follow(between: Callable[[Tensor], Tensor]) -> None:
    module = Attention(between)
    done = rewrite_exported_program(attention_program(module, features()), to_heads(2))
    assert len(done.replacements) == 1
    for x in (features(), features(3, 7)):
        torch.testing.assert_close(done.model.module()(x), module(x), atol=1e-5, rtol=0)
    with torch.no_grad():
        module.k_proj.weight[-DIM:] += 1.0
        module.v_proj.weight[-DIM:] += 1.0
    lossy = rewrite_exported_program(attention_program(module, features()), to_heads(2)).model.module()
    assert float((lossy(features()) - module(features())).detach().abs().max()) > 1e-3


def test_caches_that_a_graph_hands_out_have_fewer_heads() -> None:
    module = Attention(result="caches")
    done = rewrite_exported_program(attention_program(module, features()), to_heads(2))
    x = features(3, 7)
    (new, k, v), (old, old_k, old_v) = done.model.module()(x), module(x)
    torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    torch.testing.assert_close(k, old_k[:, ::2], atol=1e-6, rtol=0)
    torch.testing.assert_close(v, old_v[:, ::2], atol=1e-6, rtol=0)


def _as_another(k: Tensor) -> Tensor:
    return F.rms_norm(k, (DIM,)).flatten(2).view_as(k.flatten(2)).view(k.shape)


def _in_a_region(k: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.rms_norm(k, (DIM,))


@pytest.mark.parametrize(
    ("between", "result", "reason"),
    [
        (_as_another, "out", "takes its sizes from another tensor"),
        (_in_a_region, "out", "inside a wrapped region"),
        (lambda k: F.rms_norm(k, (DIM,)), "leak", "also read at"),
    ],
    ids=["view_as", "autocast", "read elsewhere"],
)
def test_what_cannot_be_written_anew_keeps_its_attention_on_repeated_heads(
    between: Callable[[Tensor], Tensor], result: str, reason: str
) -> None:
    module = Attention(between, result)
    _check_repeated(module, reason)


def test_a_cache_input_keeps_its_shape_and_its_attention() -> None:
    past = torch.randn(2, HEADS, 3, DIM, generator=torch.Generator().manual_seed(0))
    _check_repeated(Attention(), "cache past is an input of the graph", past)


def _check_repeated(module: nn.Module, reason: str, *more: Tensor) -> None:
    program = attention_program(module, features(), *more)
    done = rewrite_exported_program(program, to_heads(2))
    assert not done.refused and len(done.replacements) == 1
    (kept,) = done.kept.values()
    assert reason in kept.why and kept.cache and not kept.projection
    new = done.model.module()
    old_size, new_size = (sum(p.numel() for p in p_.parameters()) for p_ in (program.module(), new))
    assert old_size - new_size == 2 * 2 * DIM * (WIDTH + 1)  # two heads fewer of keys and of values, with biases
    torch.testing.assert_close(new(features(), *more), module(features(), *more), atol=1e-5, rtol=0)
    if not more:  # the length of keys is not tied to that of queries
        torch.testing.assert_close(new(features(3, 7)), module(features(3, 7)), atol=1e-5, rtol=0)
    reloaded = torch.export.export(new, (features(), *more), strict=False)
    torch.testing.assert_close(reloaded.module()(features(), *more), new(features(), *more), atol=1e-6, rtol=0)
    with torch.no_grad():
        module.k_proj.weight[-DIM:] += 1.0  # type: ignore[union-attr, operator, index]
        module.v_proj.weight[-DIM:] += 1.0  # type: ignore[union-attr, operator, index]
    lossy = rewrite_exported_program(attention_program(module, features(), *more), to_heads(2)).model.module()
    assert float((lossy(features(), *more) - module(features(), *more)).detach().abs().max()) > 1e-3


def test_a_graph_module_repeats_heads_too() -> None:
    module = Attention(_as_another)
    graph = attention_program(module, features()).module()
    done = rewrite_graph_module(graph, (features(),), {}, to_heads(2))
    assert len(done.kept) == 1
    torch.testing.assert_close(done.model(features(3, 7)), module(features(3, 7)), atol=1e-5, rtol=0)
    assert sum(p.numel() for p in done.model.parameters()) < sum(p.numel() for p in graph.parameters())
    assert [n for n, _ in done.model.named_buffers() if "index" in n]


def test_keys_read_elsewhere_before_they_change_are_left_alone() -> None:
    module = Attention(result="leak")
    with torch.no_grad():
        module.k_proj.weight[-DIM:] += 0.2
    program = attention_program(module, features())
    new = rewrite_exported_program(program, to_heads(2)).model
    assert calls(new.graph, "linear") == calls(program.graph, "linear") + 1  # the old keys are still computed
    assert new.state_dict["k_proj.weight"] is program.state_dict["k_proj.weight"]
    assert new.state_dict["k_proj.k_weight"].shape == (2 * DIM, WIDTH)


# ------------------------------------------------------------------ graph modules


@pytest.mark.parametrize("name", ["nanogpt-softmax", "gpt2-eager", "llama-gqa-sdpa", "mha-sequence-first"])
def test_graph_modules_of_aten_operators_are_edited_as_they_are(name: str) -> None:
    case, module, heads = twin(name)
    graph = exported(case, module).module()
    keys = set(graph.state_dict())
    assert is_flat(graph)
    done = rewrite_graph_module(graph, (), case.inputs(*FIRST), to_heads(heads))
    new = done.model
    assert isinstance(new, GraphModule) and new is not graph and len(done.replacements) == case.sites
    for size in (FIRST, SECOND):
        result = main_output(new(**case.inputs(*size)))
        torch.testing.assert_close(result, case.run(module, case.inputs(*size)), atol=1e-5, rtol=0)
        assert torch.equal(main_output(graph(**case.inputs(*size))), case.run(module, case.inputs(*size)))
    assert set(graph.state_dict()) == keys
    old = dict(graph.named_parameters())
    shared = [n for n, p in new.named_parameters() if old.get(n) is p]
    assert len(shared) > len(old) // 2
    case.perturb(module)
    lossy = rewrite_graph_module(graph, (), case.inputs(*FIRST), to_heads(heads)).model
    difference = main_output(lossy(**case.inputs(*FIRST))) - case.run(module, case.inputs(*FIRST))
    assert float(difference.abs().max()) > 1e-3


def test_an_exported_graph_module_keeps_its_checks() -> None:
    case, module, heads = twin("nanogpt-softmax")
    graph = exported(case, module).module()
    new = rewrite_graph_module(graph, (), case.inputs(*FIRST), to_heads(heads)).model
    for checked in (graph, new):
        with pytest.raises(AssertionError, match="Guard failed"):
            checked(idx=torch.ones(2, 65, dtype=torch.int64))  # it has 64 positions
        with pytest.raises(ValueError, match="keyword mismatch"):
            checked(torch.ones(2, 6, dtype=torch.int64))  # it was exported with a keyword
        with pytest.raises(NotImplementedError):
            checked.train()


def _traced(name: str) -> tuple[ZooCase, nn.Module, GraphModule, int]:
    case, module, heads = twin(name)
    return case, module, torch.fx.symbolic_trace(module), heads


@pytest.mark.parametrize("name", ["nanogpt-sdpa", "mha-batch-first", "mha-sequence-first"])
def test_symbolic_traces(name: str) -> None:
    case, module, graph, heads = _traced(name)
    assert not is_flat(graph)
    done: GraphRewrite[GraphModule] = rewrite_graph_module(graph, (), case.inputs(*FIRST), to_heads(heads))
    assert isinstance(done.model, GraphModule) and len(done.replacements) == case.sites
    for size in (FIRST, SECOND):
        inputs = case.inputs(*size)
        by_position, by_name = done.model(*inputs.values()), done.model(**inputs)
        assert isinstance(by_position, Tensor) and torch.equal(by_position, by_name)
        torch.testing.assert_close(by_position, case.run(module, inputs), atol=1e-5, rtol=0)
    untouched = {n for n, _ in module.named_parameters() if "c_attn" not in n and "in_proj" not in n}
    assert untouched <= set(dict(done.model.named_parameters(remove_duplicate=False)))
    by_position.square().mean().backward()
    assert all(p.grad is not None for n, p in done.model.named_parameters() if "v_" in n)
    case.perturb(module)
    lossy = rewrite_graph_module(graph, (), case.inputs(*FIRST), to_heads(heads)).model
    difference = lossy(**case.inputs(*FIRST)) - case.run(module, case.inputs(*FIRST))
    assert float(difference.abs().max()) > 1e-3


def test_a_traced_result_keeps_its_structure() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Any]:
            y = self.layer(x) + shift
            return {"y": y, "pair": (x, y.sum(-1))}

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Attention) or super().is_leaf_module(m, module_qualified_name)

    module = Named().eval()
    graph = GraphModule(module, Leaves().trace(module))
    new = rewrite_graph_module(graph, (features(),), {"shift": torch.ones(WIDTH)}, to_heads(2)).model
    x, shift = features(4, 9), torch.full((WIDTH,), 2.0)
    expected, result = module(x, shift), new(x, shift=shift)
    assert set(result) == {"y", "pair"} and isinstance(result["pair"], tuple)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ nothing to do, wrong use, and the check itself


@pytest.mark.parametrize("name", ["mlp", "router", "deberta-eager"])
def test_without_sites_the_very_object_comes_back(name: str) -> None:
    case = ZOO[name]
    program = exported(case, case.build())
    done = rewrite_exported_program(program, to_heads(1))
    assert done.model is program and done.replacements == () and done.matches.sites == ()
    graph = program.module()
    assert rewrite_graph_module(graph, (), case.inputs(*FIRST), to_heads(1)).model is graph


def test_only_chosen_sites_change() -> None:
    case, module, heads = twin("nanogpt-softmax")

    def first(flow: Flow, matches: Matches) -> Sequence[Replacement]:
        return to_heads(heads)(flow, matches)[:1]

    new = rewrite_exported_program(exported(case, module), first).model
    assert calls(new.graph, "softmax") == calls(new.graph, "scaled_dot_product") == 1
    assert new.state_dict["h.1.attn.c_attn.weight"] is module.state_dict(keep_vars=True)["h.1.attn.c_attn.weight"]


def test_keywords_may_come_in_any_order_and_wrong_ones_are_usage() -> None:
    case, module, heads = twin("bert-sdpa")
    program = exported(case, module)
    inputs = case.inputs(*FIRST)
    done = rewrite_exported_program(program, to_heads(heads), (), dict(reversed(inputs.items())))
    assert len(done.replacements) == case.sites
    with pytest.raises(UsageError, match="keywords"):
        rewrite_exported_program(program, to_heads(heads), (), {"input_ids": inputs["input_ids"]})
    with pytest.raises(UsageError, match="do not fit"):
        rewrite_graph_module(torch.fx.symbolic_trace(Attention()), (), {"y": features()}, to_heads(2))


def test_the_check_sees_a_wrong_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.install.fx_attention import attention as right

    def wrong(emitter: Any, like: Any, spec: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return right(emitter, like, spec, q, v, k, mask)

    program = attention_program(Attention(), features())
    rewrite_exported_program(program, to_heads(2))
    monkeypatch.setattr(fx_editor, "attention", wrong)
    done = rewrite_exported_program(program, to_heads(2))  # it is repeated instead, and says why
    assert all("does not equal that of repeated heads" in kept.why for kept in done.kept.values())
    assert len(done.kept) == len(done.replacements)
