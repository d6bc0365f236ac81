"""What the kernels of attention share: rows and pages of a program, and softmax attention over its tiles.

Scores live in log2 units inside: ``exp2`` is what the hardware has, so ``log2(e)`` is folded into the
scale once. What leaves a kernel as an LSE is a natural logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

__all__ = [
    "NOTHING",
    "active_rows",
    "attend_tiles",
    "block_part",
    "list_pages",
    "pages_of_tile",
    "store_part",
    "wanted_pages",
]

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def active_rows(is_active, token, row, ROWS: tl.constexpr):
    """Return for each row of a tile its token, and whether there is one.

    A tile holds ``ROWS`` rows of each query head of a group: the active ones, in order. The ``r``-th active
    token is found by comparing ranks, since registers cannot be indexed.
    """
    rank = tl.cumsum(is_active.to(tl.int32), axis=0) - 1
    same = is_active[None, :] & (rank[None, :] == (row % ROWS)[:, None])
    return tl.sum(tl.where(same, token[None, :], 0), axis=1), tl.sum(same.to(tl.int32), axis=1) > 0


@triton.jit
def wanted_pages(mask, is_active, token, page, stride_row, stride_span, pages, spans, span,
            MASK_ROWS: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """Return which of some pages any active row of the group selected, int32."""
    if not OWN:
        return (tl.load(mask + page, mask=page < pages, other=0) != 0).to(tl.int32)
    wanted = page * 0
    for i in range(MASK_ROWS):
        for s in range(spans):
            used = tl.max((is_active & (token // span == s)).to(tl.int32), axis=0)
            chosen = tl.load(mask + i * stride_row + s * stride_span + page, mask=page < pages, other=0)
            wanted |= (chosen != 0).to(tl.int32) * used
    return wanted


@triton.jit
def list_pages(wanted, page, physical, length, taken, share, entries, logicals,
                SHARES: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """Write those wanted pages that are a share's to its list; return how many all of them take.

    Of the wanted pages that exist, in reading order, a share takes every ``SHARES``-th: no program waits for
    a count, and no share is longer than another by more than one.
    """
    wanted = tl.where(length > 0, wanted, 0)
    rank = taken + tl.cumsum(wanted, axis=0) - 1
    mine = (wanted > 0) & (rank % SHARES == share)
    place = rank // SHARES
    # One number for both: what is scattered has to be reordered among threads first.
    entry = (physical.to(tl.int64) << 16) | length
    tl.store(entries + place, entry, mask=mine)
    if OWN:
        tl.store(logicals + place, page.to(tl.int64), mask=mine)
    return taken + tl.sum(wanted, axis=0)


@triton.jit
def pages_of_tile(entries, first, listed, PART: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return physical page and length of the tokens of a tile: scalars where it lies in one page.

    To be called in the turn of a loop that they are for. Loads masked by ``listed`` and handed on from the
    turn before became asynchronous copies that each turn waited for, and keys and values with them.
    """
    if PART % BLOCK_N == 0:  # noqa: SIM108 (known at compile time: the types differ)
        place = first // PART
    else:
        place = (first + tl.arange(0, BLOCK_N)) // PART
    entry = tl.load(entries + place, mask=place < listed, other=0)
    return entry >> 16, (entry & 0xFFFF).to(tl.int32)


@triton.jit
def _weighed(scores, peak, total, mixed, scale_log2):
    """Take a tile of raw scores into a running softmax; return weights and the new peak, total and sum.

    ``peak`` is a raw score: scaling it and subtracting is one multiply-add an element.
    """
    top = tl.maximum(peak, tl.max(scores, axis=1))
    safe = tl.where(top == NOTHING, 0.0, top) * scale_log2  # -inf - -inf would be NaN
    weights = tl.exp2(scores * scale_log2 - safe[:, None])
    kept = tl.exp2(peak * scale_log2 - safe)
    return weights, top, total * kept + tl.sum(weights, axis=1), mixed * kept[:, None]


@triton.jit
def store_part(
    part_out, part_lse, slot, exists, peak, total, mixed, scale_log2, channel,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store a state: normalised ``out``, and ``lse`` in log2 units."""
    share = tl.where(total == 0, 1.0, total)
    lse = tl.where(total == 0, NOTHING, peak * scale_log2 + tl.log2(share))
    tl.store(part_lse + slot, lse, mask=exists)
    into = part_out + slot.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    # One division a row: one an element would be a third of what a short program executes.
    tl.store(into, mixed * (1.0 / share)[:, None], mask=exists[:, None] & (channel < HEAD_DIM)[None, :])


@triton.jit
def block_part(
    q, k, v, part_out, part_lse, slots, stride_qh, stride_qt, stride_kt, stride_vt, scale_log2, keys, tile,
    tiles, GROUP: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Attend from all rows of a group to the block's own keys, dense.

    With ``WAIT`` the kernel before may still run, and read memory that is reused for the parts: they are
    stored when it is done.
    """
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    for first_row in range(tile * BLOCK_M, GROUP * TOKENS, tiles * BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        of_group, token = row // TOKENS, row % TOKENS
        exists = row < GROUP * TOKENS
        from_q = q + of_group[:, None] * stride_qh + token[:, None] * stride_qt + channel[None, :]
        queries = tl.load(from_q, mask=exists[:, None] & wide, other=0.0)
        peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, keys, BLOCK_K):
            key = first + tl.arange(0, BLOCK_K)
            there = (key < keys)[:, None] & wide
            block_keys = tl.load(k + key[:, None] * stride_kt + channel[None, :], mask=there, other=0.0)
            scores = tl.dot(queries, tl.trans(block_keys), input_precision=PRECISION)
            scores = tl.where((key < keys)[None, :], scores, NOTHING)
            weights, peak, total, mixed = _weighed(scores, peak, total, mixed, scale_log2)
            values = tl.load(v + key[:, None] * stride_vt + channel[None, :], mask=there, other=0.0)
            mixed = tl.dot(weights.to(values.dtype), values, acc=mixed, input_precision=PRECISION)
        if WAIT:
            gdc_wait()
        slot = slots + (of_group * TOKENS + token) * SLOTS + SLOTS - 1
        store_part(part_out, part_lse, slot, exists, peak, total, mixed, scale_log2, channel, HEAD_DIM)


@triton.jit
def attend_tiles(
    queries, k_pages, v_pages, entries, logicals, mask_row, exists, channel, begin, end, listed, piece,
    stride_kp, stride_kt, stride_vp, stride_vt, scale_log2,
    PAGE_SIZE: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to tokens ``begin`` to ``end`` of a list of pages: raw peak, total and sum of a softmax.

    A page counts ``PART`` tokens, its ``piece``-th part of so many. ``OWN`` masks pages for rows that did not
    select them, where rows or query heads have their own lists.
    """
    wide = (channel < HEAD_DIM)[None, :]
    peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        physical, length = pages_of_tile(entries, first, listed, PART, BLOCK_N)
        if PART % BLOCK_N == 0:
            slot = piece * PART + first % PART + tl.arange(0, BLOCK_N)
            from_k = k_pages + physical * stride_kp + slot[:, None] * stride_kt + channel[None, :]
            from_v = v_pages + physical * stride_vp + slot[:, None] * stride_vt + channel[None, :]
        else:
            slot = piece * PART + (first + tl.arange(0, BLOCK_N)) % PART
            from_k = k_pages + (physical * stride_kp + slot * stride_kt)[:, None] + channel[None, :]
            from_v = v_pages + (physical * stride_vp + slot * stride_vt)[:, None] + channel[None, :]
        valid = slot < length
        page_keys = tl.load(from_k, mask=valid[:, None] & wide, other=0.0)
        scores = tl.dot(queries, tl.trans(page_keys), input_precision=PRECISION)
        seen = valid[None, :]
        if OWN:
            place = (first + tl.arange(0, BLOCK_N)) // PART
            logical = tl.load(logicals + place, mask=place < listed, other=0)
            chosen = tl.load(mask_row[:, None] + logical[None, :], mask=exists[:, None] & seen, other=0)
            seen = seen & (chosen != 0)
        scores = tl.where(seen, scores, NOTHING)
        weights, peak, total, mixed = _weighed(scores, peak, total, mixed, scale_log2)
        values = tl.load(from_v, mask=valid[:, None] & wide, other=0.0)
        if OWN:
            # A weight of 0 does not stop a NaN in a page that another row selected.
            bad = values.to(tl.float32) - values.to(tl.float32) != 0
            hit = tl.dot(seen.to(values.dtype), bad.to(values.dtype), input_precision=PRECISION)
            mixed = tl.where(hit > 0, float("nan"), mixed)
            values = tl.where(bad, 0.0, values).to(values.dtype)
        mixed = tl.dot(weights.to(values.dtype), values, acc=mixed, input_precision=PRECISION)
    return peak, total, mixed
