"""Every clause of the written specification is held by a test, and every mark names a clause."""

from __future__ import annotations

import ast
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


def marked_clauses() -> dict[str, list[str]]:
    """Places of each marked id, over this project's tests and the conformance suite."""
    places: dict[str, list[str]] = {}
    for folder in ("tests", "conformance"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for clause, line in clause_marks(path.read_text("utf-8")):
                places.setdefault(clause, []).append(f"{path.relative_to(ROOT)}:{line}")
    return places


def test_every_clause_is_written_once_and_named_by_a_test_and_every_mark_names_one() -> None:
    clauses, marked = written_clauses(), marked_clauses()
    assert len(clauses) == len(set(clauses)) > 50
    assert not set(clauses) - set(marked), "no test is marked with these clauses"
    assert not {clause: places for clause, places in marked.items() if clause not in clauses}


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
