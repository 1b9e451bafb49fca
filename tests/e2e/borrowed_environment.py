"""An environment of its own for packages that would disturb ours; it borrows everything else from us."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(home: Path, packages: Sequence[str]) -> Path:
    """The interpreter of a new environment in `home` with these packages, without their dependencies."""
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    wanted = [*packages, "--no-deps", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True, timeout=600)
    (folder,) = home.glob("lib/python*/site-packages")
    (folder / "borrowed.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    return python


def run(python: Path, *arguments: object) -> str:
    """The last line of what it prints; fails with its complaint if it fails."""
    done = subprocess.run([str(python), *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""
