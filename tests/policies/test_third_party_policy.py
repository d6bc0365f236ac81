"""The policy of the guide, installed, found and used as an outsider would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-policy.md"

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


def test_the_policy_of_the_guide_runs_under_its_name_once_installed(tmp_path: Path) -> None:
    project, target = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    files = re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', GUIDE.read_text("utf-8"), flags=re.DOTALL)
    for name, text in files:
        (project / name).write_text(text, "utf-8")
    install = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target), str(project)]
    subprocess.run([sys.executable, "-m", "pip", "install", *install], check=True)
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines() == ["4 [0, 2, 4, 6]", "0 [0, 2, 4, 6]"] * 2
