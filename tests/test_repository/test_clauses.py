"""Every clause of the written specification is held by a test, and every mark names a clause."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLAUSE = re.compile(r"^### ([A-Z]+-[1-9][0-9]*)\b", re.MULTILINE)
MENTION = re.compile(r"\bclauses? ([A-Z]+-[0-9]+)|\[([A-Z]+-[0-9]+)\]\(")


def written_clauses() -> list[str]:
    """Ids in the headings of docs/spec, in order of appearance."""
    pages = sorted((ROOT / "docs" / "spec").glob("*.md"))
    return [clause for page in pages for clause in CLAUSE.findall(page.read_text("utf-8"))]


def clause_marks(source: str) -> Iterator[tuple[str, int]]:
    """Yield (id, line) of each literal argument of `pytest.mark.clause(...)` in ``source``."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("mark.clause"):
            continue
        for argument in node.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value, node.lineno


@functools.cache
def marked_clauses() -> dict[str, list[str]]:
    """Places of each marked id, over this project's tests and the conformance suite."""
    places: dict[str, list[str]] = {}
    for folder in ("tests", "conformance"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for clause, line in clause_marks(path.read_text("utf-8")):
                places.setdefault(clause, []).append(f"{path.relative_to(ROOT)}:{line}")
    return places


def test_the_scan_sees_marks_on_functions_classes_modules_and_parameters() -> None:
    source = (
        "import pytest\n"
        "pytestmark = pytest.mark.clause('A-1')\n"
        "@pytest.mark.clause('B-1', 'B-2')\n"
        "def test_one(): ...\n"
        "CASES = [pytest.param(1, marks=pytest.mark.clause('C-1'))]\n"
    )
    assert {clause for clause, _ in clause_marks(source)} == {"A-1", "B-1", "B-2", "C-1"}


def test_no_clause_is_written_twice() -> None:
    clauses = written_clauses()
    assert len(clauses) > 50
    assert sorted(clauses) == sorted(set(clauses))


@pytest.mark.parametrize("clause", written_clauses())
def test_the_clause_is_named_by_a_test(clause: str) -> None:
    assert clause in marked_clauses(), f"no test is marked @pytest.mark.clause({clause!r})"


def test_every_mark_names_a_written_clause() -> None:
    unknown = {c: places for c, places in marked_clauses().items() if c not in written_clauses()}
    assert not unknown


def test_the_conformance_suite_lists_the_written_clauses() -> None:
    clauses = pytest.importorskip("sparse_dlm_attn_conformance.clauses", reason="the suite is not installed")
    assert set(clauses.CLAUSES) == set(written_clauses())


def test_every_clause_that_code_or_documentation_mentions_is_written() -> None:
    known = set(written_clauses())
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for folder in ("sparse_dlm_attn", "reference", "backends", "benchmarks", "conformance", "models", "integrations"):
        files += (ROOT / folder).rglob("*.py")
    unknown = {
        f"{path.relative_to(ROOT)}: {clause}"
        for path in files
        for match in MENTION.finditer(path.read_text("utf-8"))
        if (clause := match[1] or match[2]) not in known
    }
    assert not unknown
