"""The command `conformance` as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

__all__ = ["run"]


def run(folder: Path, *arguments: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; in one process unless told otherwise: each takes seconds to start."""
    own = () if "--workers" in arguments else ("--workers", "1")
    return subprocess.run(
        [sys.executable, "-m", "sparse_dlm_attn", "conformance", *arguments, *own],
        cwd=folder,
        text=True,
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
