"""The suite as others run it: from any directory, on modules that are broken in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = """
import sys, time
import numpy as np
from sparse_dlm_attn import AttentionState, Backend, Capabilities
from sparse_dlm_attn_reference import ReferenceBackend

class NoOperators(Backend):
    name = "no-operators"
    capabilities = Capabilities()

class NotABackend:
    pass

class RaisesWhenMade(ReferenceBackend):
    def __init__(self):
        raise RuntimeError("no such device")

class LeavesWhenMade(ReferenceBackend):
    def __init__(self):
        sys.exit(7)

class BadCapabilities(ReferenceBackend):
    capabilities = "everything"

class DeclaresNothing(ReferenceBackend):
    def why_not(self, problem):
        return ["not today"]

class Unknown(ReferenceBackend):
    capabilities = Capabilities(dtypes=("float8",))

class ReturnsNone(ReferenceBackend):
    def merge(self, *states):
        return None

class ReturnsLists(ReferenceBackend):
    def merge(self, *states):
        return [state.out.tolist() for state in states]

class ReturnsViews(ReferenceBackend):
    def reuse(self, active, fresh, cached):
        if not active.any():
            return AttentionState(cached.out, cached.lse)
        return super().reuse(active, fresh, cached)

class Raises(ReferenceBackend):
    def merge(self, *states):
        raise ZeroDivisionError("the kernel did not compile")

class Leaves(ReferenceBackend):
    def merge(self, *states):
        sys.exit(3)

class Prints(ReferenceBackend):
    def merge(self, *states):
        print("merging" * 1000)
        sys.stderr.write("really")
        return super().merge(*states)

class Hangs(ReferenceBackend):
    def merge(self, *states):
        while True:
            time.sleep(0.01)

class HangsWhenMade(ReferenceBackend):
    def __init__(self):
        time.sleep(1000)

class OwnBaseException(ReferenceBackend):
    def merge(self, *states):
        raise type("Odd", (BaseException,), {})("not even an Exception")

class RaisesOnErrors(ReferenceBackend):
    def merge(self, *states):
        np.seterr(all="raise")
        return super().merge(*states)

class Exits(ReferenceBackend):
    def merge(self, *states):
        import os
        os._exit(0)

class WrongBlock(ReferenceBackend):
    def attend_block(self, q, k, v, *, scale=None):
        state = super().attend_block(q, k, v, scale=scale)
        return AttentionState(state.out + np.asarray(1, state.out.dtype), state.lse)

class Overwrites(ReferenceBackend):
    def top_pages(self, scores, count, *, eligible):
        scores.flags.writeable = True
        scores += 1
        return super().top_pages(scores, count, eligible=eligible)

class ForgetsPages(ReferenceBackend):
    def attend_pages(self, q, context, selection, active, *, scale=None):
        return super().attend_pages(q, context, selection, np.zeros_like(active), scale=scale)

class Dies(ReferenceBackend):
    def merge(self, *states):
        import os
        os.abort()

class Fine(ReferenceBackend):
    name = "fine"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "raises.py").write_text("raise OSError('no driver')", encoding="utf-8")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')", encoding="utf-8")
    # settings of the folder must not matter to the command
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n", encoding="utf-8")
    return tmp_path


def run(folder: Path, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparse_dlm_attn", "conformance", *arguments], cwd=folder, text=True,
        capture_output=True, timeout=seconds, check=False, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("broken:NoOperators", "abstract"),
        ("broken:NotABackend", "must give a Backend"),
        ("broken:RaisesWhenMade", "no such device"),
        ("broken:LeavesWhenMade", "SystemExit"),
        ("broken:BadCapabilities", "AttributeError"),
        ("broken:Unknown", "float8"),
        ("broken:Missing", "Missing"),
        ("raises:Backend", "no driver"),
        ("leaves:Backend", "bye"),
        ("nowhere:Backend", "nowhere"),
        ("nosuchname", "unknown backend"),
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
    for part in (
        "MERGE-3:",
        "law: test_",
        "backend: broken:Raises, dtype float32",
        "problem:",
        "table = MergeTable(",
    ):
        assert part in text
    snippet = text[text.index("reproduce with:") :].splitlines()[1:]
    lines = [
        line[2:] for line in snippet[: next(i for i, line in enumerate(snippet) if line.endswith("))")) + 1]
    ]
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


def test_a_wrong_result_names_worst_index_error_and_budget(folder: Path) -> None:
    (folder / "off.py").write_text(
        "from sparse_dlm_attn import AttentionState\nfrom sparse_dlm_attn_reference import ReferenceBackend\n"
        "class Off(ReferenceBackend):\n    def merge(self, *s):\n        m = super().merge(*s)\n"
        "        return AttentionState(m.out, m.lse + 1)\n",
        encoding="utf-8",
    )
    done = run(
        folder, "--backend", "off:Off", "--clause", "MERGE-1", "--dtype", "float32", "--policy", "dense"
    )
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("MERGE-1: lse of merge"))
    for part in ("worst at (", "got ", "expected ", "error 1", "budget "):
        assert part in line


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


def test_a_run_in_which_nothing_ran_fails(folder: Path) -> None:
    done = run(folder, "--backend", "broken:DeclaresNothing", "--clause", "ATTEND", "--policy", "dense",
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
