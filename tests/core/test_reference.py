"""The reference backend against computations that share no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from problems import block, masked_softmax, ragged_context, random_selection

from sparse_dlm_attn import AttentionState, Context, PageBounds, Selection, get_backend, operators
from sparse_dlm_attn_reference.attention import attend_pages_by_merging

REFERENCE = get_backend("reference")


@pytest.mark.clause("STATE-1", "ATTEND-1", "GQA-1", "GQA-2", "SELECTION-1", "CONTEXT-1")
@pytest.mark.parametrize("q_heads, kv_heads", [(4, 2), (3, 3), (7, 1), (14, 2)])
@pytest.mark.parametrize("span", [1, 2, 5])
def test_two_oracles_and_a_token_loop_agree_on_attention(q_heads: int, kv_heads: int, span: int) -> None:
    context = ragged_context(1, kv_heads=kv_heads)
    q, _, _ = block(2, q_heads=q_heads, kv_heads=kv_heads)
    active = np.random.default_rng(3).random((2, 5)) < 0.6
    for heads in {1, kv_heads, q_heads}:
        selection = random_selection(4, context, heads, 5, span)
        state = REFERENCE.attend_pages(q, context, selection, active)
        merged = attend_pages_by_merging(q, context, selection, active)
        out, lse = masked_softmax(q, context, selection, active, 1 / math.sqrt(8))
        np.testing.assert_allclose(state.out, out, atol=1e-6)
        np.testing.assert_allclose(state.lse, lse, atol=1e-6)
        np.testing.assert_allclose(merged.out, out, atol=1e-6)
        np.testing.assert_allclose(merged.lse, lse, atol=1e-6)


@pytest.mark.clause("CONTEXT-2", "ATTEND-3", "DRIVER-2")
def test_poison_in_what_does_not_exist_or_was_not_selected_changes_no_bit() -> None:
    context = ragged_context(5)
    q, _, _ = block(6)
    selection = random_selection(7, context, 4, 5, 5)
    active = np.ones((2, 5), bool)
    clean = REFERENCE.attend_pages(q, context, selection, active)
    wanted = selection.mask.any(axis=(1, 2)) & context.exists
    keys, values = np.full_like(context.k_pages, np.nan), np.full_like(context.v_pages, np.inf)
    for b, page in np.argwhere(wanted):
        at = (context.page_table[b, page], slice(None), slice(0, context.page_lengths[b, page]))
        keys[at], values[at] = context.k_pages[at], context.v_pages[at]
    table = np.where(context.exists, context.page_table, -7).astype(np.int32)
    poisoned = REFERENCE.attend_pages(
        q, Context(keys, values, table, context.page_lengths), selection, active
    )
    assert np.array_equal(clean.out, poisoned.out) and np.array_equal(clean.lse, poisoned.lse)


@pytest.mark.clause("ATTEND-2")
def test_inactive_rows_are_empty_and_their_queries_are_not_read() -> None:
    context = ragged_context(8)
    q, _, _ = block(9)
    active = np.zeros((2, 5), bool)
    active[:, 2] = True
    everything = Selection.all_pages(context, 5)
    clean = REFERENCE.attend_pages(q, context, everything, active)
    poisoned_q = np.where(active[:, None, :, None], q, np.nan)
    poisoned = REFERENCE.attend_pages(poisoned_q, context, everything, active)
    assert np.array_equal(clean.out, poisoned.out)
    assert (clean.out[:, :, ~active[0]] == 0).all() and np.isneginf(clean.lse[:, :, ~active[0]]).all()
    assert np.isfinite(clean.lse[:, :, 2]).all()


@pytest.mark.clause("SCORES-1", "SCORES-2", "BOUNDS-1")
def test_page_score_bounds_every_key_and_zero_padding_does_not_widen_the_box() -> None:
    context = ragged_context(10)
    context.k_pages[...] += 5.0  # all keys far from 0: a padded 0 would lower the minimum
    q, _, _ = block(11)
    bounds = REFERENCE.page_bounds(context)
    scores = REFERENCE.page_scores(q, bounds)
    for b, page in np.argwhere(context.exists):
        keys = context.k_pages[context.page_table[b, page], :, : context.page_lengths[b, page]]
        assert np.array_equal(bounds.lower[b, :, page], keys.min(axis=1))
        assert np.array_equal(bounds.upper[b, :, page], keys.max(axis=1))
        for h in range(4):
            assert (q[b, h] @ keys[h // 2].T <= scores[b, h, :, page, None] + 1e-4).all()
    absent = np.argwhere(~context.exists)[0]
    assert (bounds.lower[absent[0], :, absent[1]] == 0).all()


@pytest.mark.clause("POOLED-1", "POOLED-2")
def test_pooled_scores_are_the_mean_mass_per_page() -> None:
    context = ragged_context(12)
    q, _, _ = block(13)
    pooled = REFERENCE.pooled_scores(q, context, span=2)
    assert pooled.shape == (2, 4, 3, 6)
    np.testing.assert_allclose(pooled.sum(axis=-1), 1.0, atol=1e-6)
    assert (pooled[0, :, :, 0] == 0).all()  # absent
    everything = np.ones((2, 5), bool)
    for page in range(6):
        only = Selection((np.arange(6) == page)[None, None, None, :].repeat(2, axis=0), 5)
        part = REFERENCE.attend_pages(q, context, only, everything).lse
        whole = REFERENCE.attend_pages(q, context, Selection.all_pages(context, 5), everything).lse
        mass = np.exp(part - whole)
        expected = [mass[:, :, 0:2].mean(2), mass[:, :, 2:4].mean(2), mass[:, :, 4:].mean(2)]
        np.testing.assert_allclose(pooled[..., page], np.stack(expected, axis=2), atol=1e-6)


@pytest.mark.clause("TOP-1", "TOP-2", "TOP-3", "TOP-4")
@pytest.mark.parametrize("top_pages", [REFERENCE.top_pages, operators.top_pages])
def test_top_pages_ties_clamping_and_special_values(top_pages) -> None:  # type: ignore[no-untyped-def]
    scores = np.array([[1, 3, 3, 2, 3], [-np.inf] * 5, [0, np.nan, np.inf, 9, 1]], np.float32)
    eligible = np.array([[True] * 5, [False, True, False, True, False], [True] * 5])

    def chosen(count: object) -> list[list[int]]:
        return [np.flatnonzero(row).tolist() for row in top_pages(scores, count, eligible=eligible)]

    assert chosen(2) == [[1, 2], [1, 3], [1, 2]]
    assert chosen(0) == [[], [], []]
    assert chosen(-1) == [[], [], []]
    assert chosen(99) == [[0, 1, 2, 3, 4], [1, 3], [0, 1, 2, 3, 4]]
    assert chosen(np.array([1, 1, 3])) == [[1], [1], [1, 2, 3]]


@pytest.mark.clause("CHANGE-2", "CHANGE-3")
@pytest.mark.parametrize("largest", [REFERENCE.largest_changes, operators.largest_changes])
def test_largest_changes_by_count_and_by_mass(largest) -> None:  # type: ignore[no-untyped-def]
    change = np.array([[1, 4, 4, 1], [0, 0, 0, 0]], np.float32)

    def rows(**rule: float) -> list[list[int]]:
        return [np.flatnonzero(row).tolist() for row in largest(change, **rule)]

    assert rows(count=1) == [[1], [0]]
    assert rows(count=9) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert rows(count=0) == [[], []]
    assert rows(mass=0.4) == [[1], []]  # 4 of 10 is reached exactly: one row is enough
    assert rows(mass=0.41) == [[1, 2], []]
    assert rows(mass=0.9) == [[0, 1, 2], []]
    assert rows(mass=0.0) == [[], []]
    assert rows(mass=1.0) == [[0, 1, 2, 3], []]


@pytest.mark.clause("CHANGE-3")
@pytest.mark.parametrize("largest", [REFERENCE.largest_changes, operators.largest_changes])
def test_nan_change_keeps_every_row_of_its_sequence(largest) -> None:  # type: ignore[no-untyped-def]
    change = np.array([[1, np.nan, 2], [1, 1, 2]], np.float32)
    assert largest(change, mass=0.5).tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.clause("CHANGE-1")
def test_query_change_is_the_mean_over_heads_and_channels_and_rotation_invariant() -> None:
    q, _, _ = block(14, tokens=3)
    other, _, _ = block(15, tokens=3)
    change = REFERENCE.query_change(q, other)
    np.testing.assert_allclose(change[1, 2], ((q[1, :, 2] - other[1, :, 2]) ** 2).mean(), rtol=1e-6)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    turned = REFERENCE.query_change(
        (q @ rotation).astype(np.float32), (other @ rotation).astype(np.float32)
    )
    np.testing.assert_allclose(turned, change, rtol=1e-5)  # so before or after RoPE is the same


@pytest.mark.clause("MERGE-1", "MERGE-2", "MERGE-3", "MERGE-4", "STATE-2")
@pytest.mark.parametrize("merge", [REFERENCE.merge, operators.merge])
def test_merge_handles_empty_equal_and_distant_states(merge) -> None:  # type: ignore[no-untyped-def]
    def state(value: float, lse: float) -> AttentionState:
        return AttentionState(
            np.full((1, 1, 1, 2), value, np.float32), np.full((1, 1, 1), lse, np.float32)
        )

    empty = state(0.0, -np.inf)
    both = merge(state(1.0, 0.0), state(3.0, 0.0))
    assert both.out[0, 0, 0, 0] == 2.0 and both.lse[0, 0, 0] == np.float32(math.log(2))
    distant = merge(state(1.0, 100.0), state(np.float32(3e38), -100.0))
    assert distant.out[0, 0, 0, 0] == 1.0 and distant.lse[0, 0, 0] == 100.0
    for merged in (merge(state(1.5, 3.25), empty), merge(empty, state(1.5, 3.25))):
        assert merged.out[0, 0, 0, 0] == 1.5 and merged.lse[0, 0, 0] == 3.25
    nothing = merge(empty, empty)
    assert (nothing.out == 0).all() and np.isneginf(nothing.lse).all()
    poisoned = merge(state(1.0, 0.0), state(np.nan, -np.inf))
    assert poisoned.out[0, 0, 0, 0] == 1.0
    assert np.isnan(merge(state(1.0, 0.0), state(np.nan, 0.0)).out).all()


@pytest.mark.clause("PURE-1", "PURE-2", "STATE-4")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_operators_keep_dtypes_and_leave_read_only_inputs_alone(dtype: str) -> None:
    context = ragged_context(16, dtype=dtype)
    q, k, v = block(17, dtype=dtype)
    for array in (q, k, v, context.k_pages, context.v_pages, context.page_table, context.page_lengths):
        array.setflags(write=False)
    everything = Selection.all_pages(context, 5)
    out, state = REFERENCE.attend(q, k, v, context, everything, np.ones((2, 5), bool), None)
    assert out.dtype == dtype and state.out.dtype == dtype and state.lse.dtype == np.float32
    assert REFERENCE.page_bounds(context).lower.dtype == dtype
    kept = REFERENCE.reuse(np.zeros((2, 5), bool), state, state)
    assert not np.shares_memory(kept.out, state.out)


@pytest.mark.clause("SCORES-1")
def test_absent_bounds_score_zero() -> None:
    zeros = np.zeros((1, 1, 2, 4), np.float32)
    scores = REFERENCE.page_scores(np.ones((1, 2, 3, 4), np.float32), PageBounds(zeros, zeros))
    assert scores.shape == (1, 2, 3, 2) and (scores == 0).all()
