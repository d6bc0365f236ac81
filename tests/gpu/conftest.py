"""Tests that need a GPU. They run in a bare checkout too, where nothing is installed::

PYTHONPATH=.:reference:backends:benchmarks:models:conformance python -m pytest tests/gpu -q -p no:cacheprovider
"""

from __future__ import annotations

import contextlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # where pytest-timeout is installed, it has said so itself
        parser.addini("timeout", "Seconds a test may take; nobody holds them to it here.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # compilers and drivers warn in ways of their own
        item.add_marker(pytest.mark.filterwarnings("default"))
