"""Kernels of attention for many sequences: every program takes an equal share of all tiles of all of them.

Selections differ in length, and contexts of a batch more so. With a fixed number of programs for each
sequence and KV head the longest list would decide. Here the lists are laid end to end and cut into as many
equal shares as there are programs; a share may end in the middle of one list and begin in another::

    selection -> [lists] -> page lists, counts -> [shares] -> parts -> [finish], as in attention.py

A part belongs to a program ``g`` and a pair ``p`` of sequence and KV head. Along the line of all tiles
either number only grows, so ``g + p`` numbers the parts without a gap that matters.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_triton.tiles import (
    active_rows,
    attend_tiles,
    block_part,
    list_pages,
    store_part,
    wanted_pages,
)

__all__ = ["lists_kernel", "shares_kernel"]


@triton.jit
def lists_kernel(
    mask, active, page_table, page_lengths, entries, logicals, counts,
    stride_mb, stride_mh, stride_mr, stride_ms, kv_heads, pages, spans, span,
    TOKENS: tl.constexpr, MASK_ROWS: tl.constexpr, OWN: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a pair of sequence and KV head: the pages that any active row wants, in reading order."""
    pair = tl.program_id(0)
    sequence, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    page_table += sequence * pages
    page_lengths += sequence * pages
    entries += pair.to(tl.int64) * pages
    logicals += pair.to(tl.int64) * pages
    mask += sequence * stride_mb + head * stride_mh
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.arange(0, BLOCK_T)
    is_active = tl.load(active + sequence * TOKENS + token, mask=token < TOKENS, other=0) != 0
    reading = tl.max(is_active.to(tl.int32), axis=0)
    taken = reading * 0
    for first in range(0, pages, BLOCK_P):
        page = first + tl.arange(0, BLOCK_P)
        length = tl.minimum(tl.load(page_lengths + page, mask=page < pages, other=0), PAGE_SIZE)
        physical = tl.load(page_table + page, mask=page < pages, other=0)
        wanted = wanted_pages(
            mask, is_active, token, page, stride_mr, stride_ms, pages, spans, span, MASK_ROWS, OWN
        )
        taken = list_pages(wanted * reading, page, physical, length, taken, 0, entries, logicals, 1, OWN)
    tl.store(counts + pair, taken)


@triton.jit
def shares_kernel(
    q, k_pages, v_pages, mask, active, k, v, part_out, part_lse, entries, logicals, counts, firsts, lasts,
    stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt,
    stride_mb, stride_mh, stride_mr, stride_ms, stride_bkb, stride_bkh, stride_bkt, stride_bvb, stride_bvh,
    stride_bvt, scale_log2, kv_heads, pages, span, pairs, programs, blocks, keys,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr,
    OWN: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a share: softmax attention over a stretch of the page lists of all pairs.

    The first ``blocks`` programs attend to the blocks themselves, one a pair, while lists are still made:
    what a pass was given is complete before `lists_kernel` lets this one start.
    """
    share = tl.program_id(0) - blocks
    if share < 0:
        pair = tl.program_id(0)
        sequence, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
        slots = (programs + pairs + pair) * (GROUP * TOKENS)
        block_part(
            q + sequence * stride_qb + head * GROUP * stride_qh,
            k + sequence * stride_bkb + head * stride_bkh, v + sequence * stride_bvb + head * stride_bvh,
            part_out, part_lse, slots, stride_qh, stride_qt, stride_bkt, stride_bvt, scale_log2, keys, 0, 1,
            GROUP, TOKENS, 1, HEAD_DIM, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION, PDL,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if share < 0:
        return
    lane = tl.arange(0, BLOCK_L)
    count = tl.load(counts + lane, mask=lane < pairs, other=0)
    tiles = (count * PAGE_SIZE + BLOCK_N - 1) // BLOCK_N
    until = tl.cumsum(tiles, axis=0)
    work = tl.sum(tiles, axis=0).to(tl.int64)
    # No share is empty: the parts of a list are those of all shares from its first to its last.
    used = tl.maximum(tl.minimum(work, programs), 1)
    here = tl.minimum(share * work // used, work).to(tl.int32)
    end = tl.minimum((share + 1) * work // used, work).to(tl.int32)
    row = tl.arange(0, BLOCK_M)
    of_group, channel = row // ROWS, tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    while here < end:
        pair = tl.sum((until <= here).to(tl.int32), axis=0)
        begin = tl.sum(tl.where(lane < pair, tiles, 0), axis=0)
        whole = tl.sum(tl.where(lane == pair, until, 0), axis=0)
        listed = tl.sum(tl.where(lane == pair, count, 0), axis=0)
        stop = tl.minimum(whole, end)
        sequence, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
        is_active = active + sequence * TOKENS
        if ROWS == TOKENS:
            token, exists = row % TOKENS, of_group < GROUP
            exists = exists & (tl.load(is_active + token, mask=exists, other=0) != 0)
        else:
            of_block = tl.arange(0, BLOCK_T)
            flags = tl.load(is_active + of_block, mask=of_block < TOKENS, other=0) != 0
            token, found = active_rows(flags, of_block, row, ROWS)
            exists = found & (of_group < GROUP)
        from_q = q + sequence * stride_qb + head * GROUP * stride_qh
        from_q += of_group[:, None] * stride_qh + token[:, None] * stride_qt + channel[None, :]
        queries = tl.load(from_q, mask=exists[:, None] & wide, other=0.0)
        mask_row = mask + sequence * stride_mb + head * stride_mh
        mask_row += (of_group % MASK_ROWS) * stride_mr + (token // span) * stride_ms
        listing = entries + pair.to(tl.int64) * pages
        first = (here - begin) * BLOCK_N
        peak, total, mixed = attend_tiles(
            queries, k_pages + head * stride_kh, v_pages + head * stride_vh,
            listing, logicals + pair.to(tl.int64) * pages, mask_row, exists, channel, first,
            (stop - begin) * BLOCK_N, listed, 0, stride_kp, stride_kt,
            stride_vp, stride_vt, scale_log2,
            PAGE_SIZE, PAGE_SIZE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, OWN, PRECISION, STAGES,
        )  # fmt: skip
        slot = (share + pair) * (GROUP * TOKENS) + of_group * TOKENS + token
        store_part(part_out, part_lse, slot, exists, peak, total, mixed, scale_log2, channel, HEAD_DIM)
        if here == begin:
            tl.store(firsts + pair, share)
        if stop == whole:
            tl.store(lasts + pair, share)
        here = stop
