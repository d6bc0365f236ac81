"""Runs the command line as users do, in a process of its own, or in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparse_dlm_attn.cli import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs ``python -m sparse_dlm_attn`` in an empty directory."""

    def call(*arguments: str, code: int | None = 0, **options: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "160"}
        environment.pop("SDA_TRACEBACK", None)
        environment.update(options.pop("environment", {}))  # type: ignore[call-overload]
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        result: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
            [sys.executable, "-m", "sparse_dlm_attn", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=options.pop("cwd", tmp_path),
            env=environment,
            **options,
        )
        if code is not None:
            assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr or environment.get("SDA_TRACEBACK")
        return result

    return call


@pytest.fixture
def plugins(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function that lays out a distribution with entry points, as an installer would."""

    def install(entry_points: str, **modules: str) -> dict[str, str]:
        folder = tmp_path / "site"
        information = folder / "outsider-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(entry_points)
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        return {"PYTHONPATH": str(folder)}

    return install


@pytest.fixture
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start there, with a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("SDA_TRACEBACK", raising=False)


OUTSIDER = """\
from sparse_dlm_attn.policies.quest import Quest
from sparse_dlm_attn_reference import ReferenceBackend
POLICY, NUMBER = Quest(budget=16), 3
def make_policy(budget=32):
    'Make it.'
    return Quest(budget=budget)
def make_number():
    return NUMBER
class Backend(ReferenceBackend):
    def __init__(self, speed: int = 1):
        self.speed = speed
"""


@pytest.fixture
def outsider(in_an_empty_directory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a module `outsider` with policies and a backend into the current directory, not on the path."""
    Path("outsider.py").write_text(OUTSIDER)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    yield
    sys.modules.pop("outsider", None)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Return a function that runs the program in this process and returns (stdout, stderr)."""

    def run_here(*arguments: str, code: int = 0) -> tuple[str, str]:
        result = main(arguments)
        captured = capsys.readouterr()
        assert result == code, captured.err
        assert "Traceback" not in captured.err
        return captured.out, captured.err

    return run_here
