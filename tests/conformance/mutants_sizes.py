"""Kernels that are right on small problems: what is cut off beyond a tile, a word or a type."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from mutation import BACKENDS, Mutant, R, broken, with_lengths

from sparse_dlm_attn import AttentionState, PageBounds, Selection
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn_reference import ReferenceBackend


def cut(state: Any, kept: Any) -> AttentionState:
    """Empty the rows that are not kept; ``kept`` broadcasts to the lse."""
    return AttentionState(
        np.where(kept[..., None], state.out, 0).astype(state.out.dtype),
        np.where(kept, state.lse, -np.inf).astype(np.float32),
    )


def narrow_table(c: Any, kind: Any) -> Any:
    numbers = c.page_table.astype(kind).astype(np.int32)
    return replace(c, page_table=np.where(c.page_lengths > 0, numbers % len(c.k_pages), numbers))


@broken("CONTEXT-1", "CONTEXT-3")
def page_numbers_in_int16(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, narrow_table(c, np.int16), s, a, scale=scale)


@broken("CONTEXT-1", "CONTEXT-3", operator="page_bounds")
def page_numbers_of_bounds_in_uint16(self: Any, c: Any) -> Any:
    return R.page_bounds(narrow_table(c, np.uint16))


@broken("ATTEND-1")
def pages_after_the_first_64_dropped(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, Selection(s.mask & (np.arange(c.pages) < 64), s.span), a, scale=scale)


@broken("ATTEND-1")
def page_lists_hold_at_most_128(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(q, c, Selection(s.mask & (s.mask.cumsum(-1) <= 128), s.span), a, scale=scale)


@broken("ATTEND-1")
def rows_after_the_first_32_left_empty(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    return R.attend_pages(q, c, s, a & (np.arange(q.shape[2]) < 32), scale=scale)


@broken("ATTEND-1")
def rows_after_the_first_128_left_empty(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    return R.attend_pages(q, c, s, a & (np.arange(q.shape[2]) < 128), scale=scale)


@broken("ATTEND-1", "CONTEXT-2")
def page_lengths_in_int8(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    lengths = np.maximum(c.page_lengths.astype(np.int8), 0)
    return R.attend_pages(q, with_lengths(c, lengths), s, a, scale=scale)


@broken("ATTEND-1", "GQA-1")
def group_heads_after_the_eighth_left_empty(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    kept = np.arange(q.shape[1]) % (q.shape[1] // c.kv_heads) < 8
    return cut(R.attend_pages(q, c, s, a, scale=scale), kept[None, :, None])


@broken("ATTEND-1", "ACCURACY-1")
def products_with_ten_bits(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    """Matrix units that round float32 to ten bits without being asked."""

    def rounded(values: Any) -> Any:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).reshape(values.shape)

    return R.attend_pages(rounded(q), replace(c, k_pages=rounded(c.k_pages)), s, a, scale=scale)


@broken("STATE-1", "STATE-2")
def minus_infinity_minus_minus_infinity(
    self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None
) -> Any:
    state = R.attend_pages(q, c, s, a, scale=scale)
    rows = s.for_rows(q.shape[1], q.shape[2]) & a[:, None, :, None] & (c.page_lengths > 0)[:, None, None]
    bad = rows.any(axis=-1) & np.isneginf(state.lse)
    return AttentionState(
        np.where(bad[..., None], np.nan, state.out).astype(q.dtype),
        np.where(bad, np.nan, state.lse).astype(np.float32),
    )


@broken("ATTEND-1", "MERGE-4")
def nan_queries_taken_for_zero(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    return R.attend_pages(np.nan_to_num(q), c, s, a, scale=scale)


@broken("PURE-5")
def leaves_floating_point_errors_off(self: Any, q: Any, c: Any, s: Any, a: Any, *, scale: Any = None) -> Any:
    np.seterr(all="ignore")
    return R.attend_pages(q, c, s, a, scale=scale)


@broken("PURE-5", operator="top_pages")
def ties_broken_by_the_common_random_state(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    np.random.rand(scores.shape[-1])
    return R.top_pages(scores, count, eligible=eligible)


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_the_first_64_tokens(self: Any, c: Any) -> Any:
    return R.page_bounds(with_lengths(c, np.minimum(c.page_lengths, 64)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_the_first_64_pages(self: Any, c: Any) -> Any:
    return R.page_bounds(with_lengths(c, np.where(np.arange(c.pages) < 64, c.page_lengths, 0)))


@broken("BOUNDS-1", operator="page_bounds")
def bounds_of_the_first_64_channels(self: Any, c: Any) -> Any:
    bounds, kept = R.page_bounds(c), np.arange(c.head_dim) < 64
    return PageBounds(*(np.where(kept, b, 0).astype(b.dtype) for b in (bounds.lower, bounds.upper)))


@broken("SCORES-1", operator="page_scores")
def scores_of_the_first_128_channels(self: Any, q: Any, b: Any) -> Any:
    return R.page_scores(np.where(np.arange(q.shape[3]) < 128, q, 0), b)


@broken("SCORES-1", operator="page_scores")
def scores_of_the_first_32_rows(self: Any, q: Any, b: Any) -> Any:
    return np.where((np.arange(q.shape[2]) < 32)[:, None], R.page_scores(q, b), 0).astype(np.float32)


@broken("POOLED-1", operator="pooled_scores")
def spans_of_at_most_64_rows(
    self: Any, q: Any, c: Any, *, span: int, scale: Any = None, lse: Any = None
) -> Any:
    if span > 64 and q.shape[2] > 64:
        q, lse, span = q[:, :, :64], None if lse is None else lse[:, :, :64], 64
    return R.pooled_scores(q, c, span=span, scale=scale, lse=lse)


@broken("CHANGE-1", operator="query_change")
def nan_change_taken_for_none(self: Any, q: Any, q_reference: Any) -> Any:
    return np.nan_to_num(R.query_change(q, q_reference))


@broken("TOP-1", operator="top_pages")
def index_packed_into_the_score(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    """Eight bits of each score make room for the page, as a trick for sorting one number."""
    bits = np.ascontiguousarray(scores).view(np.int32) & ~np.int32(0xFF)
    return R.top_pages(bits.view(np.float32), count, eligible=eligible)


@broken("CHANGE-2", operator="largest_changes")
def changes_ranked_in_few_bits(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    bits = np.ascontiguousarray(change).view(np.int32) & ~np.int32(0x7F)
    return R.largest_changes(change if count is None else bits.view(np.float32), count=count, mass=mass)


@broken("CHANGE-3", operator="largest_changes")
def mass_reached_but_for_a_tolerance(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    return R.largest_changes(change, count=count, mass=None if mass is None else mass * (1 - 1e-9))


@broken("MERGE-1", operator="merge")
def merge_of_the_first_32_rows(self: Any, *states: Any) -> Any:
    return cut(R.merge(*states), np.arange(states[0].lse.shape[2]) < 32)


@broken("MERGE-1", operator="merge")
def merge_of_at_most_16_states(self: Any, *states: Any) -> Any:
    return R.merge(*states[:16])


@broken("BLOCK-1", operator="attend_block")
def block_padded_with_zero_keys(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    more = np.zeros((*k.shape[:2], -k.shape[2] % 16 if k.shape[2] > 16 else 0, k.shape[3]), k.dtype)
    return R.attend_block(q, np.concatenate([k, more], 2), np.concatenate([v, more], 2), scale=scale)


@broken("BLOCK-1", "MERGE-4", operator="attend_block")
def nan_in_the_block_taken_for_zero(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    return R.attend_block(q, np.nan_to_num(k), np.nan_to_num(v), scale=scale)


class accepts_what_it_does_not_declare(ReferenceBackend):
    name = "accepts_what_it_does_not_declare"
    capabilities = Capabilities(dtypes=("float32",), page_sizes=(4, 16))

    def why_not(self, problem: Any) -> Any:
        return Capabilities(dtypes=("float32",)).why_not(problem)


for kind in (accepts_what_it_does_not_declare,):
    BACKENDS[kind.name] = Mutant(kind.name, ("CAPS-1",), kind(), ("float32",))
