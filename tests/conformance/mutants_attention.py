"""Attention over pages and within the block gone wrong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from mutation import Call, R, chosen, first, kept, of_first, state, table, with_lengths

from sparse_dlm_attn import AttentionState
from sparse_dlm_attn.values import softmax_scale

HALF, DOUBLE = ("float16",), ("float64",)


def pages(x: Call, mask: Any, span: int | None = None) -> AttentionState:
    """Return attention over other pages."""
    return x.right(selection=chosen(x.selection, mask, span))


def lengths(x: Call, numbers: Any) -> AttentionState:
    """Return attention over pages of other lengths."""
    return x.right(context=with_lengths(x.context, numbers))


def tables(x: Call, numbers: Any) -> AttentionState:
    """Return attention over other physical pages."""
    return x.right(context=replace(x.context, page_table=numbers))


def in_pool(x: Call, numbers: Any) -> Any:
    return np.clip(numbers, 0, len(x.context.k_pages) - 1)


def whole(x: Call) -> Any:
    """Return the lengths of pages that are full wherever they exist."""
    return np.where(x.context.page_lengths > 0, x.context.page_size, 0)


def per_head(x: Call) -> Any:
    return x.selection.for_query_heads(x.q.shape[1])


def group(x: Call) -> int:
    return int(x.q.shape[1] // x.context.kv_heads)


def numbers(x: Call) -> Any:
    return np.arange(x.context.pages)


def rows(x: Call) -> Any:
    return np.arange(x.q.shape[2])


def with_lse(x: Call, change: Any) -> AttentionState:
    right = x.right()
    return state(right.out, change(right.lse), right)


table(
    R,
    "attend_pages",
    {
        "lse_in_base_two": ("STATE-1", lambda x: with_lse(x, lambda lse: lse / np.log(2))),
        "scale_applied_twice": ("STATE-3", lambda x: x.right(scale=softmax_scale(x.q.shape[3], x.scale) ** 2)),
        "scale_missing": ("STATE-3", lambda x: x.right(scale=1.0)),
        "given_scale_ignored": ("STATE-3", lambda x: x.right(scale=None)),
        "default_scale_without_root": ("STATE-3", lambda x: x.right(scale=x.scale or 1.0 / x.q.shape[3])),
        "lse_leaves_the_scale_out": ("STATE-1", lambda x: AttentionState(x.right().out, x.right(scale=1.0).lse)),
        "lse_is_the_largest_score": (
            "STATE-1",
            lambda x: with_lse(
                x,
                lambda lse: (
                    np.maximum.reduce(
                        [pages(x, x.selection.mask & (numbers(x) == page)).lse for page in numbers(x)], initial=-np.inf
                    )
                    if x.context.pages
                    else lse
                ),
            ),
        ),
        "out_not_normalised": (
            "STATE-1",
            lambda x: state(
                x.right().out * np.maximum(x.context.page_lengths.sum(axis=1), 1)[:, None, None, None],
                x.right().lse,
                x.right(),
            ),
        ),
        "last_page_dropped": ("ATTEND-1", lambda x: pages(x, x.selection.mask & (numbers(x) < x.context.pages - 1))),
        "partial_pages_ignored": (
            "ATTEND-1",
            lambda x: lengths(x, np.where(x.context.page_lengths == x.context.page_size, x.context.page_lengths, 0)),
        ),
        "partial_pages_read_whole": ("CONTEXT-2", lambda x: lengths(x, whole(x))),
        "last_token_of_a_page_dropped": ("ATTEND-1", lambda x: lengths(x, np.maximum(x.context.page_lengths - 1, 0))),
        "one_token_too_many": ("CONTEXT-2", lambda x: lengths(x, np.minimum(x.context.page_lengths + 1, whole(x)))),
        "group_heads_all_from_the_first": (
            "GQA-1",
            lambda x: x.right(q=np.repeat(x.q[:, :: group(x)], group(x), axis=1)),
        ),
        "selection_of_the_first_head_of_a_group": (
            "GQA-2",
            lambda x: pages(
                x,
                np.repeat(x.selection.mask[:, :: group(x)], group(x), axis=1)
                if x.selection.heads == x.q.shape[1]
                else x.selection.mask,
            ),
        ),
        "union_over_the_heads_of_a_group": (
            "GQA-2",
            lambda x: pages(
                x, per_head(x).reshape(len(x.q), x.context.kv_heads, group(x), *per_head(x).shape[2:]).any(axis=2)
            ),
        ),
        "selection_head_is_head_modulo_heads": (
            "SELECTION-1",
            lambda x: pages(x, x.selection.mask[:, np.arange(x.q.shape[1]) % x.selection.heads]),
        ),
        "union_where_own_pages_were_asked": (
            "SELECTION-1",
            lambda x: pages(x, np.broadcast_to(x.selection.mask.any(axis=2, keepdims=True), x.selection.mask.shape)),
        ),
        "span_is_row_modulo_spans": (
            "SELECTION-1",
            lambda x: pages(x, x.selection.mask[:, :, rows(x) % x.selection.mask.shape[2]], 1),
        ),
        "span_begins_one_row_early": (
            "SELECTION-1",
            lambda x: pages(
                x,
                x.selection.mask[:, :, np.minimum((rows(x) + 1) // x.selection.span, x.selection.mask.shape[2] - 1)],
                1,
            ),
        ),
        "selection_of_sequence_0_for_all": ("SELECTION-1 PURE-4", lambda x: pages(x, of_first(x.selection.mask))),
        "page_table_ignored": (
            "CONTEXT-1 CONTEXT-3",
            lambda x: tables(
                x,
                np.arange(x.context.page_table.size, dtype=np.int32).reshape(x.context.page_table.shape)
                % len(x.context.k_pages),
            ),
        ),
        "page_table_transposed": (
            "CONTEXT-1 CONTEXT-2",
            lambda x: tables(
                x, in_pool(x, np.ascontiguousarray(x.context.page_table.T).reshape(x.context.page_table.shape))
            ),
        ),
        "table_of_sequence_0_for_all": (
            "CONTEXT-1 PURE-4",
            lambda x: tables(x, in_pool(x, of_first(x.context.page_table))),
        ),
        "lengths_of_sequence_0_for_all": (
            "CONTEXT-2 PURE-4 ATTEND-1",
            lambda x: x.right(
                context=replace(
                    x.context,
                    page_table=in_pool(x, x.context.page_table),
                    page_lengths=of_first(x.context.page_lengths),
                )
            ),
        ),
        "table_entry_of_absent_pages_used": (
            "CONTEXT-2",
            lambda x: (  # gathers before it looks at the lengths
                x.context.k_pages[x.context.page_table],
                x.right(),
            )[1],
        ),
        "keys_after_the_first_128_dropped": (
            "ATTEND-1",
            lambda x: lengths(
                x,
                np.clip(
                    128 - np.cumsum(x.context.page_lengths, axis=1) + x.context.page_lengths, 0, x.context.page_lengths
                ),
            ),
        ),
        "rows_after_the_first_16_left_empty": ("ATTEND-1", lambda x: x.right(active=x.active & (rows(x) < 16))),
        "rows_after_the_first_32_left_empty": ("ATTEND-1", lambda x: x.right(active=x.active & (rows(x) < 32))),
        "rows_after_the_first_128_left_empty": ("ATTEND-1", lambda x: x.right(active=x.active & (rows(x) < 128))),
        "channels_after_the_first_64_ignored": ("ATTEND-1", lambda x: x.right(q=first(x.q, 64, 3))),
        "values_taken_from_keys": (
            "ATTEND-1",
            lambda x: x.right(context=replace(x.context, v_pages=x.context.k_pages)),
        ),
        "selected_pages_inverted": ("ATTEND-1 ATTEND-5", lambda x: pages(x, ~x.selection.mask)),
        "inactive_rows_computed": ("ATTEND-2", lambda x: x.right(active=np.ones_like(x.active))),
        "inactive_rows_return_q": (
            "ATTEND-2",
            lambda x: state(np.where(x.active[:, None, :, None], x.right().out, x.q), x.right().lse, x.right()),
        ),
        "inactive_rows_have_lse_zero": (
            "ATTEND-2",
            lambda x: with_lse(x, lambda lse: np.where(x.active[:, None, :], lse, 0)),
        ),
        "activity_of_sequence_0_for_all": ("ATTEND-2", lambda x: x.right(active=of_first(x.active))),
        "empty_rows_divide_by_zero": (
            "STATE-2",
            lambda x: state(
                np.where((np.isneginf(x.right().lse) & x.active[:, None, :])[..., None], np.nan, x.right().out),
                x.right().lse,
                x.right(),
            ),
        ),
        "empty_lse_is_a_large_negative_number": (
            "STATE-2",
            lambda x: with_lse(x, lambda lse: np.where(np.isneginf(lse), -1e30, lse)),
        ),
        "returns_a_tuple": ("STATE-4", lambda x: (x.right().out, x.right().lse)),
        "lse_in_double_precision": ("STATE-4", lambda x: Lax(x.right().out, x.right().lse.astype(np.float64))),
        "nan_papered_over": (
            "MERGE-4",
            lambda x: AttentionState(np.nan_to_num(x.right().out), np.nan_to_num(x.right().lse, neginf=-np.inf)),
        ),
        "nan_queries_taken_for_zero": ("ATTEND-1 MERGE-4", lambda x: x.right(q=np.nan_to_num(x.q))),
        "page_numbers_in_int16": ("CONTEXT-1 CONTEXT-3", lambda x: x.right(context=narrow_table(x.context, np.int16))),
        "pages_after_the_first_64_dropped": ("ATTEND-1", lambda x: pages(x, x.selection.mask & (numbers(x) < 64))),
        "page_lists_hold_at_most_128": (
            "ATTEND-1",
            lambda x: pages(x, x.selection.mask & (x.selection.mask.cumsum(-1) <= 128)),
        ),
        "page_lengths_in_int8": (
            "ATTEND-1 CONTEXT-2",
            lambda x: lengths(x, np.maximum(x.context.page_lengths.astype(np.int8), 0)),
        ),
        "group_heads_after_the_eighth_left_empty": (
            "ATTEND-1 GQA-1",
            lambda x: kept(x.right(), (np.arange(x.q.shape[1]) % group(x) < 8)[None, :, None]),
        ),
        "last_bit_depends_on_the_batch": ("PURE-4", lambda x: x.right() if len(x.q) == 1 else last_bit(x, 9)),
        "nondeterministic_last_bit": (
            "PURE-3",
            lambda x: last_bit(x, next(vars(x.this).setdefault("calls", itertools.count())) % 2 * 9),
        ),
        "leaves_floating_point_errors_off": ("PURE-5", lambda x: (np.seterr(all="ignore"), x.right())[1]),
        "nan_leaks_from_unselected_pages": ("ATTEND-3 ATTEND-2", lambda x: loose(x)),
        "masked_scores_count_as_zero": ("ATTEND-1 ATTEND-3", lambda x: loose(x, mask_by="zero", clean=True)),
        "mask_added_to_scores": ("ATTEND-3 ATTEND-2", lambda x: loose(x, mask_by="add")),
        "masked_with_a_finite_number": ("STATE-2 ATTEND-2", lambda x: loose(x, mask_by="finite", clean=True)),
    },
)
table(
    R,
    "attend_pages",
    {
        "half_precision_accumulation": ("ACCURACY-1", lambda x: loose(x, clean=True, sum_dtype=np.float16)),
        "half_precision_scores": ("ACCURACY-1", lambda x: loose(x, clean=True, dtype=np.float16)),
        "out_stays_in_single_precision": (
            "STATE-4",
            lambda x: AttentionState(x.right().out.astype(np.float32), x.right().lse),
        ),
        "lse_has_the_dtype_of_the_inputs": ("STATE-4", lambda x: Lax(x.right().out, x.right().lse.astype(x.q.dtype))),
    },
    HALF,
)
table(
    R,
    "attend_pages",
    {
        "double_precision_computed_in_single": (
            "ACCURACY-1 ACCURACY-2",
            lambda x: loose(x, clean=True, dtype=np.float32),
        )
    },
    DOUBLE,
)


class Lax(AttentionState):
    """A state that does not check its parts."""

    def __post_init__(self) -> None:
        pass


def last_bit(x: Call, towards: float) -> AttentionState:
    right = x.right()
    return state(np.nextafter(right.out, np.asarray(towards, right.out.dtype)), right.lse, right)


def narrow_table(context: Any, kind: Any) -> Any:
    """Return a context whose page numbers went through a narrow integer type."""
    entries = context.page_table.astype(kind).astype(np.int32)
    return replace(context, page_table=np.where(context.page_lengths > 0, entries % len(context.k_pages), entries))


def loose(
    x: Call, *, mask_by: str = "inf", dtype: Any = np.float64, sum_dtype: Any = None, clean: bool = False
) -> AttentionState:
    """Dense attention over everything with masks afterwards: the way to read what must not be read."""
    q, c = x.q, x.context
    table = np.where(c.page_lengths > 0, c.page_table, 0)
    valid = np.arange(c.page_size) < c.page_lengths[:, :, None]
    read = x.selection.for_rows(q.shape[1], q.shape[2]) & x.active[:, None, :, None]
    count = c.pages * c.page_size
    allowed = (read[..., None] & valid[:, None, None]).reshape(*q.shape[:3], count)
    if count == 0:
        return state(np.zeros(q.shape), np.full(q.shape[:3], -np.inf), AttentionState.empty_like(q))
    with np.errstate(all="ignore"):
        present = allowed.any(axis=2)[..., None] if clean else valid.reshape(len(q), 1, count, 1)
        k, v = (
            np.where(
                present,
                np.repeat(part[table].swapaxes(1, 2).reshape(len(q), c.kv_heads, count, q.shape[3]), group(x), axis=1),
                0,
            ).astype(dtype)
            for part in (c.k_pages, c.v_pages)
        )
        logits = (q.astype(dtype) @ k.swapaxes(2, 3)) * dtype(softmax_scale(q.shape[3], x.scale))
        if mask_by == "add":
            logits = logits + np.where(allowed, 0, -np.inf)
        else:
            logits = np.where(allowed, logits, {"inf": -np.inf, "zero": 0.0, "finite": -1e4}[mask_by])
        peak = logits.max(axis=3, keepdims=True)
        weights = np.exp(logits - np.where(peak == -np.inf, 0, peak)).astype(sum_dtype or dtype)
        if mask_by == "zero":
            weights = weights * allowed
        if sum_dtype is None:
            total, mixed = weights.sum(axis=3, keepdims=True), weights @ v
        else:
            total, mixed = np.zeros((*q.shape[:3], 1), sum_dtype), np.zeros(q.shape, sum_dtype)
            for key in range(count):
                total = total + weights[..., key : key + 1]
                mixed = mixed + weights[..., key : key + 1] * v[:, :, None, key].astype(sum_dtype)
        safe = np.where(total == 0, 1, total)
        lse = np.where(total == 0, -np.inf, peak + np.log(safe.astype(np.float64)))[..., 0]
        return state(np.where(total == 0, 0, mixed / safe), lse, AttentionState.empty_like(q))
