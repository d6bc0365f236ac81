"""Every clause of the written specification is held by a test, and whoever names a clause names a written one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sparse_dlm_attn_conformance.clauses import CLAUSES

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"mark\.clause\(([^)]*)\)")
MENTION = re.compile(r"\bclauses? ([A-Z]+-[0-9]+)|\[([A-Z]+-[0-9]+)\]\(")
FOLDERS = ("sparse_dlm_attn", "reference", "backends", "benchmarks", "conformance", "models", "integrations")


def texts(*folders: str, kind: str = "py") -> Iterable[str]:
    return (path.read_text("utf-8") for folder in folders for path in (ROOT / folder).rglob(f"*.{kind}"))


def test_every_clause_is_written_once_listed_by_the_suite_and_held_by_a_test() -> None:
    pages = texts("docs/spec", kind="md")
    written = [clause for page in pages for clause in re.findall(r"^### ([A-Z]+-\d+)", page, re.MULTILINE)]
    assert len(written) == len(set(written)) > 50
    marked = {
        clause
        for text in texts("tests", "conformance")
        for mark in MARK.findall(text)
        for clause in re.findall(r"[A-Z]+-\d+", mark)
    }
    assert marked == set(written) == set(CLAUSES)


def test_every_clause_that_code_or_documentation_mentions_is_written() -> None:
    pages = [*texts(*FOLDERS), *texts("docs", kind="md"), *(path.read_text("utf-8") for path in ROOT.glob("*.md"))]
    assert {one or other for text in pages for one, other in MENTION.findall(text)} <= set(CLAUSES)
