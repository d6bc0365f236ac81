"""Default operators, written once on the array API; their docstrings are on `Backend`.

A backend inherits all of these and overrides those that it computes faster. They have no
data-dependent shapes and never synchronise, so they may run inside a captured CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING

from sparse_dlm_attn.arrays import Array, compute_dtype, invert_permutation, namespace, shape_of
from sparse_dlm_attn.checks import (
    check_extend_bounds,
    check_pooled_scores,
    check_query_change,
    check_reuse,
    check_row_changes,
    check_states,
    check_top_pages,
)
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.values import AttentionState, PageBounds, check_int, softmax_scale

if TYPE_CHECKING:
    from sparse_dlm_attn.backend import Backend
    from sparse_dlm_attn.context import Context

__all__ = [
    "check_change_rule",
    "extend_bounds",
    "gather_pages",
    "largest_changes",
    "merge",
    "pooled_scores",
    "query_change",
    "reuse",
    "top_pages",
]

CHUNK_ELEMENTS = 2**21
"""Most scores or gathered key channels that a sweep over a context holds at once."""

LEAST_ROWS = 16
"""Rows for which a part of a context is sized, so that a long block does not cut it into single pages."""


def extend_bounds(backend: Backend, context: Context, bounds: PageBounds, from_page: int) -> PageBounds:
    """See :meth:`sparse_dlm_attn.Backend.extend_bounds`."""
    check_extend_bounds(context, bounds, from_page)
    fresh = backend.page_bounds(context.pages_from(from_page))
    if from_page == 0:
        return fresh
    xp = namespace(fresh.lower)
    sides = ((bounds.lower, fresh.lower), (bounds.upper, fresh.upper))
    return PageBounds(*(xp.concat([old[:, :, :from_page, :], new], axis=2) for old, new in sides))


def descending_ranks(values: Array) -> Array:
    """Rank along the last axis, 0 for the largest; ties go to the lower index, NaN ranks as +inf."""
    xp = namespace(values)
    keys = xp.where(xp.isnan(values), math.inf, values)
    return invert_permutation(xp.argsort(-keys, axis=-1, stable=True))


def top_pages(scores: Array, count: int | Array, *, eligible: Array) -> Array:
    """See :meth:`sparse_dlm_attn.Backend.top_pages`."""
    check_top_pages(scores, count, eligible)
    xp = namespace(scores)
    eligible = xp.broadcast_to(eligible, shape_of(scores))
    # Two stable sorts: by score first, then eligible before not eligible. A sentinel score
    # would tie with an eligible page whose true score is -inf.
    order = xp.argsort(-xp.where(xp.isnan(scores), math.inf, scores), axis=-1, stable=True)
    barred = xp.astype(xp.take_along_axis(~eligible, order, axis=-1), xp.int32)
    order = xp.take_along_axis(order, xp.argsort(barred, axis=-1, stable=True), axis=-1)
    if isinstance(count, int):  # any int is legal, but not in every integer dtype
        count = min(max(count, 0), shape_of(scores)[-1])
    limit = xp.asarray(count, device=scores.device)
    limit = limit[..., None] if limit.ndim else limit
    return (invert_permutation(order) < limit) & eligible


def query_change(q: Array, q_reference: Array) -> Array:
    """See :meth:`sparse_dlm_attn.Backend.query_change`."""
    check_query_change(q, q_reference)
    xp = namespace(q, q_reference)
    dtype = compute_dtype(q)
    difference = xp.astype(q, dtype) - xp.astype(q_reference, dtype)
    total = xp.sum(difference * difference, axis=(1, 3))
    # An array, since PyTorch divides by a plain number as a product with its rounded inverse on a GPU.
    numbers = xp.full((), q.shape[1] * q.shape[3], dtype=dtype, device=total.device)
    return xp.astype(total / numbers, xp.float32)


def check_change_rule(count: int | None, mass: float | None) -> None:
    """Raise unless exactly one of ``count`` and ``mass`` is given and in range."""
    if (count is None) == (mass is None):
        raise InvalidArgumentError("count/mass", "must be given one at a time", f"count={count}, mass={mass}")
    if count is not None:
        check_int("count", count, 0)
    if mass is not None:
        given: object = mass  # whatever its annotation promises
        if isinstance(given, bool) or not isinstance(given, Real):
            raise InvalidTypeError("mass", "must be a number in 0..1", repr(given))
        if not 0.0 <= mass <= 1.0:
            raise InvalidArgumentError("mass", "must lie in 0..1", mass)


def largest_changes(change: Array, *, count: int | None = None, mass: float | None = None) -> Array:
    """See :meth:`sparse_dlm_attn.Backend.largest_changes`."""
    check_row_changes(change)
    check_change_rule(count, mass)
    xp = namespace(change)
    ranks = descending_ranks(change)
    if count is not None:
        return ranks < min(count, shape_of(change)[-1])
    order = invert_permutation(ranks)
    ordered = xp.astype(xp.take_along_axis(change, order, axis=-1), xp.float64)
    running = xp.cumulative_sum(ordered, axis=-1)
    total = running[..., -1:]
    # Sums of the rows before each row, shifted rather than subtracted: inf - inf would be NaN.
    before = xp.concat([xp.zeros_like(total), running[..., :-1]], axis=-1)
    # 0 x inf is NaN too, but a mass of 0 is reached by nothing at all.
    target = mass * total if mass else xp.where(xp.isnan(total), total, xp.zeros_like(total))
    # A row is needed while the rows before it fall short of the target; the comparison is written
    # so that NaN changes (total NaN) keep every row, which lets the NaN show in the output.
    needed = ~(before >= target)
    return xp.take_along_axis(needed, ranks, axis=-1)


def merge(*states: AttentionState) -> AttentionState:
    """See :meth:`sparse_dlm_attn.Backend.merge`."""
    check_states(*states)
    xp = namespace(states[0].out)
    dtype = compute_dtype(states[0].out)
    lse = xp.stack([xp.astype(state.lse, dtype) for state in states])
    peak = xp.max(lse, axis=0)
    # The empty set has lse -inf: subtracting a finite stand-in avoids -inf - -inf.
    safe_peak = xp.where(peak == -math.inf, 0.0, peak)
    weights = xp.exp(lse - safe_peak)
    total = xp.sum(weights, axis=0)
    empty = total == 0
    merged_lse = xp.where(empty, -math.inf, safe_peak + xp.log(xp.where(empty, 1.0, total)))
    out = xp.zeros_like(xp.astype(states[0].out, dtype))
    for index, state in enumerate(states):
        share = (weights[index, ...] / xp.where(empty, 1.0, total))[..., None]
        # A state without weight may hold NaN or inf, and 0 x NaN is NaN (clause MERGE-4).
        out = out + share * xp.where(share == 0, 0.0, xp.astype(state.out, dtype))
    return AttentionState(xp.astype(out, states[0].out.dtype), xp.astype(merged_lse, xp.float32))


def reuse(active: Array, fresh: AttentionState, cached: AttentionState) -> AttentionState:
    """See :meth:`sparse_dlm_attn.Backend.reuse`."""
    check_reuse(active, fresh, cached)
    xp = namespace(fresh.out)
    rows = active[:, None, :]
    return AttentionState(xp.where(rows[..., None], fresh.out, cached.out), xp.where(rows, fresh.lse, cached.lse))


def gather_pages(pages: Array, context: Context) -> Array:
    """Copy pages into reading order, ``(batch, kv_heads, pages, page_size, head_dim)``.

    Tokens that do not exist become 0, so whatever is stored there cannot reach a sum.
    """
    xp = namespace(pages)
    batch, count = shape_of(context.page_table)
    if pages.shape[0] == 0:  # no physical page: entries of absent pages have nothing to point at
        shape = (batch, pages.shape[1], count, *shape_of(pages)[2:])
        return xp.zeros(shape, dtype=pages.dtype, device=pages.device)
    table = xp.where(context.exists, context.page_table, 0)
    taken = xp.take(pages, xp.reshape(table, (-1,)), axis=0)
    shape = (batch, count, *shape_of(pages)[1:])
    ordered = xp.permute_dims(xp.reshape(taken, shape), (0, 2, 1, 3, 4))
    return xp.where(valid_tokens(context)[:, None, :, :, None], ordered, xp.zeros_like(ordered))


def valid_tokens(context: Context) -> Array:
    """Bool ``(batch, pages, page_size)``: token slots that hold a token."""
    xp = namespace(context.page_lengths)
    slots = xp.arange(context.page_size, dtype=xp.int32, device=context.page_lengths.device)
    return slots < context.page_lengths[:, :, None]


def pooled_scores(
    q: Array, context: Context, *, span: int, scale: float | None = None, lse: Array | None = None
) -> Array:
    """See :meth:`sparse_dlm_attn.Backend.pooled_scores`."""
    check_pooled_scores(q, context, span, scale, lse)
    xp = namespace(q)
    batch, q_heads, tokens, head_dim = shape_of(q)
    span = min(span, max(tokens, 1))
    factor = softmax_scale(head_dim, scale)
    spans = -(-tokens // span)
    if 0 in (batch, q_heads, tokens, context.pages):
        return xp.zeros((batch, q_heads, spans, context.pages), dtype=xp.float32, device=q.device)
    columns = []
    if lse is None:
        lse = _context_lse(q, context, factor)
    # A row without mass (lse -inf) has scores of -inf alone: any finite stand-in gives 0 for it.
    shift = xp.astype(xp.where(lse == -math.inf, 0.0, lse), compute_dtype(q))[..., None, None]
    for part in _page_parts(context, q):
        sums = xp.zeros((batch, q_heads, spans, part.pages), dtype=compute_dtype(q), device=q.device)
        for first, logits in _logits(q, part, factor, span):
            rows = slice(first, first + int(logits.shape[2]))
            # No mass exceeds 1, whatever the LSE: of one that is too small not even exp must overflow.
            exponent = logits - shift[:, :, rows, ...]
            mass = xp.sum(xp.exp(xp.where(exponent > 0, 0.0, exponent)), axis=-1)
            mass = xp.where(mass > 1, 1.0, mass)
            sums = _add_rows(sums, mass, first, span)
        columns.append(sums)
    counts = [min(span, tokens - start) for start in range(0, tokens, span)]
    counts = xp.asarray(counts, dtype=compute_dtype(q), device=q.device)[:, None]
    return xp.astype(xp.concat(columns, axis=3) / counts, xp.float32)


def _context_lse(q: Array, context: Context, factor: float) -> Array:
    """Sweep over the pages once and return each row's LSE, ``(batch, q_heads, tokens)``."""
    xp = namespace(q)
    lse = xp.full(shape_of(q)[:3], -math.inf, dtype=compute_dtype(q), device=q.device)
    for part in _page_parts(context, q):
        chunks = []
        for first, logits in _logits(q, part, factor, 1):
            batch, heads, rows = shape_of(logits)[:3]
            logits = xp.reshape(logits, (batch, heads, rows, -1))
            before = lse[:, :, first : first + rows]
            peak = xp.maximum(xp.max(logits, axis=-1), before)
            safe = xp.where(peak == -math.inf, 0.0, peak)
            total = xp.sum(xp.exp(logits - safe[..., None]), axis=-1) + xp.exp(before - safe)
            empty = total == 0
            chunks.append(xp.where(empty, -math.inf, safe + xp.log(xp.where(empty, 1.0, total))))
        lse = xp.concat(chunks, axis=2)
    return lse


def _page_parts(context: Context, q: Array) -> Iterator[Context]:
    """Cut a context into parts whose gathered keys stay within `CHUNK_ELEMENTS`."""
    slots = context.batch * context.kv_heads * context.page_size * max(context.head_dim, 1)
    rows = min(int(q.shape[2]), LEAST_ROWS) * int(q.shape[0] * q.shape[1]) * context.page_size
    pages = max(CHUNK_ELEMENTS // max(slots, rows), 1)
    for start in range(0, context.pages, pages):
        columns = slice(start, min(start + pages, context.pages))
        yield replace(
            context,
            page_table=context.page_table[:, columns],
            page_segments=None,
            bounds=None,
            page_lengths=context.page_lengths[:, columns],
        )


def _logits(q: Array, part: Context, factor: float, span: int) -> Iterator[tuple[int, Array]]:
    """Yield a first row and scores ``(batch, q_heads, rows, pages, page_size)``, some rows at a time.

    Scores of tokens that do not exist are -inf. Rows of one yield make whole spans, or lie within one.
    """
    xp = namespace(q)
    batch, q_heads, tokens, head_dim = shape_of(q)
    group, slots = q_heads // part.kv_heads, part.pages * part.page_size
    keys = xp.astype(gather_pages(part.k_pages, part), compute_dtype(q))
    keys = xp.matrix_transpose(xp.reshape(keys, (batch, part.kv_heads, 1, slots, head_dim)))
    valid = valid_tokens(part)[:, None, None, :, :]
    wanted = max(CHUNK_ELEMENTS // (batch * q_heads * slots), 1)
    for start, end in _row_parts(tokens, span, wanted):
        rows = xp.astype(q[:, :, start:end, :], compute_dtype(q))
        rows = xp.reshape(rows, (batch, part.kv_heads, group, end - start, head_dim))
        logits = factor * xp.matmul(rows, keys)
        shape = (batch, q_heads, end - start, part.pages, part.page_size)
        yield start, xp.where(valid, xp.reshape(logits, shape), -math.inf)


def _row_parts(tokens: int, span: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most about ``wanted``: several whole spans, or pieces of one."""
    if wanted >= span:
        step = wanted // span * span
        yield from ((start, min(start + step, tokens)) for start in range(0, tokens, step))
        return
    for first in range(0, tokens, span):
        last = min(first + span, tokens)
        yield from ((start, min(start + wanted, last)) for start in range(first, last, wanted))


def _add_rows(sums: Array, mass: Array, first: int, span: int) -> Array:
    """Add masses ``(batch, q_heads, rows, pages)`` of rows from ``first`` on to the sums of their spans."""
    xp = namespace(sums)
    batch, heads, rows, pages = shape_of(mass)
    start, spans = first // span, -(-rows // span)
    missing = spans * span - rows
    if missing and spans > 1:
        fill = xp.zeros((batch, heads, missing, pages), dtype=mass.dtype, device=mass.device)
        mass = xp.concat([mass, fill], axis=2)
    width = span if spans > 1 else int(mass.shape[2])
    summed = xp.sum(xp.reshape(mass, (batch, heads, spans, width, pages)), axis=3)
    before, after = sums[:, :, :start, :], sums[:, :, start + spans :, :]
    return xp.concat([before, sums[:, :, start : start + spans, :] + summed, after], axis=2)
