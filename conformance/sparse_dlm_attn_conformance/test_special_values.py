"""Laws of NaN and infinities: what is rotten shows, in the rows that it belongs to and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import EXACT, Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect, expect_same_bits, expect_state, expect_state_close
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import COUNTS, block_keys, context_keys, weights
from sparse_dlm_attn_conformance.strategies import cases, change_tables, merge_tables, score_tables
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.tables import ChangeTable, HostState, MergeTable, ScoreTable
from sparse_dlm_attn_conformance.test_attention import attend


def some(case: Case, shape: tuple[int, ...], share: float = 0.3) -> Host:
    """Return some places, bool of ``shape``."""
    return np.asarray(np.random.default_rng(case.seed).random(shape) < share)


@pytest.mark.clause("BLOCK-1", "MERGE-4")
@law(case=cases(regimes=EXACT, max_pages=1), share=0.5)
def test_nan_in_the_block_shows_where_it_is_read(subject: Subject, case: Case, arrays: Arrays) -> None:
    """A NaN query spoils its row; a NaN key, or value channel, spoils every row of its group of heads."""
    rows, keys = some(case, arrays.q.shape[:3]), some(case, arrays.k.shape[:3], 0.1)
    heads = np.repeat(keys.any(axis=2), arrays.group, axis=1)[:, :, None]
    every = np.broadcast_to(heads, rows.shape)
    rotten_keys = np.repeat(keys, arrays.group, axis=1)[:, :, None]
    felt = (rotten_keys & (weights(arrays, block_keys(arrays)) >= COUNTS)).any(axis=3)
    for name, rotten, touched in (
        ("q", arrays.but(q=np.where(rows[..., None], np.nan, arrays.q)), rows),
        ("k", arrays.but(k=np.where(keys[..., None], np.nan, arrays.k)), every),
        ("v", arrays.but(v=np.where(keys[..., None], np.nan, arrays.v)), every),
    ):
        on = subject.load(rotten)
        state = subject.backend.attend_block(on.q, on.k, on.v, scale=case.scale)
        out, lse = expect_state(subject, state, "attend_block", arrays.q.shape)
        what = f"the places of NaN after NaN in {name} of the block"
        certain = felt | ~every if name == "v" else np.ones_like(rows)  # a NaN value of weight 0 may be dropped
        shown = np.broadcast_to(touched[..., None], out.shape)
        expect_same_bits(np.isnan(out)[certain], shown[certain], what, "BLOCK-1")
        expect_same_bits(np.isnan(lse), touched & (name != "v"), f"{what}, lse", "BLOCK-1")


@pytest.mark.clause("ATTEND-1", "MERGE-4")
@law(case=cases(regimes=EXACT, min_pages=1), share=0.5)
def test_a_nan_query_spoils_its_row_alone(subject: Subject, case: Case, arrays: Arrays) -> None:
    rows = some(case, arrays.q.shape[:3])
    reads = arrays.rows().any(axis=3)
    out, lse = (
        host(part) for part in vars(attend(subject, arrays.but(q=np.where(rows[..., None], np.nan, arrays.q)))).values()
    )
    expect(np.isnan(out[rows & reads]).all(), "ATTEND-1", "NaN in a query that reads a key must show in out")
    expect(np.isnan(lse[rows & reads]).all(), "ATTEND-1", "NaN in a query that reads a key must show in lse")
    expect(not np.isnan(out[~rows]).any(), "ATTEND-1", "NaN in a query must stay in its row")
    expect(not np.isnan(lse[~rows]).any(), "ATTEND-1", "NaN in a query must stay in its row: lse")


@pytest.mark.clause("CHANGE-1")
@law(case=cases(regimes=EXACT, max_pages=1), share=0.3)
def test_nan_in_a_query_gives_a_nan_change_in_its_row(subject: Subject, case: Case, arrays: Arrays) -> None:
    where = some(case, arrays.q.shape, 0.05)
    rows = where.any(axis=(1, 3))
    clean = subject.load(arrays)
    expected = np.where(rows, np.nan, host(subject.backend.query_change(clean.q, clean.q_other)))
    for name in ("q", "q_other"):
        on = subject.load(arrays.but(**{name: np.where(where, np.nan, getattr(arrays, name))}))
        got = host(subject.backend.query_change(on.q, on.q_other))
        expect_same_bits(got, expected, f"query_change with NaN in {name}", "CHANGE-1")


@pytest.mark.clause("BOUNDS-1")
@law(case=cases(regimes=EXACT, min_pages=1), share=0.3)
def test_infinite_keys_give_infinite_bounds(subject: Subject, case: Case, arrays: Arrays) -> None:
    where = some(case, arrays.k_pages.shape, 0.2) & arrays.stored()[..., None]
    signs = np.where((np.arange(case.head_dim) + case.seed) % 2 == 0, np.inf, -np.inf)
    rotten = arrays.but(k_pages=np.where(where, signs, arrays.k_pages))
    bounds, wanted = subject.backend.page_bounds(subject.load(rotten).context), rotten.bounds()
    for side in ("lower", "upper"):
        got = host(getattr(bounds, side)).astype(np.float64)
        expect_same_bits(got, getattr(wanted, side), f"{side} bound of infinite keys", "BOUNDS-1")


@pytest.mark.clause("CHANGE-2", "CHANGE-3", "TOP-1")
@law(changes=change_tables(), scores=score_tables(special=False), exponent=st.sampled_from((-100, 60)), one_dtype=True)
def test_a_choice_has_no_unit(subject: Subject, changes: ChangeTable, scores: ScoreTable, exponent: int) -> None:
    """Changes and scores times a power of two: the same rows and pages, for nothing is added to them."""
    ops, factor = subject.backend, np.float32(2.0**exponent)
    for rule in ({"count": changes.count}, {"mass": changes.mass}):
        plain, scaled = (
            host(ops.largest_changes(subject.floats(values, "float32"), **rule))
            for values in (changes.change(), changes.change() * factor)
        )
        clause = "CHANGE-2" if "count" in rule else "CHANGE-3"
        expect_same_bits(scaled, plain, f"largest_changes of changes times 2^{exponent}", clause)
    count, eligible = scores.count(), subject.ints(scores.mask())
    count = count if isinstance(count, int) else subject.ints(count)
    plain, scaled = (
        host(ops.top_pages(subject.floats(values, "float32"), count, eligible=eligible))
        for values in (scores.scores(), scores.scores() * factor)
    )
    expect_same_bits(scaled, plain, f"top_pages of scores times 2^{exponent}", "TOP-1")


@pytest.mark.clause("REUSE-1", "MERGE-4")
@law(table=merge_tables(states=(2,)), share=0.3)
def test_reuse_hides_no_nan(subject: Subject, table: MergeTable) -> None:
    rng = np.random.default_rng(table.seed)

    def rotten(state: HostState) -> HostState:
        special = rng.choice([np.nan, np.inf], state.lse.shape)
        return HostState(
            np.where(rng.random(state.out.shape) < 0.2, np.nan, state.out),
            np.where(rng.random(state.lse.shape) < 0.3, special, state.lse),
        )

    states = [rotten(state) for state in table.states(subject.dtype)]
    active = rng.integers(0, 2, (table.batch, table.tokens)).astype(bool)
    kept = subject.backend.reuse(subject.ints(active), *(subject.state(state) for state in states))
    for side in ("out", "lse"):
        fresh, cached = (getattr(state, side) for state in states)
        rows = active[:, None, :, None] if side == "out" else active[:, None, :]
        got = host(getattr(kept, side)).astype(np.float64)
        expect_same_bits(got, np.where(rows, fresh, cached), f"{side} of reuse beside NaN and inf", "REUSE-1")


@pytest.mark.clause("STATE-1", "STATE-2", "ATTEND-1")
@law(case=cases(regimes=("generic", "dyadic"), min_pages=1), share=0.5)
def test_keys_that_score_minus_infinity_do_not_count(subject: Subject, case: Case, arrays: Arrays) -> None:
    """Their weight is 0, and a row that reads no others is empty: nothing computes -inf - -inf."""
    first = np.arange(case.head_dim) == 0
    stored = arrays.stored()
    gone = some(case, stored.shape, (0.3, 1.0)[case.seed % 2]) & stored
    rows = arrays.but(
        q=np.where(first, 1.0, arrays.q), k_pages=np.where(gone[..., None] & first, -np.inf, arrays.k_pages)
    )
    state = attend(subject, rows)
    keys = context_keys(rows)
    keys = type(keys)(
        np.where(np.isinf(keys.keys), 0.0, keys.keys),
        keys.values,
        keys.allowed & np.asarray(np.isfinite(keys.keys).all(axis=3))[:, :, None],
    )
    expected = accuracy.attention(rows, keys)
    what = "attend_pages with keys that score -inf"
    expect_state_close(host(state.out), host(state.lse), expected, what, "STATE-1")


@pytest.mark.clause("STATE-1")
@law(case=cases(regimes=("dyadic",), min_pages=1), share=0.3)
def test_a_score_of_plus_infinity_shows(subject: Subject, case: Case, arrays: Arrays) -> None:
    first = np.arange(case.head_dim) == 0
    rows = hot(arrays, first)
    state = attend(subject, rows)
    reads = rows.rows().any(axis=3)
    lse = host(state.lse)[reads]
    expect(np.isnan(host(state.out)[reads]).all(), "STATE-1", "a score of +inf must give an out of NaN")
    expect((np.isnan(lse) | np.isposinf(lse)).all(), "STATE-1", "a score of +inf must give an lse of NaN or +inf")


def hot(arrays: Arrays, first: Host) -> Arrays:
    """Return the problem with +inf in the first channel of every stored key."""
    keys = np.where(arrays.stored()[..., None] & first, np.inf, arrays.k_pages)
    return arrays.but(q=np.where(first, 1.0, arrays.q), k_pages=keys)
