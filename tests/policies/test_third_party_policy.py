"""A policy of another distribution is installed, found and used as an outsider would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "tests" / "third_party_policy"

USE = """
import numpy as np
from sparse_dlm_attn import Context, PassInfo, PrefixAttention, list_policies

assert list_policies()["strided"].distribution == "strided-policy"
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, heads, 4, 8), dtype=np.float32) for heads in (4, 2, 2))
cache = rng.standard_normal((1, 2, 32, 8), dtype=np.float32)
context = Context.from_dense(cache, cache, page_size=4, lengths=[30])
attention, memory = PrefixAttention("strided:stride=2"), None
for index in range(4):
    out, memory = attention(q, k, v, context, memory, PassInfo(index))
    print(int(memory.active.sum()), np.flatnonzero(memory.selection.mask[0, 0, 0]).tolist())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the distribution into a folder of its own, without a network."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target), str(PROJECT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.clause("REGISTRY-1")
def test_an_installed_policy_runs_under_its_name_in_a_fresh_interpreter(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True,
                          cwd=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 [0, 2, 4, 6]", "0 [0, 2, 4, 6]"] * 2


def test_the_guide_shows_exactly_the_code_that_is_installed() -> None:
    guide = (ROOT / "docs" / "how-to" / "write-a-policy.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', guide, flags=re.DOTALL))
    for name in ("strided_policy.py", "pyproject.toml"):
        assert blocks[name] == (PROJECT / name).read_text(encoding="utf-8"), name
