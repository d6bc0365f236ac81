"""The suite as others run it: the command and pytest, from any directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from command_runs import run

from sparse_dlm_attn import InvalidArgumentError, UnavailableError, UnknownNameError
from sparse_dlm_attn_conformance import check_backend
from sparse_dlm_attn_conformance.contenders import contenders
from sparse_dlm_attn_conformance.subjects import load_backend


def test_a_device_that_is_not_there_is_a_failure_with_a_reason(folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run(folder, "--backend", "sparse_dlm_attn_torch:TorchBackend", "--device", "cuda", "--clause", "TOP-2")
    assert done.returncode == 1
    assert "must load; UnavailableError: " in done.stdout and "device" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_share_draws_fewer_problems(folder: Path) -> None:
    counts = []
    for share in ("1", "0.2"):
        done = run(
            folder,
            "--backend",
            "reference",
            "--clause",
            "MERGE-2",
            "--dtype",
            "float32",
            "--policy",
            "dense",
            "--share",
            share,
            "--report",
            "out.json",
        )
        assert done.returncode == 0, done.stdout
        report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        counts.append(sum(result["examples"] for result in report["results"]))
    assert 0 < 2 * counts[1] < counts[0]
    assert report["profile"] == "quick x 0.2"


def test_a_run_in_which_nothing_ran_fails(folder: Path) -> None:
    done = run(
        folder,
        "--backend",
        "broken:DeclaresNothing",
        "--clause",
        "BLOCK",
        "--clause",
        "MEMORY-2",
        "--policy",
        "dense",
        "--dtype",
        "float32",
        "--report",
        "out.json",
    )
    assert done.returncode == 1
    report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    skipped = [result for result in report["results"] if result["outcome"] == "skipped"]
    assert skipped and all("not today" in result["reason"] for result in skipped if result["refused"])


def test_a_ledger_turns_failures_into_known_ones(folder: Path) -> None:
    (folder / "known.toml").write_text(
        "[[known_failure]]\nclause = 'MERGE-3'\nreason = 'does not compile'\nlink = 'https://example.org/1'\n",
        encoding="utf-8",
    )
    done = run(
        folder,
        "--backend",
        "broken:Raises",
        "--clause",
        "MERGE-3",
        "--dtype",
        "float32",
        "--known-failures",
        "known.toml",
    )
    assert done.returncode == 0
    assert "known failure: does not compile" in done.stdout


REFERENCE = ("--backend", "reference")
BAD_OPTIONS = [
    (("--backend", "nope"), "unknown backend 'nope'. Known: "),
    (("--backend", "nowhere:Backend"), "Check the spelling of 'nowhere'"),
    (("--backend", "broken:Missing"), "Check the name after ':' in 'broken:Missing'"),
    ((*REFERENCE, "--device", "cuda"), "leave --device out, or name another --backend"),
    ((*REFERENCE, "--policy", "lossa"), "did you mean 'losa'?"),
    ((*REFERENCE, "--policy", "losa:budget=0"), "policy 'losa': budget must be at least 1; got 0"),
    ((*REFERENCE, "--clause", "FOO"), "unknown clause or group in --clause 'FOO'. Known: ACCURACY, "),
    ((*REFERENCE, "--dtype", "flaot32"), "unknown dtype in --dtype 'flaot32'; did you mean 'float32'?"),
    ((*REFERENCE, "--profile", "endless"), "--profile must be one of quick"),
    ((*REFERENCE, "--known-failures", "missing.toml"), "cannot be read"),
    ((*REFERENCE, "--report", "no/such/folder/out.json"), "--report: the directory of"),
    ((*REFERENCE, "--report", "."), "--report: '.' is a directory"),
    ((*REFERENCE, "--report", "/dev/null/x.json"), "--report: cannot write '/dev/null/x.json'"),
    ((*REFERENCE, "--workers", "0"), "--workers must be at least 1"),
    ((*REFERENCE, "--share", "0"), "--share must be above 0"),
    ((*REFERENCE, "--share", "inf"), "--share must be above 0 and finite"),
    ((*REFERENCE, "--seconds", "nan"), "--seconds must be 0 (no limit) or more"),
    ((), "--backend"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_OPTIONS, ids=[" ".join(a) for a, _ in BAD_OPTIONS])
def test_bad_options_are_refused_before_anything_runs(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    before = sorted(folder.iterdir())
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert done.stdout == "" and said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("text", ["nope", "nowhere:Thing", "math:Thing", "nope:key=3"])
def test_what_is_not_there_at_all_is_a_wrong_request(text: str) -> None:
    with pytest.raises((UnknownNameError, UnavailableError)):
        load_backend(text)
    with pytest.raises((UnknownNameError, UnavailableError)):
        contenders([text])


@pytest.mark.parametrize("text", ["losa:buget=3", "losa:budget", "losa:budget=0", "losa:budget=many"])
def test_parameters_that_a_policy_does_not_take_are_a_wrong_request(text: str) -> None:
    with pytest.raises((UnknownNameError, InvalidArgumentError)):
        contenders([text])


def test_an_unknown_clause_is_refused_with_those_of_its_group() -> None:
    with pytest.raises(UnknownNameError, match=r"'merge-9'; did you mean 'MERGE-4'\? Known: MERGE-1, "):
        check_backend("reference", clauses=("merge-9",))


ONE_LAW = (*REFERENCE, "--clause", "TOP-2", "--dtype", "float32")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the devices of Linux")
@pytest.mark.parametrize(("targets", "code"), [(["/dev/full"], 2), (["/dev/null", "/dev/stdout"], 0)])
def test_a_report_goes_to_a_device_and_never_replaces_it(folder: Path, targets: list[str], code: int) -> None:
    before = [os.lstat(target) for target in targets]
    done = run(folder, *ONE_LAW, *(f"--report={target}" for target in targets))
    assert done.returncode == code
    full = "error: --report: cannot write '/dev/full': No space left on device."
    assert done.stderr.splitlines() == ([full] if code else [f"wrote {target}" for target in targets])
    assert all(os.path.samestat(os.lstat(target), old) for target, old in zip(targets, before, strict=True))
    assert ('"specification": ' in done.stdout) == ("/dev/stdout" in targets)


def test_a_report_is_written_as_every_other_file_and_nothing_else_is(folder: Path) -> None:
    (folder / "real.json").write_text("old")
    (folder / "real.json").chmod(0o640)
    (folder / "link.json").symlink_to("real.json")
    before = sorted(folder.iterdir())
    assert run(folder, *ONE_LAW, "--report", "link.json").returncode == 0
    assert sorted(folder.iterdir()) == before
    assert (folder / "link.json").is_symlink() and (folder / "real.json").stat().st_mode & 0o777 == 0o640
    assert json.loads((folder / "real.json").read_text("utf-8"))["counts"]["passed"] >= 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_output_that_cannot_be_written_is_one_line(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run(folder, *ONE_LAW, stdout=full)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: cannot read or write: [Errno 28] No space left on device."]


def test_a_run_whose_reader_leaves_ends_quietly_and_proves_nothing(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = run(folder, *ONE_LAW, stdout=closed)
    assert (done.returncode, done.stderr) == (1, "")


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").unlink()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)


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


def test_several_backends_in_several_processes_report_like_one(folder: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = run(
        folder,
        "--backend",
        "reference",
        "--backend",
        "broken:Fine",
        "--clause",
        "TOP",
        "--dtype",
        "float32",
        "--workers",
        "2",
        "--report",
        "out.json",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    matrix = json.loads((folder / "out.json").read_text(encoding="utf-8"))["matrix"]
    assert matrix["TOP-1"] == {"reference float32": "passed", "broken:Fine float32": "passed"}
    assert "; 0 problems" not in done.stdout


def test_the_suite_runs_from_a_plain_checkout(tmp_path: Path) -> None:
    """What we depend on is installed, and we are on PYTHONPATH alone: registered names are found all the same."""
    site = tmp_path / "site"
    site.mkdir()
    ours = re.compile(r"(_editable_impl_|__editable__.?)?sparse_dlm_attn|.*\.pth$")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not ours.match(entry.name):
            (site / entry.name).symlink_to(entry)
    folders = ("", "reference", "backends", "conformance", "models")
    path = os.pathsep.join([str(site), *(str(Path(__file__).parents[2] / folder) for folder in folders)])
    interpreter = getattr(sys, "_base_executable", sys.executable)
    find = "import importlib.metadata as m; print([d.name for d in m.distributions() if 'dlm' in d.name])"

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([interpreter, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    if python("-c", find).stdout.strip() != "[]":
        pytest.skip("the base interpreter of this environment has the package installed")
    done = python(
        "-m",
        "sparse_dlm_attn",
        "conformance",
        "--workers",
        "1",
        "--backend",
        "reference",
        "--policy",
        "losa:budget=3",
        "--clause",
        "MERGE-2",
        "--dtype",
        "float32",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"reference: [1-9]\d* passed; [1-9]\d* problems", done.stdout)


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
