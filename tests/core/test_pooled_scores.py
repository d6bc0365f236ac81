"""The default `pooled_scores`: any cut into chunks, a known LSE, memory that does not follow the lengths."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from problems import Array, block, ragged_context

from sparse_dlm_attn import Context, InvalidArgumentError, InvalidTypeError, Selection, operators
from sparse_dlm_attn_reference import ReferenceBackend

REFERENCE = ReferenceBackend()


def dense_lse(q: Array, context: Context) -> Array:
    everything = Selection.all_pages(context, q.shape[2])
    active = np.ones((q.shape[0], q.shape[2]), bool)
    return np.asarray(REFERENCE.attend_pages(q, context, everything, active).lse)


@pytest.mark.parametrize("convert", [np.asarray, array_api_strict.asarray], ids=["numpy", "strict"])
@pytest.mark.parametrize("chunk", [1, 60, 300, 2**21])
@pytest.mark.parametrize("span", [1, 3, 4, 13, 99])
@pytest.mark.clause("POOLED-1", "POOLED-2", "POOLED-3")
def test_no_cut_into_chunks_changes_the_scores(
    span: int, chunk: int, convert: Callable[[Array], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "CHUNK_ELEMENTS", chunk)
    context = ragged_context(20, pages=9)
    q, _, _ = block(21, tokens=13)
    other = Context(*(convert(part) for part in (
        context.k_pages, context.v_pages, context.page_table, context.page_lengths)))
    expected = REFERENCE.pooled_scores(q, context, span=span)
    got = operators.pooled_scores(convert(q), other, span=span)
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-6)
    lse = dense_lse(q, context)
    for scores in (
        operators.pooled_scores(convert(q), other, span=span, lse=convert(lse)),
        REFERENCE.pooled_scores(q, context, span=span, lse=lse),
    ):
        np.testing.assert_allclose(np.asarray(scores), expected, atol=3e-6)


@pytest.mark.clause("POOLED-3")
def test_an_lse_over_more_keys_gives_shares_of_the_whole() -> None:
    context = ragged_context(22)
    q, _, _ = block(23)
    whole = REFERENCE.pooled_scores(q, context, span=2)
    half = Context(context.k_pages, context.v_pages, context.page_table[:, 3:], context.page_lengths[:, 3:])
    lse = dense_lse(q, context)
    for pooled in (operators.pooled_scores, REFERENCE.pooled_scores):
        np.testing.assert_allclose(pooled(q, half, span=2, lse=lse), whole[..., 3:], atol=3e-6)


@pytest.mark.clause("POOLED-3")
def test_an_lse_that_is_too_small_gives_no_score_above_1() -> None:
    """In a batch at different passes, some rows' LSE belongs to fewer keys; their scores are not used."""
    context = ragged_context(24)
    q, _, _ = block(25)
    for pooled in (operators.pooled_scores, REFERENCE.pooled_scores):
        scores = pooled(q, context, span=5, lse=dense_lse(q, context) - np.float32(500))
        assert (np.asarray(scores) <= 1).all()


@pytest.mark.clause("ERROR-1", "POOLED-3")
def test_an_lse_of_another_shape_or_dtype_is_refused() -> None:
    context = ragged_context(26)
    q, _, _ = block(27)
    for pooled in (operators.pooled_scores, REFERENCE.pooled_scores):
        with pytest.raises(InvalidArgumentError, match="lse"):
            pooled(q, context, span=2, lse=np.zeros((2, 4, 4), np.float32))
        with pytest.raises(InvalidTypeError, match="lse"):
            pooled(q, context, span=2, lse=np.zeros((2, 4, 5)))


@pytest.mark.parametrize("known", [False, True], ids=["two sweeps", "known LSE"])
def test_memory_at_64k_keys_is_that_of_a_chunk(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "CHUNK_ELEMENTS", 2**18)
    rng = np.random.default_rng(0)
    keys, rows, page_size = 65_536, 256, 128
    k = rng.standard_normal((1, 1, keys, 4), dtype=np.float32)
    q = rng.standard_normal((1, 1, rows, 4), dtype=np.float32)
    context = Context.from_dense(k, k, page_size)
    lse = None
    if known:  # by halves, as merging partial states would give it
        logits = 0.5 * np.matmul(q[0, 0], k[0, 0].T)
        lse = np.log(np.exp(logits).sum(axis=1, dtype=np.float64)).astype(np.float32)[None, None]
        del logits
    tracemalloc.start()
    try:
        scores = operators.pooled_scores(q, context, span=64, lse=lse)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(scores.sum(axis=-1), 1.0, atol=1e-4)
    # The scores of all rows and keys take 64 MiB; a chunk of 2**18 of them takes 1 MiB.
    assert peak < 8 * 2**20
