"""The default operators run on any array API library and agree with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from problems import Array, ragged_context, random_selection

from sparse_dlm_attn import Context, InvalidArgumentError, InvalidTypeError, PageBounds, Selection, operators
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
    selection = random_selection(8, expected, 2, 5, 2)
    other = Selection(convert(selection.mask), 2)
    for actual, wanted in zip(other.page_lists(), selection.page_lists(), strict=True):
        check(actual, wanted)
    active = np.array([[True, False, True, False, False]] * 2)
    check(other.loaded(convert(active), 4, 2), selection.loaded(active, 4, 2))
    check(other.for_rows(4, 5), selection.for_rows(4, 5))
    assert str(other) == str(selection)


@pytest.mark.parametrize(
    "rule", [{}, {"count": 1, "mass": 0.5}, {"count": -1}, {"count": 1.5}, {"mass": 1.1}, {"mass": -0.1}]
)
def test_change_rules_that_make_no_sense_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"count|mass"):
        operators.largest_changes(np.zeros((1, 2), np.float32), **rule)


def test_bounds_grow_without_a_look_at_finished_pages() -> None:
    k = np.random.default_rng(0).standard_normal((2, 3, 64, 8), dtype=np.float32)
    backend = ReferenceBackend()
    before, after = (Context.from_dense(k, k, 16, lengths=[tokens] * 2) for tokens in (40, 64))
    known, wanted = backend.page_bounds(before), backend.page_bounds(after)
    k[:, :, :32] = np.nan
    grown = backend.extend_bounds(after, known, 2)
    np.testing.assert_array_equal(grown.lower, wanted.lower)
    np.testing.assert_array_equal(grown.upper, wanted.upper)


@pytest.mark.parametrize("first, pages, error", [
    (-1, 4, "from_page"), (5, 4, "from_page"), (3, 2, "bounds must hold the first from_page=3 pages"),
    (True, 4, "from_page"), (1.0, 4, "from_page"),
])
def test_bounds_that_cannot_grow_so_are_refused(first: Any, pages: int, error: str) -> None:
    cache = np.zeros((1, 1, 64, 8), dtype=np.float32)
    context = Context.from_dense(cache, cache, 16)
    known = np.zeros((1, 1, pages, 8), dtype=np.float32)
    with pytest.raises(InvalidArgumentError, match=error):
        ReferenceBackend().extend_bounds(context, PageBounds(known, known), first)


def test_bounds_of_another_form_do_not_grow() -> None:
    cache = np.zeros((1, 1, 64, 8), dtype=np.float32)
    context, other = Context.from_dense(cache, cache, 16), np.zeros((1, 2, 4, 8), dtype=np.float32)
    with pytest.raises(InvalidArgumentError, match=r"bounds\.lower"):
        ReferenceBackend().extend_bounds(context, PageBounds(other, other), 1)
    with pytest.raises(InvalidTypeError, match="bounds must be PageBounds"):
        ReferenceBackend().extend_bounds(context, None, 1)  # type: ignore[arg-type]
