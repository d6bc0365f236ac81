"""Block-sparse attention of long blocks over selected pages: the frozen selection of a whole sequence.

One program computes a tile of query rows of one head with a streaming softmax (FlashAttention 2), over
the list of pages that the tile's spans chose. Whole pages need no mask; lists are made on the device.
See docs/backends/full-sequence.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_dlm_attn_triton.common import shared_memory
from sparse_dlm_attn_triton.span_lists import SpanLists, span_lists
from sparse_dlm_attn_triton.span_tiles import LOG2_E, Tile, attend_tile, padded_dim, row_view

__all__ = ["attend_spans", "lists_for"]


@triton.jit
def _softmax_step(scores, values, keep, peak, total, acc, factor, MASKED: tl.constexpr):
    """Take a tile of keys into the streaming softmax; ``keep`` is where it counts, if MASKED."""
    if MASKED:
        scores = tl.where(keep, scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    # Rows that have seen nothing but -inf: no -inf - -inf.
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores * factor - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    weights = weights.to(values.dtype)
    return higher, total, tl.dot(weights, values, acc, input_precision="ieee")


@triton.jit
def _product(queries, keys):
    """Return queries times keys transposed, in float32; "ieee" keeps float32 inputs from TF32."""
    return tl.dot(queries, tl.trans(keys), input_precision="ieee")


@triton.jit
def _load_rows(base, rows, stride, keep, DIM: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of channels; channels past DIM are 0, as are rows outside ``keep`` if MASKED."""
    channel = tl.arange(0, CHANNELS)
    at = base + rows[:, None] * stride + channel[None, :]
    if MASKED:
        tile = tl.load(at, mask=keep[:, None] & (channel[None, :] < DIM), other=0.0)
    elif CHANNELS != DIM:
        tile = tl.load(at, mask=channel[None, :] < DIM, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _attend(
    q, k, v, out, lse, active, entries, bits, counts, table, lengths, k_tiles, v_tiles,
    q_b, q_h, q_t, k_page, k_head, k_token, v_page, v_head, v_token, active_b, active_t,
    table_row, table_page, lengths_row, lengths_page, tokens, span, groups, pages, tiles_a_group,
    heads, q_heads, kv_heads, k_page_rows, k_head_rows, v_page_rows, v_head_rows, factor,
    PAGE: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TOGETHER: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of rows of one head; see `attend_spans`."""
    # Programs that follow each other share a head, so that its keys stay in the L2 cache.
    group, part = tl.program_id(0) // tiles_a_group, tl.program_id(0) % tiles_a_group
    b, head = tl.program_id(1) // q_heads, tl.program_id(1) % q_heads
    kv_head = (head // (q_heads // kv_heads)).to(tl.int64)
    local = part * ROWS + tl.arange(0, ROWS)
    row = group * (TOGETHER * span) + local
    exists = (local < TOGETHER * span) & (row < tokens)
    alive = exists & (tl.load(active + b * active_b + row * active_t, mask=exists, other=0) != 0)
    q_at = q + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    queries = _load_rows(q_at, row.to(tl.int64), q_t, alive, DIM, CHANNELS, True)
    which = tl.minimum(local // span, TOGETHER - 1)

    listed = (b * heads + head // (q_heads // heads)) * groups + group
    first = entries + listed.to(tl.int64) * pages
    first_bits = bits + listed.to(tl.int64) * pages
    plain = tl.load(counts + listed * 2)
    careful = tl.load(counts + listed * 2 + 1)
    k_at, v_at = k + kv_head * k_head, v + kv_head * v_head
    k_row, v_row = (kv_head * k_head_rows).to(tl.int32), (kv_head * v_head_rows).to(tl.int32)
    key = tl.arange(0, KEYS)
    peak = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)

    # The page of the next step is read one step ahead and handed on: a load whose address comes from
    # another load of the same step would take a stage of the pipeline, and K and V would come late.
    if PAGE % KEYS == 0:  # a step lies within a page
        page, chosen = tl.load(first), which
        if TOGETHER > 1:
            chosen = tl.load(first_bits) >> which
        for i in tl.range(0, plain * (PAGE // KEYS), warp_specialize=SPECIALIZE):
            within = (i % (PAGE // KEYS)) * KEYS
            if TMA:
                keys = k_tiles.load([page * k_page_rows + k_row + within, 0])
                values = v_tiles.load([page * v_page_rows + v_row + within, 0])
            else:
                at = page.to(tl.int64)
                keys = _load_rows(
                    k_at + at * k_page + within * k_token, key, k_token, key, DIM, CHANNELS, False
                )
                values = _load_rows(
                    v_at + at * v_page + within * v_token, key, v_token, key, DIM, CHANNELS, False
                )
            scores = _product(queries, keys)
            keep = ((chosen & 1) != 0)[:, None]
            peak, total, acc = _softmax_step(scores, values, keep, peak, total, acc, factor, TOGETHER > 1)
            following = tl.minimum((i + 1) // (PAGE // KEYS), pages - 1)
            page = tl.load(first + following)
            if TOGETHER > 1:
                chosen = tl.load(first_bits + following) >> which
    else:  # the listed pages are one stream of tokens
        whole = plain * PAGE // KEYS
        page, chosen = tl.load(first + tl.minimum(key // PAGE, pages - 1)), key
        if TOGETHER > 1:
            chosen = tl.load(first_bits + tl.minimum(key // PAGE, pages - 1))
        for i in tl.range(0, whole, warp_specialize=SPECIALIZE):
            within = (i * KEYS + key) % PAGE
            at = page.to(tl.int64)
            keys = _load_rows(k_at, at * k_page + within * k_token, 1, key, DIM, CHANNELS, False)
            values = _load_rows(v_at, at * v_page + within * v_token, 1, key, DIM, CHANNELS, False)
            scores = _product(queries, keys)
            keep = ((chosen[None, :] >> which[:, None]) & 1) != 0
            peak, total, acc = _softmax_step(scores, values, keep, peak, total, acc, factor, TOGETHER > 1)
            following = tl.minimum(((i + 1) * KEYS + key) // PAGE, pages - 1)
            page = tl.load(first + following)
            if TOGETHER > 1:
                chosen = tl.load(first_bits + following)
        if whole * KEYS < plain * PAGE:
            inside = whole * KEYS + key < plain * PAGE
            place = (whole * KEYS + key) // PAGE
            within = (whole * KEYS + key) % PAGE
            rest = tl.load(first + place, mask=inside, other=0).to(tl.int64)
            keys = _load_rows(k_at, rest * k_page + within * k_token, 1, inside, DIM, CHANNELS, True)
            values = _load_rows(v_at, rest * v_page + within * v_token, 1, inside, DIM, CHANNELS, True)
            scores = _product(queries, keys)
            keep = inside[None, :]
            if TOGETHER > 1:
                spans = tl.load(first_bits + place, mask=inside, other=0)
                keep = keep & (((spans[None, :] >> which[:, None]) & 1) != 0)
            peak, total, acc = _softmax_step(scores, values, keep, peak, total, acc, factor, True)

    for i in range(careful):
        logical = tl.load(first + pages - 1 - i)
        length = tl.load(lengths + b * lengths_row + logical * lengths_page)
        at = tl.load(table + b * table_row + logical * table_page).to(tl.int64)
        chose = which >= 0
        if TOGETHER > 1:
            chose = ((tl.load(first_bits + pages - 1 - i) >> which) & 1) != 0
        for start in range(0, length, KEYS):
            inside = start + key < length
            keys = _load_rows(k_at + at * k_page, start + key, k_token, inside, DIM, CHANNELS, True)
            values = _load_rows(v_at + at * v_page, start + key, v_token, inside, DIM, CHANNELS, True)
            keep = inside[None, :] & chose[:, None]
            scores = _product(queries, keys)
            higher, total, added = _softmax_step(scores, values, keep, peak, total, acc, factor, True)
            if TOGETHER > 1:
                # A row that did not choose the page must not meet its values, not even with weight 0.
                added = tl.where(chose[:, None], added, acc)
            peak, acc = higher, added

    nothing = (total == 0.0) | (alive == 0)
    shown = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, total)[:, None])
    log = (peak + tl.log2(tl.where(nothing, 1.0, total))) * 0.6931471805599453
    log = tl.where(nothing, -float("inf"), log)
    place = tl.program_id(1).to(tl.int64) * tokens + row
    channel = tl.arange(0, CHANNELS)
    tl.store(
        out + place[:, None] * DIM + channel[None, :], shown.to(out.dtype.element_ty),
        mask=exists[:, None] & (channel[None, :] < DIM),
    )
    tl.store(lse + place, log, mask=exists)


def lists_for(
    q: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, page_lengths: torch.Tensor,
    mask: torch.Tensor, span: int, active: torch.Tensor, tile: Tile | None = None,
) -> SpanLists:
    """Make the page lists that `attend_spans` takes, once for many passes with one selection.

    Parameters
    ----------
    q, v_pages, page_table, page_lengths, mask, span, active
        As for `attend_spans`. Lists stay right for other queries and keys of the same shapes; where
        spans share a tile, they stay right while the same values are finite.
    tile : Tile, optional
        As for `attend_spans`.

    Returns
    -------
    SpanLists
        For a tile of as many rows.
    """
    tokens, span = q.shape[2], min(span, max(q.shape[2], 1))
    tile = tile or attend_tile(q.dtype, q.shape[3], tokens, span, v_pages.shape[2], shared_memory(q.device))
    together = max(min(tile.rows // span, mask.shape[2]), 1)
    return span_lists(v_pages, page_table, page_lengths, mask, span, active, together)


def attend_spans(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor,
    page_lengths: torch.Tensor, mask: torch.Tensor, span: int, active: torch.Tensor, scale: float,
    *, tile: Tile | None = None, lists: SpanLists | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
        tile = attend_tile(q.dtype, head_dim, tokens, span, page_size, shared_memory(q.device))
        tile = replace(tile, tma=span >= 128 and _can_describe(k_pages, v_pages, tile))
    if lists is None:
        lists = lists_for(q, v_pages, page_table, page_lengths, mask, span, active, tile)
    heads, groups, pages = lists.entries.shape[1:]
    tiles_a_group = triton.cdiv(lists.spans_together * span, tile.rows)
    channels = padded_dim(head_dim)
    k_tiles, v_tiles, rows = _descriptors(k_pages, v_pages, tile, channels)
    _attend[(groups * tiles_a_group, batch * q_heads)](
        q, k_pages, v_pages, out, lse, active.view(torch.uint8), lists.entries, lists.bits, lists.counts,
        page_table, page_lengths, k_tiles, v_tiles, *q.stride()[:3], *k_pages.stride()[:3],
        *v_pages.stride()[:3], *active.stride(), *page_table.stride(), *page_lengths.stride(), tokens, span,
        groups, pages, tiles_a_group, heads, q_heads, kv_heads, *rows, scale * LOG2_E,
        PAGE=page_size, DIM=head_dim, CHANNELS=channels, ROWS=tile.rows, KEYS=tile.tokens,
        TOGETHER=lists.spans_together, TMA=tile.tma, SPECIALIZE=tile.warp_specialize, **tile.launch_options(),
    )
    return out, lse


def _can_describe(k_pages: torch.Tensor, v_pages: torch.Tensor, tile: Tile) -> bool:
    """Return whether tiles of these pages can be copied by descriptors, which only some GPUs follow."""
    if k_pages.device.type != "cuda" or torch.cuda.get_device_capability(k_pages.device) < (9, 0):
        return False
    if k_pages.dtype == torch.float32 or k_pages.shape[2] % tile.tokens:
        return False
    return row_view(k_pages) is not None and row_view(v_pages) is not None


def _descriptors(
    k_pages: torch.Tensor, v_pages: torch.Tensor, tile: Tile, channels: int
) -> tuple[Any, Any, tuple[int, int, int, int]]:
    """Return tensor descriptors of K and V and the row strides of their pages, if the tile asks for them."""
    if not tile.tma:
        return k_pages, v_pages, (0, 0, 0, 0)
    views = row_view(k_pages), row_view(v_pages)
    if views[0] is None or views[1] is None or k_pages.shape[2] % tile.tokens:
        raise ValueError(
            "tile.tma: needs pages whose tokens lie side by side in memory, rows on 16 bytes, and "
            f"tile.tokens ({tile.tokens}) that divides page_size ({k_pages.shape[2]}); use tma=False."
        )
    from triton.tools.tensor_descriptor import TensorDescriptor  # absent before Triton 3.4

    block = [tile.tokens, channels]
    tiles = [TensorDescriptor.from_tensor(view[0], block) for view in views if view is not None]
    return tiles[0], tiles[1], (views[0][1], views[0][2], views[1][1], views[1][2])
