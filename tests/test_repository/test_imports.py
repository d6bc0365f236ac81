"""What an import costs and loads, in fresh interpreters, and which way the arrows point."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "transformers",
    "triton",
    "hypothesis",
    "pytest",
    "_pytest",
    "matplotlib",
    "typer",
    "rich",
    "click",
    "safetensors",
}
FOLDERS = {"reference", "backends", "conformance", "models", "integrations", "tests", "benchmarks", "examples"}

# Which of this project's packages each one may import, besides itself. The suite compares with the
# reference; nothing else knows another package than the specification.
ALLOWED = {
    "sparse_dlm_attn": set(),
    "reference/sparse_dlm_attn_reference": {"sparse_dlm_attn"},
    "models/sparse_dlm_attn_small_model": {"sparse_dlm_attn"},
    "conformance/sparse_dlm_attn_conformance": {"sparse_dlm_attn", "sparse_dlm_attn_reference"},
    "integrations/sparse_dlm_attn_transformers": {"sparse_dlm_attn", "sparse_dlm_attn_cuda_graphs"},
    # Times one backend against others, and tunes the Triton backend.
    "benchmarks/sparse_dlm_attn_benchmarks": {
        "sparse_dlm_attn",
        "sparse_dlm_attn_flash",
        "sparse_dlm_attn_torch",
        "sparse_dlm_attn_triton",
    },
}


def run_fresh(code: str) -> str:
    """Run ``code`` in a new interpreter, without this one's path or environment variables of Python's."""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


PASS = """
import numpy as np
from sparse_dlm_attn import Context, PrefixAttention
q, k, v = (np.ones((1, heads, 4, 8), np.float32) for heads in (4, 2, 2))
context = Context.from_dense(*np.ones((2, 1, 2, 32, 8), np.float32), page_size=4)
PrefixAttention(policy="losa:budget=8,active=2", backend="reference")(q, k, v, context)
"""
VERSION = """
import sys
sys.argv = ["sparse-dlm-attn", "--version"]
from sparse_dlm_attn.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code
"""


@pytest.mark.parametrize(
    ("code", "ours", "helpers"),
    [
        ("import sparse_dlm_attn", set(), set()),
        ("import sparse_dlm_attn as s; assert s.list_backends() and s.list_policies()", set(), set()),
        (PASS, {"sparse_dlm_attn_reference"}, set()),
        (VERSION, set(), {"typer", "rich", "click"}),
    ],
    ids=["import", "listings", "a pass on the reference", "the version on the command line"],
)
def test_nothing_is_loaded_that_is_not_needed(code: str, ours: set[str], helpers: set[str]) -> None:
    printed = run_fresh(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    loaded = {name.partition(".")[0] for name in json.loads(printed.splitlines()[-1])}
    assert loaded & HEAVY <= helpers
    assert {name for name in loaded if name.startswith("sparse_dlm_attn_")} == ours


def test_importing_the_integration_registers_nothing_in_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code = (
        "import sparse_dlm_attn_transformers as ours\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "registries = AttentionInterface(), AttentionMaskInterface()\n"
        "assert not any(ours.NAME in registry for registry in registries)\n"
        "ours.register()\n"
        "assert all(ours.NAME in registry for registry in registries)\n"
    )
    run_fresh(code)


def imported_packages(path: Path) -> Iterator[str]:
    """Top-level packages of all absolute imports of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def packages() -> list[str]:
    """Import packages of this repository, by folder."""
    found = ["sparse_dlm_attn"]
    for folder in ("reference", "backends", "benchmarks", "conformance", "models", "integrations"):
        parents = sorted((ROOT / folder).glob("sparse_dlm_attn_*/__init__.py"))
        found += [str(path.parent.relative_to(ROOT)) for path in parents]
    return found


@pytest.mark.parametrize("package", packages())
def test_arrows_between_packages_point_one_way(package: str) -> None:
    own = package.rpartition("/")[2]
    allowed = ALLOWED.get(package, {"sparse_dlm_attn"}) | {own}
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported_packages(path)
        if (name.startswith("sparse_dlm_attn") and name not in allowed) or name in FOLDERS
    }
    assert not wrong


def test_only_commands_import_the_command_line() -> None:
    files = [path for package in packages() for path in (ROOT / package).rglob("*.py")]
    importing = {path for path in files if "sparse_dlm_attn.cli" in path.read_text("utf-8")}
    commands = {path for path in files if path.stem == "command" or path.parent.name in ("commands", "cli")}
    assert importing <= commands | {ROOT / "sparse_dlm_attn" / "__main__.py"}


@pytest.mark.parametrize("package", packages())
def test_the_package_declares_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
