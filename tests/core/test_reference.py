"""Operators by hand, on the reference and as defaults: ties, extremes, NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState, get_backend, operators

REFERENCE = get_backend("reference")


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


@pytest.mark.parametrize("largest", [REFERENCE.largest_changes, operators.largest_changes])
def test_nan_change_keeps_every_row_of_its_sequence(largest) -> None:  # type: ignore[no-untyped-def]
    change = np.array([[1, np.nan, 2], [1, 1, 2]], np.float32)
    assert largest(change, mass=0.5).tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize("merge", [REFERENCE.merge, operators.merge])
def test_merge_handles_empty_equal_and_distant_states(merge) -> None:  # type: ignore[no-untyped-def]
    def state(value: float, lse: float) -> AttentionState:
        return AttentionState(np.full((1, 1, 1, 2), value, np.float32), np.full((1, 1, 1), lse, np.float32))

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
