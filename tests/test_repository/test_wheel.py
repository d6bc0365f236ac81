"""What the wheel holds, built from this checkout by the same hooks that an installer calls."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGEST_WHEEL = 20 * 2**20
"""Bytes: 16 MB for the small model's weights, the rest for texts and code."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_each_package_with_its_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    expected = {"sparse_dlm_attn"}
    for folder in ("reference", "backends", "benchmarks", "conformance", "models", "integrations"):
        expected |= {path.parent.name for path in (ROOT / folder).glob("sparse_dlm_attn_*/__init__.py")}
    assert {top for top in tops if not top.endswith(".dist-info")} == expected
    assert {f"{package}/py.typed" for package in expected} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_the_wheel_holds_weights_texts_and_their_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for wanted in ("sparse_dlm_attn_tiny/data/tiny.safetensors", "sparse_dlm_attn_tiny/data/held_out.txt"):
        assert wanted in names
    licences = [name for name in names if ".dist-info/licenses/" in name]
    assert any(name.endswith("/LICENSE") for name in licences)
    assert any("held_out" in name for name in licences)


def test_the_wheel_keeps_to_its_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= LARGEST_WHEEL


def test_every_file_of_code_in_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    missing = []
    for folder in ("", "reference", "backends", "benchmarks", "conformance", "models", "integrations"):
        for path in (ROOT / folder).glob("sparse_dlm_attn*/**/*.py"):
            if str(path.relative_to(ROOT / folder)) not in names:
                missing.append(str(path))
    assert not missing
