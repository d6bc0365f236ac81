"""What an import costs and loads, in fresh interpreters, and which way the arrows point."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch", "transformers", "triton", "jax", "cupy",
    "hypothesis", "pytest", "_pytest", "matplotlib", "typer", "rich",
    "click", "safetensors",
}
FOLDERS = {
    "reference", "backends", "conformance", "models", "integrations", "tests", "benchmarks", "examples"
}

# Which of this project's packages each one may import, besides itself. The suite compares with the
# reference; nothing else knows another package than the specification.
ALLOWED = {
    "sparse_dlm_attn": set(),
    "reference/sparse_dlm_attn_reference": {"sparse_dlm_attn"},
    "models/sparse_dlm_attn_tiny": {"sparse_dlm_attn"},
    "conformance/sparse_dlm_attn_conformance": {"sparse_dlm_attn", "sparse_dlm_attn_reference"},
    "integrations/sparse_dlm_attn_transformers": {"sparse_dlm_attn", "sparse_dlm_attn_cuda_graphs"},
    # Times one backend against others, and tunes the Triton backend.
    "benchmarks/sparse_dlm_attn_bench": {
        "sparse_dlm_attn", "sparse_dlm_attn_folded", "sparse_dlm_attn_torch", "sparse_dlm_attn_triton",
    },
}


def run_fresh(code: str) -> str:
    """Run ``code`` in a new interpreter, without this one's path or environment variables of Python's."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_packages(code: str) -> set[str]:
    """Top-level packages that are loaded after ``code`` ran in a new interpreter."""
    printed = run_fresh(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    return {name.partition(".")[0] for name in json.loads(printed.splitlines()[-1])}


def test_importing_the_specification_takes_at_most_three_tenths_of_a_second() -> None:
    # Processor time: on an idle machine it is the wall time of an import, and other work does not count.
    code = (
        "import time; start = time.process_time(); import sparse_dlm_attn; "
        "print(time.process_time() - start)"
    )
    assert statistics.median(float(run_fresh(code)) for _ in range(5)) <= 0.3


def test_importing_the_specification_loads_no_framework_and_no_other_package_of_ours() -> None:
    loaded = loaded_packages("import sparse_dlm_attn")
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith("sparse_dlm_attn_")}


def test_listing_backends_and_policies_imports_none_of_them() -> None:
    loaded = loaded_packages(
        "import sparse_dlm_attn as s; assert s.list_backends() and s.list_policies()"
    )
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith("sparse_dlm_attn_")}


def test_a_pass_on_the_reference_loads_no_framework() -> None:
    code = """
import numpy as np
from sparse_dlm_attn import Context, PassInfo, PrefixAttention
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, heads, 4, 8), dtype=np.float32) for heads in (4, 2, 2))
cache = rng.standard_normal((2, 1, 2, 32, 8), dtype=np.float32)
context = Context.from_dense(cache[0], cache[1], page_size=4)
attention = PrefixAttention(policy="losa:budget=8,active=2", backend="reference")
out, memory = attention(q, k, v, context, None, PassInfo(0))
out, memory = attention(q, k, v, context, memory, PassInfo(1))
"""
    loaded = loaded_packages(code)
    assert "sparse_dlm_attn_reference" in loaded
    assert not loaded & HEAVY
    assert not loaded & {"sparse_dlm_attn_conformance", "sparse_dlm_attn_tiny"}


def test_the_command_line_answers_its_version_without_loading_the_model_or_a_framework() -> None:
    code = (
        "import sys\nsys.argv = ['sparse-dlm-attn', '--version']\n"
        "from sparse_dlm_attn.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
    )
    loaded = loaded_packages(code)
    assert not loaded & {"torch", "triton", "hypothesis", "pytest", "matplotlib", "sparse_dlm_attn_tiny"}


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
