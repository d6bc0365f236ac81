"""The suite as others run it: the command and pytest, from any directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import run


def test_a_device_that_is_not_there_is_refused_with_a_reason(folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for backend, said in (
        ("sparse_dlm_attn_torch:TorchBackend", "UnavailableError: "),
        ("reference", "UnknownNameError: "),
    ):
        done = run(folder, "--backend", backend, "--device", "cuda", "--clause", "TOP-2")
        assert done.returncode == 1
        assert f"must load; {said}" in done.stdout and "device" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr


def test_share_draws_fewer_problems(folder: Path) -> None:
    counts = []
    for share in ("1", "0.2"):
        done = run(folder, "--backend", "reference", "--clause", "MERGE-2", "--dtype", "float32",
                   "--policy", "dense", "--share", share, "--report", "out.json")  # fmt: skip
        assert done.returncode == 0, done.stdout
        report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        counts.append(sum(result["examples"] for result in report["results"]))
    assert 0 < 2 * counts[1] < counts[0]
    assert report["profile"] == "quick x 0.2"


@pytest.mark.parametrize("clause", ["ATTEND", "MEMORY-2"])
def test_a_run_in_which_nothing_ran_fails(folder: Path, clause: str) -> None:
    done = run(folder, "--backend", "broken:DeclaresNothing", "--clause", clause, "--policy", "dense",
               "--dtype", "float32", "--report", "out.json")  # fmt: skip
    assert done.returncode == 1
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    skipped = [result for result in report["results"] if result["outcome"] == "skipped"]
    assert skipped and all("not today" in result["reason"] for result in skipped if result["refused"])


def test_several_backends_run_side_by_side(folder: Path) -> None:
    done = run(folder, "--backend", "reference", "--backend", "broken:Fine", "--clause", "TOP",
               "--dtype", "float32", "--report", "out.json")  # fmt: skip
    assert done.returncode == 0
    matrix = json.loads((folder / "out.json").read_text(encoding="utf-8"))["matrix"]
    assert matrix["TOP-1"] == {"reference float32": "passed", "broken:Fine float32": "passed"}


def test_a_ledger_turns_failures_into_known_ones(folder: Path) -> None:
    (folder / "known.toml").write_text(
        "[[known_failure]]\nclause = 'MERGE-3'\nreason = 'does not compile'\nlink = 'https://example.org/1'\n",
        encoding="utf-8",
    )
    done = run(folder, "--backend", "broken:Raises", "--clause", "MERGE-3", "--dtype", "float32",
               "--known-failures", "known.toml")  # fmt: skip
    assert done.returncode == 0
    assert "known failure: does not compile" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backend", "reference", "--clause", "NOPE-1"), "clause or group"),
        (("--backend", "reference", "--dtype", "int4"), "must be one of float64"),
        (("--backend", "reference", "--profile", "endless"), "must be one of quick"),
        (("--backend", "reference", "--known-failures", "missing.toml"), "cannot be read"),
        (("--backend", "reference", "--report", "no/such/folder/out.json"), "does not exist"),
        (("--backend", "reference", "--workers", "0"), "at least 1"),
        (("--backend", "reference", "--share", "0"), "above 0"),
        ((), "--backend"),
    ],
)
def test_bad_options_are_refused_with_exit_code_2(
    folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_that_cannot_be_written_fails_the_run() -> None:
    done = run(Path.cwd(), "--backend", "reference", "--clause", "TOP-2", "--report", "/dev/full/x.json")
    assert done.returncode == 2


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").unlink()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=120, check=False)


SUITE = ("--pyargs", "sparse_dlm_attn_conformance")


def test_pytest_runs_the_suite_from_any_directory(folder: Path) -> None:
    done = run_pytest(folder, *SUITE, "--sda-backend", "broken:Fine", "--sda-clause", "TOP-2")
    assert done.returncode == 0, done.stdout
    for part in ("backend broken:Fine", "specification", "profile quick", "passed"):
        assert part in done.stdout


def test_pytest_without_a_backend_says_what_is_missing(folder: Path) -> None:
    done = run_pytest(folder, *SUITE, "-q")
    assert done.returncode != 0
    assert "needs --sda-backend NAME" in done.stdout + done.stderr


def test_workers_report_like_one_process(folder: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = run(folder, "--backend", "reference", "--clause", "TOP", "--workers", "2", "--report", "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert report["matrix"]["TOP-1"]["reference float32"] == "passed"
    assert "; 0 problems" not in done.stdout


def test_the_nightly_profile_stores_what_fails_and_tries_it_first(folder: Path) -> None:
    arguments = ("--backend", "broken:Raises", "--clause", "MERGE-3", "--dtype", "float32")
    arguments = (*arguments, "--profile", "nightly")
    assert run(folder, *arguments).returncode == 1
    stored = [path for path in (folder / ".hypothesis" / "sda-nightly").rglob("*") if path.is_file()]
    assert stored
    assert run(folder, *arguments, "--report", "out.json").returncode == 1
    results = json.loads((folder / "out.json").read_text(encoding="utf-8"))["results"]
    assert all(result["examples"] <= 60 for result in results)


def test_the_plugin_leaves_other_test_runs_alone(folder: Path) -> None:
    (folder / "test_mine.py").write_text(
        "import sys\ndef test_light():\n    assert 'sparse_dlm_attn_conformance.laws' not in sys.modules\n",
        encoding="utf-8",
    )
    done = run_pytest(folder, "-q", "test_mine.py")
    assert done.returncode == 0, done.stdout
    assert "conformance" not in done.stdout
