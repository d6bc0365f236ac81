"""The notebooks run from top to bottom, in a kernel of their own, and show what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def read(path: Path) -> Any:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count]


def test_the_first_notebook_answers_with_each_policy_and_draws_what_was_read(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = read(ROOT / "examples" / "what_a_policy_reads.ipynb")
    # An empty folder: it needs what is installed, not this checkout.
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    rows = {line.split()[0]: line for line in printed(code[1]).splitlines()}
    assert len(rows) == 4
    assert all(("right" in line) != name.startswith("streaming-llm") for name, line in rows.items())
    pictures = [output for output in code[2].outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    assert "pass 0: density 100.0%" in printed(code[3]) and "4 of 16 rows recomputed" in printed(code[3])
