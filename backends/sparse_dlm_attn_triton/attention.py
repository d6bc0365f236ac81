"""Kernels of attention: over listed pages in splits, then one that finishes a pass.

Data flow of a pass, each arrow one launch (docs/backends/triton.md has the sizes)::

    q, pages, selection, k and v of the block -> [splits] -> parts -> [finish] -> out, context state
    cached states ----------------------------------------------------^

The block is one more split, which a program of its own computes beside the others.

Scores live in log2 units inside: ``exp2`` is what the hardware has, so ``log2(e)`` is folded into the
scale once. What leaves a kernel as an LSE is a natural logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["finish_kernel", "splits_kernel"]

LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _active_rows(is_active, token, row, ROWS: tl.constexpr):
    """Return for each row of a tile its token, and whether there is one.

    A tile holds ``ROWS`` rows of each query head of a group: the active ones, in order. The ``r``-th active
    token is found by comparing ranks, since registers cannot be indexed.
    """
    rank = tl.cumsum(is_active.to(tl.int32), axis=0) - 1
    same = is_active[None, :] & (rank[None, :] == (row % ROWS)[:, None])
    return tl.sum(tl.where(same, token[None, :], 0), axis=1), tl.sum(same.to(tl.int32), axis=1) > 0


@triton.jit
def _wanted(mask, is_active, token, page, stride_row, stride_span, pages, spans, span,
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
def _list_pages(wanted, page, physical, length, taken, split, entries, logicals,
                SPLITS: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """Write those wanted pages that are a split's to its list, and return how many are taken by all.

    Of the wanted pages that exist, in reading order, a split takes every ``SPLITS``-th: no split waits for
    a count, and none is longer than another by more than one.
    """
    wanted = tl.where(length > 0, wanted, 0)
    rank = taken + tl.cumsum(wanted, axis=0) - 1
    mine = (wanted > 0) & (rank % SPLITS == split)
    place = rank // SPLITS
    # One number for both: what is scattered has to be reordered among threads first.
    tl.store(entries + place, (physical.to(tl.int64) << 16) | length, mask=mine)
    if OWN:
        tl.store(logicals + place, page.to(tl.int64), mask=mine)
    return taken + tl.sum(wanted, axis=0)


@triton.jit
def _pages_of_tile(entries, first, listed, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return physical page and length of the tokens of a tile: scalars where it lies in one page.

    They are fetched a tile ahead. A load whose address waits for another load in the same turn of a loop
    would halve how far ahead keys and values are fetched.
    """
    if PAGE_SIZE % BLOCK_N == 0:  # noqa: SIM108 (known at compile time: the types differ)
        place = first // PAGE_SIZE
    else:
        place = (first + tl.arange(0, BLOCK_N)) // PAGE_SIZE
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
def _store_part(
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
def _block_part(
    q, k, v, part_out, part_lse, slots, stride_qh, stride_qt, stride_kt, stride_vt, scale_log2, keys, tile,
    tiles, GROUP: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from all rows of a group to the block's own keys, dense."""
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
        slot = slots + (of_group * TOKENS + token) * SLOTS + SLOTS - 1
        _store_part(part_out, part_lse, slot, exists, peak, total, mixed, scale_log2, channel, HEAD_DIM)


@triton.jit
def splits_kernel(
    q, k_pages, v_pages, page_table, page_lengths, mask, active, k, v, part_out, part_lse, scratch,
    stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt,
    stride_mb, stride_mh, stride_mr, stride_ms, stride_bkb, stride_bkh, stride_bkt, stride_bvb, stride_bvh,
    stride_bvt, scale_log2, kv_heads, pages, spans, span, capacity, keys,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    SLOTS: tl.constexpr, MASK_ROWS: tl.constexpr, OWN: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a split, a tile of rows and a KV head: softmax attention over its share of the pages.

    The program after the last split attends to the block itself, if there is one. ``OWN`` masks pages for
    rows that did not select them, where rows or query heads have their own lists.
    """
    split, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    slots = pair * (GROUP * TOKENS * SLOTS)
    q += sequence * stride_qb + head * GROUP * stride_qh
    if split == SPLITS:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        _block_part(
            q, k + sequence * stride_bkb + head * stride_bkh, v + sequence * stride_bvb + head * stride_bvh,
            part_out, part_lse, slots, stride_qh, stride_qt, stride_bkt, stride_bvt, scale_log2, keys, tile,
            tl.num_programs(1), GROUP, TOKENS, SLOTS, HEAD_DIM, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION,
        )  # fmt: skip
        return
    # Page tables were written before this pass began, so there is no need to wait for them.
    page_table += sequence * pages
    page_lengths += sequence * pages
    page = tl.arange(0, BLOCK_P)
    page_length = tl.minimum(tl.load(page_lengths + page, mask=page < pages, other=0), PAGE_SIZE)
    page_physical = tl.load(page_table + page, mask=page < pages, other=0)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    of_group = row // ROWS
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    if ROWS == TOKENS:  # nor for queries; a row that turns out inactive is computed and not stored
        token, exists = row % TOKENS, of_group < GROUP
        from_q = q + of_group[:, None] * stride_qh + token[:, None] * stride_qt
        queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mask += sequence * stride_mb + head * stride_mh
    active += sequence * TOKENS
    block_token = tl.arange(0, BLOCK_T)
    is_active = tl.load(active + block_token, mask=block_token < TOKENS, other=0) != 0
    wanted = _wanted(
        mask, is_active, block_token, page, stride_mr, stride_ms, pages, spans, span, MASK_ROWS, OWN
    )
    if ROWS < TOKENS:
        token, found = _active_rows(is_active, block_token, row, ROWS)
        exists = found & (of_group < GROUP)
        from_q = q + of_group[:, None] * stride_qh + token[:, None] * stride_qt
        queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)
    if tl.max(is_active.to(tl.int32), axis=0) == 0:
        return

    entries = scratch + ((pair * tl.num_programs(1) + tile) * SPLITS + split).to(tl.int64) * 2 * capacity
    logicals = entries + capacity
    taken = _list_pages(wanted, page, page_physical, page_length, 0, split, entries, logicals, SPLITS, OWN)
    if LONG:
        for first_page in range(BLOCK_P, pages, BLOCK_P):
            more = first_page + tl.arange(0, BLOCK_P)
            more_length = tl.minimum(tl.load(page_lengths + more, mask=more < pages, other=0), PAGE_SIZE)
            more_physical = tl.load(page_table + more, mask=more < pages, other=0)
            more_wanted = _wanted(
                mask, is_active, block_token, more, stride_mr, stride_ms, pages, spans, span, MASK_ROWS, OWN
            )
            taken = _list_pages(
                more_wanted, more, more_physical, more_length, taken, split, entries, logicals, SPLITS, OWN
            )
    listed = (taken - split + SPLITS - 1) // SPLITS
    tl.debug_barrier()  # the list was written by other threads of this program
    peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k_pages += head * stride_kh
    v_pages += head * stride_vh
    mask_row = mask + (of_group % MASK_ROWS) * stride_mr + (token // span) * stride_ms
    physical, length = _pages_of_tile(entries, 0, listed, PAGE_SIZE, BLOCK_N)
    for first in tl.range(0, listed * PAGE_SIZE, BLOCK_N, num_stages=STAGES):
        if PAGE_SIZE % BLOCK_N == 0:
            slot = first % PAGE_SIZE + tl.arange(0, BLOCK_N)
            from_k = k_pages + physical * stride_kp + slot[:, None] * stride_kt + channel[None, :]
            from_v = v_pages + physical * stride_vp + slot[:, None] * stride_vt + channel[None, :]
        else:
            slot = (first + tl.arange(0, BLOCK_N)) % PAGE_SIZE
            from_k = k_pages + (physical * stride_kp + slot * stride_kt)[:, None] + channel[None, :]
            from_v = v_pages + (physical * stride_vp + slot * stride_vt)[:, None] + channel[None, :]
        valid = slot < length
        page_keys = tl.load(from_k, mask=valid[:, None] & wide, other=0.0)
        scores = tl.dot(queries, tl.trans(page_keys), input_precision=PRECISION)
        seen = valid[None, :]
        if OWN:
            place = (first + tl.arange(0, BLOCK_N)) // PAGE_SIZE
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
        physical, length = _pages_of_tile(entries, first + BLOCK_N, listed, PAGE_SIZE, BLOCK_N)
    if ROWS == TOKENS:
        exists = exists & (tl.load(active + token, mask=exists, other=0) != 0)
    slot_of_row = slots + (of_group * TOKENS + token) * SLOTS + split
    _store_part(part_out, part_lse, slot_of_row, exists, peak, total, mixed, scale_log2, channel, HEAD_DIM)


@triton.jit
def _merged(out, lse, other_out, other_lse):
    """Merge two states in log2 units; one of weight 0 is dropped, whatever its ``out`` holds."""
    top = tl.maximum(lse, other_lse)
    safe = tl.where(top == NOTHING, 0.0, top)
    weight, other_weight = tl.exp2(lse - safe), tl.exp2(other_lse - safe)
    total = weight + other_weight
    share = tl.where(total == 0, 1.0, total)
    return tl.where(weight == 0, 0.0, out * (weight / share)) + tl.where(
        other_weight == 0, 0.0, other_out * (other_weight / share)
    )


@triton.jit
def finish_kernel(
    q, active, part_out, part_lse, cached_out, cached_lse, reference, out, state_out, state_lse, kept,
    stride_qb, stride_qh, stride_qt, stride_cb, stride_ch, stride_ct, stride_lb, stride_lh,
    stride_rb, stride_rh, stride_rt, q_heads,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CONTEXT: tl.constexpr, CACHED: tl.constexpr,
    BLOCK: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a query row: merge its splits, or take its cached state, and merge the block's part.

    ``KEEP`` stores what the next pass measures change against: the query of every row (1), or that of
    active rows and the old one of the others (2).
    """
    token, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    wide = channel < HEAD_DIM
    row = (sequence * q_heads + head) * TOKENS + token
    if KEEP:  # written before this pass began, so there is no need to wait
        from_q = q + sequence * stride_qb + head * stride_qh + token * stride_qt + channel
        query = tl.load(from_q, mask=wide, other=0.0)
        if KEEP == 1:
            tl.store(kept + row * HEAD_DIM + channel, query, mask=wide)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if BLOCK:
        at_block = row * SLOTS + SLOTS - 1
        block_out = tl.load(part_out + at_block * HEAD_DIM + channel, mask=wide, other=0.0)
        block_lse = tl.load(part_lse + at_block)
    if CONTEXT:
        is_active = tl.load(active + sequence * TOKENS + token) != 0
        # Lengths instead of conjunctions with a scalar, which Triton's interpreter does not take as masks.
        ready, stored = tl.where(is_active, SPLITS, 0), tl.where(is_active, 0, HEAD_DIM)
        split = tl.arange(0, BLOCK_S)
        lses = tl.load(part_lse + row * SLOTS + split, mask=split < ready, other=NOTHING)
        from_parts = part_out + (row * SLOTS + split)[:, None] * HEAD_DIM + channel[None, :]
        parts = tl.load(from_parts, mask=(split < ready)[:, None] & wide[None, :], other=0.0)
        top = tl.max(lses, axis=0)
        safe = tl.where(top == NOTHING, 0.0, top)
        weights = tl.exp2(lses - safe)
        total = tl.sum(weights, axis=0)
        share = tl.where(total == 0, 1.0, total)
        # A split without a weight is dropped; NaN is no 0, and shows.
        parts = tl.where((weights != 0)[:, None], parts * (weights / share)[:, None], 0.0)
        context_out = tl.sum(parts, axis=0)
        context_lse = tl.where(total == 0, NOTHING, safe + tl.log2(share))
        natural = context_lse * LN2
        if CACHED:
            from_old = cached_out + sequence * stride_cb + head * stride_ch + token * stride_ct + channel
            old = tl.load(from_old, mask=channel < stored, other=0.0).to(tl.float32)
            from_lse = cached_lse + sequence * stride_lb + head * stride_lh + token
            old_lse = tl.load(from_lse, mask=is_active == 0, other=0.0)
            context_out = tl.where(is_active, context_out, old)
            natural = tl.where(is_active, natural, old_lse)
            context_lse = tl.where(is_active, context_lse, old_lse / LN2)
        tl.store(state_out + row * HEAD_DIM + channel, context_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, natural)
        if BLOCK:
            both = _merged(context_out, context_lse, block_out, block_lse)
            tl.store(out + row * HEAD_DIM + channel, both.to(out.dtype.element_ty), mask=wide)
        if KEEP == 2:
            from_before = reference + sequence * stride_rb + head * stride_rh + token * stride_rt + channel
            before = tl.load(from_before, mask=channel < stored, other=0.0)
            tl.store(kept + row * HEAD_DIM + channel, tl.where(is_active, query, before), mask=wide)
    else:
        tl.store(state_out + row * HEAD_DIM + channel, block_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, block_lse * LN2)
