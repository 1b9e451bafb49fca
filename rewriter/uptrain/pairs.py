"""Which modules of a rewritten model answer to which of the original's: found in the weights, not by name.

A rewrite keeps a model's tree of modules and changes weights inside its blocks. For each block the smallest module that
holds everything changed in it gives an output that means the same in both models, whatever basis its heads are in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def changed(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the student's parameters that the teacher lacks, or has with another shape or other numbers, and of the
    teacher's that the student lacks: what took their place may have no parameters of its own."""
    old, new = dict(teacher.named_parameters()), dict(student.named_parameters())
    differing = [name for name in new if name not in old or not _same(new[name], old[name])]
    return [*differing, *(name for name in old if name not in new)]


def _same(a: nn.Parameter, b: nn.Parameter) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().to(b.device, b.dtype), b.detach())


def paired_modules(student: nn.Module, teacher: nn.Module, names: list[str]) -> list[str]:
    """Paths of the smallest modules that hold the parameters `names`, one for each repeated block.

    Paths that one of them lacks are replaced by their nearest parents in both. The model itself is no pair.
    """
    tree = _tree(names)
    modules = dict(student.named_modules())
    there = {name for name, _ in teacher.named_modules() if name in modules}
    paths = []
    for path in _split(tree, "", modules)[0] if names else ():
        while path and path not in there:
            path = path.rpartition(".")[0]
        if path and path not in paths:
            paths.append(path)
    return [p for p in paths if not any(p != q and p.startswith(f"{q}.") for q in paths)]


def to_train(student: nn.Module, teacher: nn.Module, names: list[str], which: str) -> set[str]:
    """Names of the parameters that learn: "all" of them, those of "blocks" in which some of `names` changed, or the
    "rewritten" ones, `names` themselves."""
    everything = {name for name, _ in student.named_parameters()}
    if which == "all":
        return everything
    if which == "rewritten":
        return everything & set(names)
    paths = paired_modules(student, teacher, names)
    blocks = tuple(f"{block_around(student, path) or path}." for path in paths)
    return {name for name in everything if name.startswith(blocks)} if blocks else everything


def outwards(path: str) -> list[str]:
    """The module and those around it, innermost first, without the model itself."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def block_around(model: nn.Module, path: str) -> str | None:
    """The element of a list of modules that holds `path`."""
    for outer in outwards(path):
        parent, _, name = outer.rpartition(".")
        if name.isdigit() and isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential)):
            return outer
    return None


_Tree = Mapping[str, "_Tree | None"]


def _tree(names: list[str]) -> _Tree:
    """Nested dictionaries by the parts of the names; parameters are None."""
    root: dict[str, dict[str, object] | None] = {}
    for name in names:
        node: dict[str, object] = root  # type: ignore[assignment]
        *folders, leaf = name.split(".")
        for part in folders:
            node = node.setdefault(part, {})  # type: ignore[assignment]
        node[leaf] = None
    return root  # type: ignore[return-value]


def _split(node: _Tree, path: str, modules: Mapping[str, nn.Module]) -> tuple[list[str], int]:
    """(paths under `path`, how sure it is that they are blocks: 2 of a list, 1 the only one of a list, 0 not at all).

    A list of blocks is split, and so is a module all of whose changed children hold such lists (an encoder beside a
    decoder). Beside lists of several blocks, other changed children (embeddings) are left out. Any other module with
    several changed children is one pair.
    """
    children = {name: child for name, child in node.items() if child is not None}
    if len(children) < len(node):  # it owns changed parameters itself
        return [path], 0
    found = [_split(child, f"{path}.{name}" if path else name, modules) for name, child in children.items()]
    module = modules.get(path)
    if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and len(children) > 1):
        return [p for paths, _ in found for p in paths], 2 if len(children) > 1 else max(1, found[0][1])
    least, most = min(sure for _, sure in found), max(sure for _, sure in found)
    if len(found) == 1 or least:
        return [p for paths, _ in found for p in paths], least
    if most == 2:
        return [p for paths, sure in found for p in paths if sure == 2], 2
    return [path], 0
