"""The default operators run on any array API library and agree with the reference."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from problems import Array, ragged_context

from sparse_dlm_attn import Context, Selection, operators
from sparse_dlm_attn_reference import ReferenceBackend


def from_torch(array: Array) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array.copy())


@pytest.fixture(params=["numpy", "array_api_strict", "torch"])
def convert(request: pytest.FixtureRequest) -> Callable[[Array], Any]:
    """Return a function that moves a NumPy array into the library under test."""
    return {"numpy": np.asarray, "array_api_strict": array_api_strict.asarray, "torch": from_torch}[request.param]


def converted(context: Context, convert: Callable[[Array], Any]) -> Context:
    return Context(*(convert(a) for a in (context.k_pages, context.v_pages, context.page_table, context.page_lengths)))


def check(actual: Any, expected: Array, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, atol=tolerance)


def test_values_work_on_any_library(convert: Callable[[Array], Any]) -> None:
    context = converted(ragged_context(7), convert)
    expected = ragged_context(7)
    check(context.page_ends, expected.page_ends)
    check(context.tokens, expected.tokens)
    selection = Selection(np.random.default_rng(8).random((2, 2, 3, 6)) < 0.5, 2)
    other = Selection(convert(selection.mask), 2)
    for actual, wanted in zip(other.page_lists(), selection.page_lists(), strict=True):
        check(actual, wanted)
    active = np.array([[True, False, True, False, False]] * 2)
    check(other.loaded(convert(active), 4, 2), selection.loaded(active, 4, 2))
    check(other.for_rows(4, 5), selection.for_rows(4, 5))
    assert str(other) == str(selection)


def test_bounds_grow_without_a_look_at_finished_pages() -> None:
    k = np.random.default_rng(0).standard_normal((2, 3, 64, 8), dtype=np.float32)
    backend = ReferenceBackend()
    before, after = (Context.from_dense(k, k, 16, lengths=[tokens] * 2) for tokens in (40, 64))
    known, wanted = backend.page_bounds(before), backend.page_bounds(after)
    k[:, :, :32] = np.nan
    grown = backend.extend_bounds(after, known, 2)
    np.testing.assert_array_equal(grown.lower, wanted.lower)
    np.testing.assert_array_equal(grown.upper, wanted.upper)


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
