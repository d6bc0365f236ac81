"""The public names: exported, documented, versioned."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import pytest

import sparse_dlm_attn

ROOT = Path(__file__).parents[2]


def entry_points() -> list[EntryPoint]:
    """Everything that this distribution registers."""
    return sorted(distribution("sparse_dlm_attn").entry_points, key=lambda entry: (entry.group, entry.name))


def test_all_lists_every_public_name_once() -> None:
    names = [name for name in vars(sparse_dlm_attn) if not name.startswith("_") and name != "TYPE_CHECKING"]
    values = {name: getattr(sparse_dlm_attn, name) for name in names}
    modules = {name for name, value in values.items() if inspect.ismodule(value) and not callable(value)}
    assert sorted(sparse_dlm_attn.__all__) == sorted({*names, "__version__"} - modules)


@pytest.mark.parametrize("package", ["sparse_dlm_attn", "sparse_dlm_attn_distributed", "sparse_dlm_attn_flash"])
def test_what_a_package_exports_has_a_docstring_and_stands_in_the_api_reference(package: str) -> None:
    if package != "sparse_dlm_attn":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    told = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    module = importlib.import_module(package)
    for name in set(module.__all__) - {"__version__", "SPEC_VERSION", "Array"}:
        assert inspect.getdoc(getattr(module, name)), name
        assert re.search(rf"^::: {package}(\.\w+)*\.{name}$", told, re.MULTILINE), name


def test_versions_are_written_as_documented_and_stand_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", sparse_dlm_attn.__version__)
    assert re.fullmatch(r"20\d\d\.(0[1-9]|1[0-2])", sparse_dlm_attn.SPEC_VERSION)
    assert f"## Package {sparse_dlm_attn.__version__}" in changelog
    assert f"## Specification {sparse_dlm_attn.SPEC_VERSION}" in changelog


@pytest.mark.parametrize("entry", entry_points(), ids=lambda entry: f"{entry.group}:{entry.name}")
def test_what_the_distribution_registers_can_be_loaded(entry: EntryPoint) -> None:
    assert entry.load() is not None
