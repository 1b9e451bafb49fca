"""The README is true: its snippets run in order, as pasted, and print what it shows.

Words and whole numbers must be the same. Numbers with decimals may differ by 3 % (another processor rounds
differently), in a block of timings by anything. "…" stands for whatever the README leaves out.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DECIMAL = re.compile(r"[+-]?\d+\.\d+(e[+-]\d+)?")
RELATIVE = 0.03


@dataclass(frozen=True)
class Block:
    """One fenced block: what its info string says, its text, and the line of the README on which it starts."""

    info: str
    text: str
    line: int


@dataclass(frozen=True)
class Snippet:
    """A block to run, and the block that shows its output, if any."""

    code: Block
    shown: Block | None


def blocks(text: str) -> Iterator[Block]:
    lines = text.splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
        else:
            yield Block(lines[opened][3:].strip(), "\n".join(lines[opened + 1 : number]) + "\n", opened + 1)
            opened = None
    assert opened is None, f"the fence on line {opened} is never closed"


def snippets(text: str, language: str) -> list[Snippet]:
    found = list(blocks(text))
    after = [*found[1:], None]
    return [
        Snippet(code, shown if shown is not None and shown.info.startswith("text") else None)
        for code, shown in zip(found, after, strict=True)
        if code.info == language
    ]


def difference(printed: str, shown: Block) -> str | None:
    """None if `printed` is what the README shows, else where they part."""
    return _differ(_words(printed), _words(shown.text), free="timings" in shown.info)


def _words(text: str) -> list[str]:
    words = [word for line in text.splitlines() for word in line.split()]
    return [word for word in words if set(word) != {"─"}]


def _differ(printed: list[str], shown: list[str], *, free: bool) -> str | None:
    pieces: list[list[str]] = [[]]
    for word in shown:
        if word == "…":
            pieces.append([])
        else:
            pieces[-1].append(word)
    at = 0
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        starts = [0] if number == 0 else [len(printed) - len(piece)] if last and piece else range(at, len(printed) + 1)
        fits = [s for s in starts if s >= at and _same(printed[s : s + len(piece)], piece, free)]
        if not fits:
            return f"printed {' '.join(printed[at : at + 40])!r}, shown {' '.join(piece)!r}"
        at = fits[0] + len(piece)
    if pieces[-1] and at != len(printed):
        return f"{' '.join(printed[at:])!r} is printed and not shown"
    return None


def _same(printed: list[str], shown: list[str], free: bool) -> bool:
    return len(printed) == len(shown) and all(_word_same(a, b, free) for a, b in zip(printed, shown, strict=True))


def _word_same(printed: str, shown: str, free: bool) -> bool:
    if DECIMAL.fullmatch(printed) and DECIMAL.fullmatch(shown):
        return free or abs(float(printed) - float(shown)) <= RELATIVE * abs(float(shown))
    return printed == shown


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_snippets_run_in_order_and_print_what_is_shown(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = snippets(text, "python")
    assert len(found) >= 4 and sum(s.shown is not None for s in found) >= 3
    names: dict[str, object] = {"__name__": "readme"}
    for snippet in found:
        printed = io.StringIO()
        source = compile(snippet.code.text, f"README.md, line {snippet.code.line}", "exec")
        with contextlib.redirect_stdout(printed):
            exec(source, names)
        if snippet.shown is not None:
            problem = difference(printed.getvalue(), snippet.shown)
            assert problem is None, f"README.md, line {snippet.shown.line}: {problem}\n{printed.getvalue()}"
    assert {"smollm2-gqa3", "minilm-gqa6.onnx"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_shell_snippets_run_in_order_and_print_what_is_shown(text: str, tmp_path: Path) -> None:
    found = [s for s in snippets(text, "sh") if not s.code.text.startswith("make ")]
    assert len(found) >= 3 and all(s.shown is not None for s in found)
    for snippet in found:
        printed = _shell(snippet.code.text, tmp_path)
        assert snippet.shown is not None
        if "timings" in snippet.shown.info:  # the machine and onnxruntime's version are whoever runs this
            header, _, rest = printed.partition("\n")
            assert re.fullmatch(r".* · cpu · 2 threads · 20 runs · onnxruntime \d+\.\d+.*", header)
            shown = Block("text timings", snippet.shown.text.partition("\n")[2], snippet.shown.line)
            assert difference(rest, shown) is None, f"{difference(rest, shown)}\n{printed}"
        else:
            problem = difference(printed, snippet.shown)
            assert problem is None, f"README.md, line {snippet.shown.line}: {problem}\n{printed}"


def _shell(script: str, folder: Path) -> str:
    """Standard output of a script, run with this interpreter as `python` and this source tree as `rewriter`."""
    commands = folder / ".bin"
    commands.mkdir(exist_ok=True)
    for name, words in (("python", [sys.executable]), ("rewriter", [sys.executable, "-m", "rewriter"])):
        command = commands / name
        command.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_commands_exist_and_set_everything_up(text: str) -> None:
    commands = [line for s in snippets(text, "sh") if s.code.text.startswith("make ") for line in _lines(s)]
    assert commands == ["make demo", "make test"]
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        rule = re.search(rf"^{command.removeprefix('make ')}: (.*)$", rules, re.MULTILINE)
        assert rule is not None and rule.group(1) in {"setup", "lint"}, "each command starts from setup"
    assert re.search(r"^lint: setup$", rules, re.MULTILINE)


def _lines(snippet: Snippet) -> list[str]:
    return snippet.code.text.splitlines()


def test_every_target_is_in_the_table_and_no_other(text: str) -> None:
    from rewriter import targets

    table = text.partition("\n## Targets\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == [target["name"] for target in targets()]
    for target in targets():
        assert target["paper"].removeprefix("arXiv ") in table, target["name"]


def test_links_inside_the_project_lead_somewhere() -> None:
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        for link in (link for link in links if "://" not in link):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_files_named_in_the_architecture_exist() -> None:
    named = re.findall(r"`((?:rewriter|passes|codegen|tests|samples)/[\w/.]*)`", _documents())
    assert len(named) >= 20
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, missing


def _documents() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))


# ------------------------------------------------------------------ the comparison itself can fail


@pytest.mark.parametrize(
    ("printed", "shown", "equal"),
    [
        ("a 1 0.500\n", "a 1 0.500", True),
        ("a   1  0.505\n────\n", "a 1 0.500\n──", True),
        ("a 1 0.600", "a 1 0.500", False),
        ("a 2 0.500", "a 1 0.500", False),
        ("a 1 0.500 more", "a 1 0.500", False),
        ("a 1", "a 1 0.500", False),
        ("a 1 b c d 2 e", "a 1\n…\n2 e", True),
        ("a 1 b c d 2 e f", "a 1\n…\n2 e", False),
        ("a 1 b c d 2 e f", "a 1\n…", True),
        ("x a 1 b", "a 1\n…", False),
        ("x a 1", "…\na 1", True),
        ("x a 1", "…\nb 1", False),
    ],
)
def test_what_counts_as_the_same_output(printed: str, shown: str, equal: bool) -> None:
    assert (difference(printed, Block("text", shown, 1)) is None) is equal


def test_only_timings_may_differ_freely() -> None:
    block = "min ms 29.5\n"
    assert difference("min ms 71.2", Block("text timings", block, 1)) is None
    assert difference("min ms 71.2", Block("text", block, 1)) is not None
    assert difference("max ms 29.5", Block("text timings", block, 1)) is not None
