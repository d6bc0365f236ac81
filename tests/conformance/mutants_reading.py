"""Attention that reads the wrong tokens, pages, heads or rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from mutation import R, broken, with_lengths

from sparse_dlm_attn import AttentionState, Context, Selection
from sparse_dlm_attn.values import softmax_scale


@broken("STATE-1")
def lse_in_base_two(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(state.out, (state.lse / np.log(2)).astype(np.float32))


@broken("STATE-3")
def scale_applied_twice(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, s, a, scale=softmax_scale(q.shape[3], scale) ** 2)


@broken("STATE-3")
def scale_missing(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, s, a, scale=1.0)


@broken("STATE-3")
def given_scale_ignored(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, s, a)


@broken("STATE-3")
def default_scale_without_root(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, s, a, scale=scale or 1.0 / q.shape[3])


@broken("STATE-1")
def lse_leaves_the_scale_out(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return AttentionState(
        R.attend_pages(q, c, s, a, scale=scale).out, R.attend_pages(q, c, s, a, scale=1.0).lse
    )


@broken("STATE-1")
def lse_is_the_largest_score(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state, lse = R.attend_pages(q, c, s, a, scale=scale), np.full(q.shape[:3], -np.inf, np.float32)
    for page in range(c.pages):
        only = Selection(s.mask & (np.arange(c.pages) == page), s.span)
        lse = np.maximum(lse, R.attend_pages(q, c, only, a, scale=scale).lse)
    return AttentionState(state.out, lse)


@broken("STATE-1")
def out_not_normalised(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    tokens = np.maximum(c.page_lengths.sum(axis=1), 1)[:, None, None, None]
    return AttentionState((state.out * tokens).astype(q.dtype), state.lse)


@broken("ATTEND-1")
def last_page_dropped(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(
        q, c, Selection(s.mask & (np.arange(c.pages) < c.pages - 1), s.span), a, scale=scale
    )


@broken("ATTEND-1")
def partial_pages_ignored(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    full = np.where(c.page_lengths == c.page_size, c.page_lengths, 0)
    return R.attend_pages(q, with_lengths(c, full), s, a, scale=scale)


@broken("CONTEXT-2")
def partial_pages_read_whole(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, with_lengths(c, np.where(c.page_lengths > 0, c.page_size, 0)), s, a, scale=scale)


@broken("ATTEND-1")
def last_token_of_a_page_dropped(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, with_lengths(c, np.maximum(c.page_lengths - 1, 0)), s, a, scale=scale)


@broken("CONTEXT-2")
def one_token_too_many(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    longer = np.where(c.page_lengths > 0, np.minimum(c.page_lengths + 1, c.page_size), 0)
    return R.attend_pages(q, with_lengths(c, longer), s, a, scale=scale)


@broken("ATTEND-1", "CONTEXT-5")
def zero_keys_in_partial_pages(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    k, v = c.k_pages.copy(), c.v_pages.copy()
    held = np.zeros(k.shape[:1] + k.shape[2:3], bool)
    for b, page in np.argwhere(c.page_lengths > 0):
        held[c.page_table[b, page], : c.page_lengths[b, page]] = True
    k.swapaxes(1, 2)[~held], v.swapaxes(1, 2)[~held] = 0, 0
    whole = np.where(c.page_lengths > 0, c.page_size, 0)
    return R.attend_pages(q, Context(k, v, c.page_table, whole.astype(np.int32)), s, a, scale=scale)


@broken("GQA-1")
def group_heads_all_from_the_first(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    group = q.shape[1] // c.kv_heads
    return R.attend_pages(np.repeat(q[:, ::group], group, axis=1), c, s, a, scale=scale)


@broken("GQA-1")
def kv_head_is_head_modulo_kv_heads(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    order = np.argsort(np.arange(q.shape[1]) % c.kv_heads, kind="stable")
    mask = Selection(s.mask, s.span).for_query_heads(q.shape[1])
    moved = R.attend_pages(q[:, order], c, Selection(mask[:, order], s.span), a, scale=scale)
    back = np.argsort(order)
    return AttentionState(moved.out[:, back], moved.lse[:, back])


@broken("GQA-2")
def selection_of_the_first_head_of_a_group(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    mask = s.mask
    if s.heads == q.shape[1]:
        group = q.shape[1] // c.kv_heads
        mask = np.repeat(mask[:, ::group], group, axis=1)
    return R.attend_pages(q, c, Selection(mask, s.span), a, scale=scale)


@broken("GQA-2")
def union_over_the_heads_of_a_group(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    mask = s.for_query_heads(q.shape[1])
    shape = (mask.shape[0], c.kv_heads, q.shape[1] // c.kv_heads, *mask.shape[2:])
    return R.attend_pages(q, c, Selection(mask.reshape(shape).any(axis=2), s.span), a, scale=scale)


@broken("SELECTION-1")
def selection_head_is_head_modulo_heads(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    mask = s.mask[:, np.arange(q.shape[1]) % s.heads]
    return R.attend_pages(q, c, Selection(mask, s.span), a, scale=scale)


@broken("SELECTION-1")
def union_where_own_pages_were_asked(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    mask = np.broadcast_to(s.mask.any(axis=2, keepdims=True), s.mask.shape)
    return R.attend_pages(q, c, Selection(np.array(mask), s.span), a, scale=scale)


@broken("SELECTION-1")
def span_is_row_modulo_spans(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    rows = s.mask[:, :, np.arange(q.shape[2]) % s.mask.shape[2]]
    return R.attend_pages(q, c, Selection(rows, 1), a, scale=scale)


@broken("SELECTION-1")
def span_begins_one_row_early(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    index = np.minimum((np.arange(q.shape[2]) + 1) // s.span, s.mask.shape[2] - 1)
    return R.attend_pages(q, c, Selection(s.mask[:, :, index], 1), a, scale=scale)


@broken("SELECTION-1", "PURE-4")
def selection_of_sequence_0_for_all(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    mask = np.repeat(s.mask[:1], len(q), axis=0)
    return R.attend_pages(q, c, Selection(mask, s.span), a, scale=scale)


@broken("CONTEXT-1", "CONTEXT-3")
def page_table_ignored(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    table = np.arange(c.page_table.size, dtype=np.int32).reshape(c.page_table.shape) % len(c.k_pages)
    return R.attend_pages(q, replace(c, page_table=table), s, a, scale=scale)


@broken("CONTEXT-1", "CONTEXT-2")
def page_table_transposed(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    table = np.ascontiguousarray(c.page_table.T).reshape(c.page_table.shape)
    return R.attend_pages(q, replace(c, page_table=np.clip(table, 0, len(c.k_pages) - 1)), s, a, scale=scale)


@broken("CONTEXT-1", "PURE-4")
def table_of_sequence_0_for_all(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    table = np.clip(np.repeat(c.page_table[:1], len(q), axis=0), 0, len(c.k_pages) - 1)
    return R.attend_pages(q, replace(c, page_table=table), s, a, scale=scale)


@broken("CONTEXT-2", "PURE-4", "ATTEND-1")
def lengths_of_sequence_0_for_all(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    table = np.clip(c.page_table, 0, len(c.k_pages) - 1)
    lengths = np.repeat(c.page_lengths[:1], len(q), axis=0)
    return R.attend_pages(q, replace(c, page_table=table, page_lengths=lengths), s, a, scale=scale)


@broken("CONTEXT-2")
def table_entry_of_absent_pages_used(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    c.k_pages[c.page_table]  # a gather that does not look at the lengths first
    return R.attend_pages(q, c, s, a, scale=scale)


@broken("CONTEXT-5", "CONTEXT-1")
def last_page_taken_for_full(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    """Assumes that only the last existing page may be partial."""
    lengths = np.where(c.page_lengths > 0, c.page_size, 0)
    for b, row in enumerate(c.page_lengths):
        last = np.flatnonzero(row)[-1:]
        lengths[b, last] = row[last]
    return R.attend_pages(q, with_lengths(c, lengths), s, a, scale=scale)


@broken("ATTEND-1")
def keys_after_the_first_128_dropped(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    before = np.cumsum(c.page_lengths, axis=1) - c.page_lengths
    return R.attend_pages(q, with_lengths(c, np.clip(128 - before, 0, c.page_lengths)), s, a, scale=scale)


@broken("ATTEND-1")
def rows_after_the_first_16_left_empty(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    return R.attend_pages(q, c, s, a & (np.arange(q.shape[2]) < 16), scale=scale)


@broken("ATTEND-1")
def channels_after_the_first_64_ignored(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    return R.attend_pages(np.where(np.arange(q.shape[3]) < 64, q, 0), c, s, a, scale=scale)


@broken("ATTEND-1")
def second_tile_not_rescaled(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    """An online softmax over tiles of 16 pages that adds sums without moving them to the common peak."""
    states = []
    for first in range(0, max(c.pages, 1), 16):
        tile = (np.arange(c.pages) >= first) & (np.arange(c.pages) < first + 16)
        states.append(R.attend_pages(q, c, Selection(s.mask & tile, s.span), a, scale=scale))
    if len(states) == 1:
        return states[0]
    logs = np.stack([state.lse for state in states]).astype(np.float64)
    peak = np.where(np.isneginf(logs.max(axis=0)), 0, logs[-1])  # the last tile's instead of the largest
    with np.errstate(all="ignore"):
        weights = np.exp(np.minimum(logs - np.where(np.isneginf(peak), 0, peak), 0))
        total = weights.sum(axis=0)
        out = sum(w[..., None] * state.out for w, state in zip(weights, states, strict=True))
        lse = np.where(total == 0, -np.inf, np.where(np.isneginf(peak), 0, peak) + np.log(total))
        return AttentionState(
            (out / np.where(total == 0, 1, total)[..., None]).astype(q.dtype), lse.astype(np.float32)
        )
