"""The command `conformance`: run the suite on a backend or policy and report."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sparse_dlm_attn import InvalidArgumentError, UnavailableError
from sparse_dlm_attn.cli.console import discard_rest, note, show_error
from sparse_dlm_attn.files import check_target, write_atomically
from sparse_dlm_attn_conformance import PROFILES

EXIT_CODES = {0: 0, 1: 1, 2: 130, 3: 2, 4: 2, 5: 1}
"""Exit codes of pytest as those of this program: 1 a law failed or nothing ran, 2 bad input."""

MOST_WORKERS = 4
"""Processes unless asked for more: each loads the backend anew, and on a device takes memory of its own."""


def conformance(
    backend: Annotated[
        list[str],
        typer.Option(
            "--backend", help="Backend under test: a registered name or module:attr; repeatable.", metavar="NAME"
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
        typer.Option(help="Write the report: JSON, or a Markdown matrix for .md; repeatable.", metavar="FILE"),
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
            help="Processes; more than 1 needs pytest-xdist.", show_default=f"one a core, at most {MOST_WORKERS}"
        ),
    ] = None,
) -> None:
    """Prove that a backend or policy keeps the specification, or show where it does not."""
    workers = check_environment(workers)
    if profile not in PROFILES:
        raise InvalidArgumentError("--profile", f"must be one of {', '.join(PROFILES)}", repr(profile))
    if not 0 < share < math.inf:
        raise InvalidArgumentError("--share", "must be above 0 and finite", share)
    if not 0 <= seconds < math.inf:
        raise InvalidArgumentError("--seconds", "must be 0 (no limit) or more, and finite", seconds)
    for path in report or []:
        check_target(path, "--report")
    options: list[tuple[str, object]] = [("--sda-profile", profile), ("--sda-share", share), ("--sda-seconds", seconds)]
    for name, values in (("backend", backend), ("policy", policy), ("dtype", dtype), ("clause", clause)):
        options += [(f"--sda-{name}", value) for value in values or []]
    if device is not None:
        options.append(("--sda-device", device))
    if known_failures is not None:
        options.append(("--sda-known-failures", known_failures.absolute()))
    if seed is not None:
        options.append(("--hypothesis-seed", seed))
    options.append(("--sda-database", Path(".hypothesis/sda-nightly").absolute()))
    code = run_pytest([f"{name}={value}" for name, value in options], workers, report or ())
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


def run_pytest(options: list[str], workers: int, reports: Sequence[Path] = ()) -> int:
    """Run the laws in a process of their own, write the reports and return our exit code.

    A backend that takes its process down cannot take the command down. Neither settings nor plug-ins
    of pytest in the current folder have a say; the folder is on the path, so ``module:attr`` finds a
    module there.
    """
    with tempfile.TemporaryDirectory() as empty:
        made = [Path(empty, f"report-{number}{path.suffix}") for number, path in enumerate(reports)]
        settings = Path(empty, "pytest.ini")
        settings.write_text("[pytest]\n", encoding="utf-8")
        over = Path(empty, "finished")
        flags = (
            "-X faulthandler -m pytest -p no:cacheprovider -p sparse_dlm_attn_conformance.plugin "
            "-p _hypothesis_pytestplugin --import-mode=importlib --tb=short -q --pyargs sparse_dlm_attn_conformance"
        )
        command = [sys.executable, *flags.split(), "-c", str(settings), "--rootdir", empty, f"--sda-finished={over}"]
        command += [*options, *(f"--sda-report={path}" for path in made)]
        if workers > 1:
            command += ["-p", "xdist", "-n", str(workers)]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        environment.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", empty)  # nightly's database has its own place
        if workers > 1:  # or each process starts a thread a core, and they wait for each other
            threads = str(max(1, (os.cpu_count() or 1) // workers))
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                environment.setdefault(name, threads)
        code = _relay(command, environment)
        ended = code in (0, 1, 5) and not over.exists()  # os._exit(0) is no success
        for path, found in zip(reports, made, strict=True):
            if found.exists():
                write_atomically(path, found.read_bytes(), "--report")
                note(f"wrote {path}")
    if code in EXIT_CODES and not ended:
        return EXIT_CODES[code]
    show_error(
        f"the code under test ended the process (status {code}); the stack above shows where. Enter it in a "
        "ledger with crash = true to go on without it."
    )
    return 1


def _relay(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a process, pass its output on and return its status; it ends where nobody can take the output."""
    if sys.stdout.isatty():  # what pytest would see itself if it wrote there
        environment = {"FORCE_COLOR": "1", **environment}
        environment.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        try:
            while piece := process.stdout.read(1 << 16):
                typer.echo(piece, nl=False)
        except BaseException as error:
            process.kill()
            if isinstance(error, BrokenPipeError):  # whoever reads has seen enough; nothing is proven
                discard_rest(sys.stdout)
                raise typer.Exit(1) from error
            raise
    return process.returncode
