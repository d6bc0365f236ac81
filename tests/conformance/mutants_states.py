"""Block attention, fused passes, merge and reuse gone wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mutation import R, broken, quiet

from sparse_dlm_attn import AttentionState


@broken("BLOCK-1", operator="attend_block")
def block_is_causal(self: Any, q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    states = [
        R.attend_block(q[:, :, r : r + 1], k[:, :, : r + 1], v[:, :, : r + 1], scale=scale)
        for r in range(q.shape[2])
    ]
    return AttentionState(
        np.concatenate([s.out for s in states], axis=2), np.concatenate([s.lse for s in states], axis=2)
    )


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
        def attend(
            self: Any, q: Any, k: Any, v: Any, c: Any, s: Any, a: Any, cached: Any, *, scale: Any = None
        ) -> Any:
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


@fused_mutant("MERGE-4")
def attend_multiplies_unwritten_memory_by_zero(
    fresh: Any, state: Any, block: Any, a: Any, cached: Any
) -> Any:
    out = R.merge(state, block).out
    return np.where(np.isnan(state.out).any(axis=-1, keepdims=True), np.nan, out).astype(out.dtype), state


@fused_mutant("MERGE-4")
def attend_papers_cached_nan_over(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return R.merge(AttentionState(np.nan_to_num(state.out), state.lse), block).out, state


@fused_mutant("PURE-2")
def attend_hands_back_the_cached_state(fresh: Any, state: Any, block: Any, a: Any, cached: Any) -> Any:
    return R.merge(state, block).out, state if cached is None or a.any() else cached


def merged(
    states: Any,
    *,
    base: float = np.e,
    shift: bool = True,
    where: bool = True,
    lse: Any = None,
    dtype: Any = np.float64,
) -> Any:
    with np.errstate(all="ignore"):
        logs = np.stack([state.lse.astype(np.float64) for state in states])
        peak = logs.max(axis=0) if shift else np.zeros(logs.shape[1:])
        safe = np.where(np.isneginf(peak), 0, peak)
        weights = (base ** (logs - safe)).astype(dtype)
        total = weights.sum(axis=0, dtype=dtype)
        share = weights / np.where(total == 0, 1, total)
        parts = [part[..., None] * state.out.astype(dtype) for part, state in zip(share, states, strict=True)]
        if where:
            parts = [
                np.where(part[..., None] == 0, 0, mixed) for part, mixed in zip(share, parts, strict=True)
            ]
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
    return AttentionState(
        out.astype(states[0].out.dtype), (logs.max(axis=0) + np.log(weights.sum(axis=0))).astype(np.float32)
    )


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
        return AttentionState(
            (rows[..., None] * fresh.out + (1 - rows[..., None]) * cached.out).astype(fresh.out.dtype),
            np.where(a[:, None, :], fresh.lse, cached.lse),
        )


@broken("REUSE-1", operator="reuse")
def reuse_by_the_rows_of_sequence_0(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    return R.reuse(np.repeat(a[:1], len(a), axis=0), fresh, cached)


@broken("REUSE-1", operator="reuse")
def reuse_takes_nan_for_empty(self: Any, a: Any, fresh: Any, cached: Any) -> Any:
    right = R.reuse(a, fresh, cached)
    return AttentionState(right.out, np.where(np.isnan(right.lse), -np.inf, right.lse).astype(np.float32))


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


@broken("ACCURACY-2", "MERGE-1", operator="merge", dtypes=("float16",))
def merge_rounds_the_lse_to_the_dtype(self: Any, *states: Any) -> Any:
    return R.merge(*(AttentionState(s.out, s.lse.astype(np.float16).astype(np.float32)) for s in states))


@broken("ATTEND-4", operator="attend")
def attend_reads_what_is_cached_for_active_rows(
    self: Any, q: Any, k: Any, v: Any, c: Any, s: Any, a: Any, cached: Any, *, scale: Any = None
) -> Any:
    _, state, block = fused(q, k, v, c, s, a, cached, scale)
    taint = 0 if cached is None else 0 * cached.out
    return (R.merge(state, block).out + taint).astype(q.dtype), state
