"""Bounds, scores and pooled scores gone wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mutation import Method, R, broken, quiet, with_lengths

from sparse_dlm_attn import PageBounds, Selection
from sparse_dlm_attn.values import softmax_scale


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_zero_padded_pages(self: Any, c: Any) -> Any:
    b, partial = R.page_bounds(c), (c.page_lengths < c.page_size)[:, None, :, None]
    return PageBounds(
        np.where(partial, np.minimum(b.lower, 0), b.lower), np.where(partial, np.maximum(b.upper, 0), b.upper)
    )


@broken("BOUNDS-1", operator="page_bounds")
def bounds_skip_partial_pages(self: Any, c: Any) -> Any:
    return R.page_bounds(with_lengths(c, np.where(c.page_lengths == c.page_size, c.page_lengths, 0)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_whole_pages(self: Any, c: Any) -> Any:
    return R.page_bounds(with_lengths(c, np.where(c.page_lengths > 0, c.page_size, 0)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_absent_pages_are_infinite(self: Any, c: Any) -> Any:
    b, absent = R.page_bounds(c), (c.page_lengths == 0)[:, None, :, None]
    return PageBounds(np.where(absent, np.asarray(np.inf, b.lower.dtype), b.lower), b.upper)


@broken("BOUNDS-1", operator="page_bounds")
def bounds_skip_nan(self: Any, c: Any) -> Any:
    return R.page_bounds(replace(c, k_pages=np.nan_to_num(c.k_pages, posinf=np.inf, neginf=-np.inf)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_are_finite(self: Any, c: Any) -> Any:
    right = R.page_bounds(c)
    return type(right)(*(np.where(np.isinf(side), 0, side) for side in (right.lower, right.upper)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_miss_the_last_token(self: Any, c: Any) -> Any:
    return R.page_bounds(with_lengths(c, np.where(c.page_lengths > 1, c.page_lengths - 1, c.page_lengths)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_swapped(self: Any, c: Any) -> Any:
    b = R.page_bounds(c)
    return PageBounds(b.upper, b.lower)


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_values(self: Any, c: Any) -> Any:
    return R.page_bounds(replace(c, k_pages=c.v_pages))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_rounded_to_half_precision(self: Any, c: Any) -> Any:
    b = R.page_bounds(c)
    return PageBounds(*(part.astype(np.float16).astype(part.dtype) for part in (b.lower, b.upper)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_in_single_precision(self: Any, c: Any) -> Any:
    b = R.page_bounds(c)
    return PageBounds(b.lower.astype(np.float16), b.upper.astype(np.float16))


@broken("BOUNDS-1", "PURE-3", operator="page_bounds")
def bounds_cached_for_a_shape(self: Any, c: Any) -> Any:
    kept = self.__dict__.setdefault("kept", {})
    return kept.setdefault((c.k_pages.shape, c.page_lengths.tobytes()), R.page_bounds(c))


@broken("BOUNDS-2", operator="extend_bounds")
def growth_keeps_the_page_that_was_partly_filled(self: Any, c: Any, b: Any, first: Any) -> Any:
    return R.extend_bounds(c, b, min(first + 1, c.pages))


@broken("BOUNDS-2", operator="extend_bounds")
def growth_reads_the_whole_context(self: Any, c: Any, b: Any, first: Any) -> Any:
    return R.page_bounds(c)


@broken("BOUNDS-2", operator="extend_bounds")
def growth_starts_a_page_too_early(self: Any, c: Any, b: Any, first: Any) -> Any:
    return R.extend_bounds(c, b, max(first - 1, 0))


@broken("BOUNDS-2", operator="extend_bounds")
def growth_widens_what_was_known(self: Any, c: Any, b: Any, first: Any) -> Any:
    grown = R.extend_bounds(c, b, first)
    lower, upper = grown.lower.copy(), grown.upper.copy()
    lower[:, :, first : first + 1] = np.minimum(lower, b.lower)[:, :, first : first + 1]
    upper[:, :, first : first + 1] = np.maximum(upper, b.upper)[:, :, first : first + 1]
    return PageBounds(lower, upper)


def scores_mutant(*clauses: str, dtypes: tuple[str, ...] = ("float32",)) -> Callable[[Method], Method]:
    return broken(*clauses, operator="page_scores", dtypes=dtypes)


@scores_mutant("SCORES-1")
def scores_scaled(self: Any, q: Any, b: Any) -> Any:
    return (R.page_scores(q, b) * softmax_scale(q.shape[3], None)).astype(np.float32)


@scores_mutant("SCORES-1")
def scores_averaged_over_channels(self: Any, q: Any, b: Any) -> Any:
    return (R.page_scores(q, b) / q.shape[3]).astype(np.float32)


@scores_mutant("SCORES-1", "SCORES-2")
def scores_by_the_middle_of_the_box(self: Any, q: Any, b: Any) -> Any:
    middle = (b.lower / 2 + b.upper / 2).astype(b.lower.dtype)
    return R.page_scores(q, PageBounds(middle, middle))


@scores_mutant("SCORES-1", "SCORES-2")
def scores_by_the_upper_bound_only(self: Any, q: Any, b: Any) -> Any:
    return R.page_scores(q, PageBounds(b.upper, b.upper))


@scores_mutant("SCORES-1", "SCORES-2")
def scores_ignore_negative_queries(self: Any, q: Any, b: Any) -> Any:
    return R.page_scores(np.maximum(q, 0), b)


@scores_mutant("GQA-1")
def scores_of_the_first_group_head_for_all(self: Any, q: Any, b: Any) -> Any:
    group = q.shape[1] // b.lower.shape[1]
    return np.repeat(R.page_scores(q, b)[:, ::group], group, axis=1)


@scores_mutant("GQA-1")
def scores_head_modulo_kv_heads(self: Any, q: Any, b: Any) -> Any:
    heads = np.arange(q.shape[1]) % b.lower.shape[1]
    return R.page_scores(q, PageBounds(b.lower[:, heads], b.upper[:, heads]))


@scores_mutant("SCORES-1", dtypes=("float16",))
def scores_in_half_precision(self: Any, q: Any, b: Any) -> Any:
    return R.page_scores(q, b).astype(np.float16).astype(np.float32)


@scores_mutant("SCORES-1", dtypes=("float64",))
def scores_in_double_precision(self: Any, q: Any, b: Any) -> Any:
    return R.page_scores(q, b).astype(np.float64)


def pooled_mutant(*clauses: str) -> Callable[[Method], Method]:
    def register(function: Method) -> Method:
        # The mistakes below are made in the sweep that finds the LSE itself.
        def method(self: Any, q: Any, c: Any, *, span: int, scale: Any = None, lse: Any = None) -> Any:
            if lse is not None:
                return R.pooled_scores(q, c, span=span, scale=scale, lse=lse)
            return function(self, q, c, span=span, scale=scale)

        method.__name__ = function.__name__
        broken(*clauses, operator="pooled_scores")(method)
        return function

    return register


@pooled_mutant("POOLED-1")
def pooled_without_the_partial_tail(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    full = np.where(c.page_lengths == c.page_size, c.page_lengths, 0)
    return R.pooled_scores(q, with_lengths(c, full), span=span, scale=scale)


@pooled_mutant("POOLED-1")
def pooled_mean_instead_of_mass(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    mass = R.pooled_scores(q, c, span=span, scale=scale)
    return (mass / np.maximum(c.page_lengths, 1)[:, None, None]).astype(np.float32)


@pooled_mutant("POOLED-1")
def pooled_sums_the_rows(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    return (R.pooled_scores(q, c, span=span, scale=scale) * min(span, q.shape[2])).astype(np.float32)


@pooled_mutant("POOLED-1")
def pooled_divides_the_last_span_by_a_whole_one(
    self: Any, q: Any, c: Any, *, span: int, scale: Any = None
) -> Any:
    mass, rest = R.pooled_scores(q, c, span=span, scale=scale), q.shape[2] % span
    if rest:
        mass[:, :, -1] *= rest / span
    return mass


@pooled_mutant("POOLED-1")
def pooled_first_row_stands_for_its_span(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    return R.pooled_scores(q[:, :, ::span], c, span=1, scale=scale)


@pooled_mutant("POOLED-1")
def pooled_without_scale(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    return R.pooled_scores(q, c, span=span, scale=1.0)


@pooled_mutant("POOLED-2")
def pooled_nan_without_context(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    mass = R.pooled_scores(q, c, span=span, scale=scale)
    mass[~(c.page_lengths > 0).any(axis=1)] = np.nan
    return mass


@pooled_mutant("POOLED-2")
def pooled_uniform_mass_for_absent_pages(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    mass = R.pooled_scores(q, c, span=span, scale=scale)
    return np.where((c.page_lengths > 0)[:, None, None], mass, np.float32(1e-3))


@broken("POOLED-3", operator="pooled_scores")
@quiet
def pooled_weighs_keys_above_1(
    self: Any, q: Any, c: Any, *, span: int, scale: Any = None, lse: Any = None
) -> Any:
    if lse is None:
        return R.pooled_scores(q, c, span=span, scale=scale)
    tokens = q.shape[2]
    active = np.ones((len(q), tokens), bool)
    own = R.attend_pages(q, c, Selection.all_pages(c, tokens), active, scale=scale).lse.astype(np.float64)
    more = np.exp(np.where(np.isneginf(own), 0.0, own - lse))[..., None]
    rows = R.pooled_scores(q, c, span=1, scale=scale) * more
    means = [rows[:, :, start : start + span].mean(axis=2) for start in range(0, tokens, span)]
    return np.stack(means, axis=2).astype(np.float32)


@scores_mutant("SCORES-1", "GQA-1")
def scores_by_the_bounds_of_sequence_0(self: Any, q: Any, b: Any) -> Any:
    return R.page_scores(q, PageBounds(*(np.repeat(part[:1], len(q), axis=0) for part in (b.lower, b.upper))))


@pooled_mutant("POOLED-1")
def pooled_softmax_of_each_page_alone(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
    mass = np.zeros((*q.shape[:2], -(-q.shape[2] // span), c.pages), np.float32)
    for page in range(c.pages):
        alone = np.where(np.arange(c.pages) == page, c.page_lengths, 0)
        mass[..., page] = R.pooled_scores(q, with_lengths(c, alone), span=span, scale=scale)[..., page]
    return mass
