"""What is special about Hugging Face models: the head-count knob, saving, and hooks that collect attentions."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import UnsupportedModel, UsageError
from rewriter.install.call_record import CallRecord, snapshot
from rewriter.install.mixer import HEAD_COUNTS, MixerParameters, RewrittenMixer
from rewriter.install.reproduction import HINT, disagreement
from rewriter.install.tensors import owned_parameter, repeat_heads
from rewriter.module_modes import evaluating

GROUPS = "num_key_value_groups"
KV_HEADS = "num_key_value_heads"
QUERY_HEADS = "num_attention_heads"
MARK = "rewritten_kv_heads"
"""Set on a module whose head count was changed by the knob."""
PROJECTIONS = "rewritten_projections"
"""Names of its projections that were changed, separated by spaces."""
GAINS = "rewritten_gains"
"""Paths of the parameters of its norms that were changed, separated by spaces; not set if there are none."""


def is_pretrained(module: Any) -> bool:
    """True for a Hugging Face model; does not import transformers."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(module, library.PreTrainedModel)


# ---------------------------------------------------------------------- the knob


def knob_applies(model: nn.Module, owner: str, k_weight_key: str, v_weight_key: str) -> bool:
    """True if the attention at `owner` takes its number of K/V heads from its config and has plain K/V projections.

    The keys are state-dict keys, e.g. ``"model.layers.0.self_attn.k_proj.weight"``.
    """
    module = model.get_submodule(owner)
    config = _config(model, module)
    heads, kv_heads, groups = _integer(config, QUERY_HEADS), _integer(config, KV_HEADS), _integer(module, GROUPS)
    projections = [_projection(module, owner, key) for key in (k_weight_key, v_weight_key)]
    if heads is None or kv_heads is None or groups is None or not groups or heads % groups:
        return False
    present = heads // groups
    marked = getattr(module, MARK, None)
    return present == (kv_heads if marked is None else marked) and all(
        projection is not None and projection.out_features % present == 0 for projection in projections
    )


def adds_outside(model: nn.Module, owner: str, weight_key: str, bias: Tensor | None) -> bool:
    """True if `bias` is added to a projection that has none itself: by a hook or by code, which would add it again."""
    projection = _projection(model.get_submodule(owner), owner, weight_key)
    return bias is not None and projection is not None and projection.bias is None


def apply_knob(
    model: nn.Module,
    owner: str,
    k_weight_key: str,
    v_weight_key: str,
    kv_heads: int,
    after: MixerParameters,
    record: CallRecord,
    *,
    q_weight_key: str | None = None,
    gains: Mapping[str, Tensor] | None = None,
) -> None:
    """Give the attention at `owner` `kv_heads` K/V heads by editing its projections, its group size and the config.

    Of `after` only the K and V parameters are read, and the Q parameters if `q_weight_key` names a projection to put
    them in, and cast to the model's dtype. `gains` are new parameters of norms that multiply heads apart, by their
    paths from the owner, heads along their first axis. The config is edited once all
    attentions that share it have equally many K/V heads; until then the model is saved through rewrite.json. Before
    anything is changed, a copy of the module is edited and must equal another copy that holds each new head repeated
    for its group.

    Raises:
        UnsupportedModel: if the knob does not apply, or the edited module is not what it should be.
    """
    if not knob_applies(model, owner, k_weight_key, v_weight_key):
        raise UnsupportedModel(f"{owner} does not take its number of K/V heads from the config", hint=HINT)
    module = model.get_submodule(owner)
    names = [key.removeprefix(f"{owner}.").removesuffix(".weight") for key in (k_weight_key, v_weight_key)]
    pairs = dict(zip(names, ((after.k_weight, after.k_bias), (after.v_weight, after.v_bias)), strict=True))
    if q_weight_key is not None and _projection(module, owner, q_weight_key) is None:
        raise UnsupportedModel(f"{owner} has no plain query projection", hint=HINT)
    query = "" if q_weight_key is None else q_weight_key.removeprefix(f"{owner}.").removesuffix(".weight")
    queries = {query: (after.q_weight, after.q_bias)} if query else {}
    gains = gains or {}
    _prove(module, owner, pairs, kv_heads, record, queries, gains)
    turn_knob(module, pairs, kv_heads, gains)
    for name, (weight, bias) in queries.items():
        _set_rows(module.get_submodule(name), weight, bias)
    settle_config(model, module)
    guard_saving(model, owner)


def turn_knob(
    module: nn.Module,
    projections: Mapping[str, tuple[Tensor, Tensor | None]],
    kv_heads: int,
    gains: Mapping[str, Tensor],
) -> None:
    """Edit one attention module: new K/V rows by projection name, gains by path, head counts, group size."""
    before = heads_of(module)
    for name, (weight, bias) in projections.items():
        _set_rows(module.get_submodule(name), weight, bias)
    for path, numbers in gains.items():
        _set_gains(module, path, numbers)
    if gains:
        setattr(module, GAINS, " ".join(gains))
    for name in HEAD_COUNTS:
        if _integer(module, name) == before:
            setattr(module, name, kv_heads)
    setattr(module, GROUPS, _query_heads(module) // kv_heads)
    setattr(module, MARK, kv_heads)
    setattr(module, PROJECTIONS, " ".join(projections))


def settle_config(model: nn.Module, module: nn.Module) -> None:
    """Write the K/V head count into the config that `module` reads, if all attentions under it agree."""
    config = _config(model, module)
    sharing = list(_attentions(model, config))
    if any(isinstance(m, RewrittenMixer) for m in sharing):
        return
    counts = {heads_of(m) for m in sharing}
    if len(counts) == 1:
        setattr(config, KV_HEADS, counts.pop())


def describe(module: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs to give a fresh module the shape of an edited one, as JSON."""
    projections = {name: module.get_submodule(name) for name in str(getattr(module, PROJECTIONS)).split()}
    shapes = {name: [*layer.weight.shape, layer.bias is not None] for name, layer in projections.items()}  # type: ignore[misc]
    told = {"kind": "knob", "kv_heads": heads_of(module), "shapes": shapes}
    paths = str(getattr(module, GAINS, "")).split()
    return told | ({"gains": {path: [*module.get_parameter(path).shape] for path in paths}} if paths else {})


def rebuild(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Edit a freshly built module as described, with empty weights.

    Raises:
        KeyError, TypeError, AttributeError: if the description is broken or fits another module.
    """
    like = next(module.parameters())
    empty = {
        name: (like.new_empty(int(rows), int(columns)), like.new_empty(int(rows)) if bias else None)
        for name, (rows, columns, bias) in description["shapes"].items()
    }
    gains = {path: like.new_empty([int(n) for n in shape]) for path, shape in description.get("gains", {}).items()}
    turn_knob(module, empty, int(description["kv_heads"]), gains)


def heads_of(module: nn.Module) -> int:
    """The number of K/V heads of a module with the knob."""
    return _query_heads(module) // int(getattr(module, GROUPS))


def turned(model: nn.Module) -> dict[str, nn.Module]:
    """The modules edited by the knob, by dotted path."""
    return {name: module for name, module in model.named_modules() if _integer(module, MARK) is not None}


def config_tells_all(model: nn.Module) -> bool:
    """True if the config that is saved with the model gives every edited module the K/V heads that it has."""
    for module in turned(model).values():
        config = _config(model, module)
        if heads_of(module) != _integer(config, KV_HEADS) or not _holds(getattr(model, "config", None), config):
            return False
    return True


def _holds(whole: Any, part: Any) -> bool:
    """True if `part` is the config `whole` or one of the configs inside it."""
    if whole is part:
        return True
    inner = vars(whole).values() if hasattr(whole, "to_dict") else ()
    return any(_holds(value, part) for value in inner if hasattr(value, "to_dict"))


def _prove(
    module: nn.Module,
    owner: str,
    pairs: Mapping[str, tuple[Tensor, Tensor | None]],
    kv_heads: int,
    record: CallRecord,
    queries: Mapping[str, tuple[Tensor, Tensor | None]],
    gains: Mapping[str, Tensor],
) -> None:
    edited, twin = copy.deepcopy(module), copy.deepcopy(module)
    for copied in (edited, twin):
        for name, (weight, bias) in queries.items():
            _set_rows(copied.get_submodule(name), weight, bias)
    repeats = heads_of(module) // kv_heads
    turn_knob(edited, pairs, kv_heads, gains)
    for name, (weight, bias) in pairs.items():
        wide = [None if t is None else repeat_heads(t.detach(), kv_heads, repeats) for t in (weight, bias)]
        assert wide[0] is not None
        _set_rows(twin.get_submodule(name), wide[0], wide[1])
    for path, numbers in gains.items():
        _set_gains(twin, path, repeat_heads(numbers.detach(), kv_heads, repeats))
    try:
        with torch.no_grad(), evaluating(edited), evaluating(twin):
            answers = [_replay(m, record) for m in (edited, twin)]
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModel(f"{owner} cannot be given {kv_heads} K/V heads: {error}", hint=HINT) from error
    if (reason := disagreement(*answers)) is not None:
        raise UnsupportedModel(f"{owner}: shared heads do not equal repeated ones ({reason})", hint=HINT)


def _replay(module: nn.Module, record: CallRecord) -> Any:
    return module(*map(snapshot, record.args), **{name: snapshot(value) for name, value in record.kwargs.items()})


def _set_rows(projection: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    assert isinstance(projection, nn.Linear)
    like = projection.weight
    projection.weight = owned_parameter(weight, like, like.requires_grad)
    if bias is not None:
        projection.bias = owned_parameter(bias, like, like.requires_grad)
    projection.out_features = weight.shape[0]


def _set_gains(module: nn.Module, path: str, numbers: Tensor) -> None:
    """A parameter of a norm, and the shape that the norm was built for where that is the parameter's."""
    holder, _, name = path.rpartition(".")
    norm = module.get_submodule(holder)
    old = norm.get_parameter(name)
    if getattr(norm, "normalized_shape", None) == tuple(old.shape):
        setattr(norm, "normalized_shape", tuple(numbers.shape))  # noqa: B010
    setattr(norm, name, owned_parameter(numbers, old, old.requires_grad))


def _projection(module: nn.Module, owner: str, key: str) -> nn.Linear | None:
    path, _, parameter = key.removeprefix(f"{owner}.").rpartition(".")
    if parameter != "weight" or not key.startswith(f"{owner}."):
        return None
    try:
        child = module.get_submodule(path)
    except AttributeError:
        return None
    return child if type(child) is nn.Linear else None


def _attentions(model: nn.Module, config: Any) -> Iterator[nn.Module]:
    for module in model.modules():
        if _integer(module, GROUPS) is not None and _config(model, module) is config:
            yield module


def _config(model: nn.Module, module: nn.Module) -> Any:
    """The config that holds the module's head counts: its own, else the model's."""
    for config in (getattr(module, "config", None), getattr(model, "config", None)):
        if _integer(config, KV_HEADS) is not None:
            return config
    return None


def _query_heads(module: nn.Module) -> int:
    heads = _integer(getattr(module, "config", None), QUERY_HEADS)
    assert heads is not None
    return heads


def _integer(holder: Any, name: str) -> int | None:
    try:
        value = getattr(holder, name, None)
    except Exception:  # a config whose layers differ in it refuses to give one number for all
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---------------------------------------------------------------------- saving


def guard_saving(model: nn.Module, owner: str) -> None:
    """Make `save_pretrained` of the models around `owner` write what can be loaded again.

    The plain one would write a checkpoint of the original architecture with missing weights, which from_pretrained
    fills with random ones.
    """
    for path in _enclosing(owner):
        module = model.get_submodule(path)
        if is_pretrained(module):
            module.save_pretrained = types.MethodType(save_pretrained, module)  # type: ignore[assignment]


def save_pretrained(
    self: Any,
    save_directory: Any,
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Stands in for a rewritten model's `save_pretrained`; see `rewriter.install.checkpoint_saving.save`."""
    from rewriter.install.checkpoint_saving import save

    if push_to_hub:
        raise UsageError(
            "a rewritten model is not pushed to the hub by save_pretrained", hint="Save it, then upload the folder."
        )
    if is_main_process:
        Path(save_directory).parent.mkdir(parents=True, exist_ok=True)  # as the original does
        save(self, save_directory, state_dict=state_dict, **kwargs)


# ---------------------------------------------------------------------- hooks


def move_dispatch_hook(original: nn.Module, replacement: nn.Module) -> None:
    """Let the replacement's inputs be moved between devices as the original's were (accelerate's dispatch).

    Raises:
        UnsupportedModel: if the original's weights are offloaded by that hook.
    """
    hook: Any = getattr(original, "_hf_hook", None)
    if hook is None:
        return
    if getattr(hook, "offload", False):
        raise UnsupportedModel("the attention's weights are offloaded", hint="Load the model without offloading.")
    importlib.import_module("accelerate.hooks").add_hook_to_module(replacement, hook)


def keep_output_capture(model: nn.Module, owner: str, replacement: nn.Module) -> None:
    """Let ``outputs.attentions`` go on containing what the module at `owner` contributes.

    transformers finds the modules to collect from by their class, when collecting is first asked for; a replaced
    module would silently be missing. Without effect on other models, and where the hooks are there already (`place`
    moves them).
    """
    path = next((p for p in reversed(_enclosing(owner)) if is_pretrained(model.get_submodule(p))), None)
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")  # newer versions only
    if path is None or capturing is None:
        return
    around, original = model.get_submodule(path), model.get_submodule(owner)
    if getattr(around, "_output_capturing_hooks_installed", False):
        return
    for key, recorders in capturing._CAN_RECORD_REGISTRY.get(around).items():
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            index = _collected_index(recorder, original, f".{owner}.")
            if index is not None and key != "hidden_states":
                replacement.register_forward_hook(OutputCollector(key, index))


def _collected_index(recorder: Any, original: nn.Module, path: str) -> int | None:
    """The element of the original's output that `recorder` collects, None if it does not collect from it."""
    if isinstance(recorder, str):
        return 1 if path.endswith(f"{recorder}.") else None
    if isinstance(recorder, type):
        return 1 if isinstance(original, recorder) else None
    wanted, layer = recorder.target_class, recorder.layer_name
    if wanted is None or not isinstance(original, wanted) or (layer and f".{layer.strip('.')}." not in path):
        return None
    return int(recorder.index)


class OutputCollector:
    """A forward hook that hands one element of a module's output to transformers' active collector, if any."""

    def __init__(self, key: str, index: int) -> None:
        self.key, self.index = key, index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        collector: Any = sys.modules["transformers.utils.output_capturing"]._active_collector
        if torch.compiler.is_compiling() and not collector.compiling:
            return  # reading the context variable cannot be traced, and nothing is being collected
        collected = collector.get()
        if collected is not None and self.key in collected:
            value = output[self.index] if isinstance(output, tuple) else output
            if value is not None:
                collected[self.key].append(value)


def _enclosing(owner: str) -> list[str]:
    """Paths of the modules around `owner`, outermost first."""
    parts = owner.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
