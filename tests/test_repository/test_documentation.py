"""Python in the documentation runs and prints what the page says.

The ``python`` blocks of a page run in order, in one namespace, in an empty folder. A ``text`` block that
follows a ``python`` block with only blank lines between is its expected output. A block is left out only by a
comment on the line before it that gives the reason: ``<!-- not run: reason -->``. A page that begins with
``<!-- needs: torch, transformers -->`` is skipped where one of these packages is not installed.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from sparse_dlm_attn import get_policy
from sparse_dlm_attn.cli.application import application

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?"
    r"^(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


NEEDS = re.compile(r"\A<!-- needs: (?P<packages>[\w, ]+) -->\n")


@dataclass(frozen=True)
class Block:
    """One fenced block: its kind, text, first line in the page, and whether it may run."""

    kind: str
    text: str
    line: int
    reason: str | None
    follows_code: bool


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a Markdown page in order."""
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(page):
        close = bool(found) and found[-1].kind == "python" and not page[end : match.start()].strip()
        indent = len(match["indent"])
        text = "".join(line[indent:] for line in match["body"].splitlines(keepends=True))
        line = page.count("\n", 0, match.start("body")) + 1
        found.append(Block(match["kind"], text, line, match["reason"], close))
        end = match.end()
    return found


def pages() -> list[Path]:
    """Pages that hold Python."""
    candidates = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [p for p in candidates if any(b.kind == "python" for b in blocks(p.read_text("utf-8")))]


def run_page(path: Path, name: str) -> None:
    """Run a page's Python in order and compare what it prints."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    printed = ""
    for block in blocks(path.read_text("utf-8")):
        if block.kind == "python" and block.reason is None:
            # Blank lines in front put the page's own line numbers into tracebacks.
            code = compile("\n" * (block.line - 1) + block.text, str(path), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, module.__dict__)
            printed = output.getvalue()
        elif block.kind == "text" and block.follows_code and block.reason is None:
            assert printed.rstrip() == block.text.rstrip(), f"{path.name}:{block.line}"


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_python_on_the_page_runs_and_prints_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = NEEDS.match(path.read_text("utf-8"))
    for package in re.findall(r"\w+", needs["packages"]) if needs else ():
        pytest.importorskip(package, reason=f"{path.name} needs {package}, which is not installed")
    monkeypatch.chdir(tmp_path)
    name = "page_" + re.sub(r"\W", "_", str(path.relative_to(ROOT)))
    try:
        run_page(path, name)
    finally:
        sys.modules.pop(name, None)


def test_the_backend_on_the_page_holds_the_laws_of_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = pytest.importorskip("sparse_dlm_attn_conformance", reason="the suite is not installed")
    page = (ROOT / "docs" / "how-to" / "write-a-backend.md").read_text("utf-8")
    (tmp_path / "selected_pages.py").write_text(blocks(page)[0].text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    groups = ("STATE", "CONTEXT", "GQA", "BOUNDS", "SCORES", "ATTEND", "BLOCK", "PURE")
    assert suite.check_backend("selected_pages:SelectedPages", clauses=groups) == []


def test_the_demo_in_the_readme_is_what_the_demo_prints() -> None:
    shown = [block.text for block in blocks((ROOT / "README.md").read_text("utf-8")) if "exact" in block.text]
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown[0].splitlines()[2:]]
    code = "import sys; from sparse_dlm_attn.cli import main; sys.exit(main(['decode', '--json']))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    results = json.loads(printed.stdout)["results"]
    assert [row[:2] for row in rows] == [[result["policy"], result["answer"]] for result in results]
    assert [row[2] == "yes" for row in rows] == [result["exact"] for result in results]
    for row, result in zip(rows, results, strict=True):
        for cell, part in zip(row[3:], ("everything", "after_first_pass"), strict=True):
            # Another machine's BLAS may round a score differently and so load a few pages more or less.
            share = 100 * result["reads"][part]["byte_share"]
            assert abs(float(cell.removesuffix(" %")) - share) <= 1.0, row[0]


def console_commands() -> list[tuple[str, str]]:
    """Lines of ``console`` blocks that call our command line, with the page they stand on."""
    return [
        (str(path.relative_to(ROOT)), line)
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        for block in blocks(path.read_text("utf-8"))
        if block.kind == "console"
        for line in block.text.splitlines()
        if re.match(r"\$ .*\bsparse-dlm-attn [a-z]", line)
    ]


@pytest.mark.parametrize(("page", "line"), console_commands())
def test_commands_on_the_page_exist_with_their_options_and_policies(page: str, line: str) -> None:
    words = shlex.split(line.rpartition("sparse-dlm-attn ")[2], comments=True)
    words = words[: words.index(">")] if ">" in words else words
    group = typer.main.get_command(application())
    command = group.get_command(typer.Context(group), words[0])
    assert command is not None, words[0]
    assert not (command.help or "").startswith("(not available)")
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}
    for option, value in pairwise(words):
        if option == "--policy" and "my_module" not in value:
            assert get_policy(value)


def test_a_wrong_output_on_a_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n", "utf-8")
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run_page(page, "page_wrong")
    page.write_text("<!-- not run: needs a device -->\n```python\nraise SystemExit\n```\n", "utf-8")
    run_page(page, "page_left_out")


def test_the_readme_keeps_to_its_length_and_shows_a_short_example() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert 60 <= len(text.splitlines()) <= 100
    first = next(block for block in blocks(text) if block.kind == "python")
    assert len(first.text.splitlines()) <= 14


def test_no_page_is_missing_from_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert written == set(re.findall(r"[\w/-]+\.md", navigation))
