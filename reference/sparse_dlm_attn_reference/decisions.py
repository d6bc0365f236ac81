"""Decisions: bounds, scores, ranking and change (specification, "Decisions")."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_dlm_attn import Context, PageBounds
from sparse_dlm_attn.checks import (
    check_context,
    check_library,
    check_page_scores,
    check_pooled_scores,
    check_query_change,
    check_row_changes,
    check_top_pages,
)
from sparse_dlm_attn.operators import check_change_rule
from sparse_dlm_attn.values import softmax_scale
from sparse_dlm_attn_reference.attention import ROWS_AT_ONCE, page_tokens

__all__ = ["largest_changes", "page_bounds", "page_scores", "pooled_scores", "query_change", "top_pages"]

FloatArray = np.ndarray[Any, Any]


def page_bounds(context: Context) -> PageBounds:
    """Return minimum and maximum of each page's valid keys (clause BOUNDS-1)."""
    check_context(context)
    check_library("context", context.k_pages, np.ndarray, "reference")
    shape = (context.batch, context.kv_heads, context.pages, context.head_dim)
    lower = np.zeros(shape, context.k_pages.dtype)
    upper = np.zeros(shape, context.k_pages.dtype)
    for b, page in np.argwhere(context.page_lengths > 0):
        keys = context.k_pages[context.page_table[b, page], :, : context.page_lengths[b, page]]
        lower[b, :, page], upper[b, :, page] = keys.min(axis=1), keys.max(axis=1)
    return PageBounds(lower, upper)


def page_scores(q: FloatArray, bounds: PageBounds, active: FloatArray | None = None) -> FloatArray:
    """Return the sum over channels of max(q lower, q upper) (clause SCORES-1)."""
    check_page_scores(q, bounds, active)
    check_library("q", q, np.ndarray, "reference")
    batch, q_heads, tokens, _ = q.shape
    group = q_heads // bounds.lower.shape[1]
    scores = np.zeros((batch, q_heads, tokens, bounds.lower.shape[2]))
    with np.errstate(invalid="ignore", over="ignore"):
        for b, h in np.ndindex(batch, q_heads):
            wanted = np.arange(tokens) if active is None else np.flatnonzero(active[b])
            rows = q[b, h, wanted].astype(np.float64)[:, None, :]
            lower = bounds.lower[b, h // group].astype(np.float64)
            upper = bounds.upper[b, h // group].astype(np.float64)
            scores[b, h, wanted] = np.maximum(rows * lower, rows * upper).sum(axis=-1)
        return scores.astype(np.float32)


def pooled_scores(
    q: FloatArray, context: Context, *, span: int, scale: float | None = None, lse: FloatArray | None = None
) -> FloatArray:
    """Return the mean softmax mass a page receives from a span's rows (clauses POOLED-1, POOLED-3)."""
    check_pooled_scores(q, context, span, scale, lse)
    check_library("q", q, np.ndarray, "reference")
    batch, q_heads, tokens, head_dim = q.shape
    factor = softmax_scale(head_dim, scale)
    scores = np.zeros((batch, q_heads, -(-tokens // span), context.pages))
    for b, h in np.ndindex(batch, q_heads):
        lengths = context.page_lengths[b]
        listed = np.flatnonzero(lengths > 0)
        if listed.size == 0:
            continue
        k = page_tokens(context.k_pages, context, b, h // (q_heads // context.kv_heads), listed)
        first_tokens = np.cumsum(lengths[listed]) - lengths[listed]
        for start in range(0, tokens, span):
            rows = slice(start, min(start + span, tokens))
            total = np.zeros(listed.size)
            for first in range(rows.start, rows.stop, ROWS_AT_ONCE):
                piece = slice(first, min(first + ROWS_AT_ONCE, rows.stop))
                of_rows = None if lse is None else lse[b, h, piece].astype(np.float64)
                mass = _masses(factor * (q[b, h, piece].astype(np.float64) @ k.T), of_rows)
                of_pages = np.add.reduceat(mass, first_tokens, axis=1)
                # No mass exceeds 1, even if the LSE is too small; NaN stays.
                total += np.where(of_pages > 1, 1.0, of_pages).sum(axis=0)
            scores[b, h, start // span, listed] = total / (rows.stop - rows.start)
    return scores.astype(np.float32)


def _masses(logits: FloatArray, lse: FloatArray | None) -> FloatArray:
    """Return softmax weights ``(rows, tokens)``, normalised by ``lse`` if it is known."""
    with np.errstate(invalid="ignore", over="ignore"):
        peak = logits.max(axis=1, keepdims=True) if lse is None else lse[:, None]
        nothing = np.isneginf(peak)  # every score -inf: no mass, as in an empty context
        exponent = logits - np.where(nothing, 0.0, peak)
        # An LSE may be far too small, for which exp would overflow.
        mass = np.exp(np.where(exponent > 0, 0.0, exponent))
        return mass if lse is not None else mass / np.where(nothing, 1.0, mass.sum(axis=1, keepdims=True))


def top_pages(scores: FloatArray, count: int | FloatArray, eligible: FloatArray) -> FloatArray:
    """Return the ``count`` best eligible pages, the lowest index first among equals (clause TOP-1)."""
    check_top_pages(scores, count, eligible)
    check_library("scores", scores, np.ndarray, "reference")
    eligible = np.broadcast_to(eligible, scores.shape)
    counts = np.broadcast_to(np.asarray(count), scores.shape[:-1])
    mask = np.zeros(scores.shape, bool)
    for position in np.ndindex(*scores.shape[:-1]):
        candidates = np.flatnonzero(eligible[position])
        values = np.where(np.isnan(scores[position]), np.inf, scores[position])[candidates]
        best = candidates[np.lexsort((candidates, -values))]
        mask[position][best[: max(int(counts[position]), 0)]] = True
    return mask


def query_change(q: FloatArray, q_reference: FloatArray) -> FloatArray:
    """Return the mean squared difference of each row over heads and channels (clause CHANGE-1)."""
    check_query_change(q, q_reference)
    check_library("q", q, np.ndarray, "reference")
    with np.errstate(over="ignore", invalid="ignore"):
        difference = q.astype(np.float64) - q_reference.astype(np.float64)
        change: FloatArray = (difference**2).mean(axis=(1, 3))
        return change.astype(np.float32)


def largest_changes(change: FloatArray, *, count: int | None = None, mass: float | None = None) -> FloatArray:
    """Return the rows that changed most, by number or by share of the total (CHANGE-2, CHANGE-3)."""
    check_row_changes(change)
    check_library("change", change, np.ndarray, "reference")
    check_change_rule(count, mass)
    chosen = np.zeros(change.shape, bool)
    for b, row in enumerate(change.astype(np.float64)):
        order = np.lexsort((np.arange(len(row)), -np.where(np.isnan(row), np.inf, row)))
        if count is not None:
            chosen[b, order[:count]] = True
            continue
        total, reached = sum(row[order]), 0.0
        target = mass * total if mass or np.isnan(total) else 0.0
        for index in order:
            if reached >= target:  # False for NaN: then every row is taken
                break
            chosen[b, index] = True
            reached += row[index]
    return chosen
