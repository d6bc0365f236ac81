"""Attention for ragged batches, stream-K: every program takes an equal share of the tiles of all sequences.

Selections differ in length, and contexts of a batch more so. With a fixed number of programs for each
sequence and KV head the longest list would decide. Here the lists are laid end to end and cut into as many
equal shares as there are programs; a share may end in the middle of one list and begin in another::

    selection -> [lists] -> page lists, counts -> [stream_k] -> partial states -> [finish], as in attention.py

A part belongs to a program ``g`` and a pair ``p`` of sequence and KV head. Along the line of all tiles
either number only grows, so ``g + p`` numbers the parts without a gap that matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_triton.attention import MOST_LISTED, Parts
from sparse_dlm_attn_triton.common import LOG2_E, Launch, power_of_two
from sparse_dlm_attn_triton.problem import Grid, Part, Sizes, constants_of, strides_of
from sparse_dlm_attn_triton.tiles import active_rows, attend_tiles, block_part, list_pages, store_part, wanted_pages

__all__ = ["MOST_PAIRS", "StreamK", "stream_k"]

MOST_PAIRS = 2048
"""Most pairs of sequence and KV head whose page lists one program can look through."""
Tensor = torch.Tensor


@triton.jit
def lists_kernel(
    mask,
    active,
    page_table,
    page_lengths,
    entries,
    logicals,
    counts,
    mask_stride,
    kv_heads,
    pages,
    spans,
    span,
    TOKENS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PER_ROW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a pair of sequence and KV head: the pages that any active row wants, in reading order."""
    pair = tl.program_id(0)
    sequence, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    page_table += sequence * pages
    page_lengths += sequence * pages
    entries += pair.to(tl.int64) * pages
    logicals += pair.to(tl.int64) * pages
    mask += sequence * mask_stride[0] + head * mask_stride[1]
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
        wanted = wanted_pages(mask, is_active, token, page, mask_stride, pages, spans, span, MASK_ROWS, PER_ROW)
        taken = list_pages(wanted * reading, page, physical, length, taken, 0, entries, logicals, 1, PER_ROW)
    tl.store(counts + pair, taken)


@triton.jit
def stream_k_kernel(
    q,
    k_pages,
    v_pages,
    mask,
    active,
    k,
    v,
    part_out,
    part_lse,
    entries,
    logicals,
    counts,
    firsts,
    lasts,
    q_stride,
    k_page_stride,
    v_page_stride,
    mask_stride,
    k_stride,
    v_stride,
    scale_log2,
    kv_heads,
    pages,
    span,
    pairs,
    programs,
    blocks,
    keys,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PER_ROW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
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
            q + sequence * q_stride[0] + head * GROUP * q_stride[1],
            k + sequence * k_stride[0] + head * k_stride[1],
            v + sequence * v_stride[0] + head * v_stride[1],
            part_out,
            part_lse,
            slots,
            q_stride,
            k_stride,
            v_stride,
            scale_log2,
            keys,
            0,
            1,
            GROUP,
            TOKENS,
            1,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_K,
            BLOCK_D,
            PRECISION,
            PDL,
        )
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if share < 0:
        return
    lane = tl.arange(0, BLOCK_L)  # one a pair
    count = tl.load(counts + lane, mask=lane < pairs, other=0)
    tiles = (count * PAGE_SIZE + BLOCK_N - 1) // BLOCK_N
    until = tl.cumsum(tiles, axis=0)
    work = tl.sum(tiles, axis=0).to(tl.int64)
    # No share is empty: the parts of a list are those of all shares from its first to its last.
    used = tl.maximum(tl.minimum(work, programs), 1)
    here = tl.minimum(share * work // used, work).to(tl.int32)
    end = tl.minimum((share + 1) * work // used, work).to(tl.int32)
    row = tl.arange(0, BLOCK_M)
    group_head, channel = row // ROWS, tl.arange(0, BLOCK_D)
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
            token, exists = row % TOKENS, group_head < GROUP
            exists = exists & (tl.load(is_active + token, mask=exists, other=0) != 0)
        else:
            block_token = tl.arange(0, BLOCK_T)
            flags = tl.load(is_active + block_token, mask=block_token < TOKENS, other=0) != 0
            token, found = active_rows(flags, block_token, row, ROWS)
            exists = found & (group_head < GROUP)
        from_q = q + sequence * q_stride[0] + head * GROUP * q_stride[1]
        from_q += group_head[:, None] * q_stride[1] + token[:, None] * q_stride[2] + channel[None, :]
        queries = tl.load(from_q, mask=exists[:, None] & wide, other=0.0)  # [BLOCK_M, BLOCK_D]
        mask_row = mask + sequence * mask_stride[0] + head * mask_stride[1]
        mask_row += (group_head % MASK_ROWS) * mask_stride[2] + (token // span) * mask_stride[3]
        listing = entries + pair.to(tl.int64) * pages
        first = (here - begin) * BLOCK_N
        running_max, running_sum, acc = attend_tiles(
            queries,
            k_pages + head * k_page_stride[1],
            v_pages + head * v_page_stride[1],
            listing,
            logicals + pair.to(tl.int64) * pages,
            mask_row,
            exists,
            channel,
            first,
            (stop - begin) * BLOCK_N,
            listed,
            0,
            k_page_stride,
            v_page_stride,
            scale_log2,
            PAGE_SIZE,
            PAGE_SIZE,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            PER_ROW,
            PRECISION,
            STAGES,
        )
        slot = (share + pair) * (GROUP * TOKENS) + group_head * TOKENS + token
        store_part(part_out, part_lse, slot, exists, running_max, running_sum, acc, scale_log2, channel, HEAD_DIM)
        if here == begin:
            tl.store(firsts + pair, share)
        if stop == whole:
            tl.store(lasts + pair, share)
        here = stop


@dataclass(frozen=True)
class StreamK:
    """The launches of `lists_kernel` and `stream_k_kernel`, and the shape of the parts that these store.

    ``shape`` is ``(parts, group * tokens, head_dim)``; parts of blocks come from ``block_slots`` on.
    """

    lists: Launch
    shares: Launch
    shape: tuple[int, ...]
    pairs: int
    pages: int
    block_slots: int

    def run(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Parts:
        """Launch them; return the partial states, and first part, last part and pages of each pair's list."""
        out = torch.empty(self.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(self.shape[:-1], dtype=torch.float32, device=q.device)
        entries, logicals = torch.empty((2, self.pairs, self.pages), dtype=torch.int64, device=q.device)
        counts, firsts, lasts = torch.empty((3, self.pairs), dtype=torch.int32, device=q.device)
        mask, active = part.mask, part.active
        self.lists(mask, active, part.page_table, part.page_lengths, entries, logicals, counts)
        self.shares(
            q, part.k_pages, part.v_pages, mask, active, k, v, out, lse, entries, logicals, counts, firsts, lasts
        )
        return Parts(out, lse, firsts, lasts, counts)


def stream_k(sizes: Sizes, grid: Grid) -> StreamK:
    """Settle the launches: as many shares as the settings aim at programs."""
    _, _, tokens, head_dim = sizes.q[0]
    (spans, pages), pairs, span = sizes.mask[0][2:], grid.pairs, min(sizes.span, tokens)
    constants, strides = constants_of(sizes, grid), strides_of(sizes, grid)
    lists = Launch(
        lists_kernel,
        (pairs,),
        strides[3],
        sizes.kv_heads,
        pages,
        spans,
        span,
        device=sizes.device,
        aligned=sizes.aligned,
        **{name: constants[name] for name in ("TOKENS", "MASK_ROWS", "PER_ROW", "PAGE_SIZE")},
        BLOCK_P=min(power_of_two(pages), MOST_LISTED),
        BLOCK_T=power_of_two(tokens),
        num_warps=4,
    )
    programs, blocks = grid.settings.programs, 0 if sizes.k is None else pairs
    shares = Launch(
        stream_k_kernel,
        (programs + blocks,),
        *strides,
        sizes.scale * LOG2_E,
        sizes.kv_heads,
        pages,
        span,
        pairs,
        programs,
        blocks,
        sizes.keys,
        device=sizes.device,
        aligned=sizes.aligned,
        BLOCK_L=power_of_two(pairs),
        BLOCK_T=power_of_two(tokens),
        **constants,
    )
    shape = programs + pairs + blocks, grid.group * tokens, head_dim
    return StreamK(lists, shares, shape, pairs, pages, programs + pairs)
