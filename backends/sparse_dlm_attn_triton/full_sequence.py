"""Block-sparse attention of long blocks over selected pages: the frozen selection of a whole sequence.

One program computes a tile of query rows of one head with an online softmax over the list of pages that the
tile's spans selected. Full pages need no mask; lists are made on the device (docs/backends/full-sequence.md).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from sparse_dlm_attn_triton.common import LOG2_E, power_of_two, shared_memory
from sparse_dlm_attn_triton.span_lists import SpanLists, span_lists
from sparse_dlm_attn_triton.span_tiles import Tile, attend_tile, can_describe, descriptors
from sparse_dlm_attn_triton.tiles import LN2, NEG_INF, load_rows, product, softmax_end, softmax_step

__all__ = ["attend_spans", "lists_for"]

Tensor = torch.Tensor


@triton.jit
def _softmax_values(scores, values, keep, running_max, running_sum, acc, scale_log2, MASKED: tl.constexpr):
    """Take a tile of keys and values into an online softmax; ``keep`` is where it counts, if MASKED."""
    if MASKED:
        scores = tl.where(keep, scores, NEG_INF)
    weights, running_max, running_sum, rescale = softmax_step(scores, running_max, running_sum, scale_log2)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return running_max, running_sum, acc


@triton.jit
def spans_kernel(
    q,
    k,
    v,
    out,
    lse,
    active,
    entries,
    bits,
    counts,
    table,
    lengths,
    k_tiles,
    v_tiles,
    q_stride,
    k_stride,
    v_stride,
    active_stride,
    table_stride,
    lengths_stride,
    k_rows,
    v_rows,
    tokens,
    span,
    groups,
    pages,
    tiles_a_group,
    heads,
    q_heads,
    kv_heads,
    scale_log2,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOGETHER: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """One program a tile of rows of a head; TOGETHER spans share a tile. See `attend_spans`."""
    # Programs that follow each other share a head, so that its keys stay in the L2 cache.
    group, part = tl.program_id(0) // tiles_a_group, tl.program_id(0) % tiles_a_group
    b, head = tl.program_id(1) // q_heads, tl.program_id(1) % q_heads
    kv_head = (head // (q_heads // kv_heads)).to(tl.int64)
    local = part * BLOCK_M + tl.arange(0, BLOCK_M)
    row = group * (TOGETHER * span) + local
    exists = (local < TOGETHER * span) & (row < tokens)
    alive = exists & (tl.load(active + b * active_stride[0] + row * active_stride[1], mask=exists, other=0) != 0)
    q_at = q + b.to(tl.int64) * q_stride[0] + head.to(tl.int64) * q_stride[1]
    queries = load_rows(q_at, row.to(tl.int64), q_stride[2], alive, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    which = tl.minimum(local // span, TOGETHER - 1)  # the span of each row

    listed = (b * heads + head // (q_heads // heads)) * groups + group
    first = entries + listed.to(tl.int64) * pages
    first_bits = bits + listed.to(tl.int64) * pages
    full = tl.load(counts + listed * 2)
    partial = tl.load(counts + listed * 2 + 1)
    k_at, v_at = k + kv_head * k_stride[1], v + kv_head * v_stride[1]
    k_row, v_row = (kv_head * k_rows[1]).to(tl.int32), (kv_head * v_rows[1]).to(tl.int32)
    key = tl.arange(0, BLOCK_N)
    running_max = tl.full([BLOCK_M], NEG_INF, dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    # The page of the next step is read one step ahead and carried over: a load whose address comes from another
    # load of the same step would take a stage of the pipeline, and K and V would come late.
    if PAGE_SIZE % BLOCK_N == 0:  # a step lies within a page
        page, chosen = tl.load(first), which
        if TOGETHER > 1:
            chosen = tl.load(first_bits) >> which
        for i in tl.range(0, full * (PAGE_SIZE // BLOCK_N), warp_specialize=SPECIALIZE):
            within = (i % (PAGE_SIZE // BLOCK_N)) * BLOCK_N
            if TMA:
                keys = k_tiles.load([page * k_rows[0] + k_row + within, 0])  # [BLOCK_N, BLOCK_D]
                values = v_tiles.load([page * v_rows[0] + v_row + within, 0])
            else:
                at = page.to(tl.int64)
                k_first, v_first = at * k_stride[0] + within * k_stride[2], at * v_stride[0] + within * v_stride[2]
                keys = load_rows(k_at + k_first, key, k_stride[2], key, HEAD_DIM, BLOCK_D, False)
                values = load_rows(v_at + v_first, key, v_stride[2], key, HEAD_DIM, BLOCK_D, False)
            scores = product(queries, keys)  # [BLOCK_M, BLOCK_N]
            keep = ((chosen & 1) != 0)[:, None]
            running_max, running_sum, acc = _softmax_values(
                scores, values, keep, running_max, running_sum, acc, scale_log2, TOGETHER > 1
            )
            following = tl.minimum((i + 1) // (PAGE_SIZE // BLOCK_N), pages - 1)
            page = tl.load(first + following)
            if TOGETHER > 1:
                chosen = tl.load(first_bits + following) >> which
    else:  # the listed pages are one stream of tokens
        whole = full * PAGE_SIZE // BLOCK_N
        page, chosen = tl.load(first + tl.minimum(key // PAGE_SIZE, pages - 1)), key  # [BLOCK_N]
        if TOGETHER > 1:
            chosen = tl.load(first_bits + tl.minimum(key // PAGE_SIZE, pages - 1))
        for i in tl.range(0, whole, warp_specialize=SPECIALIZE):
            within = (i * BLOCK_N + key) % PAGE_SIZE
            at = page.to(tl.int64)
            keys = load_rows(k_at, at * k_stride[0] + within * k_stride[2], 1, key, HEAD_DIM, BLOCK_D, False)
            values = load_rows(v_at, at * v_stride[0] + within * v_stride[2], 1, key, HEAD_DIM, BLOCK_D, False)
            scores = product(queries, keys)
            keep = ((chosen[None, :] >> which[:, None]) & 1) != 0
            running_max, running_sum, acc = _softmax_values(
                scores, values, keep, running_max, running_sum, acc, scale_log2, TOGETHER > 1
            )
            following = tl.minimum(((i + 1) * BLOCK_N + key) // PAGE_SIZE, pages - 1)
            page = tl.load(first + following)
            if TOGETHER > 1:
                chosen = tl.load(first_bits + following)
        if whole * BLOCK_N < full * PAGE_SIZE:
            inside = whole * BLOCK_N + key < full * PAGE_SIZE
            place = (whole * BLOCK_N + key) // PAGE_SIZE
            within = (whole * BLOCK_N + key) % PAGE_SIZE
            at = tl.load(first + place, mask=inside, other=0).to(tl.int64)
            keys = load_rows(k_at, at * k_stride[0] + within * k_stride[2], 1, inside, HEAD_DIM, BLOCK_D, True)
            values = load_rows(v_at, at * v_stride[0] + within * v_stride[2], 1, inside, HEAD_DIM, BLOCK_D, True)
            scores = product(queries, keys)
            keep = inside[None, :]
            if TOGETHER > 1:
                spans = tl.load(first_bits + place, mask=inside, other=0)
                keep = keep & (((spans[None, :] >> which[:, None]) & 1) != 0)
            running_max, running_sum, acc = _softmax_values(
                scores, values, keep, running_max, running_sum, acc, scale_log2, True
            )

    for i in range(partial):
        logical = tl.load(first + pages - 1 - i)
        length = tl.load(lengths + b * lengths_stride[0] + logical * lengths_stride[1])
        at = tl.load(table + b * table_stride[0] + logical * table_stride[1]).to(tl.int64)
        chose = which >= 0
        if TOGETHER > 1:
            chose = ((tl.load(first_bits + pages - 1 - i) >> which) & 1) != 0
        for start in range(0, length, BLOCK_N):
            inside = start + key < length
            keys = load_rows(k_at + at * k_stride[0], start + key, k_stride[2], inside, HEAD_DIM, BLOCK_D, True)
            values = load_rows(v_at + at * v_stride[0], start + key, v_stride[2], inside, HEAD_DIM, BLOCK_D, True)
            keep = inside[None, :] & chose[:, None]
            scores = product(queries, keys)
            running_max, running_sum, added = _softmax_values(
                scores, values, keep, running_max, running_sum, acc, scale_log2, True
            )
            if TOGETHER > 1:
                # A row that did not choose the page must not meet its values, not even with weight 0.
                added = tl.where(chose[:, None], added, acc)
            acc = added

    total, log = softmax_end(running_max, tl.where(alive, running_sum, 0.0), scale_log2)
    shown = tl.where(alive[:, None], acc * (1.0 / total)[:, None], 0.0)
    place = tl.program_id(1).to(tl.int64) * tokens + row
    channel = tl.arange(0, BLOCK_D)
    tl.store(
        out + place[:, None] * HEAD_DIM + channel[None, :],
        shown.to(out.dtype.element_ty),
        mask=exists[:, None] & (channel[None, :] < HEAD_DIM),
    )
    tl.store(lse + place, log * LN2, mask=exists)


def lists_for(
    q: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    mask: Tensor,
    span: int,
    active: Tensor,
    tile: Tile | None = None,
) -> SpanLists:
    """Make the page lists that `attend_spans` takes, once for many passes with one selection.

    Lists stay right for other queries and keys of the same shapes; where spans share a tile, they stay right while
    the same values are finite. Arguments are those of `attend_spans`.
    """
    tokens, span = q.shape[2], min(span, max(q.shape[2], 1))
    tile = tile or attend_tile(q.dtype, q.shape[3], tokens, span, shared_memory(q.device))
    together = max(min(tile.rows // span, mask.shape[2]), 1)
    return span_lists(v_pages, page_table, page_lengths, mask, span, active, together)


def attend_spans(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    mask: Tensor,
    span: int,
    active: Tensor,
    scale: float,
    *,
    tile: Tile | None = None,
    lists: SpanLists | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to selected pages (clause ATTEND-1), for blocks of many spans.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``, any strides with a contiguous last axis; float16,
        bfloat16 or float32.
    k_pages, v_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``, any strides with a contiguous last axis.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``.
    span : int
        Rows that share a selection.
    active : torch.Tensor
        bool ``(batch, tokens)``.
    scale : float
        Factor on q.k, positive.
    tile : Tile, optional
        How programs work; chosen from the shape unless given.
    lists : SpanLists, optional
        What `lists_for` made from the same arguments; made anew unless given.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and float32 ``lse`` ``(batch, q_heads, tokens)``; inactive rows and rows
        without a key have out 0 and lse -inf.
    """
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if 0 in (*q.shape, *mask.shape, k_pages.shape[0], page_size):
        return out.zero_(), lse.fill_(-float("inf"))
    span = min(span, tokens)
    if tile is None:
        tile = attend_tile(q.dtype, head_dim, tokens, span, shared_memory(q.device))
        tile = replace(tile, tma=span >= 128 and can_describe(k_pages, v_pages, tile))
    if lists is None:
        lists = lists_for(q, v_pages, page_table, page_lengths, mask, span, active, tile)
    heads, groups, pages = lists.entries.shape[1:]
    tiles_a_group = triton.cdiv(lists.spans_together * span, tile.rows)
    k_tiles, v_tiles, k_rows, v_rows = descriptors(k_pages, v_pages, tile)
    spans_kernel[(groups * tiles_a_group, batch * q_heads)](
        q,
        k_pages,
        v_pages,
        out,
        lse,
        active.view(torch.uint8),
        lists.entries,
        lists.bits,
        lists.counts,
        page_table,
        page_lengths,
        k_tiles,
        v_tiles,
        q.stride()[:3],
        k_pages.stride()[:3],
        v_pages.stride()[:3],
        active.stride(),
        page_table.stride(),
        page_lengths.stride(),
        k_rows,
        v_rows,
        tokens,
        span,
        groups,
        pages,
        tiles_a_group,
        heads,
        q_heads,
        kv_heads,
        scale * LOG2_E,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.tokens,
        TOGETHER=lists.spans_together,
        TMA=tile.tma,
        SPECIALIZE=tile.warp_specialize,
        **tile.launch_options(),
    )
    return out, lse
