"""Kernels that are right for few: what a batch, heads, ranked pages or rows beyond a capacity lose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from mutation import R, broken

from sparse_dlm_attn import AttentionState, Selection
from sparse_dlm_attn.backend import Backend


def without_rows(state: AttentionState, kept: Any) -> AttentionState:
    """Empty the rows that are not kept; ``kept`` broadcasts to the lse."""
    return AttentionState(
        np.where(kept[..., None], state.out, 0).astype(state.out.dtype),
        np.where(kept, state.lse, -np.inf).astype(np.float32),
    )


def ranks(self: Any, q: Any, k: Any, v: Any, c: Any, bounds: Any, rule: Any, cached: Any, scale: Any) -> Any:
    return Backend.attend_ranked(self, q, k, v, c, bounds, rule, cached, scale=scale)


@broken("ATTEND-4", operator="attend")
def cached_states_of_at_most_three_sequences(
    self: Any, q: Any, k: Any, v: Any, c: Any, s: Any, a: Any, cached: Any, *, scale: Any = None
) -> Any:
    return Backend.attend(self, q, k, v, c, s, a, None if len(q) > 3 else cached, scale=scale)


@broken("ATTEND-4", operator="attend")
def cached_states_of_at_most_sixteen_sequences(
    self: Any, q: Any, k: Any, v: Any, c: Any, s: Any, a: Any, cached: Any, *, scale: Any = None
) -> Any:
    return Backend.attend(self, q, k, v, c, s, a, None if len(q) > 16 else cached, scale=scale)


@broken("ATTEND-4", operator="attend")
def blocks_of_the_first_eight_kv_heads(
    self: Any, q: Any, k: Any, v: Any, c: Any, s: Any, a: Any, cached: Any, *, scale: Any = None
) -> Any:
    read = (np.arange(k.shape[1]) < 8)[None, :, None, None]
    return Backend.attend(self, q, k, np.where(read, v, 0).astype(v.dtype), c, s, a, cached, scale=scale)


@broken("BLOCK-1", operator="attend_block")
def block_of_the_first_eight_sequences(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    kept = (np.arange(len(q)) < 8)[:, None, None]
    return without_rows(R.attend_block(q, k, v, scale=scale), np.broadcast_to(kept, q.shape[:3]))


@broken("REUSE-1", operator="reuse")
def reuse_of_the_first_four_sequences(self: Any, active: Any, fresh: Any, cached: Any) -> Any:
    return R.reuse(active | (np.arange(len(active)) >= 4)[:, None], fresh, cached)


@broken("MERGE-1", operator="merge")
def merge_of_the_first_four_sequences(self: Any, *states: Any) -> Any:
    merged = R.merge(*states)
    kept = (np.arange(len(merged.lse)) < 4)[:, None, None]
    return without_rows(merged, np.broadcast_to(kept, merged.lse.shape))


@broken("RANKED-1", operator="attend_ranked")
def ranked_pages_in_one_word(
    self: Any, q: Any, k: Any, v: Any, c: Any, bounds: Any, rule: Any, cached: Any, *, scale: Any = None
) -> Any:
    done = ranks(self, q, k, v, c, bounds, rule, cached, scale)
    seen = done.selection.mask & (np.arange(c.pages) < 64)
    return replace(done, selection=Selection(seen, done.selection.span))


@broken("RANKED-1", operator="attend_ranked")
def ranked_rows_in_one_warp(
    self: Any, q: Any, k: Any, v: Any, c: Any, bounds: Any, rule: Any, cached: Any, *, scale: Any = None
) -> Any:
    done = ranks(self, q, k, v, c, bounds, rule, cached, scale)
    return replace(done, active=done.active & (np.arange(q.shape[2]) < 32))


@broken("RANKED-1", operator="attend_ranked")
def ranked_states_of_at_most_eight_sequences(
    self: Any, q: Any, k: Any, v: Any, c: Any, bounds: Any, rule: Any, cached: Any, *, scale: Any = None
) -> Any:
    return ranks(self, q, k, v, c, bounds, rule, None if len(q) > 8 else cached, scale)


@broken("RANKED-1", operator="attend_ranked")
def ranked_change_of_the_first_sixteen_heads(
    self: Any, q: Any, k: Any, v: Any, c: Any, bounds: Any, rule: Any, cached: Any, *, scale: Any = None
) -> Any:
    done = ranks(self, q, k, v, c, bounds, rule, cached, scale)
    if rule.reference is None or q.shape[1] <= 16:
        return done
    change = R.query_change(q[:, :16], rule.reference[:, :16])
    return replace(done, active=R.largest_changes(change, count=rule.count, mass=rule.mass))


@broken("TOP-1", "TOP-2", operator="top_pages")
def at_most_128_pages_chosen(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    return R.top_pages(scores, np.minimum(count, 128), eligible=eligible)


@broken("TOP-1", "TOP-2", operator="top_pages")
def pages_ranked_in_tiles_of_256(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
    """The best of each tile, as many as were asked for in all."""
    right = R.top_pages(scores, count, eligible=eligible)
    tile = np.arange(scores.shape[-1]) // 256
    return right & (tile <= 1)


@broken("CHANGE-2", operator="largest_changes")
def changes_of_the_first_128_rows(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    seen = np.where(np.arange(change.shape[1]) < 128, change, -1 if count is not None else 0)
    return R.largest_changes(seen.astype(np.float32), count=count, mass=mass)


@broken("CHANGE-3", operator="largest_changes")
def mass_over_at_most_64_rows(self: Any, change: Any, *, count: Any = None, mass: Any = None) -> Any:
    if mass is None:
        return R.largest_changes(change, count=count)
    return R.largest_changes(change, mass=mass) & R.largest_changes(change, count=64)
