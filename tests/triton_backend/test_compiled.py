"""Kernels as the compiler leaves them, for GPUs that need not be there: they fit, and they fetch ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Compiling takes minutes of processor time, and a busy machine must not decide how the tests end.
pytestmark = pytest.mark.timeout(3600)

SCRIPT = Path(__file__).parent / "compiling.py"
ROOM = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory for a program: A100, H100 and H200, and the GeForce cards since 8.6."""


def compiled(capability: int, *problems: str) -> dict[str, dict[str, Any]]:
    """Return what `compiling.py` tells of every kernel that some problems launch, all without a name."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), str(ROOM[capability]), *problems],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("capability", ROOM)
def test_every_kernel_compiles_and_fits(capability: int) -> None:
    found = compiled(capability)
    large = {name: one["shared"] for name, one in found.items() if one["shared"] > ROOM[capability]}
    assert not large
    assert {name.split(": ")[1] for name in found} >= {
        "changes_kernel", "scores_kernel", "select_kernel", "splits_kernel", "shares_kernel", "lists_kernel",
        "finish_kernel", "_attend", "_pool", "_sweep_lse", "_list_pages",
    }


def test_tiles_are_fetched_ahead_on_hopper() -> None:
    """What may be on its way while a tile is multiplied: keys and values of the next one, or of the next two.

    A compiler that cannot fetch ahead waits for everything, and says nothing. ``_attend`` is compiled in the
    form without tensor descriptors, which other GPUs and narrow spans take.
    """
    ahead = {
        "page 64: splits_kernel": 4, "page 64, 64 lists: splits_kernel": 2,
        "page 64, 64 lists, 32 rows: splits_kernel": 2, "page 64, ragged: shares_kernel": 2,
        "head size 256: splits_kernel": 2, "sequence, span 128: _attend": 2,
    }
    found = compiled(90, *(name.split(": ")[0] for name in ahead))
    # The last loop's wait, and the one for everything behind it.
    assert {name: found[name]["waits"][-2:] for name in ahead} == {name: [n, 0] for name, n in ahead.items()}
    # Two programs share a multiprocessor, 1 KiB of each taken by the driver.
    for name in ("page 64: splits_kernel", "page 64, 64 lists: splits_kernel"):
        assert 2 * (found[name]["shared"] + 1024) <= 228 << 10
