"""The published matrix shows every clause for the backends that it is about, and nothing that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_dlm_attn import SPEC_VERSION, get_backend
from sparse_dlm_attn_conformance.clauses import CLAUSES
from sparse_dlm_attn_conformance.report import Report, Result

PAGE = Path(__file__).parents[2] / "docs" / "conformance-matrix.md"


def problems(page: str, wanted: list[str]) -> list[str]:
    """Say what keeps a page from being the matrix of the specification and of the ``wanted`` columns."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    found = [] if f"Specification {SPEC_VERSION}," in page else ["another specification"]
    if sorted(head[2:]) != sorted(wanted) or [row[0] for row in rows] != list(CLAUSES):
        found.append(f"columns {set(head[2:]) ^ set(wanted)}, clauses {set(CLAUSES) ^ {row[0] for row in rows}}")
    for clause, says, *cells in rows:
        if says != CLAUSES.get(clause) or set(cells) - {"ok", "skip", "known", ""} or not any(cells):
            found.append(f"{clause}: {says} {cells}")
    return found


def test_the_published_matrix_is_that_of_the_specification() -> None:
    pytest.importorskip("torch", reason="torch is not installed, and the matrix names its dtypes")
    wanted = [f"{name} {dtype}" for name in ("reference", "torch") for dtype in get_backend(name).capabilities.dtypes]
    found = problems(PAGE.read_text(encoding="utf-8"), wanted)
    assert found == [], "`make conformance-matrix` writes the page anew"


def test_a_matrix_that_lacks_something_is_noticed() -> None:
    wanted = ["mine float32", "mine float64"]
    results = [Result("law", (c,), "mine", dtype, "", "passed") for c in CLAUSES for dtype in ("float32", "float64")]
    page = Report("ci", {"mine": {}}, results).as_markdown()
    assert problems(page, wanted) == []
    assert problems(page, [*wanted, "mine float16"])
    for other in (page.replace("| ok |", "| FAIL |", 1), page.replace("commutative", "odd")):
        assert problems(other, wanted)
    assert problems("\n".join(line for line in page.splitlines() if "| MERGE-2 |" not in line), wanted)
