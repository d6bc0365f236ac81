"""The worked third-party example, installed and proven as an outsider would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "third_party"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the distribution into a folder of its own, without a network."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the example, is not installed")
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(PROJECT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.clause("REGISTRY-1")
def test_the_example_conforms_under_its_registered_names(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sparse_dlm_attn",
            "conformance",
            "--backend",
            "online",
            "--policy",
            "newest-and-best",
            "--share",
            "0.2",
            "--report",
            "out.json",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["counts"]["passed"] > 200 and "failed" not in report["counts"]
    rule = "test_the_policy_does_what_its_page_states"
    assert [r["outcome"] for r in report["results"] if r["law"] == rule] == ["passed"]
    page = (ROOT / "docs" / "how-to" / "prove-your-kernel.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(online: .*?)```", page, flags=re.DOTALL)
    assert shown is not None
    printed = done.stdout[done.stdout.index("online: ") :].partition("problems covered")[0]
    assert without_numbers(shown[1]) == without_numbers(printed)


def without_numbers(summary: str) -> list[str]:
    """Lines of a summary without their numbers, which every new law changes; then order says nothing."""
    return sorted(re.sub(r"\d+", "N", line) for line in summary.splitlines())


def test_a_summary_with_another_outcome_or_reason_is_noticed() -> None:
    shown = "online: 223 passed, 16 skipped; 1228 problems\n  skipped 14: not declared"
    assert without_numbers(shown) == without_numbers(shown.replace("223", "301"))
    for other in (shown.replace("16 skipped", "1 failed"), shown.replace("declared", "fast")):
        assert without_numbers(shown) != without_numbers(other)


def test_the_guide_shows_exactly_the_code_that_is_installed() -> None:
    guide = (ROOT / "docs" / "how-to" / "prove-your-kernel.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r'```\w+ title="([\w./]+)"\n(.*?)```', guide, flags=re.DOTALL))
    for name in ("online_kernels/backend.py", "online_kernels/policy.py", "pyproject.toml"):
        assert blocks[name] == (PROJECT / name).read_text(encoding="utf-8"), name


def test_backend_and_policy_stay_short() -> None:
    for name in ("backend.py", "policy.py"):
        assert len((PROJECT / "online_kernels" / name).read_text(encoding="utf-8").splitlines()) <= 95
