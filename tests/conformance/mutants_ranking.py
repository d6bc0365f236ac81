"""Ranking and change gone wrong, and backends wrong as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from mutation import BACKENDS, Method, Mutant, R, broken

from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn_reference import ReferenceBackend


def top_mutant(*clauses: str) -> Callable[[Method], Method]:
    return broken(*clauses, operator="top_pages")


@top_mutant("TOP-2")
def ties_to_the_highest_index(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    mask = np.broadcast_to(eligible, scores.shape)[..., ::-1]
    return R.top_pages(np.ascontiguousarray(scores[..., ::-1]), count, eligible=mask)[..., ::-1].copy()


@top_mutant("TOP-1")
def one_page_too_many(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    return R.top_pages(scores, count + 1, eligible=eligible)


@top_mutant("TOP-1")
def one_page_too_few(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    return R.top_pages(scores, count - 1, eligible=eligible)


@top_mutant("TOP-1")
def at_least_one_page(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    return R.top_pages(scores, np.maximum(count, 1), eligible=eligible)


@top_mutant("TOP-3")
def pages_not_eligible_fill_up(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    barred = np.where(np.broadcast_to(eligible, scores.shape), scores, -np.inf)
    return R.top_pages(barred.astype(np.float32), count, eligible=np.ones_like(barred, bool))


@top_mutant("TOP-1", "TOP-3")
def pages_not_eligible_use_up_the_count(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    return R.top_pages(scores, count, eligible=np.ones(scores.shape, bool)) & eligible


@top_mutant("TOP-4")
def nan_ranks_last(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    return R.top_pages(np.where(np.isnan(scores), np.float32(-np.inf), scores), count, eligible=eligible)


@top_mutant("TOP-1")
def tiny_scores_tie(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    tiny = np.abs(scores) < np.float32(1e-12)
    return R.top_pages(np.where(tiny, np.float32(0), scores), count, eligible=eligible)


@top_mutant("TOP-1")
def count_of_the_first_row_for_all(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    first = int(np.asarray(count).flat[0])
    return R.top_pages(scores, first, eligible=eligible)


@top_mutant("TOP-1")
def all_pages_that_reach_the_threshold(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    mask = R.top_pages(scores, count, eligible=eligible)
    lowest = np.where(mask, scores, np.inf).min(axis=-1, keepdims=True, initial=np.inf)
    return (mask | (scores >= lowest)) & eligible


@top_mutant("TOP-1")
def lowest_scores_win(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    return R.top_pages(-scores, count, eligible=eligible)


def change_mutant(*clauses: str, dtypes: tuple[str, ...] = ("float32",)) -> Callable[[Method], Method]:
    return broken(*clauses, operator="query_change", dtypes=dtypes)


@change_mutant("CHANGE-1")
def change_is_a_sum(self: Any, q: Any, other: Any) -> Any:
    return (R.query_change(q, other) * (q.shape[1] * q.shape[3])).astype(np.float32)


@change_mutant("CHANGE-1")
def change_averaged_over_tokens(self: Any, q: Any, other: Any) -> Any:
    change = R.query_change(q, other)
    return np.repeat(change.mean(axis=1, keepdims=True), change.shape[1], axis=1).astype(np.float32)


@change_mutant("CHANGE-1")
def change_is_absolute(self: Any, q: Any, other: Any) -> Any:
    return np.abs(q - other).mean(axis=(1, 3)).astype(np.float32)


@change_mutant("CHANGE-1")
def change_is_a_norm(self: Any, q: Any, other: Any) -> Any:
    return np.sqrt(R.query_change(q, other))


@change_mutant("CHANGE-1")
def change_of_the_first_head(self: Any, q: Any, other: Any) -> Any:
    return R.query_change(q[:, :1], other[:, :1])


@change_mutant("CHANGE-1", "ACCURACY-1", dtypes=("float16",))
def change_in_half_precision(self: Any, q: Any, other: Any) -> Any:
    with np.errstate(all="ignore"):
        return ((q - other) ** 2).mean(axis=(1, 3), dtype=np.float16).astype(np.float32)


def largest_mutant(*clauses: str) -> Callable[[Method], Method]:
    return broken(*clauses, operator="largest_changes")


@largest_mutant("CHANGE-2")
def one_row_too_many(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    return R.largest_changes(change, count=None if count is None else count + 1, mass=mass)


@largest_mutant("CHANGE-2")
def row_ties_to_the_highest(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    return R.largest_changes(np.ascontiguousarray(change[:, ::-1]), count=count, mass=mass)[:, ::-1].copy()


@largest_mutant("CHANGE-2")
def nan_changes_rank_last(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if count is None:
        return R.largest_changes(change, mass=mass)
    return R.largest_changes(np.where(np.isnan(change), np.float32(-1), change), count=count)


@largest_mutant("CHANGE-2", "CHANGE-3")
def changes_below_an_epsilon_tie(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    large = np.where(change < np.float32(1e-12), np.float32(0), change)
    return R.largest_changes(large, count=count, mass=mass)


def by_mass(
    change: Any,
    mass: float,
    enough: Callable[[float, float], bool],
    order_of: Any = None,
    total_of: Any = None,
) -> Any:
    chosen = np.zeros(change.shape, bool)
    for b, row in enumerate(change.astype(np.float64)):
        order = np.lexsort((np.arange(len(row)), -row)) if order_of is None else order_of(row)
        target, reached = mass * (row.sum() if total_of is None else total_of(change, b)), 0.0
        for index in order:
            if enough(reached, target):
                break
            chosen[b, index], reached = True, reached + row[index]
    return chosen


@largest_mutant("CHANGE-3")
def mass_must_be_exceeded(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if count is not None:
        return R.largest_changes(change, count=count)
    return by_mass(change, mass, lambda reached, target: reached > target)


@largest_mutant("CHANGE-3")
def mass_of_an_unsorted_prefix(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if count is not None:
        return R.largest_changes(change, count=count)
    return by_mass(
        change, mass, lambda reached, target: reached >= target, order_of=lambda row: range(len(row))
    )


@largest_mutant("CHANGE-3")
def mass_of_the_whole_batch(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if count is not None:
        return R.largest_changes(change, count=count)
    return by_mass(
        change,
        mass,
        lambda reached, target: reached >= target,
        total_of=lambda all_, b: float(all_.astype(np.float64).sum()),
    )


@largest_mutant("CHANGE-3")
def mass_takes_at_least_one_row(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if count is not None:
        return R.largest_changes(change, count=count)
    return R.largest_changes(change, mass=mass) | R.largest_changes(change, count=1)


@largest_mutant("CHANGE-3")
def mass_leaves_the_last_row_out(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    """Keeps rows while the sum, the row included, stays within the mass."""
    if count is not None:
        return R.largest_changes(change, count=count)
    order = np.argsort(-change, axis=1, kind="stable")
    running = np.cumsum(np.take_along_axis(change, order, 1).astype(np.float64), axis=1)
    keep = running <= mass * running[:, -1:]
    return np.take_along_axis(keep, np.argsort(order, axis=1), 1)


@largest_mutant("CHANGE-3")
def mass_ignores_nan(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if count is not None:
        return R.largest_changes(change, count=count)
    return R.largest_changes(np.nan_to_num(change), mass=mass)


@broken("CAPS-1", operator="why_not")
def why_not_stops_at_the_first_reason(self: Any, problem: Any) -> Any:
    return self.capabilities.why_not(problem)[:1]


@broken("CAPS-1", operator="why_not")
def why_not_answers_with_a_bool(self: Any, problem: Any) -> Any:
    return not self.capabilities.why_not(problem)


@broken("STATE-4", operator="asarray")
def asarray_ignores_the_dtype(self: Any, values: Any, *, dtype: Any = None) -> Any:
    return np.asarray(values)


class declares_sizes_as_a_list(ReferenceBackend):
    """`capabilities` must be hashable values that a reader can trust: tuples."""

    name: ClassVar[str] = "declares_sizes_as_a_list"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32",), page_sizes=[1, 2, 4])  # type: ignore[arg-type]


BACKENDS["declares_sizes_as_a_list"] = Mutant(
    "declares_sizes_as_a_list", ("CAPS-1",), declares_sizes_as_a_list(), ("float32",)
)
