"""Tiny randomly initialised models of transformers; everything here is skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import torch
    import transformers
except ImportError as error:
    REASON = f"transformers and PyTorch are needed: {error}"
else:
    REASON = ""
    transformers.utils.logging.set_verbosity_error()


class SkippedModule(pytest.Module):
    """A file whose imports would fail."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if REASON else None


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
