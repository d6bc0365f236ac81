"""Many conformance runs with different problems, side by side, to see whether any result is luck.

``python -m sparse_dlm_attn_conformance.seeds --backend reference --seeds 20 --workers 16`` prints a line
for each run and a verdict. It needs nothing installed but pytest and Hypothesis: a checkout whose folders
are on ``PYTHONPATH`` will do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Run", "main", "run_seed"]


@dataclass(frozen=True)
class Run:
    """One run: its seed, whether it was clean, and a line about it."""

    seed: int
    clean: bool
    line: str


def run_seed(seed: int, options: Sequence[str], folder: Path) -> Run:
    """Run the suite with one seed in a process of its own; the log stays in ``folder``."""
    report, log = folder / f"{seed}.json", folder / f"{seed}.log"
    command = [sys.executable, "-m", "sparse_dlm_attn", "conformance", "--workers", "1", *options]
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [*command, "--seed", str(seed), "--report", str(report)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    counts: dict[str, int] = found.get("counts", {})
    problems = sum(result["examples"] for result in found.get("results", ()))
    summary = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no report"
    line = f"seed {seed}: {summary}; {problems} problems, {time.monotonic() - started:.0f} s"
    clean = done.returncode == 0 and counts.get("passed", 0) > 0
    if not clean:
        failed = sorted({describe(r) for r in found.get("results", ()) if r["outcome"] == "failed"})
        line += f"; exit code {done.returncode}, see {log}" + "".join(f"\n    {name}" for name in failed)
    return Run(seed, clean, line)


def describe(result: dict[str, Any]) -> str:
    """Name a failed law with all that one needs to find it in the log."""
    where = " ".join(filter(None, (result["backend"], result["dtype"], result["policy"])))
    return f"FAILED {result['law']} on {where}: {result['reason'][:200]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all seeds and return 0 if every run was clean, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_dlm_attn_conformance.seeds",
        description="Run the conformance suite with many seeds. Other options go to the command "
        "`conformance` as they are: --backend, --dtype, --profile, --policy, --device, ...",
    )
    parser.add_argument("--seeds", type=int, default=20, help="how many runs (default: 20)")
    parser.add_argument("--first", type=int, help="seed of the first run (default: a random one)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)")
    parser.add_argument("--logs", type=Path, help="folder of logs and reports (default: a temporary one)")
    chosen, options = parser.parse_known_args(arguments)
    if chosen.seeds < 1 or chosen.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    if not any(option == "--backend" or option.startswith("--backend=") for option in options):
        parser.error("--backend NAME is missing")
    if "--profile" not in options:
        options += ["--profile", "ci"]
    folder = chosen.logs or Path(tempfile.mkdtemp(prefix="sda-seeds-"))
    folder.mkdir(parents=True, exist_ok=True)
    first = random.randrange(10**6) if chosen.first is None else chosen.first
    with ThreadPoolExecutor(chosen.workers) as pool:
        runs = []
        for run in pool.map(lambda seed: run_seed(seed, options, folder), range(first, first + chosen.seeds)):
            print(run.line, flush=True)
            runs.append(run)
    clean = sum(run.clean for run in runs)
    verdict = "no flaky result" if clean == len(runs) else "NOT CLEAN"
    print(f"{clean} of {len(runs)} runs clean: {verdict}; {folder}")
    return 0 if clean == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
