"""Attention states: how they are computed, merged and reused (specification, "Attention states")."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_dlm_attn import AttentionState, Context, Selection
from sparse_dlm_attn.checks import check_attend_block, check_attend_pages, check_library, check_reuse, check_states
from sparse_dlm_attn.values import softmax_scale

__all__ = ["attend_block", "attend_pages", "merge", "page_tokens", "reuse"]

FloatArray = np.ndarray[Any, Any]
ROWS_AT_ONCE = 256  # bounds the score matrix of a whole-sequence block


def page_tokens(pages: FloatArray, context: Context, sequence: int, head: int, listed: Any) -> FloatArray:
    """Copy the valid tokens of the ``listed`` logical pages, in reading order, as float64.

    Returns
    -------
    numpy.ndarray
        float64 ``(tokens, head_dim)``. Nothing else of ``pages`` is read.
    """
    table, lengths = context.page_table[sequence, listed], context.page_lengths[sequence, listed]
    valid = np.arange(context.page_size) < lengths[:, None]
    tokens: FloatArray = pages[table, head][valid].astype(np.float64)
    return tokens


def softmax_attention(q: FloatArray, k: FloatArray, v: FloatArray, scale: float) -> tuple[FloatArray, FloatArray]:
    """Return ``(out, lse)`` of ``q`` ``(heads, rows, head_dim)`` over the keys and values of one KV head.

    Clause STATE-1.
    """
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:2], -np.inf)
    if len(k) == 0:
        return out, lse
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf inputs flow to the output
        for start in range(0, q.shape[1], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = scale * (q[:, rows].astype(np.float64) @ k.T)
            peak = logits.max(axis=2, keepdims=True)
            # Keys whose scores are all -inf weigh nothing, as if the set were empty (STATE-2).
            nothing = np.isneginf(peak)
            weights = np.exp(logits - np.where(nothing, 0.0, peak))
            total = np.where(nothing, 1.0, weights.sum(axis=2, keepdims=True))
            out[:, rows] = np.where(nothing, 0.0, (weights @ v) / total)
            lse[:, rows] = (peak + np.log(total))[..., 0]
    return out, lse


def attend_pages(
    q: FloatArray, context: Context, selection: Selection, active: FloatArray, *, scale: float | None = None
) -> AttentionState:
    """Attend to selected pages: one softmax a row over all its keys (clause ATTEND-1)."""
    check_attend_pages(q, context, selection, active, scale)
    check_library("q", q, np.ndarray, "reference")
    batch, q_heads, tokens, head_dim = q.shape
    factor = softmax_scale(head_dim, scale)
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)
    alike = q_heads // max(context.kv_heads, selection.heads)  # query heads that share keys and pages
    for b, first in np.ndindex(batch, q_heads // alike):
        heads = np.arange(first * alike, (first + 1) * alike)
        kv_head = heads[0] // (q_heads // context.kv_heads)
        selection_head = heads[0] // (q_heads // selection.heads)
        for start in range(0, tokens, selection.span):
            rows = start + np.flatnonzero(active[b, start : start + selection.span])
            chosen = selection.mask[b, selection_head, start // selection.span]
            listed = np.flatnonzero(chosen & (context.page_lengths[b] > 0))
            if rows.size == 0 or listed.size == 0:
                continue
            k = page_tokens(context.k_pages, context, b, kv_head, listed)
            v = page_tokens(context.v_pages, context, b, kv_head, listed)
            where = b, heads[:, None], rows
            out[where], lse[where] = softmax_attention(q[where], k, v, factor)
    return _state(out, lse, q.dtype)


def attend_block(q: FloatArray, k: FloatArray, v: FloatArray, *, scale: float | None = None) -> AttentionState:
    """Attend densely within the block (clause BLOCK-1)."""
    check_attend_block(q, k, v, scale)
    check_library("q", q, np.ndarray, "reference")
    batch, q_heads, _, head_dim = q.shape
    factor = softmax_scale(head_dim, scale)
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)
    group = q_heads // k.shape[1]
    for b, kv_head in np.ndindex(batch, k.shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        keys, values = k[b, kv_head].astype(np.float64), v[b, kv_head].astype(np.float64)
        out[b, heads], lse[b, heads] = softmax_attention(q[b, heads], keys, values, factor)
    return _state(out, lse, q.dtype)


def merge(*states: AttentionState) -> AttentionState:
    """Merge states of disjoint key sets (clauses MERGE-1 to MERGE-4)."""
    check_states(*states)
    check_library("states", states[0].out, np.ndarray, "reference")
    lse = np.stack([state.lse.astype(np.float64) for state in states])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        peak = lse.max(axis=0)
        shift = np.where(np.isneginf(peak), 0.0, peak)
        total = np.exp(lse - shift).sum(axis=0)
        merged_lse = np.where(total == 0, -np.inf, shift + np.log(total))
        out = np.zeros(states[0].out.shape)
        for state, state_lse in zip(states, lse, strict=True):
            share = np.exp(state_lse - shift) / np.where(total == 0, 1.0, total)
            weight = np.where(np.isneginf(state_lse), 0.0, share)[..., None]
            out += np.where(weight == 0, 0.0, weight * state.out.astype(np.float64))
    return _state(out, merged_lse, states[0].out.dtype)


def _state(out: FloatArray, lse: FloatArray, dtype: Any) -> AttentionState:
    """Round to the dtypes of clause STATE-4; what is too large for them becomes inf, silently."""
    with np.errstate(over="ignore"):
        return AttentionState(out.astype(dtype), lse.astype(np.float32))


def reuse(active: FloatArray, fresh: AttentionState, cached: AttentionState) -> AttentionState:
    """Take active rows from ``fresh`` and the others from ``cached`` (clause REUSE-1)."""
    check_reuse(active, fresh, cached)
    check_library("fresh", fresh.out, np.ndarray, "reference")
    out, lse = cached.out.copy(), cached.lse.copy()
    for b, row in np.argwhere(active):
        out[b, :, row], lse[b, :, row] = fresh.out[b, :, row], fresh.lse[b, :, row]
    return AttentionState(out, lse)
