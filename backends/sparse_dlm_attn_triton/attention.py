"""Kernels of attention: over listed pages in splits, then one that finishes a pass.

Data flow of a pass, each arrow one launch (docs/backends/triton.md has the sizes)::

    q, pages, selection, k and v of the block -> [splits] -> parts -> [finish] -> out, context state
    cached states ----------------------------------------------------^

The block is one more split, which a program of its own computes beside the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_triton.tiles import (
    NOTHING,
    active_rows,
    attend_tiles,
    block_part,
    list_pages,
    store_part,
    wanted_pages,
)

__all__ = ["finish_kernel", "splits_kernel"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["pairs"])
def splits_kernel(
    q, k_pages, v_pages, page_table, page_lengths, mask, active, k, v, part_out, part_lse, scratch,
    stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt,
    stride_mb, stride_mh, stride_mr, stride_ms, stride_bkb, stride_bkh, stride_bkt, stride_bvb, stride_bvh,
    stride_bvt, scale_log2, kv_heads, pairs, tiles, pages, spans, span, capacity, keys,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    SLOTS: tl.constexpr, MASK_ROWS: tl.constexpr, OWN: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr,
    PIECES: tl.constexpr, LATER: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program a split, a tile of rows and a KV head: softmax attention over its share of the pages.

    The last programs, one a tile and KV head, attend to the block itself, if there is one: those of pages
    take longer, and should all start at once. ``PIECES`` splits share a list of pages, each with its part of
    every page. ``LATER`` says that this is not the first kernel of a pass: what the pass was given is
    complete, although the kernel before may not be.
    """
    program, of_pages = tl.program_id(0), pairs * tiles * SPLITS
    of_block, split = program >= of_pages, program % max(SPLITS, 1)
    number = tl.where(of_block, program - of_pages, program // max(SPLITS, 1))
    tile, pair = number % tiles, number // tiles
    sequence, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    slots = pair * (GROUP * TOKENS * SLOTS)
    q += sequence * stride_qb + head * GROUP * stride_qh
    if PDL and not LATER:
        gdc_wait()
        gdc_launch_dependents()
    if of_block:
        block_part(
            q, k + sequence * stride_bkb + head * stride_bkh, v + sequence * stride_bvb + head * stride_bvh,
            part_out, part_lse, slots, stride_qh, stride_qt, stride_bkt, stride_bvt, scale_log2, keys, tile,
            tiles, GROUP, TOKENS, SLOTS, HEAD_DIM, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION,
            PDL and LATER,
        )  # fmt: skip
        if PDL and LATER:
            gdc_launch_dependents()
        return
    page_table += sequence * pages
    page_lengths += sequence * pages
    page = tl.arange(0, BLOCK_P)
    page_length = tl.minimum(tl.load(page_lengths + page, mask=page < pages, other=0), PAGE_SIZE)
    page_physical = tl.load(page_table + page, mask=page < pages, other=0)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    of_group = row // ROWS
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    if ROWS == TOKENS:  # a row that turns out inactive is computed and not stored
        token, exists = row % TOKENS, of_group < GROUP
        from_q = q + of_group[:, None] * stride_qh + token[:, None] * stride_qt
        queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)
    # Which rows are active is an input too, or what `scores_kernel` wrote: two kernels back, and complete.
    active += sequence * TOKENS
    block_token = tl.arange(0, BLOCK_T)
    is_active = tl.load(active + block_token, mask=block_token < TOKENS, other=0) != 0
    if ROWS == TOKENS:
        stored = exists & (tl.load(active + token, mask=exists, other=0) != 0)
    if PDL and LATER:
        gdc_wait()
        gdc_launch_dependents()
    mask += sequence * stride_mb + head * stride_mh
    wanted = wanted_pages(
        mask, is_active, block_token, page, stride_mr, stride_ms, pages, spans, span, MASK_ROWS, OWN
    )
    if ROWS < TOKENS:
        token, found = active_rows(is_active, block_token, row, ROWS)
        exists = found & (of_group < GROUP)
        stored = exists
        from_q = q + of_group[:, None] * stride_qh + token[:, None] * stride_qt
        queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)
    if tl.max(is_active.to(tl.int32), axis=0) == 0:
        return

    SHARES: tl.constexpr = SPLITS // PIECES
    # The first shares are a page longer. Programs of one multiprocessor are half a grid apart: let a long
    # share meet a short one there.
    turned = tl.where(2 * pair < pairs, split, SPLITS - 1 - split)
    share, piece = turned // PIECES, turned % PIECES
    entries = scratch + (number * SPLITS + split).to(tl.int64) * 2 * capacity
    logicals = entries + capacity
    taken = list_pages(
        wanted, page, page_physical, page_length, 0, share, entries, logicals, SHARES, OWN
    )
    if LONG:
        for first_page in range(BLOCK_P, pages, BLOCK_P):
            more = first_page + tl.arange(0, BLOCK_P)
            more_length = tl.minimum(tl.load(page_lengths + more, mask=more < pages, other=0), PAGE_SIZE)
            more_physical = tl.load(page_table + more, mask=more < pages, other=0)
            more_wanted = wanted_pages(
                mask, is_active, block_token, more, stride_mr, stride_ms, pages, spans, span, MASK_ROWS, OWN
            )
            taken = list_pages(
                more_wanted, more, more_physical, more_length, taken, share, entries, logicals, SHARES, OWN
            )
    listed = (taken - share + SHARES - 1) // SHARES
    tl.debug_barrier()  # the list was written by other threads of this program
    PART: tl.constexpr = PAGE_SIZE // PIECES
    mask_row = mask + (of_group % MASK_ROWS) * stride_mr + (token // span) * stride_ms
    peak, total, mixed = attend_tiles(
        queries, k_pages + head * stride_kh, v_pages + head * stride_vh, entries, logicals, mask_row,
        exists, channel, 0, listed * PART, listed, piece, stride_kp, stride_kt, stride_vp, stride_vt,
        scale_log2, PAGE_SIZE, PART, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, OWN, PRECISION, STAGES,
    )  # fmt: skip
    slot_of_row = slots + (of_group * TOKENS + token) * SLOTS + split
    store_part(part_out, part_lse, slot_of_row, stored, peak, total, mixed, scale_log2, channel, HEAD_DIM)


@triton.jit
def _merged(out, lse, other_out, other_lse):
    """Merge two states of rows in log2 units; one of weight 0 is dropped, whatever its ``out`` holds."""
    top = tl.maximum(lse, other_lse)
    safe = tl.where(top == NOTHING, 0.0, top)
    weight, other_weight = tl.exp2(lse - safe), tl.exp2(other_lse - safe)
    total = weight + other_weight
    share = tl.where(total == 0, 1.0, total)
    return tl.where((weight == 0)[:, None], 0.0, out * (weight / share)[:, None]) + tl.where(
        (other_weight == 0)[:, None], 0.0, other_out * (other_weight / share)[:, None]
    )


@triton.jit
def _united(
    part_out, part_lse, base, step, ready, most, channel,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the first ``ready`` parts of each row, ``step`` apart from ``base``; LSE in log2 units.

    ``BLOCK_S`` parts at a time: their loads wait for nothing, so all of them are under way together.
    """
    top = tl.full((BLOCK_R,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    mixed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for begin in range(0, most, BLOCK_S):
        if BLOCK_R == 1:  # parts of one row are a tile
            part = begin + tl.arange(0, BLOCK_S)
            lses = tl.load(part_lse + base + part * step, mask=part < ready, other=NOTHING)
            there = (part < ready)[:, None] & (channel < HEAD_DIM)[None, :]
            from_parts = part_out + (base + part * step)[:, None] * HEAD_DIM + channel[None, :]
            parts = tl.load(from_parts, mask=there, other=0.0)
            peak = tl.maximum(top, tl.max(lses, axis=0))
            safe = tl.where(peak == NOTHING, 0.0, peak)
            weights = tl.exp2(lses - safe)
            # A part without a weight is dropped; NaN is no 0, and shows.
            parts = tl.where((weights != 0)[:, None], parts * weights[:, None], 0.0)
            added, weight = tl.sum(parts, axis=0)[None, :], tl.sum(weights, axis=0)
        else:
            peak = top
            for i in tl.static_range(BLOCK_S):
                from_lse = part_lse + base + (begin + i) * step
                peak = tl.maximum(peak, tl.load(from_lse, mask=begin + i < ready, other=NOTHING))
            safe = tl.where(peak == NOTHING, 0.0, peak)
            added, weight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
            for i in tl.static_range(BLOCK_S):
                at, there = base + (begin + i) * step, begin + i < ready
                share = tl.exp2(tl.load(part_lse + at, mask=there, other=NOTHING) - safe)
                there = there[:, None] & (channel < HEAD_DIM)[None, :]
                rows = tl.load(part_out + at[:, None] * HEAD_DIM + channel[None, :], mask=there, other=0.0)
                added += tl.where((share != 0)[:, None], rows * share[:, None], 0.0)
                weight += share
        kept = tl.exp2(top - safe)
        mixed = tl.where((kept != 0)[:, None], mixed * kept[:, None], 0.0) + added
        total = total * kept + weight
        top = peak
    share = tl.where(total == 0, 1.0, total)
    lse = tl.where(total == 0, NOTHING, top + tl.log2(share))
    return mixed * (1.0 / share)[:, None], lse


@triton.jit
def finish_kernel(
    q, active, part_out, part_lse, firsts, lasts, counts, cached_out, cached_lse, reference,
    out, state_out, state_lse, kept,
    stride_qb, stride_qh, stride_qt, stride_cb, stride_ch, stride_ct, stride_lb, stride_lh,
    stride_rb, stride_rh, stride_rt, q_heads, block_slots,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    CONTEXT: tl.constexpr, CACHED: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
    KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program ``BLOCK_R`` rows of a query head, a warp each: merge parts or cached states with the block.

    Parts are those of `splits_kernel`, or ``SHARED``: those of `shares.shares_kernel`.

    ``KEEP`` stores what the next pass measures change against: the query of every row (1), or that of
    active rows and the old one of the others (2).
    """
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = token < TOKENS
    channel = tl.arange(0, BLOCK_D)
    wide = exists[:, None] & (channel < HEAD_DIM)[None, :]
    row = (sequence * q_heads + head) * TOKENS + token
    into = row[:, None] * HEAD_DIM + channel[None, :]
    if KEEP:  # written before this pass began, so there is no need to wait
        from_q = q + sequence * stride_qb + head * stride_qh + token[:, None] * stride_qt + channel[None, :]
        query = tl.load(from_q, mask=wide, other=0.0)
        if KEEP == 1:
            tl.store(kept + into, query, mask=wide)
    if CACHED:  # of every row: which rows are active may not be known yet
        from_old = cached_out + sequence * stride_cb + head * stride_ch
        old = tl.load(from_old + token[:, None] * stride_ct + channel[None, :], mask=wide, other=0.0)
        old = old.to(tl.float32)
        from_lse = cached_lse + sequence * stride_lb + head * stride_lh + token
        old_lse = tl.load(from_lse, mask=exists, other=NOTHING)
    if KEEP == 2:
        from_before = reference + sequence * stride_rb + head * stride_rh
        before = tl.load(from_before + token[:, None] * stride_rt + channel[None, :], mask=wide, other=0.0)
    if CONTEXT:  # complete since the kernel before the last; without pages there is none, and no use for it
        is_active = tl.load(active + sequence * TOKENS + token, mask=exists, other=0) != 0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if SHARED:
        pair = sequence * (q_heads // GROUP) + head // GROUP
        of_pair = (head % GROUP) * TOKENS + token
        at_block = (block_slots + pair) * (GROUP * TOKENS) + of_pair
    else:
        at_block = row * SLOTS + SLOTS - 1
    if BLOCK:
        block_out = tl.load(part_out + at_block[:, None] * HEAD_DIM + channel[None, :], mask=wide, other=0.0)
        block_lse = tl.load(part_lse + at_block, mask=exists, other=NOTHING)
    if CONTEXT:
        if SHARED:
            first = tl.load(firsts + pair)
            ready = tl.where(tl.load(counts + pair) > 0, tl.load(lasts + pair) - first + 1, 0)
            context_out, context_lse = _united(
                part_out, part_lse, (first + pair) * (GROUP * TOKENS) + of_pair, GROUP * TOKENS,
                tl.where(is_active, ready, 0), ready, channel, HEAD_DIM, BLOCK_R, BLOCK_S, BLOCK_D,
            )  # fmt: skip
        else:
            context_out, context_lse = _united(
                part_out, part_lse, row * SLOTS, 1, tl.where(is_active, SPLITS, 0), SPLITS, channel, HEAD_DIM,
                BLOCK_R, BLOCK_S, BLOCK_D,
            )  # fmt: skip
        natural = context_lse * LN2
        if CACHED:
            context_out = tl.where(is_active[:, None], context_out, old)
            natural = tl.where(is_active, natural, old_lse)
            context_lse = tl.where(is_active, context_lse, old_lse / LN2)
        tl.store(state_out + into, context_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, natural, mask=exists)
        if BLOCK:
            both = _merged(context_out, context_lse, block_out, block_lse)
            tl.store(out + into, both.to(out.dtype.element_ty), mask=wide)
        if KEEP == 2:
            tl.store(kept + into, tl.where(is_active[:, None], query, before), mask=wide)
    else:
        tl.store(state_out + into, block_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, block_lse * LN2, mask=exists)
