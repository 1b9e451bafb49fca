"""The documentation is true: it builds without a warning, and its Python snippets run and print what is shown."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_readme import blocks, difference, snippets

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md") if "```python\n" in page.read_text(encoding="utf-8"))
CONFIG = ROOT / ".ci" / "mkdocs.yml"


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(CONFIG, tmp_path / "site")
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    pages = {str(page.relative_to(tmp_path / "site")) for page in (tmp_path / "site").rglob("*.html")}
    sources = {str(page.relative_to(DOCS).with_suffix(".html")) for page in DOCS.rglob("*.md")}
    assert sources <= pages
    reference = (tmp_path / "site" / "reference" / "python.html").read_text(encoding="utf-8")
    assert "Rewrite a model&#39;s attention" in reference or "Rewrite a model's attention" in reference
    assert "calibration" in reference


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", CONFIG.read_text(encoding="utf-8")))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_a_broken_link_would_fail_the_build(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("# A\n\n[nowhere](nowhere.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: a\ndocs_dir: pages\nplugins: []\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "nowhere.md" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_snippets_run_in_order_and_print_what_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    sys.modules.setdefault("docs", type(sys)("docs"))  # dataclasses look their module up
    for snippet in snippets((DOCS / page).read_text(encoding="utf-8"), "python"):
        printed = io.StringIO()
        source = compile(snippet.code.text, f"{page}, line {snippet.code.line}", "exec")
        with contextlib.redirect_stdout(printed):
            exec(source, names)
        if snippet.shown is not None:
            problem = difference(printed.getvalue(), snippet.shown)
            assert problem is None, f"{page}, line {snippet.shown.line}: {problem}\n{printed.getvalue()}"


def test_the_pages_with_snippets_are_found() -> None:
    assert {"tutorial.md", "targets.md", "write-a-target.md", "ideas.md"} <= set(PAGES)
    assert all(block.info in {"", "python", "sh", "text", "text timings", "bash"} for page in DOCS.glob("*.md")
               for block in blocks(page.read_text(encoding="utf-8")))  # fmt: skip


def targets_in(text: str) -> set[str]:
    """Targets named in a text, without what follows the name."""
    return {re.split(r"[:\[]", name)[0] for name in re.findall(r"`([^`]+)`", text)}


def test_every_target_has_a_how_to_and_says_whether_it_needs_healing() -> None:
    from rewriter import targets

    known = {re.split(r"[:\[]", target["name"])[0] for target in targets()}
    lines = (DOCS / "targets.md").read_text(encoding="utf-8").splitlines()
    assert targets_in("\n".join(line for line in lines if line.startswith("## "))) == known
    healing = (DOCS / "when-not.md").read_text(encoding="utf-8").partition("| target |")[2]
    assert targets_in(healing) == known
    assert targets_in(healing.replace("`window`", "window")) == known - {"window"}, "one that is missing is seen"


def test_commands_and_options_in_the_documentation_exist() -> None:
    from typer.main import get_command

    from rewriter.cli import app

    group = get_command(app)
    commands = getattr(group, "commands")  # noqa: B009
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")).replace("\\\n", " ")
    used = [line for line in re.findall(r"^(?:.*-m )?rewriter ([a-z].*)$", text, re.MULTILINE)]
    assert len(used) >= 5
    for line in used:
        name, *words = line.split()
        options = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        unknown = [word for word in words if word.startswith("--") and word not in options]
        assert not unknown, f"rewriter {line}"
