"""The wheel in an environment of its own on a machine without a compiler: what works, and what is said of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.scale_models import Stack, write


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, which borrows what the wheel requires from ours; `path` holds no compiler."""

    home: Path
    path: Path

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A program of the environment."""
        kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "CXX", "REWRITER_CXX"}}
        environment = {**kept, "PATH": str(self.path), "REWRITER_CACHE": str(self.home / "cache")}
        program, *rest = map(str, words)
        command = [str(self.home / "bin" / program), *rest]
        return subprocess.run(command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def installed(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    from hatchling.builders.wheel import WheelBuilder

    home = tmp_path_factory.mktemp("environment")
    (wheel,) = WheelBuilder(str(project_root)).build(directory=str(home), versions=["standard"])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, timeout=240)
    (folder,) = home.glob("lib/python*/site-packages")
    (folder / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (home / "empty").mkdir()
    return Installed(home, home / "empty")


def test_a_file_is_rewritten(installed: Installed) -> None:
    source = write(Stack(1, hidden=16, inner=16, heads=4), installed.home / "in.onnx", external=False)
    done = installed.run("rewriter", "rewrite", source, "out.onnx", "--target", "mqa")
    assert done.returncode == 0, done.stderr
    where = installed.run("python", "-c", "import rewriter; print(rewriter.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed.home), "it is the wheel that was run"
    assert (installed.home / "out.onnx").exists()


def test_a_missing_compiler_is_said_where_one_is_needed(installed: Installed) -> None:
    """And the templates are there: it is looked for when the source stands."""
    source = write(Stack(1, hidden=16, inner=16, heads=4), installed.home / "kernels.onnx", external=False)
    assert installed.run("rewriter", "rewrite", source, "gqa.onnx", "--target", "gqa2").returncode == 0
    done = installed.run("rewriter", "kernels", "gqa.onnx", "-o", "built", "--arch", "cpu:avx2")
    assert done.returncode == 1 and "there is no C++ compiler" in done.stderr and "REWRITER_CXX" in done.stderr
    assert "Traceback" not in done.stderr and not list((installed.home / "built").glob("*.so"))


_MODEL = """
import sys, torch, rewriter
from codegen.errors import NoCompiler
layer = torch.nn.TransformerEncoderLayer(16, 4, 16, dropout=0.0, batch_first=True).eval()
given = (torch.randn(2, 5, 16),)
fast = rewriter.optimize(layer, "gqa2", example_inputs=given, kernels=sys.argv[1])
print(*fast(*given).shape)
"""


@pytest.mark.slow
def test_torch_models_run_on_operators_of_torch(installed: Installed) -> None:
    done = installed.run("python", "-c", _MODEL, "auto")
    assert done.returncode == 0 and done.stdout.split() == ["2", "5", "16"], done.stderr
    asked = installed.run("python", "-c", _MODEL, "cpp")
    assert asked.returncode == 1 and "there is no C++ compiler" in asked.stderr
