"""The default `pooled_scores` works in chunks: its memory does not follow the lengths."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from problems import block, ragged_context

from sparse_dlm_attn import Context, InvalidArgumentError, InvalidTypeError, operators
from sparse_dlm_attn_reference import ReferenceBackend


@pytest.mark.parametrize("pooled", [operators.pooled_scores, ReferenceBackend().pooled_scores])
def test_an_lse_of_another_shape_or_dtype_is_refused(pooled) -> None:  # type: ignore[no-untyped-def]
    q, _, _ = block(27)
    with pytest.raises(InvalidArgumentError, match="lse"):
        pooled(q, ragged_context(26), span=2, lse=np.zeros((2, 4, 4), np.float32))
    with pytest.raises(InvalidTypeError, match="lse"):
        pooled(q, ragged_context(26), span=2, lse=np.zeros((2, 4, 5)))


@pytest.mark.parametrize("known", [False, True], ids=["two sweeps", "known LSE"])
def test_many_keys_are_scored_some_at_a_time(known: bool) -> None:
    rng, keys, rows, page_size, span = np.random.default_rng(0), 65_536, 512, 128, 64
    k = rng.standard_normal((1, 1, keys, 4), dtype=np.float32)
    q = rng.standard_normal((1, 1, rows, 4), dtype=np.float32)
    weights = np.exp(0.5 * np.matmul(q[0, 0], k[0, 0].T))
    total = weights.sum(axis=1, dtype=np.float64)[:, None]
    weights /= total
    expected = weights.reshape(rows // span, span, -1, page_size).sum(axis=3).mean(axis=1)
    del weights
    lse = np.log(total).astype(np.float32).reshape(1, 1, rows) if known else None
    context = Context.from_dense(k, k, page_size)
    tracemalloc.start()
    try:
        scores = operators.pooled_scores(q, context, span=span, lse=lse)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(scores[0, 0], expected, rtol=1e-3)
    assert peak < 64 * 2**20  # the scores of all rows and keys take 128 MiB
