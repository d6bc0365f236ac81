"""What the tests of the Triton backend share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    from sparse_dlm_attn_triton import launch, launch_decisions, ranked_pass
except ImportError:
    PLANS = []
else:
    PLANS = [launch.planned, launch_decisions._scores, ranked_pass._settled]


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Launches that were settled before the test, or with what it patches, are not used after it."""
    for plan in PLANS:
        plan.cache_clear()
    yield
    for plan in PLANS:
        plan.cache_clear()
