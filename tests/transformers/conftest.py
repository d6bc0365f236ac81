"""Tiny randomly initialised models of transformers; everything here is skipped where it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore: list[str] = []
try:
    import torch
    import transformers
except ImportError as error:
    missing = str(error)
    collect_ignore_glob = ["test_[!w]*.py"]
else:
    missing = ""
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    if not missing:
        torch.manual_seed(0)
