"""Laws of decisions: bounds, scores, ranking, change. On the dyadic grid they are exact."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_dlm_attn import PageBounds
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import EXACT, Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect, expect_array, expect_bounds, expect_close, expect_same_bits
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import context_keys, page_mass
from sparse_dlm_attn_conformance.strategies import cases, change_tables, score_tables
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.tables import ChangeTable, ScoreTable
from sparse_dlm_attn_reference import ReferenceBackend


def bounds_of(subject: Subject, arrays: Arrays) -> tuple[Host, Host]:
    shape = (arrays.q.shape[0], arrays.k_pages.shape[1], arrays.page_lengths.shape[1], arrays.q.shape[3])
    bounds = subject.backend.page_bounds(subject.load(arrays).context)
    return expect_bounds(subject, bounds, "page_bounds", shape)


@pytest.mark.clause("BOUNDS-1", "ACCURACY-3", "CONTEXT-2")
@law(case=cases())
def test_page_bounds_are_the_exact_minimum_and_maximum(subject: Subject, arrays: Arrays) -> None:
    expected = arrays.bounds()
    for got, want, name in zip(
        bounds_of(subject, arrays), (expected.lower, expected.upper), ("lower", "upper"), strict=True
    ):
        expect_same_bits(got.astype(np.float64), want, f"page_bounds: {name}", "BOUNDS-1")


@pytest.mark.clause("BOUNDS-1")
@law(case=cases(min_pages=1, regimes=EXACT), share=0.5)
def test_a_nan_key_gives_nan_bounds_in_its_channel(subject: Subject, case: Case, arrays: Arrays) -> None:
    stored = arrays.stored()[..., None] & (np.random.default_rng(case.seed).random(arrays.k_pages.shape) < 0.2)
    poisoned = arrays.but(k_pages=np.where(stored, np.nan, arrays.k_pages))
    expected = poisoned.bounds()
    lower, upper = bounds_of(subject, poisoned)
    expect_same_bits(lower.astype(np.float64), expected.lower, "lower bound of NaN keys", "BOUNDS-1")
    expect_same_bits(upper.astype(np.float64), expected.upper, "upper bound of NaN keys", "BOUNDS-1")


@pytest.mark.clause("BOUNDS-2")
@law(case=cases(min_pages=1))
def test_bounds_after_growth_are_those_from_scratch(subject: Subject, case: Case, arrays: Arrays) -> None:
    """Pages that did not change, and bounds of those that did, are spoilt: whoever reads them shows it."""
    first = case.seed % (case.pages + 1)
    wanted = arrays.bounds()
    later = np.arange(case.pages) >= first
    per_head = np.broadcast_to(later, (*wanted.lower.shape[:2], case.pages))
    spoilt = arrays.poisoned(arrays.stored(~per_head) & ~arrays.stored(per_head), np.nan)
    before = PageBounds(*(np.where(later[:, None], np.nan, side) for side in (wanted.lower, wanted.upper)))
    grown = subject.backend.extend_bounds(subject.load(spoilt).context, subject.bounds(before, arrays.layout), first)
    got = expect_bounds(subject, grown, "extend_bounds", wanted.lower.shape)
    for side, want, name in zip(got, (wanted.lower, wanted.upper), ("lower", "upper"), strict=True):
        expect_same_bits(side.astype(np.float64), want, f"extend_bounds: {name}", "BOUNDS-2")


def scores_of(subject: Subject, arrays: Arrays) -> Host:
    shape = (*arrays.q.shape[:3], arrays.page_lengths.shape[1])
    bounds = subject.bounds(arrays.bounds(), arrays.layout)
    scores = subject.backend.page_scores(subject.load(arrays).q, bounds)
    return expect_array(subject, scores, "page_scores", shape, "float32", "SCORES-1")


def scores_on_host(arrays: Arrays) -> Host:
    """Return sum_c max(q_c lower_c, q_c upper_c) in float64, for each query head."""
    bounds = arrays.bounds()
    lower, upper = (np.repeat(part, arrays.group, axis=1)[:, :, None] for part in (bounds.lower, bounds.upper))
    q = arrays.q[:, :, :, None, :]
    return np.asarray(np.maximum(q * lower, q * upper).sum(axis=4))


@pytest.mark.clause("SCORES-1", "ACCURACY-3", "GQA-1")
@law(case=cases(regimes=EXACT))
def test_page_scores_are_exact_on_the_dyadic_grid(subject: Subject, arrays: Arrays) -> None:
    expect_same_bits(scores_of(subject, arrays).astype(np.float64), scores_on_host(arrays), "page_scores", "SCORES-1")


@pytest.mark.clause("SCORES-1", "ACCURACY-1", "ACCURACY-2")
@law(case=cases(regimes=("generic", "large", "mixed_scale")))
def test_page_scores_stay_within_the_budget(subject: Subject, arrays: Arrays) -> None:
    bounds = arrays.bounds()
    budget = accuracy.scores_budget(subject.dtype, arrays.q, bounds.lower, bounds.upper)
    expect_close(scores_of(subject, arrays), scores_on_host(arrays), budget, "page_scores", "SCORES-1")


@pytest.mark.clause("SCORES-1", "ACCURACY-3")
@law(case=cases(regimes=EXACT), share=0.5)
def test_page_scores_of_active_rows_do_not_depend_on_the_others(subject: Subject, case: Case, arrays: Arrays) -> None:
    rows = np.broadcast_to(arrays.active[:, None, :], arrays.q.shape[:3])
    rotten = arrays.but(q=np.where(rows[..., None], arrays.q, np.nan))
    on = subject.load(rotten)
    scores = subject.backend.page_scores(on.q, subject.bounds(arrays.bounds()), active=on.active)
    shape = (*arrays.q.shape[:3], case.pages)
    got = expect_array(subject, scores, "page_scores", shape, "float32", "SCORES-1")
    expect_same_bits(
        got[rows].astype(np.float64), scores_on_host(arrays)[rows], "page_scores of active rows", "SCORES-1"
    )


@pytest.mark.clause("SCORES-2")
@law(case=cases(min_pages=1), share=0.7)
def test_a_page_scores_at_least_as_much_as_each_of_its_keys(subject: Subject, case: Case, arrays: Arrays) -> None:
    bounds = arrays.bounds()
    own = subject.bounds(bounds) if case.seed % 2 else subject.backend.page_bounds(subject.load(arrays).context)
    scores = expect_array(
        subject,
        subject.backend.page_scores(subject.load(arrays).q, own),
        "page_scores",
        (*arrays.q.shape[:3], case.pages),
        "float32",
        "SCORES-1",
    )
    keys = context_keys(arrays, arrays.everyone())
    products = np.where(keys.allowed, np.einsum("bhtd,bhnd->bhtn", arrays.q, keys.keys), -np.inf)
    best = products.reshape(*scores.shape, case.page_size).max(axis=4)
    slack = accuracy.scores_budget(subject.dtype, arrays.q, bounds.lower, bounds.upper)
    expect((scores >= best - slack).all(), "SCORES-2", "a page must not score below one of its keys")


@pytest.mark.clause("POOLED-1", "POOLED-2", "STATE-3", "GQA-1")
@law(case=cases())
def test_pooled_scores_are_the_mean_softmax_mass_of_pages(subject: Subject, case: Case, arrays: Arrays) -> None:
    got = pooled(subject, arrays)
    expect_close(got, page_mass(arrays, case.span), accuracy.pooled_budget(arrays), "pooled_scores", "POOLED-1")


@pytest.mark.clause("POOLED-2", "STATE-2")
@law(case=cases(), share=0.7)
def test_pooled_scores_of_a_span_sum_to_1_or_0(subject: Subject, arrays: Arrays) -> None:
    got = pooled(subject, arrays).astype(np.float64)
    absent = got[np.broadcast_to(~arrays.exists, got.shape)]
    expect((absent == 0).all(), "POOLED-2", "absent pages must get 0")
    sums = np.broadcast_to(arrays.exists.any(axis=3).astype(float), got.shape[:3])
    # A mass of 1 is off by what its weights are off, and those by what their scores are.
    budget = accuracy.pooled_budget(arrays)
    expect_close(got.sum(axis=3), sums, budget, "pooled_scores summed over pages", "POOLED-2")


def pooled(subject: Subject, arrays: Arrays) -> Host:
    on = subject.load(arrays)
    scores = subject.backend.pooled_scores(on.q, on.context, span=arrays.span, scale=arrays.scale)
    batch, q_heads, tokens, _ = arrays.q.shape
    shape = (batch, q_heads, -(-tokens // arrays.span), arrays.page_lengths.shape[1])
    return expect_array(subject, scores, "pooled_scores", shape, "float32", "POOLED-1")


def top(subject: Subject, table: ScoreTable) -> Host:
    count = table.count()
    mask = subject.backend.top_pages(
        subject.floats(table.scores(), "float32"),
        count if isinstance(count, int) else subject.ints(count),
        eligible=subject.ints(table.mask()),
    )
    return expect_array(subject, mask, "top_pages", (*table.lead, table.pages), "bool", "TOP-1")


@pytest.mark.clause("TOP-1", "TOP-2", "ACCURACY-3")
@law(table=score_tables(special=False), one_dtype=True)
def test_top_pages_are_the_best_and_the_lowest_among_equals(subject: Subject, table: ScoreTable) -> None:
    check_ranking(table, top(subject, table), "TOP-1", "TOP-2")


@pytest.mark.clause("TOP-1", "TOP-3", "TOP-4")
@law(table=score_tables(), one_dtype=True)
def test_top_pages_rank_infinities_and_nan(subject: Subject, table: ScoreTable) -> None:
    check_ranking(table, top(subject, table), "TOP-4", "TOP-4")


def check_ranking(table: ScoreTable, mask: Host, best: str, ties: str) -> None:
    """Check a mask against the definition: size, eligibility, nothing better left out, ties."""
    scores = np.where(np.isnan(table.scores()), np.inf, table.scores())
    eligible = np.broadcast_to(table.mask(), mask.shape)
    counts = np.broadcast_to(np.asarray(table.count()), table.lead)
    for row in np.ndindex(*table.lead):
        chosen, allowed = mask[row], eligible[row]
        wanted = min(max(int(counts[row]), 0), int(allowed.sum()))
        expect(not (chosen & ~allowed).any(), "TOP-3", f"row {row} holds pages that are not eligible")
        expect(int(chosen.sum()) == wanted, "TOP-1", f"row {row} must hold {wanted} pages; got {int(chosen.sum())}")
        left = allowed & ~chosen
        for page in np.flatnonzero(left):
            text = f"row {row}: page {page} was left out, but scores better than a chosen one"
            expect((scores[row][chosen] >= scores[row][page]).all(), best, text)
            equal = chosen & (scores[row] == scores[row][page])
            text = f"row {row}: among equals the lowest page must win, but page {page} lost to a higher one"
            expect(not equal[page:].any(), ties, text)


@pytest.mark.clause("CHANGE-1", "ACCURACY-3")
@law(case=cases(regimes=EXACT, max_pages=1))
def test_query_change_is_exact_on_the_dyadic_grid(subject: Subject, arrays: Arrays) -> None:
    expected = ((arrays.q - arrays.q_other) ** 2).mean(axis=(1, 3)).astype(np.float32)
    expect_same_bits(changes(subject, arrays), expected, "query_change", "CHANGE-1")


@pytest.mark.clause("CHANGE-1", "ACCURACY-1")
@law(case=cases(regimes=("generic", "large", "mixed_scale"), max_pages=1), share=0.7)
def test_query_change_stays_within_the_budget(subject: Subject, case: Case, arrays: Arrays) -> None:
    expected = ((arrays.q - arrays.q_other) ** 2).mean(axis=(1, 3))
    # The difference itself is rounded relative to the queries, which may be far larger than it.
    size = np.maximum(np.abs(arrays.q), np.abs(arrays.q_other)) ** 2
    budget = accuracy.change_budget(subject.dtype, size.mean(axis=(1, 3)), case.q_heads * case.head_dim)
    expect_close(changes(subject, arrays), expected, budget, "query_change", "CHANGE-1")


def changes(subject: Subject, arrays: Arrays) -> Host:
    on = subject.load(arrays)
    change = subject.backend.query_change(on.q, on.q_other)
    return expect_array(subject, change, "query_change", arrays.q.shape[::2], "float32", "CHANGE-1")


def largest(subject: Subject, table: ChangeTable, **rule: float) -> Host:
    change = subject.floats(table.change(), "float32")
    chosen = subject.backend.largest_changes(change, **rule)  # type: ignore[arg-type]
    return expect_array(subject, chosen, "largest_changes", table.change().shape, "bool", "CHANGE-2")


def ranked(row: Host) -> list[int]:
    """Return the rows of one sequence, the largest change first, the lowest row among equals."""
    keys = np.where(np.isnan(row), np.inf, row)
    return sorted(range(len(row)), key=lambda index: (-keys[index], index))


@pytest.mark.clause("CHANGE-2", "ACCURACY-3")
@law(table=change_tables(special=True), one_dtype=True)
def test_largest_changes_by_count(subject: Subject, table: ChangeTable) -> None:
    chosen = largest(subject, table, count=table.count)
    for sequence, row in enumerate(table.change()):
        expected = sorted(ranked(row)[: table.count])
        got = np.flatnonzero(chosen[sequence]).tolist()
        text = f"sequence {sequence}: the {table.count} largest are rows {expected}; got {got}"
        expect(got == expected, "CHANGE-2", text)


@pytest.mark.clause("CHANGE-3", "ACCURACY-3")
@law(table=change_tables(), one_dtype=True)
def test_largest_changes_by_mass_are_the_smallest_set_that_reaches_it(subject: Subject, table: ChangeTable) -> None:
    chosen = largest(subject, table, mass=table.mass)
    for sequence, row in enumerate(table.change().astype(np.float64)):
        order, reached, expected = ranked(row), 0.0, set()
        target = table.mass * float(sum(row[index] for index in order))
        for index in order:
            if reached >= target:
                break
            expected.add(index)
            reached += float(row[index])
        got = set(np.flatnonzero(chosen[sequence]).tolist())
        text = f"sequence {sequence}: rows {sorted(expected)} reach {table.mass:g} of the total; got {sorted(got)}"
        expect(got == expected, "CHANGE-3", text)


@pytest.mark.clause("CHANGE-3")
@law(table=change_tables(dyadic=False), share=0.5, one_dtype=True)
def test_the_mass_of_any_changes_is_reached_and_not_overshot(subject: Subject, table: ChangeTable) -> None:
    chosen = largest(subject, table, mass=table.mass)
    for sequence, row in enumerate(table.change().astype(np.float64)):
        total, kept = float(row.sum()), row[chosen[sequence]]
        slack = 1e-12 * total
        text = f"sequence {sequence}: the chosen rows must reach {table.mass:g} of the total"
        expect(kept.sum() >= table.mass * total - slack, "CHANGE-3", text)
        needless = kept.size and kept.sum() - kept.min() >= table.mass * total + slack and total > 0
        expect(not needless, "CHANGE-3", f"sequence {sequence}: fewer rows reach {table.mass:g} of the total")
        left = row[~chosen[sequence]]
        text = f"sequence {sequence}: a larger change was left out"
        expect(not (kept.size and left.size) or kept.min() >= left.max(), "CHANGE-3", text)


@pytest.mark.clause("CHANGE-3")
@law(table=change_tables(), share=0.3, one_dtype=True)
def test_mass_of_nothing_is_nobody_and_nan_is_everybody(subject: Subject, table: ChangeTable) -> None:
    expect(not largest(subject, table, mass=0.0).any(), "CHANGE-3", "mass 0 must give the empty set")
    still = ChangeTable(table.batch, (0.0,) * len(table.values), table.count, table.mass)
    expect(
        not largest(subject, still, mass=max(table.mass, 0.5)).any(), "CHANGE-3", "a total of 0 must give the empty set"
    )
    rotten = ChangeTable(table.batch, (float("nan"), *table.values[1:]), table.count, table.mass)
    chosen = largest(subject, rotten, mass=max(table.mass, 0.5))
    expect(chosen[0].all(), "CHANGE-3", "NaN in a sequence must choose every row of it")


@pytest.mark.clause("ACCURACY-3")
@law(case=cases(regimes=EXACT, min_pages=1), share=0.7)
def test_scores_and_ranking_choose_the_same_pages_as_the_reference(subject: Subject, case: Case) -> None:
    arrays, reference = case.arrays(subject.dtype), ReferenceBackend()
    on, ops = subject.load(arrays), subject.backend
    exists = arrays.exists
    count = 1 + case.seed % (case.pages + 1)
    chosen = ops.top_pages(ops.page_scores(on.q, ops.page_bounds(on.context)), count, eligible=subject.ints(exists))
    scores = reference.page_scores(arrays.q, reference.page_bounds(arrays.context()))
    expected = reference.top_pages(scores, count, eligible=exists)
    got = expect_array(subject, chosen, "top_pages", expected.shape, "bool", "TOP-1")
    expect_same_bits(got, expected, "the pages chosen by score", "ACCURACY-3")
    moved = ops.largest_changes(ops.query_change(on.q, on.q_other), count=case.seed % 4)
    want = reference.largest_changes(reference.query_change(arrays.q, arrays.q_other), count=case.seed % 4)
    got = expect_array(subject, moved, "largest_changes", want.shape, "bool", "CHANGE-2")
    expect_same_bits(got, want, "the rows chosen by change", "ACCURACY-3")


# Pooled scores from a known LSE, which a policy has at hand after a dense pass.


def pooled_of(subject: Subject, arrays: Arrays, lse: Host) -> Host:
    on = subject.load(arrays)
    known = subject.floats(lse, "float32")
    return host(subject.backend.pooled_scores(on.q, on.context, span=arrays.span, scale=arrays.scale, lse=known))


@pytest.mark.clause("POOLED-3", "POOLED-1")
@law(case=cases())
def test_a_known_lse_gives_the_same_masses(subject: Subject, arrays: Arrays) -> None:
    keys = context_keys(arrays, arrays.everyone())
    lse = accuracy.attention(arrays, keys).state.lse
    got = pooled_of(subject, arrays, lse)
    # A float32 LSE is off by half its last place, which scales every mass of its row.
    finite = np.where(np.isfinite(lse), np.abs(lse), 0.0)
    slack = accuracy.EPS["float32"] * finite.max(initial=0.0)
    budget = accuracy.pooled_budget(arrays) + slack
    expect_close(got, page_mass(arrays, arrays.span), budget, "pooled_scores(lse=)", "POOLED-3")


@pytest.mark.clause("POOLED-3")
@law(case=cases(), share=0.5)
def test_an_lse_over_more_keys_gives_shares_of_it(subject: Subject, arrays: Arrays) -> None:
    lse = accuracy.attention(arrays, context_keys(arrays, arrays.everyone())).state.lse
    whole = pooled_of(subject, arrays, lse).astype(np.float64)
    twice = pooled_of(subject, arrays, lse + np.log(2.0)).astype(np.float64)
    # Half of a mass is exact; the LSE rounds once more.
    limit = 1e-6 + accuracy.EPS["float32"] * np.abs(np.where(np.isfinite(lse), lse, 0.0)).max(initial=0.0)
    expect_close(twice, whole / 2, 4 * limit, "pooled_scores of an LSE over twice the mass", "POOLED-3")


@pytest.mark.clause("POOLED-3")
@law(case=cases(), share=0.5)
def test_an_lse_that_is_too_small_gives_no_score_above_1(subject: Subject, arrays: Arrays) -> None:
    lse = accuracy.attention(arrays, context_keys(arrays, arrays.everyone())).state.lse
    for missing in (3.0, 500.0):
        scores = pooled_of(subject, arrays, lse - missing)
        # A mean of ones may round; NaN of infinite keys is not meant.
        largest = scores.max(initial=0.0)
        text = f"pooled_scores of an LSE that is {missing} too small must not exceed 1; got {largest}"
        expect(not (scores > 1 + 2 * accuracy.EPS["float32"]).any(), "POOLED-3", text)
