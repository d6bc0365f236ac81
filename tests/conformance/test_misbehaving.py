"""Backends that are broken in every way give a report, not a traceback of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import run


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("broken:NoOperators", "abstract"),
        ("broken:NotABackend", "must give a Backend"),
        ("broken:RaisesWhenMade", "no such device"),
        ("broken:LeavesWhenMade", "SystemExit"),
        ("broken:BadCapabilities", "AttributeError"),
        ("broken:Unknown", "float8"),
        ("raises:Backend", "no driver"),
        ("leaves:Backend", "bye"),
    ],
)
def test_a_backend_that_does_not_load_gives_a_report(folder: Path, target: str, said: str) -> None:
    done = run(folder, "--backend", target, "--clause", "MERGE", "--report", "out.json")
    assert done.returncode == 1
    assert said in done.stdout and "nothing is proven" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert report["nothing_ran_on"] == [target] and report["counts"]["failed"] == 1
    assert said in report["backends"][target]["did not load"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ReturnsNone", "must return an AttentionState; got NoneType"),
        ("ReturnsLists", "must return an AttentionState; got list"),
        ("ReturnsViews", "must not share memory"),
        ("Raises", "ZeroDivisionError: the kernel did not compile"),
        ("Leaves", "SystemExit: 3"),
        ("OwnBaseException", "Odd: not even an Exception"),
        ("Hangs", "ran longer than 1 s"),
    ],
)
def test_a_backend_that_misbehaves_gives_a_report(folder: Path, kind: str, said: str) -> None:
    clauses = ("--clause", "PURE-2") if kind == "ReturnsViews" else ("--clause", "MERGE-3")
    done = run(
        folder,
        "--backend",
        f"broken:{kind}",
        "--policy",
        "dense",
        *clauses,
        "--dtype",
        "float32",
        "--seconds",
        "1" if kind == "Hangs" else "60",
        "--report",
        "out.json",
        "--report",
        "out.md",
    )
    assert done.returncode == 1
    assert said in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert report["counts"]["failed"] >= 1
    assert "FAIL" in (folder / "out.md").read_text(encoding="utf-8")


def test_a_failure_prints_all_one_needs_and_a_snippet_that_fails_again(folder: Path) -> None:
    done = run(folder, "--backend", "broken:Raises", "--clause", "MERGE-3", "--dtype", "float32")
    text = done.stdout
    for part in ("MERGE-3:", "law: test_", "backend: broken:Raises, dtype float32", "problem:", "table = MergeTable("):
        assert part in text
    snippet = text[text.index("reproduce with:") :].splitlines()[1:]
    lines = [line[2:] for line in snippet[: next(i for i, line in enumerate(snippet) if line.endswith("))")) + 1]]
    again = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=folder, text=True, capture_output=True, check=False
    )
    assert "ZeroDivisionError: the kernel did not compile" in again.stderr


@pytest.mark.parametrize(
    ("kind", "clause", "said"),
    [
        ("WrongBlock", "BLOCK-1", "BLOCK-1: attend_block: out lies outside the error budget"),
        ("Overwrites", "PURE-1", "PURE-1: argument scores after top_pages must be equal bit for bit"),
        ("ForgetsPages", "POLICY-5", "POLICY-5: out of pass"),
        ("ForgetsPages", "MEMORY-3", "ACCURACY-2: out of pass"),
    ],
)
def test_every_kind_of_snippet_fails_again(folder: Path, kind: str, clause: str, said: str) -> None:
    """A problem, a problem and an operator, an episode and a policy, the steps of the state machine."""
    done = run(folder, "--backend", f"broken:{kind}", "--clause", clause, "--dtype", "float32",
               "--policy", "streaming-llm:sinks=3,window=2", "--seed", "1")  # fmt: skip
    assert done.returncode == 1
    text = done.stdout[done.stdout.index(said) :]
    lines = text[text.index("reproduce with:") :].splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("  "))
    again = subprocess.run(
        [sys.executable, "-c", "\n".join(line[2:] for line in lines[:end])],
        cwd=folder, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert f"ConformanceFailure: {said}" in again.stderr, again.stderr


def test_a_setting_that_the_backend_changes_is_named_and_does_not_spoil_the_run(folder: Path) -> None:
    done = run(folder, "--backend", "broken:RaisesOnErrors", "--clause", "PURE-5", "--clause", "MERGE-3",
               "--dtype", "float32", "--policy", "dense", "--report", "out.json")  # fmt: skip
    assert done.returncode == 1
    assert "PURE-5: merge must leave the process as it was, but: numpy.geterr() was" in done.stdout
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    failed = {result["law"] for result in report["results"] if result["outcome"] == "failed"}
    assert failed == {"test_no_operator_changes_a_setting_of_the_process"}


def test_a_backend_that_hangs_while_it_loads_is_cut(folder: Path) -> None:
    done = run(folder, "--backend", "broken:HangsWhenMade", "--clause", "TOP-2", "--seconds", "1")
    assert done.returncode == 1
    assert "loading broken:HangsWhenMade ran longer than 1 s" in done.stdout


def test_printing_is_no_failure_and_does_not_spoil_the_report(folder: Path) -> None:
    done = run(folder, "--backend", "broken:Prints", "--clause", "MERGE-3", "--dtype", "float32",
               "--report", "out.json")  # fmt: skip
    assert done.returncode == 0 and "merging" not in done.stdout
    assert json.loads((folder / "out.json").read_text(encoding="utf-8"))["counts"]["passed"] >= 2


@pytest.mark.parametrize("kind", ["Dies", "Exits"])
def test_a_backend_that_ends_the_process_is_reported(folder: Path, kind: str) -> None:
    done = run(folder, "--backend", f"broken:{kind}", "--clause", "MERGE-3", "--dtype", "float32")
    assert done.returncode == 1
    assert "ended the process" in done.stderr


def test_a_wrong_result_names_worst_index_error_and_budget(folder: Path) -> None:
    (folder / "off.py").write_text(
        "from sparse_dlm_attn import AttentionState\nfrom sparse_dlm_attn_reference import ReferenceBackend\n"
        "class Off(ReferenceBackend):\n    def merge(self, *s):\n        m = super().merge(*s)\n"
        "        return AttentionState(m.out, m.lse + 1)\n",
        encoding="utf-8",
    )
    done = run(folder, "--backend", "off:Off", "--clause", "MERGE-1", "--dtype", "float32", "--policy", "dense")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("MERGE-1: lse of merge"))
    for part in ("worst at (", "got ", "expected ", "error 1", "budget "):
        assert part in line


def test_a_worker_that_dies_is_a_failed_law_in_the_report(folder: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = run(folder, "--backend", "broken:Dies", "--clause", "MERGE-3", "--dtype", "float32",
               "--policy", "dense", "--workers", "2", "--report", "out.json")  # fmt: skip
    assert done.returncode == 1
    results = json.loads((folder / "out.json").read_text(encoding="utf-8"))["results"]
    failed = [result for result in results if result["outcome"] == "failed"]
    assert failed and all("MERGE-3" in result["clauses"] for result in failed)
    assert all("ended the process" in result["reason"] for result in failed)
