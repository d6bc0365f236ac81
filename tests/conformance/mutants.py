"""Backends that are wrong in one plausible way each; the suite has to name the broken clause.

Every mutant is the reference with one operator replaced. `BACKENDS` maps its name (what is wrong) to
the clauses of which at least one must be found broken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from sparse_dlm_attn import AttentionState, Capabilities, Context, PageBounds, Selection
from sparse_dlm_attn.values import softmax_scale
from sparse_dlm_attn_reference import ReferenceBackend

R = ReferenceBackend()
Method = Callable[..., Any]


@dataclass(frozen=True)
class Mutant:
    """A broken backend and the clauses that name its mistake."""

    name: str
    clauses: tuple[str, ...]
    backend: ReferenceBackend
    dtypes: tuple[str, ...]


BACKENDS: dict[str, Mutant] = {}


def broken(*clauses: str, operator: str = "", dtypes: tuple[str, ...] = ("float32",)) -> Callable[[Method], Method]:
    """Register a reference whose ``operator`` is the decorated function; its name says what is wrong."""

    def register(function: Method) -> Method:
        name, target = function.__name__, operator or "attend_pages"
        kind = type(name, (ReferenceBackend,), {"name": name, target: function})
        BACKENDS[name] = Mutant(name, clauses, kind(), dtypes)
        return function

    return register


def quiet(function: Method) -> Method:
    def run(*arguments: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*arguments, **options)

    run.__name__ = function.__name__
    return run


# --- attention over pages -------------------------------------------------------------------------


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
    return AttentionState(R.attend_pages(q, c, s, a, scale=scale).out, R.attend_pages(q, c, s, a, scale=1.0).lse)


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


def with_lengths(context: Any, lengths: Any) -> Any:
    return replace(context, page_lengths=np.asarray(lengths, dtype=np.int32))


@broken("ATTEND-1")
def last_page_dropped(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, Selection(s.mask & (np.arange(c.pages) < c.pages - 1), s.span), a, scale=scale)


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
def selection_of_the_first_head_of_a_group(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
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
def selection_head_is_head_modulo_heads(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
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


def loose_attention(
    q: Any, c: Any, s: Any, a: Any, scale: Any, *, mask_by: str = "inf", dtype: Any = np.float64,
    sum_dtype: Any = None, clean_values: bool = False, active_only: bool = True,
) -> Any:
    """Dense attention over everything with masks afterwards: the way to read what must not be read."""
    factor = softmax_scale(q.shape[3], scale)
    table = np.where(c.page_lengths > 0, c.page_table, 0)
    valid = np.arange(c.page_size) < c.page_lengths[:, :, None]
    rows = s.for_rows(q.shape[1], q.shape[2]) & (a[:, None, :, None] if active_only else True)
    allowed = (rows[..., None] & valid[:, None, None]).reshape(*q.shape[:3], c.pages * c.page_size)
    group, count = q.shape[1] // c.kv_heads, c.pages * c.page_size
    k, v = (np.repeat(
        part[table].swapaxes(1, 2).reshape(len(q), c.kv_heads, count, q.shape[3]), group, axis=1
    ) for part in (c.k_pages, c.v_pages))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    if count == 0:
        return AttentionState(out.astype(q.dtype), lse.astype(np.float32))
    with np.errstate(all="ignore"):
        k, v = k.astype(dtype), v.astype(dtype)
        flat = valid.reshape(len(q), 1, count, 1)
        k, v = np.where(flat, k, 0), np.where(flat, v, 0)
        if clean_values:
            read = allowed.any(axis=2)[..., None]
            k, v = np.where(read, k, 0), np.where(read, v, 0)
        logits = (q.astype(dtype) @ k.swapaxes(2, 3)) * dtype(factor)
        low = {"inf": -np.inf, "zero": 0.0, "finite": -1e4, "add": 0.0}[mask_by]
        logits = logits + np.where(allowed, 0, -np.inf) if mask_by == "add" else np.where(allowed, logits, low)
        peak = logits.max(axis=3, keepdims=True)
        weights = np.exp(logits - np.where(peak == -np.inf, 0, peak)).astype(sum_dtype or dtype)
        if mask_by == "zero":
            weights = weights * allowed
        total = weights[..., 0:1] * 0
        mixed = np.zeros(q.shape, weights.dtype)
        if sum_dtype is None:
            total, mixed = weights.sum(axis=3, keepdims=True), weights @ v
        else:
            for key in range(count):
                total = total + weights[..., key : key + 1]
                mixed = mixed + weights[..., key : key + 1] * v[:, :, None, key].astype(sum_dtype)
        empty = total == 0
        out = np.where(empty, 0, mixed / np.where(empty, 1, total))
        lse = np.where(empty, -np.inf, peak + np.log(np.where(empty, 1, total).astype(np.float64)))[..., 0]
    return AttentionState(out.astype(q.dtype), lse.astype(np.float32))


@broken("ATTEND-3", "ATTEND-2")
def nan_leaks_from_unselected_pages(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale)


@broken("ATTEND-1", "ATTEND-3")
def masked_scores_count_as_zero(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, mask_by="zero", clean_values=True)


@broken("ATTEND-3", "ATTEND-2")
def mask_added_to_scores(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, mask_by="add")


@broken("STATE-2", "ATTEND-2")
def masked_with_a_finite_number(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, mask_by="finite", clean_values=True)


@broken("ATTEND-2")
def inactive_rows_computed(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, s, np.ones_like(a), scale=scale)


@broken("ATTEND-2")
def inactive_rows_return_q(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(np.where(a[:, None, :, None], state.out, q), state.lse)


@broken("ATTEND-2")
def inactive_rows_have_lse_zero(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(state.out, np.where(a[:, None, :], state.lse, np.float32(0)))


@broken("ATTEND-2")
def activity_of_sequence_0_for_all(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, s, np.repeat(a[:1], len(a), axis=0), scale=scale)


@broken("STATE-2")
def empty_rows_divide_by_zero(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    empty = np.isneginf(state.lse) & a[:, None, :]
    return AttentionState(np.where(empty[..., None], np.asarray(np.nan, q.dtype), state.out), state.lse)


@broken("STATE-2")
def empty_lse_is_a_large_negative_number(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(state.out, np.where(np.isneginf(state.lse), np.float32(-1e30), state.lse))


@broken("ACCURACY-1", dtypes=("float16",))
def half_precision_accumulation(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, clean_values=True, sum_dtype=np.float16)


@broken("ACCURACY-1", dtypes=("float16",))
def half_precision_scores(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, clean_values=True, dtype=np.float16)


@broken("ACCURACY-1", "ACCURACY-2", dtypes=("float64",))
def double_precision_computed_in_single(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, clean_values=True, dtype=np.float32)


@broken("STATE-4", dtypes=("float16",))
def out_stays_in_single_precision(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(state.out.astype(np.float32), state.lse)


class Lax(AttentionState):
    """A state that does not check its parts."""

    def __post_init__(self) -> None:
        pass


@broken("STATE-4", dtypes=("float16",))
def lse_has_the_dtype_of_the_inputs(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return Lax(state.out, state.lse.astype(q.dtype))


@broken("STATE-4")
def lse_in_double_precision(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return Lax(state.out, state.lse.astype(np.float64))


@broken("STATE-4")
def returns_a_tuple(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return state.out, state.lse


@broken("ATTEND-1")
def values_taken_from_keys(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, replace(c, v_pages=c.k_pages), s, a, scale=scale)


@broken("MERGE-4")
def nan_papered_over(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(np.nan_to_num(state.out, nan=0.0), np.nan_to_num(state.lse, nan=0.0, neginf=-np.inf))


@broken("CONTEXT-1", "CONTEXT-5")
def strides_of_the_cache_assumed(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    """Reads the memory behind the pages as if it were contiguous."""
    k = c.k_pages
    if not k.flags.c_contiguous and k.size and k.base is not None and k.base.size >= k.size:
        raw = np.ravel(k.base if k.base.ndim else k)[: k.size].reshape(k.shape)
        c = replace(c, k_pages=np.ascontiguousarray(raw))
    return R.attend_pages(q, c, s, a, scale=scale)


@broken("ATTEND-1", "ATTEND-5")
def selected_pages_inverted(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, Selection(~s.mask, s.span), a, scale=scale)


@broken("PURE-1")
def queries_scaled_in_place(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    q.flags.writeable = True
    q *= 0.5
    return R.attend_pages(q, c, s, a, scale=2 * softmax_scale(q.shape[3], scale))


@broken("PURE-1")
def poison_cleaned_in_place(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    base = c.k_pages if c.k_pages.base is None else c.k_pages.base
    base.flags.writeable = True
    c.k_pages.flags.writeable = True
    c.k_pages[...] = np.nan_to_num(c.k_pages)
    return R.attend_pages(q, c, s, a, scale=scale)


@broken("PURE-3")
def results_share_one_buffer(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state, kept = R.attend_pages(q, c, s, a, scale=scale), self.__dict__.setdefault("buffers", {})
    buffer = kept.setdefault((q.shape, q.dtype), np.empty_like(state.out))
    buffer[...] = state.out
    return AttentionState(buffer, state.lse)


@broken("PURE-3")
def nondeterministic_last_bit(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state, calls = R.attend_pages(q, c, s, a, scale=scale), self.__dict__.setdefault("calls", itertools.count())
    return AttentionState(np.nextafter(state.out, np.asarray(next(calls) % 2 * 9, q.dtype)), state.lse)


@broken("PURE-4")
def last_bit_depends_on_the_batch(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return state if len(q) == 1 else AttentionState(np.nextafter(state.out, np.asarray(9, q.dtype)), state.lse)


@broken("PURE-3")
def stale_state_after_the_prefix_grew(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    kept = self.__dict__.setdefault("kept", {})
    key = (q.shape, c.k_pages.shape, c.page_table.tobytes(), q.dtype.name)
    if key not in kept:
        kept[key] = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(kept[key].out.copy(), kept[key].lse.copy())


# --- within the block, and fused ------------------------------------------------------------------


@broken("BLOCK-1", operator="attend_block")
def block_is_causal(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    states = [R.attend_block(q[:, :, r : r + 1], k[:, :, : r + 1], v[:, :, : r + 1], scale=scale)
              for r in range(q.shape[2])]
    return AttentionState(np.concatenate([s.out for s in states], axis=2),
                          np.concatenate([s.lse for s in states], axis=2))


@broken("BLOCK-1", operator="attend_block")
def last_key_of_the_block_dropped(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    return R.attend_block(q, k[:, :, :-1], v[:, :, :-1], scale=scale)


@broken("BLOCK-1", operator="attend_block")
def block_keys_cut_to_the_rows(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    return R.attend_block(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], scale=scale)


@broken("STATE-3", operator="attend_block")
def block_scale_missing(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    return R.attend_block(q, k, v, scale=1.0)


@broken("GQA-1", operator="attend_block")
def block_head_modulo_kv_heads(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    heads = np.arange(q.shape[1]) % k.shape[1]
    return R.attend_block(q, k[:, heads], v[:, heads], scale=scale)


def fused(q: Any, k: Any, v: Any, c: Any, s: Any, a: Any, cached: Any, scale: Any) -> Any:
    fresh = R.attend_pages(q, c, s, a, scale=scale)
    state = fresh if cached is None else R.reuse(a, fresh, cached)
    return fresh, state, R.attend_block(q, k, v, scale=scale)


def fused_mutant(*clauses: str) -> Callable[[Callable[..., Any]], Any]:
    def register(function: Callable[..., Any]) -> Any:
        def attend(self: Any, q: Any, k: Any, v: Any, c: Any, s: Any, a: Any, cached: Any, *, scale: Any = None) -> Any:
            return function(*fused(q, k, v, c, s, a, cached, scale), a, cached)

        attend.__name__ = function.__name__
        return broken(*clauses, operator="attend")(attend)

    return register


@fused_mutant("ATTEND-4")
def attend_forgets_what_was_cached(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return R.merge(fresh, block).out, fresh


@fused_mutant("ATTEND-4")
def attend_returns_the_fresh_part_only(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return R.merge(state, block).out, fresh


@fused_mutant("ATTEND-4")
def attend_caches_the_block_too(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return R.merge(state, block).out, R.merge(state, block)


@fused_mutant("ATTEND-4")
def attend_counts_the_block_twice(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return R.merge(state, block, block).out, state


@fused_mutant("ATTEND-4")
def attend_merges_fresh_with_cached(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    both = fresh if cached is None else R.merge(fresh, cached)
    return R.merge(both, block).out, both


@fused_mutant("ATTEND-4")
def attend_leaves_the_block_out(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return state.out, state


@fused_mutant("PURE-2")
def attend_hands_back_the_cached_state(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return R.merge(state, block).out, state if cached is None or a.any() else cached


# --- merge and reuse ------------------------------------------------------------------------------


def merged(states: Any, *, base: float = np.e, shift: bool = True, where: bool = True, lse: Any = None,
           dtype: Any = np.float64) -> Any:
    with np.errstate(all="ignore"):
        logs = np.stack([state.lse.astype(np.float64) for state in states])
        peak = logs.max(axis=0) if shift else np.zeros(logs.shape[1:])
        safe = np.where(np.isneginf(peak), 0, peak)
        weights = (base ** (logs - safe)).astype(dtype)
        total = weights.sum(axis=0, dtype=dtype)
        share = weights / np.where(total == 0, 1, total)
        parts = [part[..., None] * state.out.astype(dtype) for part, state in zip(share, states, strict=True)]
        if where:
            parts = [np.where(part[..., None] == 0, 0, mixed) for part, mixed in zip(share, parts, strict=True)]
        merged_lse = np.where(total == 0, -np.inf, safe + np.log(np.where(total == 0, 1, total)))
        if lse is not None:
            merged_lse = lse(logs)
        return AttentionState(sum(parts).astype(states[0].out.dtype), merged_lse.astype(np.float32))


@broken("MERGE-1", operator="merge")
def merge_averages_the_outs(self: Any, *states: Any) -> Any:
    out = np.mean([state.out for state in states], axis=0).astype(states[0].out.dtype)
    return AttentionState(out, R.merge(*states).lse)


@broken("MERGE-1", operator="merge")
def merge_takes_the_largest_lse(self: Any, *states: Any) -> Any:
    return merged(states, lse=lambda logs: logs.max(axis=0))


@broken("MERGE-1", operator="merge")
def merge_adds_the_lses(self: Any, *states: Any) -> Any:
    return merged(states, lse=lambda logs: logs.sum(axis=0))


@broken("MERGE-1", operator="merge")
def merge_drops_a_third_state(self: Any, *states: Any) -> Any:
    return R.merge(*states[:2])


@broken("MERGE-1", operator="merge")
def merge_in_base_two(self: Any, *states: Any) -> Any:
    return merged(states, base=2.0)


@broken("MERGE-1", operator="merge")
def merge_without_a_shift_overflows(self: Any, *states: Any) -> Any:
    return merged(states, shift=False)


@broken("MERGE-4", operator="merge")
def merge_multiplies_by_zero(self: Any, *states: Any) -> Any:
    return merged(states, where=False)


@broken("MERGE-4", operator="merge")
def merge_papers_nan_over(self: Any, *states: Any) -> Any:
    return R.merge(*(AttentionState(np.nan_to_num(s.out), s.lse) for s in states))


@broken("MERGE-3", operator="merge")
@quiet
def merge_subtracts_infinities(self: Any, *states: Any) -> Any:
    logs = np.stack([state.lse.astype(np.float64) for state in states])
    weights = np.exp(logs - logs.max(axis=0))
    out = sum(w[..., None] * s.out for w, s in zip(weights / weights.sum(axis=0), states, strict=True))
    return AttentionState(out.astype(states[0].out.dtype),
                          (logs.max(axis=0) + np.log(weights.sum(axis=0))).astype(np.float32))


@broken("MERGE-1", "MERGE-2", operator="merge")
def merge_keeps_the_weights_of_pairs(self: Any, *states: Any) -> Any:
    """Merges pairwise but forgets to carry the lse of the pair on."""
    state = states[0]
    for other in states[1:]:
        state = AttentionState(R.merge(state, other).out, other.lse)
    return AttentionState(state.out, R.merge(*states).lse)


@broken("ACCURACY-2", "MERGE-1", operator="merge", dtypes=("float32",))
def merge_in_half_precision(self: Any, *states: Any) -> Any:
    return merged(states, dtype=np.float16)


@broken("PURE-2", operator="merge")
def merge_hands_a_single_state_back(self: Any, *states: Any) -> Any:
    return states[0] if len(states) == 1 else R.merge(*states)


@broken("REUSE-1", operator="reuse")
def reuse_inverted(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    return R.reuse(~a, fresh, cached)


@broken("REUSE-1", operator="reuse")
def reuse_keeps_the_cached_lse(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    return AttentionState(R.reuse(a, fresh, cached).out, cached.lse.copy())


@broken("REUSE-1", operator="reuse")
def reuse_blends(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    with np.errstate(all="ignore"):
        rows = a[:, None, :].astype(np.float32)
        return AttentionState((rows[..., None] * fresh.out + (1 - rows[..., None]) * cached.out)
                              .astype(fresh.out.dtype), np.where(a[:, None, :], fresh.lse, cached.lse))


@broken("REUSE-1", operator="reuse")
def reuse_by_the_rows_of_sequence_0(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    return R.reuse(np.repeat(a[:1], len(a), axis=0), fresh, cached)


@broken("PURE-2", operator="reuse")
def reuse_returns_views(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    return fresh if a.all() else R.reuse(a, fresh, cached)


@broken("PURE-1", operator="reuse")
def reuse_writes_into_the_cache(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    for name in ("out", "lse"):
        getattr(cached, name).flags.writeable = True
    state = R.reuse(a, fresh, cached)
    cached.out[...], cached.lse[...] = state.out, state.lse
    return state


# --- bounds and scores ----------------------------------------------------------------------------


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_zero_padded_pages(self: Any, c: Any) -> Any:
    b, partial = R.page_bounds(c), (c.page_lengths < c.page_size)[:, None, :, None]
    return PageBounds(np.where(partial, np.minimum(b.lower, 0), b.lower), np.where(partial, np.maximum(b.upper, 0), b.upper))


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


# --- pooled scores --------------------------------------------------------------------------------


def pooled_mutant(*clauses: str) -> Callable[[Method], Method]:
    return broken(*clauses, operator="pooled_scores")


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
def pooled_divides_the_last_span_by_a_whole_one(self: Any, q: Any, c: Any, *, span: int, scale: Any = None) -> Any:
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


# --- ranking --------------------------------------------------------------------------------------


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


def by_mass(change: Any, mass: float, enough: Callable[[float, float], bool], order_of: Any = None,
            total_of: Any = None) -> Any:
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
    return by_mass(change, mass, lambda reached, target: reached >= target, order_of=lambda row: range(len(row)))


@largest_mutant("CHANGE-3")
def mass_of_the_whole_batch(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if count is not None:
        return R.largest_changes(change, count=count)
    return by_mass(change, mass, lambda reached, target: reached >= target,
                   total_of=lambda all_, b: float(all_.astype(np.float64).sum()))


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


# --- a backend as a whole -------------------------------------------------------------------------


@broken("CAPS-1", operator="why_not")
def why_not_stops_at_the_first_reason(self: Any, problem: Any) -> Any:
    return self.capabilities.why_not(problem)[:1]


@broken("CAPS-1", operator="why_not")
def why_not_answers_with_a_bool(self: Any, problem: Any) -> Any:
    return not self.capabilities.why_not(problem)


@broken("STATE-4", operator="asarray")
def asarray_ignores_the_dtype(self: Any, values: Any, *, dtype: Any = None) -> Any:
    return np.asarray(values)




class declares_sizes_as_a_list(ReferenceBackend):  # noqa: N801
    """`capabilities` must be hashable values that a reader can trust: tuples."""

    name: ClassVar[str] = "declares_sizes_as_a_list"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32",), page_sizes=[1, 2, 4])  # type: ignore[arg-type]


BACKENDS["declares_sizes_as_a_list"] = Mutant(
    "declares_sizes_as_a_list", ("CAPS-1",), declares_sizes_as_a_list(), ("float32",)
)
