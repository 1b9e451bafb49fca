"""The record that a rewritten .onnx file carries in its metadata: what was done at which site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.errors import InvalidModelFile

VERSION, TARGET, SITES = "rewriter.version", "rewriter.target", "rewriter.sites"


@dataclass(frozen=True)
class SiteRecord:
    """One rewritten site.

    Attributes:
        changed: names of initializers that were removed or replaced.
        caches: (output, axis that runs over heads) of the model's outputs that now hold fewer heads.
    """

    name: str
    before: str
    after: str
    exact: bool
    changed: tuple[str, ...]
    caches: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Record:
    """What a file's metadata says about its rewrite."""

    version: str
    target: str
    sites: tuple[SiteRecord, ...]

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(name for site in self.sites for name in site.changed)

    @property
    def caches(self) -> dict[str, int]:
        """The axis that runs over heads by output, for all outputs that hold fewer heads than they did."""
        return {name: axis for site in self.sites for name, axis in site.caches}

    @property
    def all_exact(self) -> bool:
        return bool(self.sites) and all(site.exact for site in self.sites)


def read_record(model: ir.Model) -> Record | None:
    """The record in `model`'s metadata; None if rewriter did not write the model.

    Raises:
        InvalidModelFile: there is a record, and it is not what rewriter writes.
    """
    text = model.metadata_props.get(SITES)
    if text is None:
        return None
    try:
        sites = tuple(_site(entry) for entry in json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidModelFile(
            f"the metadata entry {SITES!r} is malformed", hint="rewrite the original model again"
        ) from error
    return Record(model.metadata_props.get(VERSION, ""), model.metadata_props.get(TARGET, ""), sites)


def _site(entry: dict[str, object]) -> SiteRecord:
    name, before, after, exact, changed = (entry[key] for key in ("name", "from", "to", "exact", "changed"))
    caches = entry.get("caches", [])  # files of version 0.1 do not say
    if not isinstance(exact, bool) or not isinstance(changed, list) or not isinstance(caches, list):
        raise TypeError("not a site")
    ports = tuple((str(output), int(axis)) for output, axis in caches)
    return SiteRecord(str(name), str(before), str(after), exact, tuple(str(item) for item in changed), ports)


def rename_record(model: ir.Model, names: Mapping[str, str]) -> None:
    """What the record says of initializers and outputs under other names that they were given."""
    sites = json.loads(model.metadata_props[SITES])
    for site in sites:
        site["changed"] = [names.get(name, name) for name in site["changed"]]
        site["caches"] = [[names.get(name, name), axis] for name, axis in site["caches"]]
    model.metadata_props[SITES] = json.dumps(sites)
