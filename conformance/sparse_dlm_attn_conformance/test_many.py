"""Laws of many sequences, heads, rows and pages for what is fused or ranked: capacities end somewhere.

Tables of seeds hold hundreds of choices each, full of ties, signs of zero and NaN; `test_decisions` has small ones
that can be read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_dlm_attn_conformance.cases import EXACT, Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect_array, expect_same_bits
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.strategies import cases, choice, integers, ranked_rules
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.tables import RankedRule
from sparse_dlm_attn_conformance.test_decisions import ranked, scores_of
from sparse_dlm_attn_conformance.test_decisions import ranked as by_size
from sparse_dlm_attn_conformance.test_pass import test_attend_composes_its_four_operators as composes
from sparse_dlm_attn_conformance.test_pass import test_attend_is_one_softmax_over_context_and_block as one_softmax
from sparse_dlm_attn_conformance.test_ranked import expect_decided, run
from sparse_dlm_attn_conformance.test_ranked import test_a_rule_computes_what_the_operators_compute as computes
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
def test_nan_in_a_query_or_a_bound_gives_nan(subject: Subject, case: Case, arrays: Arrays) -> None:
    """A maximum that prefers numbers to NaN would hide it; a score that is NaN gets its page read."""
    rng = np.random.default_rng(case.seed)
    exists = arrays.exists
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
def test_scores_of_active_rows_are_what_they_are_without_saying_so(
    subject: Subject, case: Case, arrays: Arrays
) -> None:
    rows = arrays.active[:, None, :, None]
    poisoned = subject.load(arrays.but(q=np.where(rows, arrays.q, np.nan)))
    bounds = subject.bounds(arrays.bounds(), case.layout)
    scores = subject.backend.page_scores(poisoned.q, bounds, active=poisoned.active)
    shape = (*arrays.q.shape[:3], case.pages)
    got = expect_array(subject, scores, "page_scores", shape, "float32", "SCORES-1")
    expected = ReferenceBackend().page_scores(arrays.q, arrays.bounds())
    seen = np.broadcast_to(rows & arrays.exists, shape)
    what = "page_scores of active rows, the others NaN"
    expect_same_bits(got[seen].astype(np.float64), np.asarray(expected)[seen].astype(np.float64), what, "SCORES-1")


SMALL: dict[str, Any] = {"head_dims": (2, 4, 3), "page_sizes": (1, 2, 4, 3), "layouts": ("plain",)}
MANY_SEQUENCES = cases(**SMALL, batches=(4, 9, 5, 17, 33), blocks=(2, 3, 1), max_pages=3, regimes=EXACT)
MANY_HEADS = cases(
    **SMALL,
    max_batch=2,
    kv_heads=(9, 4, 5),
    groups=(2, 16, 8, 5),
    blocks=(8, 13, 5),
    max_pages=3,
    regimes=("dyadic", "ties"),
)
MANY_PAGES = cases(**{**SMALL, "page_sizes": (1, 2)}, max_batch=2, min_pages=65, max_pages=300, regimes=EXACT)
LONG_BLOCKS = cases(**SMALL, max_batch=2, blocks=(130, 33, 65, 129), max_pages=4, max_elements=4096, regimes=EXACT)


def expect_pass(subject: Subject, case: Case) -> None:
    """Check a fused pass, without and with what earlier passes left."""
    one_softmax.body(subject, case=case)
    composes.body(subject, case=case)


def expect_ranked(subject: Subject, case: Case, rule: RankedRule) -> None:
    """Check what a ranked pass decides and computes."""
    arrays = case.arrays(subject.dtype)
    expect_decided(run(subject, arrays, rule), arrays, rule)
    computes.body(subject, case=case, rule=rule)


@pytest.mark.clause("ATTEND-4", "REUSE-1", "MERGE-1", "BLOCK-1")
@law(case=MANY_SEQUENCES, share=0.4)
def test_a_pass_of_many_sequences(subject: Subject, case: Case) -> None:
    expect_pass(subject, case)


@pytest.mark.clause("ATTEND-4", "REUSE-1", "MERGE-1", "BLOCK-1")
@law(case=MANY_HEADS, share=0.4)
def test_a_pass_of_many_heads(subject: Subject, case: Case) -> None:
    expect_pass(subject, case)


@pytest.mark.clause("RANKED-1", "CHANGE-2", "CHANGE-3")
@law(case=MANY_SEQUENCES, rule=ranked_rules(), share=0.4)
def test_a_ranked_pass_of_many_sequences(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("RANKED-1", "CHANGE-2", "CHANGE-3")
@law(case=MANY_HEADS, rule=ranked_rules(), share=0.4)
def test_a_ranked_pass_of_many_heads(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("RANKED-1", "TOP-1", "TOP-2")
@law(case=MANY_PAGES, rule=ranked_rules(), share=0.2)
def test_a_ranked_pass_of_many_pages(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("RANKED-1", "CHANGE-2", "CHANGE-3")
@law(case=LONG_BLOCKS, rule=ranked_rules(), share=0.3)
def test_a_ranked_pass_of_many_rows(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("TOP-1", "TOP-2", "TOP-3")
@law(
    pages=choice((65, 130, 300, 1025)),
    count=choice((64, 1, 7, 65, 129, 257, 2000)),
    batch=choice((1, 2, 5, 17)),
    seed=integers(0, 999),
    one_dtype=True,
    share=0.5,
)
def test_the_best_of_many_pages(subject: Subject, pages: int, count: int, batch: int, seed: int) -> None:
    """With ties everywhere, and some pages that may not be chosen."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-40, 40, (batch, 1, 2, pages)).astype(np.float64)
    eligible = rng.random((batch, 1, 1, pages)) < 0.8
    wanted = np.zeros(scores.shape, dtype=bool)
    for position in np.ndindex(*scores.shape[:-1]):
        listed = np.flatnonzero(eligible[position[0], 0, 0])
        wanted[position][listed[np.lexsort((listed, -scores[position][listed]))][:count]] = True
    chosen = subject.backend.top_pages(subject.floats(scores, "float32"), count, eligible=subject.ints(eligible))
    expect_same_bits(host(chosen), wanted, f"the {count} best of {pages} pages", "TOP-2")


@pytest.mark.clause("CHANGE-2", "CHANGE-3")
@law(
    tokens=choice((33, 65, 130, 300)),
    batch=choice((1, 2, 5, 17)),
    share_of_rows=choice((0.5, 0.1, 0.9, 1.0)),
    seed=integers(0, 999),
    one_dtype=True,
    share=0.5,
)
def test_the_largest_of_many_changes(
    subject: Subject, tokens: int, batch: int, share_of_rows: float, seed: int
) -> None:
    longest = subject.backend.capabilities.max_block_length
    tokens = tokens if longest is None else min(tokens, longest)
    changes = np.random.default_rng(seed).integers(0, 64, (batch, tokens)).astype(np.float64)
    count = round(share_of_rows * tokens)
    by_count, by_mass = np.zeros((2, batch, tokens), dtype=bool)
    for b, row in enumerate(changes):
        order = np.asarray(by_size(row))
        by_count[b, order[:count]] = True
        reached = np.concatenate([[0.0], np.cumsum(row[order])[:-1]])
        by_mass[b, order[reached < share_of_rows * row.sum()]] = True
    given = subject.floats(changes, "float32")
    got = host(subject.backend.largest_changes(given, count=count))
    expect_same_bits(got, by_count, f"the {count} largest of {tokens} changes", "CHANGE-2")
    got = host(subject.backend.largest_changes(given, mass=share_of_rows))
    expect_same_bits(got, by_mass, f"{share_of_rows:g} of the sum of {tokens} changes", "CHANGE-3")
