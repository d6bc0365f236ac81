"""What tests of the PyTorch backend share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_trace_records() -> Iterator[None]:
    """Keep pytest from storing what the compiler traces: thousands of records for each graph."""
    logger = logging.getLogger("torch.__trace")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before
