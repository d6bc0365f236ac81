"""Backends that are broken in every way give a report, not a traceback of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from command_runs import run

from sparse_dlm_attn import AttentionState
from sparse_dlm_attn_conformance import check_backend
from sparse_dlm_attn_reference import ReferenceBackend

UNLOADABLE = {
    "broken:NoOperators": "abstract",
    "broken:NotABackend": "must give a Backend",
    "broken:RaisesWhenMade": "no such device",
    "broken:LeavesWhenMade": "SystemExit",
    "broken:BadCapabilities": "AttributeError",
    "broken:Unknown": "float8",
    "broken:HangsWhenMade": "loading broken:HangsWhenMade ran longer than 1 s",
    "raises:Backend": "no driver",
    "leaves:Backend": "bye",
}


def backends(names: Iterable[str]) -> list[str]:
    return [f"--backend={name}" for name in names]


def test_backends_that_do_not_load_give_a_report(folder: Path) -> None:
    done = run(
        folder,
        *backends(UNLOADABLE),
        "--policy",
        "dense",
        "--clause",
        "MERGE-3",
        "--seconds",
        "1",
        "--report",
        "out.json",
    )
    assert done.returncode == 1
    assert done.stdout.count("nothing is proven") == len(UNLOADABLE)
    assert "Traceback" not in done.stdout + done.stderr
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert report["nothing_ran_on"] == list(UNLOADABLE) and report["counts"]["failed"] == len(UNLOADABLE)
    for target, said in UNLOADABLE.items():
        assert said in report["backends"][target]["did not load"] and said in done.stdout


MISBEHAVING = {
    "ReturnsNone": "must return an AttentionState; got NoneType",
    "ReturnsLists": "must return an AttentionState; got list",
    "Raises": "ZeroDivisionError: the kernel did not compile",
    "Leaves": "SystemExit: 3",
    "OwnBaseException": "Odd: not even an Exception",
    "Hangs": "ran longer than 1 s",
}


def test_backends_that_misbehave_give_a_report(folder: Path) -> None:
    names = [f"broken:{kind}" for kind in MISBEHAVING]
    done = run(
        folder,
        *backends(names),
        "--policy",
        "dense",
        "--clause",
        "MERGE-3",
        "--dtype",
        "float32",
        "--seconds",
        "1",
        "--report",
        "out.json",
        "--report",
        "out.md",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert report["matrix"]["MERGE-3"] == {f"{name} float32": "failed" for name in names}
    for kind, said in MISBEHAVING.items():
        reasons = [found["reason"] for found in report["results"] if found["backend"] == f"broken:{kind}"]
        assert any(said in reason for reason in reasons) and said in done.stdout
    assert "FAIL" in (folder / "out.md").read_text(encoding="utf-8")


SNIPPETS = [
    (("Raises", "MERGE-3"), "MERGE-3: the code under test raised ZeroDivisionError: the kernel did not compile"),
    (("WrongBlock", "BLOCK-1"), "BLOCK-1: attend_block: out lies outside the error budget"),
    (("Overwrites", "PURE-1"), "PURE-1: argument scores after top_pages must be equal bit for bit"),
    (("ReturnsViews", "PURE-2"), "PURE-2: reuse.out must not share memory with its argument cached.out"),
    (("ForgetsPages", "POLICY-5"), "POLICY-5: out of pass"),
    (("ForgetsPages", "MEMORY-3"), "ACCURACY-2: out of pass"),
]


@pytest.mark.parametrize(("given", "said"), SNIPPETS, ids=[" ".join(given) for given, _ in SNIPPETS])
def test_a_failure_prints_all_one_needs_and_a_snippet_that_fails_again(
    folder: Path, given: tuple[str, str], said: str
) -> None:
    """A problem, a problem and an operator, an episode and a policy, the steps of the state machine."""
    done = run(
        folder,
        "--backend",
        f"broken:{given[0]}",
        "--clause",
        given[1],
        "--dtype",
        "float32",
        "--policy",
        "streaming-llm:sinks=3,window=2",
        "--seed",
        "1",
    )
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    text = done.stdout[done.stdout.index(said) :]
    for part in ("law: test_", f"backend: broken:{given[0]}, dtype float32", "reproduce with:"):
        assert part in text
    lines = text[text.index("reproduce with:") :].splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("  "))
    again = subprocess.run(
        [sys.executable, "-c", "\n".join(line[2:] for line in lines[:end])],
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
    )
    wanted = said.partition("raised ")[2] or f"ConformanceFailure: {said}"
    assert wanted in again.stderr, again.stderr


def test_a_setting_that_the_backend_changes_is_named_and_does_not_spoil_the_run(folder: Path) -> None:
    done = run(
        folder,
        "--backend",
        "broken:RaisesOnErrors",
        "--clause",
        "PURE-5",
        "--clause",
        "MERGE-3",
        "--dtype",
        "float32",
        "--policy",
        "dense",
        "--report",
        "out.json",
    )
    assert done.returncode == 1
    assert "PURE-5: merge must leave the process as it was, but: numpy.geterr() was" in done.stdout
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    failed = {result["law"] for result in report["results"] if result["outcome"] == "failed"}
    assert failed == {"test_no_operator_changes_a_setting_of_the_process"}


def test_printing_is_no_failure_and_does_not_spoil_the_report(folder: Path) -> None:
    done = run(
        folder, "--backend", "broken:Prints", "--clause", "MERGE-3", "--dtype", "float32", "--report", "out.json"
    )
    assert done.returncode == 0 and "merging" not in done.stdout
    assert json.loads((folder / "out.json").read_text(encoding="utf-8"))["counts"]["passed"] >= 2


@pytest.mark.parametrize("kind", ["Dies", "Exits"])
def test_a_backend_that_ends_the_process_is_reported(folder: Path, kind: str) -> None:
    done = run(folder, "--backend", f"broken:{kind}", "--clause", "MERGE-3", "--dtype", "float32")
    assert done.returncode == 1
    assert "ended the process" in done.stderr


def test_a_wrong_result_names_worst_index_error_and_budget() -> None:
    class Off(ReferenceBackend):
        def merge(self, *states: AttentionState) -> AttentionState:
            merged = super().merge(*states)
            return AttentionState(merged.out, merged.lse + 1)

    (found,) = check_backend(Off(), clauses=("MERGE-1",), dtypes=("float32",), first_only=True)
    line = next(line for line in found.text.splitlines() if line.startswith("MERGE-1: lse of merge"))
    for part in ("worst at (", "got ", "expected ", "error 1", "budget "):
        assert part in line


def test_a_worker_that_dies_is_a_failed_law_in_the_report(folder: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = run(
        folder,
        "--backend",
        "broken:Dies",
        "--clause",
        "MERGE-3",
        "--dtype",
        "float32",
        "--policy",
        "dense",
        "--workers",
        "2",
        "--report",
        "out.json",
    )
    assert done.returncode == 1
    results = json.loads((folder / "out.json").read_text(encoding="utf-8"))["results"]
    failed = [result for result in results if result["outcome"] == "failed"]
    assert failed and all("MERGE-3" in result["clauses"] for result in failed)
    assert all("ended the process" in result["reason"] for result in failed)
