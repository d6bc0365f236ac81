"""The command `conformance`: run the suite on a backend or policy and report."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sparse_dlm_attn import DataFileError, InvalidArgumentError, UnavailableError

__all__ = ["conformance"]

EXIT_CODES = {0: 0, 1: 1, 2: 130, 3: 2, 4: 2, 5: 1}
"""Exit codes of pytest as those of this program: 1 a law failed or nothing ran, 2 bad input."""

PROFILES = ("quick", "ci", "nightly")
MOST_WORKERS = 4
"""Processes unless asked for more: each loads the backend anew, and on a device takes memory of its own."""


def conformance(
    backend: Annotated[
        list[str],
        typer.Option(
            "--backend",
            help="Backend under test: a registered name or module:attr; repeatable.",
            metavar="NAME",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="Policy under test; repeatable.",
            metavar="NAME[:key=value,...]",
            show_default="all registered",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(  # named, since Typer 0.27 takes a metavar that is the name itself for no option
            "--dtype", help="Test only this dtype; repeatable.", metavar="DTYPE", show_default="all declared"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Passed to the backend as device=...")] = None,
    clause: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only laws of this clause (MERGE-1) or group (MERGE); repeatable.",
            metavar="ID",
            show_default="all",
        ),
    ] = None,
    profile: Annotated[str, typer.Option(help=f"How thoroughly: {', '.join(PROFILES)}.")] = "quick",
    known_failures: Annotated[
        Path | None, typer.Option(help="Ledger of known failures (TOML).", metavar="FILE")
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Write the report: JSON, or a Markdown matrix for .md; repeatable.", metavar="FILE"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draw other problems.", show_default="the same problems every time")
    ] = None,
    share: Annotated[
        float, typer.Option(help="That part of the profile's problems, for a backend that takes long.")
    ] = 1.0,
    seconds: Annotated[
        float, typer.Option(help="Time limit of one problem, compilation included; 0 for none.")
    ] = 120.0,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes; more than 1 needs pytest-xdist.",
            show_default=f"one a core, at most {MOST_WORKERS}",
        ),
    ] = None,
) -> None:
    """Prove that a backend or policy keeps the specification, or show where it does not."""
    workers = check_environment(workers)
    if profile not in PROFILES:
        raise InvalidArgumentError("--profile", f"must be one of {', '.join(PROFILES)}", repr(profile))
    if not share > 0:
        raise InvalidArgumentError("--share", "must be above 0", share)
    if seconds < 0:
        raise InvalidArgumentError("--seconds", "must be 0 (no limit) or more", seconds)
    for path in report or []:
        if not path.absolute().parent.is_dir():
            raise DataFileError(f"--report: the folder of {str(path)!r} does not exist.")
    options: list[tuple[str, object]] = [
        ("--sda-profile", profile),
        ("--sda-share", share),
        ("--sda-seconds", seconds),
    ]
    for name, values in (("backend", backend), ("policy", policy), ("dtype", dtype), ("clause", clause)):
        options += [(f"--sda-{name}", value) for value in values or []]
    options += [("--sda-report", path.absolute()) for path in report or []]
    if device is not None:
        options.append(("--sda-device", device))
    if known_failures is not None:
        options.append(("--sda-known-failures", known_failures.absolute()))
    if seed is not None:
        options.append(("--hypothesis-seed", seed))
    options.append(("--sda-database", Path(".hypothesis/sda-nightly").absolute()))
    code = run_pytest([f"{name}={value}" for name, value in options], workers)
    if code:
        raise typer.Exit(code)


def check_environment(workers: int | None) -> int:
    """Return how many processes run, and raise unless what the suite needs for them is installed."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, MOST_WORKERS) if importlib.util.find_spec("xdist") is not None else 1
    if workers < 1:
        raise InvalidArgumentError("--workers", "must be at least 1", workers)
    wanted = ["hypothesis", "pytest"] + (["xdist"] if workers > 1 else [])
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            "the conformance suite",
            [f"{name} is not installed" for name in missing],
            "Install it with: pip install 'sparse_dlm_attn[conformance]'"
            + (" pytest-xdist" if "xdist" in missing else ""),
        )
    return workers


def run_pytest(options: list[str], workers: int) -> int:
    """Run the laws in a process of their own and return our exit code.

    A backend that takes its process down cannot take the command down. Neither settings nor plug-ins
    of pytest in the current folder have a say; the folder is on the path, so ``module:attr`` finds a
    module there.
    """
    with tempfile.TemporaryDirectory() as empty:
        settings = Path(empty, "pytest.ini")
        settings.write_text("[pytest]\n", encoding="utf-8")
        over = Path(empty, "finished")
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            "pytest",
            "-c",
            str(settings),
            "--rootdir",
            empty,
            "-p",
            "no:cacheprovider",
            "-p",
            "sparse_dlm_attn_conformance.plugin",
            "-p",
            "_hypothesis_pytestplugin",
            "--import-mode=importlib",
            "--tb=short",
            "-q",
            "--pyargs",
            "sparse_dlm_attn_conformance",
            f"--sda-finished={over}",
            *options,
        ]
        if workers > 1:
            command += ["-p", "xdist", "-n", str(workers)]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        if workers > 1:  # or each process starts a thread a core, and they wait for each other
            threads = str(max(1, (os.cpu_count() or 1) // workers))
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                environment.setdefault(name, threads)
        finished = subprocess.run(command, env=environment, check=False)
        ended = finished.returncode in (0, 1, 5) and not over.exists()  # os._exit(0) is no success
    if finished.returncode in EXIT_CODES and not ended:
        return EXIT_CODES[finished.returncode]
    print(
        f"error: the code under test ended the process (status {finished.returncode}); the stack above "
        "shows where. Enter it in a ledger with crash = true to go on without it.",
        file=sys.stderr,
    )
    return 1
