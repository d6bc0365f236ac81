"""Attention over selected pages, split-KV: every page list is dealt out to a fixed number of programs.

Data flow of a pass, each arrow one launch (docs/backends/triton.md)::

    q, pages, selection, k and v of the block -> [splits] -> partial states -> [finish] -> out, context state
    cached states ------------------------------------------------------------^

The block is one more split, which a program of its own computes beside the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_triton.common import LOG2_E, Launch, power_of_two
from sparse_dlm_attn_triton.problem import Grid, Part, Sizes, constants_of, strides_of
from sparse_dlm_attn_triton.tiles import active_rows, attend_tiles, block_part, list_pages, store_part, wanted_pages

__all__ = ["MOST_LISTED", "Parts", "SplitKV", "split_kv"]

MOST_LISTED = 2048
"""Most pages that a program lists in one iteration."""
MOST_SPLITS = 128
Tensor = torch.Tensor


@triton.jit(do_not_specialize=["pairs"])
def splits_kernel(
    q,
    k_pages,
    v_pages,
    page_table,
    page_lengths,
    mask,
    active,
    k,
    v,
    part_out,
    part_lse,
    scratch,
    q_stride,
    k_page_stride,
    v_page_stride,
    mask_stride,
    k_stride,
    v_stride,
    scale_log2,
    kv_heads,
    pairs,
    tiles,
    pages,
    spans,
    span,
    capacity,
    keys,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PER_ROW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LONG: tl.constexpr,
    PIECES: tl.constexpr,
    LATER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a split, a tile of rows and a KV head: softmax attention over its list of pages.

    The last programs, one a tile and KV head, attend to the block itself, if there is one: those of pages
    take longer, and should all start at once. ``PIECES`` splits share a list of pages, each with its part of
    every page. ``LATER`` says that this is not the first kernel of a pass: what the pass was given is
    complete, although the kernel before may not be.
    """
    program, of_pages = tl.program_id(0), pairs * tiles * SPLITS
    of_block, split = program >= of_pages, program % max(SPLITS, 1)
    work = tl.where(of_block, program - of_pages, program // max(SPLITS, 1))
    tile, pair = work % tiles, work // tiles
    sequence, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    slots = pair * (GROUP * TOKENS * SLOTS)
    q += sequence * q_stride[0] + head * GROUP * q_stride[1]
    if PDL and not LATER:
        gdc_wait()
        gdc_launch_dependents()
    if of_block:
        block_part(
            q,
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
            tile,
            tiles,
            GROUP,
            TOKENS,
            SLOTS,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_K,
            BLOCK_D,
            PRECISION,
            PDL and LATER,
        )
        if PDL and LATER:
            gdc_launch_dependents()
        return
    page_table += sequence * pages
    page_lengths += sequence * pages
    page = tl.arange(0, BLOCK_P)
    page_length = tl.minimum(tl.load(page_lengths + page, mask=page < pages, other=0), PAGE_SIZE)
    page_physical = tl.load(page_table + page, mask=page < pages, other=0)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group_head = row // ROWS
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    if ROWS == TOKENS:  # a row that turns out inactive is computed and not stored
        token, exists = row % TOKENS, group_head < GROUP
        from_q = q + group_head[:, None] * q_stride[1] + token[:, None] * q_stride[2]
        queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)  # [BLOCK_M, BLOCK_D]
    # Which rows are active is an input too, or what `scores_kernel` wrote: two kernels back, and complete.
    active += sequence * TOKENS
    block_token = tl.arange(0, BLOCK_T)
    is_active = tl.load(active + block_token, mask=block_token < TOKENS, other=0) != 0
    if ROWS == TOKENS:
        stored = exists & (tl.load(active + token, mask=exists, other=0) != 0)
    if PDL and LATER:
        gdc_wait()
        gdc_launch_dependents()
    mask += sequence * mask_stride[0] + head * mask_stride[1]
    wanted = wanted_pages(mask, is_active, block_token, page, mask_stride, pages, spans, span, MASK_ROWS, PER_ROW)
    if ROWS < TOKENS:
        token, found = active_rows(is_active, block_token, row, ROWS)
        exists = found & (group_head < GROUP)
        stored = exists
        from_q = q + group_head[:, None] * q_stride[1] + token[:, None] * q_stride[2]
        queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)
    if tl.max(is_active.to(tl.int32), axis=0) == 0:
        return

    LISTS: tl.constexpr = SPLITS // PIECES
    # The first lists are a page longer. Programs of one multiprocessor are half a grid apart: let a long list
    # meet a short one there.
    turned = tl.where(2 * pair < pairs, split, SPLITS - 1 - split)
    which, piece = turned // PIECES, turned % PIECES
    entries = scratch + (work * SPLITS + split).to(tl.int64) * 2 * capacity
    logicals = entries + capacity
    taken = list_pages(wanted, page, page_physical, page_length, 0, which, entries, logicals, LISTS, PER_ROW)
    if LONG:
        for first_page in range(BLOCK_P, pages, BLOCK_P):
            more = first_page + tl.arange(0, BLOCK_P)
            more_length = tl.minimum(tl.load(page_lengths + more, mask=more < pages, other=0), PAGE_SIZE)
            more_physical = tl.load(page_table + more, mask=more < pages, other=0)
            more_wanted = wanted_pages(
                mask, is_active, block_token, more, mask_stride, pages, spans, span, MASK_ROWS, PER_ROW
            )
            taken = list_pages(
                more_wanted, more, more_physical, more_length, taken, which, entries, logicals, LISTS, PER_ROW
            )
    listed = (taken - which + LISTS - 1) // LISTS
    tl.debug_barrier()  # the list was written by other threads of this program
    PART: tl.constexpr = PAGE_SIZE // PIECES
    mask_row = mask + (group_head % MASK_ROWS) * mask_stride[2] + (token // span) * mask_stride[3]
    running_max, running_sum, acc = attend_tiles(
        queries,
        k_pages + head * k_page_stride[1],
        v_pages + head * v_page_stride[1],
        entries,
        logicals,
        mask_row,
        exists,
        channel,
        0,
        listed * PART,
        listed,
        piece,
        k_page_stride,
        v_page_stride,
        scale_log2,
        PAGE_SIZE,
        PART,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PER_ROW,
        PRECISION,
        STAGES,
    )
    slot = slots + (group_head * TOKENS + token) * SLOTS + split
    store_part(part_out, part_lse, slot, stored, running_max, running_sum, acc, scale_log2, channel, HEAD_DIM)


class Parts(NamedTuple):
    """Partial states in float32, ``lse`` in log2 units, and where the parts of a page list begin and end.

    Those of split-KV lie row by row, and need no ``firsts``, ``lasts`` and ``counts``.
    """

    out: Tensor
    lse: Tensor
    firsts: Tensor
    lasts: Tensor
    counts: Tensor


@dataclass(frozen=True)
class SplitKV:
    """The launch of `splits_kernel`, and the shape of the parts that it stores: ``(..., slots, head_dim)``."""

    launch: Launch
    shape: tuple[int, ...]
    scratch: int
    splits: int
    slots: int

    def run(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Parts:
        """Launch it; return the partial states."""
        out = torch.empty(self.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(self.shape[:-1], dtype=torch.float32, device=q.device)
        scratch = torch.empty(self.scratch, dtype=torch.int64, device=q.device)
        self.launch(
            q,
            part.k_pages,
            part.v_pages,
            part.page_table,
            part.page_lengths,
            part.mask,
            part.active,
            k,
            v,
            out,
            lse,
            scratch,
        )
        return Parts(out, lse, q, q, q)


def split_kv(sizes: Sizes, grid: Grid) -> SplitKV:
    """Settle the launch: as many splits, a power of two, as fill the programs that the settings aim for."""
    batch, q_heads, tokens, head_dim = sizes.q[0]
    spans, pages = sizes.mask[0][2:] if sizes.has_pages else (1, 0)
    page_size, block_n, lists = sizes.page_size, grid.settings.block_n, grid.pairs * grid.tiles
    splits, pieces = 0, 1
    if sizes.has_pages:
        most = min(triton.cdiv(pages * page_size, block_n), pages * max(page_size // block_n, 1), MOST_SPLITS)
        splits = min(max(grid.settings.programs // lists, 1), max(most, 1))
        splits = 1 << (splits.bit_length() - 1)
    # Several splits share each page where it holds several tiles, so that all have about the same to read.
    while pieces < splits and page_size % (2 * pieces * block_n) == 0:
        pieces *= 2
    slots = splits + (sizes.k is not None)
    capacity = triton.cdiv(pages, max(splits // pieces, 1))
    launch = Launch(
        splits_kernel,
        (slots * lists,),
        *strides_of(sizes, grid),
        sizes.scale * LOG2_E,
        sizes.kv_heads,
        grid.pairs,
        grid.tiles,
        pages,
        spans,
        min(sizes.span, tokens),
        capacity,
        sizes.keys,
        device=sizes.device,
        aligned=sizes.aligned,
        SPLITS=splits,
        SLOTS=slots,
        BLOCK_P=min(power_of_two(pages), MOST_LISTED),
        BLOCK_T=power_of_two(tokens) if splits else 16,
        LONG=pages > MOST_LISTED,
        PIECES=pieces,
        LATER=sizes.later,
        **constants_of(sizes, grid),
    )
    shape = batch, q_heads, tokens, slots, head_dim
    return SplitKV(launch, shape, lists * splits * 2 * capacity, splits, slots)
