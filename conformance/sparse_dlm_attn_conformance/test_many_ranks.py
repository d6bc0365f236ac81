"""Laws of ranking on dense tables: many pages and rows at once, full of ties, signs of zero and NaN.

Each problem is one seed, so every single one holds hundreds of choices; `test_decisions` has small tables
that can be read.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_dlm_attn_conformance.cases import Case, Host
from sparse_dlm_attn_conformance.checks import expect_array, expect_same_bits
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Subject
from sparse_dlm_attn_conformance.test_decisions import EXACT, ranked, scores_of
from sparse_dlm_attn_reference import ReferenceBackend

SEEDS = st.integers(0, 10**6)
WIDTHS = (1, 5, 31, 33, 64, 65, 130)
FEW = np.asarray([0.0, -0.0, 1.0, -1.0, 2.0], np.float32)
WILD = np.asarray([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, np.copysign(np.nan, -1.0)], np.float32)


@pytest.mark.clause("TOP-1", "TOP-2", "TOP-3", "TOP-4", "ACCURACY-3")
@law(seed=SEEDS, share=0.3, one_dtype=True)
def test_top_pages_among_many_equals(subject: Subject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages = int(rng.choice(WIDTHS))
    shape = (2, 3, 4, pages)
    scores: Host = rng.choice(WILD if seed % 2 else FEW, shape)
    eligible = rng.random(shape) < rng.choice([0.3, 0.8, 1.0])
    count = rng.integers(0, pages + 2, shape[:3]).astype(np.int32)
    mask = subject.backend.top_pages(
        subject.floats(scores, "float32"), subject.ints(count), eligible=subject.ints(eligible)
    )
    got = expect_array(subject, mask, "top_pages", shape, "bool", "TOP-1")
    expected = np.zeros(shape, bool)
    for row in np.ndindex(*shape[:3]):
        best = [page for page in ranked(scores[row]) if eligible[row][page]]
        expected[row][best[: count[row]]] = True
    clause = "TOP-4" if seed % 2 else "TOP-2"
    expect_same_bits(got, expected, f"top_pages of {pages} pages with many equals", clause)


@pytest.mark.clause("CHANGE-2", "CHANGE-3", "ACCURACY-3")
@law(seed=SEEDS, share=0.3, one_dtype=True)
def test_largest_changes_among_many_equals(subject: Subject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = int(rng.choice(WIDTHS))
    change = rng.choice(np.asarray([0.0, -0.0, 0.5, 1.0, 2.0, 2.0**24, 2.0**34], np.float32), (3, tokens))
    count, mass = int(rng.integers(0, tokens + 2)), float(rng.choice([0.25, 0.5, 0.9, 1.0]))
    by_count, by_mass = np.zeros((2, *change.shape), bool)
    for b, row in enumerate(change.astype(np.float64)):
        order, reached, total = ranked(row), 0.0, float(row.sum())
        by_count[b][order[:count]] = True
        for index in order:
            if reached >= mass * total:
                break
            by_mass[b][index], reached = True, reached + float(row[index])
    on = subject.floats(change, "float32")
    for expected, rule, clause in ((by_count, {"count": count}, "CHANGE-2"), (by_mass, {"mass": mass}, "CHANGE-3")):
        chosen = subject.backend.largest_changes(on, **rule)
        got = expect_array(subject, chosen, "largest_changes", change.shape, "bool", clause)
        expect_same_bits(got, expected, f"largest_changes of {tokens} rows by {rule}", clause)


def neighbours(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Return float32 values of which many differ in their last bits only."""
    base = rng.choice(np.asarray([1.0, -3.5, 3e-30, -7e30, 65504.0, 0.001], np.float32))
    bits = np.full(shape, base, np.float32).view(np.int32) + rng.integers(0, 6, shape).astype(np.int32)
    return np.asarray(bits.view(np.float32))


@pytest.mark.clause("TOP-1", "TOP-2", "CHANGE-2", "ACCURACY-3")
@law(seed=SEEDS, share=0.3, one_dtype=True)
def test_values_that_differ_in_the_last_bit_are_ranked(subject: Subject, seed: int) -> None:
    """Neither a bisection that stops early nor an index packed into a score may blur them."""
    rng = np.random.default_rng(seed)
    pages = int(rng.choice(WIDTHS))
    scores, count = neighbours(rng, (2, 3, pages)), int(rng.integers(1, pages + 1))
    eligible = subject.ints(np.ones(scores.shape, bool), gapped=seed % 3 == 0)
    on = subject.floats(scores, "float32", gapped=seed % 2 == 0)
    mask = subject.backend.top_pages(on, count, eligible=eligible)
    got = expect_array(subject, mask, "top_pages", scores.shape, "bool", "TOP-1")
    expected = np.zeros(scores.shape, bool)
    for row in np.ndindex(*scores.shape[:2]):
        expected[row][ranked(scores[row])[:count]] = True
    expect_same_bits(got, expected, f"top_pages, {count} of {pages} nearly equal ones", "TOP-1")
    change = np.abs(scores[:, 0])
    on = subject.floats(change, "float32", gapped=seed % 2 == 0)
    got = expect_array(
        subject, subject.backend.largest_changes(on, count=count), "largest_changes", change.shape, "bool", "CHANGE-2"
    )
    chosen = np.zeros(change.shape, bool)
    for b, row in enumerate(change):
        chosen[b][ranked(row)[:count]] = True
    expect_same_bits(got, chosen, f"largest_changes, {count} of {pages} nearly equal ones", "CHANGE-2")


@pytest.mark.clause("SCORES-1")
@law(case=cases(regimes=EXACT, min_pages=1, poisons=("zero",)), share=0.5)
def test_nan_in_a_query_or_a_bound_gives_nan(subject: Subject, case: Case) -> None:
    """A maximum that prefers numbers to NaN would hide it; a score that is NaN gets its page read."""
    arrays = case.arrays(subject.dtype)
    rng = np.random.default_rng(case.seed)
    exists = (arrays.page_lengths > 0)[:, None, None, :]
    clean = scores_of(subject, arrays).astype(np.float64)
    q = np.where(rng.random(arrays.q.shape) < 0.2, np.nan, arrays.q)
    rows = np.broadcast_to(np.isnan(q).any(axis=3, keepdims=True) & exists, clean.shape)
    got = scores_of(subject, arrays.but(q=q)).astype(np.float64)
    seen = np.broadcast_to(exists, clean.shape)
    expect_same_bits(got[seen], np.where(rows, np.nan, clean)[seen], "scores of NaN queries", "SCORES-1")
    keys = np.where(arrays.stored()[..., None] & (rng.random(arrays.k_pages.shape) < 0.1), np.nan, arrays.k_pages)
    rotten = arrays.but(k_pages=keys)
    bounds = rotten.bounds()
    spoilt: Host = np.asarray(np.isnan(bounds.lower).any(axis=3))
    pages = np.repeat(spoilt, arrays.group, axis=1)[:, :, None, :]
    got = scores_of(subject, rotten).astype(np.float64)
    expect_same_bits(got[seen], np.where(pages & seen, np.nan, clean)[seen], "scores of NaN bounds", "SCORES-1")


@pytest.mark.clause("SCORES-1")
@law(case=cases(regimes=EXACT, min_pages=1), share=0.5)
def test_scores_of_active_rows_are_what_they_are_without_saying_so(subject: Subject, case: Case) -> None:
    arrays = case.arrays(subject.dtype)
    rows = arrays.active[:, None, :, None]
    poisoned = subject.load(arrays.but(q=np.where(rows, arrays.q, np.nan)))
    bounds = subject.bounds(arrays.bounds(), case.layout)
    scores = subject.backend.page_scores(poisoned.q, bounds, active=poisoned.active)
    shape = (*arrays.q.shape[:3], case.pages)
    got = expect_array(subject, scores, "page_scores", shape, "float32", "SCORES-1")
    expected = ReferenceBackend().page_scores(arrays.q, arrays.bounds())
    seen = np.broadcast_to(rows & (arrays.page_lengths > 0)[:, None, None, :], shape)
    expect_same_bits(
        got[seen].astype(np.float64),
        np.asarray(expected)[seen].astype(np.float64),
        "page_scores of active rows, the others NaN",
        "SCORES-1",
    )
