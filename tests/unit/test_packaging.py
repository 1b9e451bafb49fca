"""What ships and what must stay true of the source tree: wheel, pins, floors, import cost, no architecture names."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FLOORS = ("rewriter", "passes", "codegen")


@pytest.fixture(scope="module")
def project(project_root: Path) -> dict[str, Any]:
    return tomllib.loads((project_root / "pyproject.toml").read_text())


# ------------------------------------------------------------------ the wheel


def _shipped(root: Path) -> set[str]:
    files = (path for floor in FLOORS for path in (root / floor).rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_the_three_floors_and_nothing_else(project_root: Path, tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (path,) = WheelBuilder(str(project_root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = [wheel.read(n).decode() for n in names if n.endswith("entry_points.txt")]
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == _shipped(project_root)
    assert {f"{floor}/py.typed" for floor in FLOORS} <= packaged
    assert "rewriter = rewriter.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


# ------------------------------------------------------------------ what it requires


def test_every_runtime_dependency_is_accounted_for(project_root: Path, project: dict[str, Any]) -> None:
    """docs/dependencies.md has a row for each and for nothing else."""
    text = (project_root / "docs" / "dependencies.md").read_text().partition("## Extras")[0]
    named = {
        name for row in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE) for name in re.findall(r"`([\w-]+)`", row)
    }
    assert named == {Requirement(t).name for t in project["project"]["dependencies"]}


# ------------------------------------------------------------------ the pins


def _pins(root: Path, file: str = "constraints.txt") -> dict[str, Version]:
    lines = (line.partition(";")[0].strip() for line in (root / file).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(pin) for name, pin in pairs}


def _requirements(project: dict[str, Any], *extras: str) -> list[Requirement]:
    texts = list(project["project"]["dependencies"])
    for extra in extras:
        texts += project["project"]["optional-dependencies"][extra]
    found = [Requirement(text) for text in texts]
    return [r for r in found if r.name != "rewriter" and (r.marker is None or r.marker.evaluate())]


def test_every_requirement_is_pinned_within_its_range(project_root: Path, project: dict[str, Any]) -> None:
    pins = _pins(project_root)
    for requirement in _requirements(project, "hub", "demo", "test"):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert pin in requirement.specifier, f"{requirement} excludes the pinned {pin}"


def _required(names: list[Requirement]) -> set[str]:
    """What these and all that they require bring along, as far as it is installed here."""
    found: set[str] = set()
    todo = [(r.name, r.extras) for r in names]
    while todo:
        name, extras = todo.pop()
        key = canonicalize_name(name)
        if key in found:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(key)
        wanted = [Requirement(line) for line in lines]
        for environment in ({"extra": extra} for extra in ("", *extras)):
            todo += [(r.name, r.extras) for r in wanted if r.marker is None or r.marker.evaluate(environment)]
    return found


def test_what_requirements_bring_along_is_pinned(project_root: Path, project: dict[str, Any]) -> None:
    """A version that nobody chose has no hash that it could be compared with."""
    brought = _required(_requirements(project, "hub", "demo", "test"))
    assert {"torch", "sympy", "setuptools"} <= brought, "the control: torch's own requirements are seen"
    assert not brought - _pins(project_root).keys()


def test_every_requirement_has_a_lower_bound(project: dict[str, Any]) -> None:
    for requirement in _requirements(project, *project["project"]["optional-dependencies"]):
        assert any(clause.operator == ">=" for clause in requirement.specifier), str(requirement)


def test_exactly_one_onnxruntime_wheel_is_asked_for_on_every_platform(project: dict[str, Any]) -> None:
    wheels = [Requirement(t) for t in project["project"]["dependencies"] if t.startswith("onnxruntime")]
    platforms = [("linux", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64"), ("win32", "ARM64"), ("darwin", "arm64")]
    for system, machine in platforms:
        environment = {"sys_platform": system, "platform_machine": machine}
        chosen = [w.name for w in wheels if w.marker is not None and w.marker.evaluate(environment)]
        gpu = (system, machine) in {("linux", "x86_64"), ("win32", "AMD64")}
        assert chosen == ["onnxruntime-gpu" if gpu else "onnxruntime"], (system, machine)


def test_the_environment_has_the_pinned_versions(project_root: Path) -> None:
    for name, pin in _pins(project_root).items():
        try:
            installed = Version(version(name))
        except PackageNotFoundError:
            continue  # pinned for another platform
        assert installed.public == pin.public, f"{name}: {installed} installed, {pin} pinned"


# ------------------------------------------------------------------ the hashes


@pytest.fixture(scope="module")
def checker(project_root: Path) -> Any:
    path = project_root / ".ci" / "check_hashes.py"
    spec = importlib.util.spec_from_file_location("check_hashes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pin_has_hashes(project_root: Path, checker: Any) -> None:
    pins = _pins(project_root) | _pins(project_root, "requirements-weights.txt")
    known = checker.known_hashes((project_root / "requirements-hashes.txt").read_text())
    assert {(name, str(pin)) for name, pin in pins.items()} == set(known)
    assert all(known.values())


def _report(name: str, version: str, sha256: str) -> dict[str, Any]:
    return {
        "install": [
            {"metadata": {"name": name, "version": version},
             "download_info": {"archive_info": {"hashes": {"sha256": sha256}}}},
            {"metadata": {"name": "rewriter", "version": "0"}, "download_info": {"dir_info": {"editable": True}}},
        ]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "version", "sha256", "wrong", "left"),
    [
        ("Some.Package", "1.0", "a" * 64, 0, 0),
        ("some-package", "1.0", "b" * 64, 1, 0),
        ("some-package", "1.1", "a" * 64, 1, 0),
        ("some-package", "1.0+cpu", "b" * 64, 0, 1),
        ("another", "1.0", "a" * 64, 0, 1),
    ],
    ids=["known", "another_hash", "another_version", "another_index", "not_pinned"],
)
def test_what_pip_took_is_compared(checker: Any, name: str, version: str, sha256: str, wrong: int, left: int) -> None:
    known = checker.known_hashes("some_package==1.0 \\\n    --hash=sha256:" + "a" * 64)
    found = checker.complaints(_report(name, version, sha256), known)
    assert tuple(map(len, found)) == (wrong, left)


# ------------------------------------------------------------------ the floors


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("file", "line", "kept"),
    [
        ("rewriter/door.py", "import passes.match\n", True),
        ("passes/match.py", "import rewriter.door\n", False),
        ("codegen/spec.py", "from passes import match\n", False),
        ("passes/match.py", "def late():\n    import onnx\n", False),
    ],
)
def test_the_contracts_catch_an_arrow_upward(
    project_root: Path, tmp_path: Path, file: str, line: str, kept: bool
) -> None:
    shutil.copy(project_root / "pyproject.toml", tmp_path)
    for name in ("rewriter/__init__.py", "rewriter/door.py", "passes/__init__.py", "passes/match.py",
                 "codegen/__init__.py", "codegen/spec.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(line)
    done = _lint_imports(tmp_path)
    assert (done.returncode == 0) is kept, done.stdout + done.stderr


# ------------------------------------------------------------------ import cost

PROBE = """
import sys
before = set(sys.modules)
import rewriter
assert rewriter.__file__, "rewriter has no __init__.py"
print(*{m.partition(".")[0] for m in set(sys.modules) - before} - sys.stdlib_module_names)
"""


def test_importing_rewriter_loads_nothing_but_itself(project_root: Path) -> None:
    """That is what makes it quick: no torch, no onnx, not one package of others."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=project_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"rewriter", "passes", "codegen"}, done.stdout


# ------------------------------------------------------------------ causes, not names

ARCHITECTURES = re.compile(
    "albert|bart|bert|bigbird|blenderbot|bloom|camembert|cohere|dbrx|deberta|deepseek|deit|dinov2|distilbert|electra|"
    "ernie|falcon|gemma[23]?|gpt2?|gptj|glm|granite|llama4?|longformer|longt5|mamba|marian|mbart|minilm|mistral|"
    "mixtral|mobilebert|modernbert|mpnet|mpt|nanogpt|neox|nemotron|olmo|pegasus|persimmon|phi3|qwen[23]?|roberta|"
    "smollm2?|stablelm|starcoder|swin|t5|vit|wav2vec2|whisper|xlm|xlnet"
)
CLASSES = re.compile(
    r"nn\.MultiheadAttention|\bMultiheadAttention\b|\bTransformer(Encoder|Decoder)(Layer)?\b|\bOPT[A-Z]\w+"
    r"|\b[A-Z]\w+For(CausalLM|MaskedLM|SequenceClassification|ConditionalGeneration)\b|\bConv1D\b"
    r"|(import|from) transformers\b"
)
WORDS = re.compile(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z]+[0-9]*")


def _named_architectures(source: str) -> set[str]:
    """Architecture and module-class names in `source`, found in words, snake_case and CamelCase alike."""
    words = {word.lower() for word in WORDS.findall(source)}
    return {word for word in words if ARCHITECTURES.fullmatch(word)} | {
        match.group() for match in CLASSES.finditer(source)
    }


def test_matching_and_capture_name_no_architecture(project_root: Path) -> None:
    files = [*(project_root / "passes").rglob("*.py"), *(project_root / "rewriter" / "capture").rglob("*.py")]
    assert files
    found = {str(f.relative_to(project_root)): names for f in files if (names := _named_architectures(f.read_text()))}
    assert not found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("if isinstance(m, BertSelfAttention):", "bert"),
        ("is_gpt2 = True", "gpt2"),
        ('if "LlamaForCausalLM" in name:', "llama"),
        ("# as in T5", "t5"),
        ("isinstance(module, nn.MultiheadAttention)", "nn.MultiheadAttention"),
        ("QWEN3_NORM", "qwen3"),
    ],
)
def test_the_name_check_sees_planted_names(text: str, name: str) -> None:
    assert name in _named_architectures(text)


@pytest.mark.parametrize("text", ["an invited caller", "op.Clip", "options = opt", "com.microsoft MultiHeadAttention"])
def test_the_name_check_leaves_ordinary_words_alone(text: str) -> None:
    assert not _named_architectures(text)


# ------------------------------------------------------------------ the tree

MACHINE_PATH = re.compile(r"(?<![\w.$])/(?:work|root)/")
SOURCES = ("*.py", "*.toml", "*.md", "*.j2", "*.txt", "Makefile", "run")


def _project_files(root: Path) -> list[Path]:
    folders = (*FLOORS, "tests", "benchmarks", "docs", "samples", ".ci")
    nested = [p for folder in folders for pattern in SOURCES for p in (root / folder).rglob(pattern)]
    return nested + [p for pattern in SOURCES for p in root.glob(pattern)]


def test_no_file_holds_a_path_of_one_machine(project_root: Path) -> None:
    files = [path for path in _project_files(project_root) if path.name != Path(__file__).name]
    assert files
    assert not [str(path) for path in files if MACHINE_PATH.search(path.read_text(errors="ignore"))]
    assert MACHINE_PATH.search("open('/" + "work/x')") and not MACHINE_PATH.search("docs/work/x")


def test_no_file_name_says_nothing(project_root: Path) -> None:
    empty = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not [str(path) for path in _project_files(project_root) if path.stem in empty]


def test_the_check_runs_by_one_executable_script(project_root: Path) -> None:
    script = project_root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "exec make test" in script.read_text()
