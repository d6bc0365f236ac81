"""Kernels as the compiler leaves them, for GPUs that need not be there: they fit, and they fetch ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the Triton backend needs Triton")

# Compiling takes minutes of processor time, and a busy machine must not decide how the tests end.
pytestmark = [pytest.mark.timeout(3600), pytest.mark.slow]

SCRIPT = Path(__file__).parent / "compiling.py"
ROOM = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory for a program: A100, H100 and H200, B200, and the GeForce cards since 8.6."""
EVERYWHERE = ["metadata", "float32, head size 256, own pages, ragged", "sequence, head size 256", "spans together"]
"""Problems whose kernels have the largest tiles, and between them all kernels but `splits_kernel`."""
AHEAD = {
    "page 64: splits_kernel": 4,
    "page 64, 64 lists: splits_kernel": 2,
    "page 64, 64 lists, 32 rows: splits_kernel": 2,
    "page 64, ragged: stream_k_kernel": 2,
    "head size 256: splits_kernel": 2,
    "sequence, span 128: spans_kernel": 2,
}
"""How many copies may be on their way on Hopper while a tile is multiplied: K and V of the next one, or two."""
PROBLEMS = {
    80: [*EVERYWHERE, "head size 256, 32 rows", "float32, own pages"],
    90: [*EVERYWHERE, *(name.split(": ")[0] for name in AHEAD)],
    100: [*EVERYWHERE, "page 64, 64 lists"],
    120: [*EVERYWHERE, "head size 256, 32 rows"],
}
KERNELS = {
    "bounds_kernel",
    "changes_kernel",
    "scores_kernel",
    "select_kernel",
    "top_kernel",
    "splits_kernel",
    "stream_k_kernel",
    "lists_kernel",
    "finish_kernel",
    "spans_kernel",
    "pooled_kernel",
    "lse_kernel",
    "span_lists_kernel",
    "unsafe_kernel",
}


@pytest.fixture(scope="module")
def compiled() -> dict[int, dict[str, dict[str, Any]]]:
    """Return what `compiling.py` tells of every kernel, by capability."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(PROBLEMS)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {int(capability): found for capability, found in json.loads(run.stdout).items()}


@pytest.mark.parametrize("capability", ROOM)
def test_every_kernel_compiles_and_fits(compiled: dict[int, dict[str, dict[str, Any]]], capability: int) -> None:
    found = compiled[capability]
    assert {name.split(": ")[1] for name in found} == KERNELS
    assert not {name: one["shared"] for name, one in found.items() if one["shared"] > ROOM[capability]}


def test_tiles_are_fetched_ahead_on_hopper(compiled: dict[int, dict[str, dict[str, Any]]]) -> None:
    """A compiler that cannot fetch ahead waits for everything, and says nothing.

    ``spans_kernel`` is compiled in the form without tensor descriptors, which other GPUs and narrow spans take.
    """
    found = compiled[90]
    # The last loop's wait, and the one for everything behind it.
    assert {name: found[name]["waits"][-2:] for name in AHEAD} == {name: [n, 0] for name, n in AHEAD.items()}
    # Two programs share a multiprocessor, 1 KiB of each taken by the driver.
    for name in ("page 64: splits_kernel", "page 64, 64 lists: splits_kernel"):
        assert 2 * (found[name]["shared"] + 1024) <= 228 << 10
