"""A backend written on the array API, right on any array library, to start a faster one from."""

from __future__ import annotations

import math

from sparse_dlm_attn.arrays import Array, compute_dtype, namespace, shape_of
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.checks import check_attend_block, check_attend_pages, check_context, check_page_scores
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.operators import gather_pages, valid_tokens
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import AttentionState, PageBounds, softmax_scale

__all__ = ["ArrayBackend"]


class ArrayBackend(Backend):
    """Every operator on the array API: dense, masked, and slow.

    A backend that subclasses it says what its arrays are (``name``, `capabilities`, `asarray`) and overrides what it
    computes faster; whatever is left holds the specification. Half precision is summed in float32.
    """

    def page_bounds(self, context: Context) -> PageBounds:
        """Gather every key and compare."""
        check_context(context)
        xp = namespace(context.k_pages)
        keys = gather_pages(context.k_pages, context)  # (batch, kv_heads, pages, page_size, head_dim)
        valid = valid_tokens(context)[:, None, :, :, None]
        exists = context.exists[:, None, :, None]
        sides = []
        for bound, nothing in ((xp.min, math.inf), (xp.max, -math.inf)):
            best = bound(xp.where(valid, keys, xp.full_like(keys, nothing)), axis=3)
            sides.append(xp.where(exists, best, xp.zeros_like(best)))
        return PageBounds(*sides)

    def page_scores(self, q: Array, bounds: PageBounds, *, active: Array | None = None) -> Array:
        """Take the larger product of each channel, for all rows."""
        check_page_scores(q, bounds)
        xp = namespace(q)
        rows = xp.astype(q, compute_dtype(q))[:, :, :, None, :]
        lower, upper = (_heads_like(q, part)[:, :, None, :, :] for part in (bounds.lower, bounds.upper))
        return xp.astype(xp.sum(xp.maximum(rows * lower, rows * upper), axis=-1), xp.float32)

    def attend_pages(
        self, q: Array, context: Context, selection: Selection, active: Array, *, scale: float | None = None
    ) -> AttentionState:
        """Mask a softmax over all tokens of the context."""
        check_attend_pages(q, context, selection, active, scale)
        xp = namespace(q)
        batch, q_heads, tokens, head_dim = shape_of(q)
        slots = context.pages * context.page_size
        pages = selection.for_rows(q_heads, tokens) & active[:, None, :, None]
        allowed = pages[..., None] & valid_tokens(context)[:, None, None, :, :]
        keys, values = (
            xp.reshape(gather_pages(part, context), (batch, context.kv_heads, slots, head_dim))
            for part in (context.k_pages, context.v_pages)
        )
        return _masked_softmax(q, keys, values, xp.reshape(allowed, (batch, q_heads, tokens, slots)), scale)

    def attend_block(self, q: Array, k: Array, v: Array, *, scale: float | None = None) -> AttentionState:
        """Softmax over all tokens of the block."""
        check_attend_block(q, k, v, scale)
        xp = namespace(q)
        allowed = xp.ones((*shape_of(q)[:3], shape_of(k)[2]), dtype=xp.bool, device=q.device)
        return _masked_softmax(q, k, v, allowed, scale)


def _heads_like(q: Array, shared: Array) -> Array:
    """Repeat KV heads in the precision of sums, so that query head h meets KV head h // group."""
    xp = namespace(q)
    return xp.repeat(xp.astype(shared, compute_dtype(q)), shape_of(q)[1] // shape_of(shared)[1], axis=1)


def _masked_softmax(q: Array, k: Array, v: Array, allowed: Array, scale: float | None) -> AttentionState:
    """Attend to allowed tokens; rows without one give the empty state."""
    if shape_of(k)[2] == 0:
        return AttentionState.empty_like(q)
    xp = namespace(q)
    keys, values = _heads_like(q, k), _heads_like(q, v)
    logits = xp.matmul(xp.astype(q, keys.dtype), xp.matrix_transpose(keys)) * softmax_scale(shape_of(q)[3], scale)
    logits = xp.where(allowed, logits, xp.full_like(logits, -math.inf))
    largest = xp.max(logits, axis=-1, keepdims=True)
    weights = xp.exp(logits - xp.where(largest == -math.inf, xp.zeros_like(largest), largest))
    total = xp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    out = _weighted_sum(weights, values, allowed) / total
    lse = xp.where(empty, xp.full_like(total, -math.inf), largest + xp.log(total))
    return AttentionState(xp.astype(out, q.dtype), xp.astype(lse[..., 0], xp.float32))


def _weighted_sum(weights: Array, values: Array, allowed: Array) -> Array:
    """Multiply so that values that a row may not read leave no trace in it: ``0 * inf`` is NaN."""
    xp = namespace(weights)
    out = xp.matmul(weights, xp.where(xp.isfinite(values), values, xp.zeros_like(values)))
    seen, nan = xp.astype(allowed, weights.dtype), xp.full_like(out, math.nan)
    hits = []
    for infinity in (math.inf, -math.inf):
        spoiled = xp.isnan(values) | (values == infinity)  # NaN as the sum of both
        hits.append(xp.matmul(seen, xp.astype(spoiled, weights.dtype)) > 0)
        out = xp.where(hits[-1], xp.full_like(out, infinity), out)
    return xp.where(hits[0] & hits[1], nan, out)
