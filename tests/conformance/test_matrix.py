"""The published matrix shows every clause for every backend of ours, and nothing that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_dlm_attn import SPEC_VERSION, get_backend
from sparse_dlm_attn_conformance.clauses import CLAUSES
from sparse_dlm_attn_conformance.report import Report, Result

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance-matrix.md"


def table(page: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns and, by clause, the cells of a matrix in Markdown."""
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in page.splitlines() if line[:2] == "| "]
    return rows[0][2:], {row[0]: row[2:] for row in rows[1:]}


def problems(page: str, wanted: set[str]) -> list[str]:
    """Say what keeps a page from being the matrix of the specification and of the ``wanted`` columns."""
    columns, rows = table(page.replace("|  |", "| - |").replace("|  |", "| - |"))
    found = []
    if f"Specification {SPEC_VERSION}," not in page:
        found.append("another specification")
    if set(columns) != wanted:
        found.append(f"columns {sorted(set(columns) ^ wanted)}")
    if list(rows) != list(CLAUSES):
        found.append(f"clauses {sorted(set(rows) ^ set(CLAUSES))}")
    for clause, cells in rows.items():
        if len(cells) != len(columns) or set(cells) - {"ok", "skip", "known", "-"} or not set(cells) - {"-"}:
            found.append(f"{clause}: {cells}")
    return found


def test_the_published_matrix_has_every_clause_and_dtype() -> None:
    pytest.importorskip("torch", reason="torch is not installed, and the matrix names its dtypes")
    wanted = {f"{name} {dtype}" for name in ("reference", "torch") for dtype in get_backend(name).capabilities.dtypes}
    assert problems(PAGE.read_text(encoding="utf-8"), wanted) == []


def test_a_matrix_that_lacks_something_is_noticed() -> None:
    results = [
        Result("law", (clause,), "mine", dtype, "", "passed") for clause in CLAUSES for dtype in ("float32", "float64")
    ]
    wanted = {"mine float32", "mine float64"}
    page = Report("ci", {"mine": {}}, results).as_markdown()
    assert problems(page, wanted) == []
    assert problems(page, {*wanted, "mine float16"})
    assert problems(page.replace("| ok |", "| FAIL |", 1), wanted)
    assert problems("\n".join(line for line in page.splitlines() if "| MERGE-2 |" not in line), wanted)
