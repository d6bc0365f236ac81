"""Attention that masks, rounds, remembers or returns wrongly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from mutation import R, broken

from sparse_dlm_attn import AttentionState, Selection
from sparse_dlm_attn.values import softmax_scale


def loose_attention(
    q: Any,
    c: Any,
    s: Any,
    a: Any,
    scale: Any,
    *,
    mask_by: str = "inf",
    dtype: Any = np.float64,
    sum_dtype: Any = None,
    clean_values: bool = False,
    active_only: bool = True,
) -> Any:
    """Dense attention over everything with masks afterwards: the way to read what must not be read."""
    factor = softmax_scale(q.shape[3], scale)
    table = np.where(c.page_lengths > 0, c.page_table, 0)
    valid = np.arange(c.page_size) < c.page_lengths[:, :, None]
    rows = s.for_rows(q.shape[1], q.shape[2]) & (a[:, None, :, None] if active_only else True)
    allowed = (rows[..., None] & valid[:, None, None]).reshape(*q.shape[:3], c.pages * c.page_size)
    group, count = q.shape[1] // c.kv_heads, c.pages * c.page_size
    k, v = (
        np.repeat(part[table].swapaxes(1, 2).reshape(len(q), c.kv_heads, count, q.shape[3]), group, axis=1)
        for part in (c.k_pages, c.v_pages)
    )
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
        logits = (
            logits + np.where(allowed, 0, -np.inf) if mask_by == "add" else np.where(allowed, logits, low)
        )
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
def empty_lse_is_a_large_negative_number(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(state.out, np.where(np.isneginf(state.lse), np.float32(-1e30), state.lse))


@broken("ACCURACY-1", dtypes=("float16",))
def half_precision_accumulation(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, clean_values=True, sum_dtype=np.float16)


@broken("ACCURACY-1", dtypes=("float16",))
def half_precision_scores(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return loose_attention(q, c, s, a, scale, clean_values=True, dtype=np.float16)


@broken("ACCURACY-1", "ACCURACY-2", dtypes=("float64",))
def double_precision_computed_in_single(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
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
    return AttentionState(
        np.nan_to_num(state.out, nan=0.0), np.nan_to_num(state.lse, nan=0.0, neginf=-np.inf)
    )


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
    state, calls = (
        R.attend_pages(q, c, s, a, scale=scale),
        self.__dict__.setdefault("calls", itertools.count()),
    )
    return AttentionState(np.nextafter(state.out, np.asarray(next(calls) % 2 * 9, q.dtype)), state.lse)


@broken("PURE-4")
def last_bit_depends_on_the_batch(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    return (
        state if len(q) == 1 else AttentionState(np.nextafter(state.out, np.asarray(9, q.dtype)), state.lse)
    )


@broken("PURE-3")
def stale_state_after_the_prefix_grew(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    kept = self.__dict__.setdefault("kept", {})
    key = (q.shape, c.k_pages.shape, c.page_table.tobytes(), q.dtype.name)
    if key not in kept:
        kept[key] = R.attend_pages(q, c, s, a, scale=scale)
    return AttentionState(kept[key].out.copy(), kept[key].lse.copy())
