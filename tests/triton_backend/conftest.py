"""What the tests of the Triton backend share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    from sparse_dlm_attn_triton import launch, launch_decisions
except ImportError:
    PLANS = []
else:
    PLANS = [launch._planned, launch_decisions._scores, launch_decisions._changes, launch_decisions._select]


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Launches that were settled before the test, or with what it patches, are not used after it."""
    for plan in PLANS:
        plan.cache_clear()
    yield
    for plan in PLANS:
        plan.cache_clear()
