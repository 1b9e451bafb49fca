"""The zoo is what it says: reproducible, non-trivial, causal where claimed, and lossless when tied."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.models import ZOO, ZooCase, cases

EVERY = [pytest.param(case, id=case.name) for case in ZOO.values()]
ATTENDING = [pytest.param(case, id=case.name) for case in cases(without=("none",))]


@pytest.mark.parametrize("case", EVERY)
def test_two_builds_are_equal_and_no_parameter_is_constant(case: ZooCase) -> None:
    first, second = case.build(), case.build()
    assert not first.training
    inputs = case.inputs(2, 9, 0)
    out = case.run(first, inputs)
    assert torch.equal(out, case.run(second, inputs))
    assert torch.isfinite(out).all()
    assert 0.05 < float(out.std()) < 20
    for name, parameter in first.named_parameters():
        assert parameter.numel() == 1 or float(parameter.detach().std()) > 0.01, name


@pytest.mark.parametrize("case", ATTENDING)
def test_tied_heads_are_equal_within_groups_and_perturbed_heads_are_not(case: ZooCase) -> None:
    module, inputs = case.build(), case.inputs(2, 9, 0)
    target = case.kv_heads // 2
    untied = case.run(module, inputs)
    assert list(case.head_views(module)), "no key/value parameters found"
    for view in case.head_views(module):
        assert view.shape[0] == case.kv_heads

    case.tie(module, target)
    tied = case.run(module, inputs)
    assert not torch.allclose(untied, tied, atol=1e-3), "tying must change the model"
    for view in case.head_views(module):
        groups = torch.unflatten(view, 0, (target, -1))
        assert torch.equal(groups, groups[:, :1].expand_as(groups))

    case.perturb(module)
    assert not torch.allclose(case.run(module, inputs), tied, atol=1e-3)


@pytest.mark.parametrize("case", ATTENDING)
def test_a_later_token_reaches_earlier_outputs_only_where_not_causal(case: ZooCase) -> None:
    if not any("sequence" in axes.values() for axes in case.axes.values()) or "encoder-decoder" in case.tags:
        pytest.skip("has no single token axis")
    module, inputs = case.build(), case.inputs(1, 8, 0)
    name = next(n for n, axes in case.axes.items() if "sequence" in axes.values())
    axis = next(i for i, label in case.axes[name].items() if label == "sequence")
    changed = inputs[name].clone()
    changed.select(axis, 7).copy_(changed.select(axis, 0))
    assert not torch.equal(changed, inputs[name])
    before, after = case.run(module, inputs), case.run(module, {**inputs, name: changed})
    earlier = (before.narrow(axis, 0, 7) - after.narrow(axis, 0, 7)).abs().max()
    assert (float(earlier) < 1e-5) is case.causal
    assert float((before.select(axis, 7) - after.select(axis, 7)).abs().max()) > 1e-3
