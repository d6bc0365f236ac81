"""Many seeds side by side, from a checkout in which nothing is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "reference", "backends", "conformance", "models")
OURS = re.compile(r"(_editable_impl_|__editable__.?)?sparse_dlm_attn|.*\.pth$")


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """An interpreter that finds what we depend on, and us by way of PYTHONPATH alone."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not OURS.match(entry.name):
            (site / entry.name).symlink_to(entry)
    path = os.pathsep.join([str(site), *(str(ROOT / folder) for folder in FOLDERS)])
    interpreter = getattr(sys, "_base_executable", sys.executable)
    environment = {**os.environ, "PYTHONPATH": path}
    find = "import importlib.metadata as m; print([d.name for d in m.distributions() if 'dlm' in d.name])"
    seen = subprocess.run([interpreter, "-c", find], env=environment, capture_output=True, text=True, check=True)
    if seen.stdout.strip() != "[]":
        pytest.skip("the base interpreter of this environment has the package installed")
    return interpreter, environment


def test_seeds_run_from_a_plain_checkout(tmp_path: Path, checkout: tuple[str, dict[str, str]]) -> None:
    interpreter, environment = checkout
    done = subprocess.run(
        [interpreter, "-m", "sparse_dlm_attn_conformance.seeds", "--seeds", "2",
         "--workers", "2", "--first", "7",
         "--backend", "sparse_dlm_attn_reference:ReferenceBackend", "--profile", "quick",
         "--clause", "MERGE-2",
         "--dtype", "float32", "--policy", "losa:budget=3", "--logs", str(tmp_path / "logs")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["seed 7", "seed 8"]
    assert re.search(r"; [1-9]\d* problems", lines[0])
    assert lines[2].startswith("2 of 2 runs clean: no flaky result")
    assert (tmp_path / "logs" / "8.json").exists()


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "from sparse_dlm_attn_reference import ReferenceBackend\n"
        "class Wrong(ReferenceBackend):\n    def merge(self, *states):\n        return states[0]\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "sparse_dlm_attn_conformance.seeds", "--seeds", "1", "--first", "3",
         "--profile", "quick", "--backend", "wrong:Wrong", "--clause", "MERGE-2", "--dtype", "float32",
         "--policy", "dense"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "FAILED test_merge_is_commutative on wrong:Wrong float32: MERGE-2" in done.stdout
    assert "0 of 1 runs clean: NOT CLEAN" in done.stdout
