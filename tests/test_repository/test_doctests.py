"""Examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_ROOTS = ("", "reference", "models", "conformance", "backends", "benchmarks", "integrations")


def modules_with_examples() -> list[str]:
    """Names of this project's modules that hold a doctest."""
    names = []
    for folder in IMPORT_ROOTS:
        for path in sorted((ROOT / folder).glob("sparse_dlm_attn*/**/*.py")):
            if ">>> " in path.read_text("utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_print_what_they_say(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0, "see the captured output"
