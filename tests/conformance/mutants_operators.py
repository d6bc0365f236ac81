"""Bounds, scores, rankings, changes and states gone wrong, and what a backend says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mutants_attention import narrow_table
from mutation import Call, R, both, first, of_first, table, with_lengths

from sparse_dlm_attn import PageBounds, Selection
from sparse_dlm_attn.values import softmax_scale

HALF, DOUBLE = ("float16",), ("float64",)


def lengths(x: Call, change: Callable[[Any, int], Any]) -> Any:
    """Return the operator over pages of other lengths: a function of the lengths and the page size."""
    return x.right(context=with_lengths(x.context, change(x.context.page_lengths, x.context.page_size)))


def keys(x: Call, values: Any) -> Any:
    return x.right(context=replace(x.context, k_pages=values))


table(
    R,
    "page_bounds",
    {
        "bounds_of_zero_padded_pages": (
            "BOUNDS-1",
            lambda x: PageBounds(
                *(
                    np.where((x.context.page_lengths < x.context.page_size)[:, None, :, None], limit(side, 0), side)
                    for side, limit in ((x.right().lower, np.minimum), (x.right().upper, np.maximum))
                )
            ),
        ),
        "bounds_skip_partial_pages": ("BOUNDS-1", lambda x: lengths(x, lambda n, size: np.where(n == size, n, 0))),
        "bounds_of_whole_pages": ("BOUNDS-1", lambda x: lengths(x, lambda n, size: np.where(n > 0, size, 0))),
        "bounds_miss_the_last_token": ("BOUNDS-1", lambda x: lengths(x, lambda n, size: np.where(n > 1, n - 1, n))),
        "bounds_of_the_first_64_tokens": ("BOUNDS-1", lambda x: lengths(x, lambda n, size: np.minimum(n, 64))),
        "bounds_of_the_first_64_pages": ("BOUNDS-1", lambda x: lengths(x, lambda n, size: first(n, 64, 1))),
        "bounds_of_absent_pages_are_infinite": (
            "BOUNDS-1",
            lambda x: PageBounds(
                np.where(
                    (x.context.page_lengths == 0)[:, None, :, None],
                    np.asarray(np.inf, x.right().lower.dtype),
                    x.right().lower,
                ),
                x.right().upper,
            ),
        ),
        "bounds_skip_nan": (
            "BOUNDS-1",
            lambda x: keys(x, np.nan_to_num(x.context.k_pages, posinf=np.inf, neginf=-np.inf)),
        ),
        "bounds_of_values": ("BOUNDS-1", lambda x: keys(x, x.context.v_pages)),
        "bounds_are_finite": ("BOUNDS-1", lambda x: both(x.right(), lambda side: np.where(np.isinf(side), 0, side))),
        "bounds_swapped": ("BOUNDS-1", lambda x: PageBounds(x.right().upper, x.right().lower)),
        "bounds_rounded_to_half_precision": (
            "BOUNDS-1",
            lambda x: both(x.right(), lambda side: side.astype(np.float16)),
        ),
        "bounds_in_single_precision": (
            "BOUNDS-1",
            lambda x: PageBounds(x.right().lower.astype(np.float16), x.right().upper.astype(np.float16)),
        ),
        "bounds_cached_for_a_shape": (
            "BOUNDS-1 PURE-3",
            lambda x: (
                vars(x.this)
                .setdefault("kept", {})
                .setdefault((x.context.k_pages.shape, x.context.page_lengths.tobytes()), x.right())
            ),
        ),
        "bounds_of_the_first_64_channels": ("BOUNDS-1", lambda x: both(x.right(), lambda side: first(side, 64, 3))),
        "page_numbers_of_bounds_in_uint16": (
            "CONTEXT-1 CONTEXT-3",
            lambda x: x.right(context=narrow_table(x.context, np.uint16)),
        ),
    },
)
table(
    R,
    "extend_bounds",
    {
        "growth_keeps_the_page_that_was_partly_filled": (
            "BOUNDS-2",
            lambda x: x.right(from_page=min(x.from_page + 1, x.context.pages)),
        ),
        "growth_reads_the_whole_context": ("BOUNDS-2", lambda x: R.page_bounds(x.context)),
        "growth_starts_a_page_too_early": ("BOUNDS-2", lambda x: x.right(from_page=max(x.from_page - 1, 0))),
        "growth_widens_what_was_known": (
            "BOUNDS-2",
            lambda x: PageBounds(
                *(
                    np.where(np.arange(x.context.pages)[:, None] == x.from_page, wider(new, old), new)
                    for new, old, wider in (
                        (x.right().lower, x.bounds.lower, np.minimum),
                        (x.right().upper, x.bounds.upper, np.maximum),
                    )
                )
            ),
        ),
    },
)


def scores_in(x: Call, middle: Callable[[Any, Any], Any]) -> Any:
    """Return the scores of boxes shrunk to one point: a function of both bounds."""
    point = middle(x.bounds.lower, x.bounds.upper).astype(x.bounds.lower.dtype)
    return x.right(bounds=PageBounds(point, point))


def group(x: Call) -> int:
    return int(x.q.shape[1] // x.bounds.lower.shape[1])


table(
    R,
    "page_scores",
    {
        "scores_scaled": ("SCORES-1", lambda x: (x.right() * softmax_scale(x.q.shape[3], None)).astype(np.float32)),
        "scores_averaged_over_channels": ("SCORES-1", lambda x: (x.right() / x.q.shape[3]).astype(np.float32)),
        "scores_by_the_middle_of_the_box": (
            "SCORES-1 SCORES-2",
            lambda x: scores_in(x, lambda lower, upper: lower / 2 + upper / 2),
        ),
        "scores_by_the_upper_bound_only": ("SCORES-1 SCORES-2", lambda x: scores_in(x, lambda lower, upper: upper)),
        "scores_ignore_negative_queries": ("SCORES-1 SCORES-2", lambda x: x.right(q=np.maximum(x.q, 0))),
        "scores_of_the_first_group_head_for_all": (
            "GQA-1",
            lambda x: np.repeat(x.right()[:, :: group(x)], group(x), axis=1),
        ),
        "scores_head_modulo_kv_heads": (
            "GQA-1",
            lambda x: x.right(bounds=both(x.bounds, lambda side: side[:, np.arange(x.q.shape[1]) % side.shape[1]])),
        ),
        "scores_by_the_bounds_of_sequence_0": ("SCORES-1 GQA-1", lambda x: x.right(bounds=both(x.bounds, of_first))),
        "scores_of_the_first_128_channels": ("SCORES-1", lambda x: x.right(q=first(x.q, 128, 3))),
        "scores_of_the_first_32_rows": ("SCORES-1", lambda x: first(x.right(), 32, 2)),
    },
)
table(
    R,
    "page_scores",
    {"scores_in_half_precision": ("SCORES-1", lambda x: x.right().astype(np.float16).astype(np.float32))},
    HALF,
)
table(R, "page_scores", {"scores_in_double_precision": ("SCORES-1", lambda x: x.right().astype(np.float64))}, DOUBLE)


def swept(mistake: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """Make a mistake in the sweep that finds the LSE itself, and none where it is given."""
    return lambda x: x.right() if x.lse is not None else mistake(x)


def last_span_diluted(x: Call) -> Any:
    mass, rest = x.right(), x.q.shape[2] % x.span
    mass[:, :, -1] *= rest / x.span if rest else 1
    return mass


def one_page_at_a_time(x: Call) -> Any:
    mass, context = x.right().copy(), x.context
    for page in range(context.pages):
        alone = np.where(np.arange(context.pages) == page, context.page_lengths, 0)
        mass[..., page] = x.right(context=with_lengths(context, alone))[..., page]
    return mass


def weighed_above_1(x: Call) -> Any:
    if x.lse is None:
        return x.right()
    tokens = x.q.shape[2]
    everyone = Selection.all_pages(x.context, tokens), np.ones((len(x.q), tokens), bool)
    own = R.attend_pages(x.q, x.context, *everyone, scale=x.scale).lse.astype(np.float64)
    with np.errstate(all="ignore"):
        more = np.exp(np.where(np.isneginf(own), 0.0, own - x.lse))[..., None]
    rows = x.right(span=1, lse=None) * more
    spans = [rows[:, :, start : start + x.span].mean(axis=2) for start in range(0, tokens, x.span)]
    return np.stack(spans, axis=2).astype(np.float32)


def span_of_64(x: Call) -> Any:
    if x.span <= 64 or x.q.shape[2] <= 64:
        return x.right()
    return x.right(q=x.q[:, :, :64], lse=None if x.lse is None else x.lse[:, :, :64], span=64)


table(
    R,
    "pooled_scores",
    {
        "pooled_without_the_partial_tail": (
            "POOLED-1",
            swept(lambda x: lengths(x, lambda n, size: np.where(n == size, n, 0))),
        ),
        "pooled_mean_instead_of_mass": (
            "POOLED-1",
            swept(lambda x: (x.right() / np.maximum(x.context.page_lengths, 1)[:, None, None]).astype(np.float32)),
        ),
        "pooled_sums_the_rows": (
            "POOLED-1",
            swept(lambda x: (x.right() * min(x.span, x.q.shape[2])).astype(np.float32)),
        ),
        "pooled_divides_the_last_span_by_a_whole_one": ("POOLED-1", swept(last_span_diluted)),
        "pooled_first_row_stands_for_its_span": ("POOLED-1", swept(lambda x: x.right(q=x.q[:, :, :: x.span], span=1))),
        "pooled_without_scale": ("POOLED-1", swept(lambda x: x.right(scale=1.0))),
        "pooled_nan_without_context": (
            "POOLED-2",
            swept(
                lambda x: np.where(
                    (x.context.page_lengths > 0).any(axis=1)[:, None, None, None], x.right(), np.float32(np.nan)
                )
            ),
        ),
        "pooled_uniform_mass_for_absent_pages": (
            "POOLED-2",
            swept(lambda x: np.where((x.context.page_lengths > 0)[:, None, None], x.right(), np.float32(1e-3))),
        ),
        "pooled_softmax_of_each_page_alone": ("POOLED-1", swept(one_page_at_a_time)),
        "pooled_weighs_keys_above_1": ("POOLED-3", weighed_above_1),
        "spans_of_at_most_64_rows": ("POOLED-1", span_of_64),
    },
)


def threshold(x: Call) -> Any:
    mask = x.right()
    lowest = np.where(mask, x.scores, np.inf).min(axis=-1, keepdims=True, initial=np.inf)
    return (mask | (x.scores >= lowest)) & x.eligible


def backwards(values: Any, axis: int = -1) -> Any:
    return np.ascontiguousarray(np.flip(values, axis))


def all_pages(x: Call) -> Any:
    return np.ones(x.scores.shape, bool)


def fewer_bits(values: Any, mask: int) -> Any:
    return (np.ascontiguousarray(values).view(np.int32) & ~np.int32(mask)).view(np.float32)


def highest_first(x: Call) -> Any:
    mask = backwards(np.broadcast_to(x.eligible, x.scores.shape))
    return backwards(x.right(scores=backwards(x.scores), eligible=mask))


table(
    R,
    "top_pages",
    {
        "ties_to_the_highest_index": ("TOP-2", highest_first),
        "one_page_too_many": ("TOP-1", lambda x: x.right(count=x.count + 1)),
        "one_page_too_few": ("TOP-1", lambda x: x.right(count=x.count - 1)),
        "at_least_one_page": ("TOP-1", lambda x: x.right(count=np.maximum(x.count, 1))),
        "pages_not_eligible_fill_up": (
            "TOP-3",
            lambda x: x.right(scores=np.where(x.eligible, x.scores, -np.inf).astype(np.float32), eligible=all_pages(x)),
        ),
        "pages_not_eligible_use_up_the_count": ("TOP-1 TOP-3", lambda x: x.right(eligible=all_pages(x)) & x.eligible),
        "nan_ranks_last": (
            "TOP-4",
            lambda x: x.right(scores=np.where(np.isnan(x.scores), np.float32(-np.inf), x.scores)),
        ),
        "tiny_scores_tie": (
            "TOP-1",
            lambda x: x.right(scores=np.where(np.abs(x.scores) < np.float32(1e-12), np.float32(0), x.scores)),
        ),
        "count_of_the_first_row_for_all": ("TOP-1", lambda x: x.right(count=int(np.asarray(x.count).flat[0]))),
        "all_pages_that_reach_the_threshold": ("TOP-1", threshold),
        "lowest_scores_win": ("TOP-1", lambda x: x.right(scores=-x.scores)),
        "at_most_128_pages_chosen": ("TOP-1 TOP-2", lambda x: x.right(count=np.minimum(x.count, 128))),
        "pages_ranked_in_tiles_of_256": ("TOP-1 TOP-2", lambda x: x.right() & (np.arange(x.scores.shape[-1]) < 512)),
        "index_packed_into_the_score": ("TOP-1", lambda x: x.right(scores=fewer_bits(x.scores, 0xFF))),
        "ties_broken_by_the_common_random_state": (
            "PURE-5",
            lambda x: (np.random.rand(x.scores.shape[-1]), x.right())[1],
        ),
    },
)
