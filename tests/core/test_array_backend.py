"""The backend on the array API: what rows of one product share, and contexts without pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import ArrayBackend, Context, Selection
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn.rules import newest_page


class OnNumPy(ArrayBackend):
    name = "on-numpy"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    def asarray(self, values: Any, *, dtype: str | None = None) -> Any:
        return np.asarray(values, dtype=dtype)


@pytest.mark.clause("ATTEND-3")
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_value_that_one_row_reads_leaves_no_trace_in_the_others(poison: float) -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 1, 1, 4, 8), dtype=np.float32)
    values[..., 3, 0] = poison
    context = Context.from_dense(keys, values, page_size=2)
    q = rng.standard_normal((1, 1, 2, 8), dtype=np.float32)
    mask = np.array([[[[True, False], [True, True]]]])
    out = OnNumPy().attend_pages(q, context, Selection(mask, 1), np.ones((1, 2), dtype=bool)).out
    assert np.isfinite(out[0, 0, 0]).all() and np.isfinite(out[0, 0, 1, 1:]).all()
    np.testing.assert_equal(out[0, 0, 1, 0], np.float32(poison))


def test_a_context_without_pages_has_no_newest_page() -> None:
    strict = pytest.importorskip("array_api_strict")
    pool = strict.zeros((1, 1, 4, 8))
    table = strict.zeros((2, 0), dtype=strict.int32)
    assert newest_page(Context(pool, pool, table, table)).shape == (2, 0)
