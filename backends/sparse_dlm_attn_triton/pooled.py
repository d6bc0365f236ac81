"""The selection sweep: how much of each span's attention falls on each page (clauses POOLED-1 to 3).

Given the LSE of the dense pass that a policy selects after, one sweep over the keys sums
``exp(scale q.k - lse)`` within tiles of rows and pages; nothing of the size rows x keys is ever stored.
Without it a first sweep finds the LSE. See docs/backends/full-sequence.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sparse_dlm_attn_triton.common import LOG2_E, power_of_two
from sparse_dlm_attn_triton.pooled_tiles import (
    add_to_scores,
    full_scores,
    pages_of_program,
    partial_scores,
    physical_pages,
    row_masses,
)
from sparse_dlm_attn_triton.span_tiles import Tile, pooled_tile
from sparse_dlm_attn_triton.tiles import LN2, NEG_INF, load_rows, softmax_end, softmax_step

__all__ = ["context_lse", "pooled_scores"]

PROGRAMS = 1024
"""Programs to aim for: enough to fill a large GPU several times over."""
LEAST_STEPS = 8
"""Steps that are worth a program of their own."""
LOG2_E_IN_KERNEL = tl.constexpr(LOG2_E)
Tensor = torch.Tensor


@triton.jit
def pooled_kernel(
    q,
    k,
    lse,
    scores,
    table,
    lengths,
    runs,
    q_stride,
    k_stride,
    table_stride,
    lengths_stride,
    tokens,
    span,
    spans,
    pages,
    pages_a_program,
    parts,
    q_heads,
    kv_heads,
    scale_log2,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROOM: tl.constexpr,
    SLOTS: tl.constexpr,
    SUBS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN_ROOM: tl.constexpr,
    MANY: tl.constexpr,
):
    """Score a share of the pages for the spans of one tile of one head; see `pooled_scores`."""
    b, head = tl.program_id(1) // q_heads, tl.program_id(1) % q_heads
    k_at = k + (head // (q_heads // kv_heads)).to(tl.int64) * k_stride[1]
    q_at = q + b.to(tl.int64) * q_stride[0] + head.to(tl.int64) * q_stride[1]
    table_at, lengths_at = table + b * table_stride[0], lengths + b * lengths_stride[0]
    lse_at = lse + tl.program_id(1).to(tl.int64) * tokens
    scores_at = scores + tl.program_id(1).to(tl.int64) * spans * pages
    begin, full, end = pages_of_program(runs, b, pages_a_program)
    bulk = (full - begin) // SLOTS
    index = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    sizes = tl.maximum(tl.minimum(tokens - index * span, span), 1).to(tl.float32)
    local = tl.arange(0, BLOCK_M)
    for part in range(parts):
        place = local % SPAN_ROOM + part * BLOCK_M
        row = (tl.program_id(0) * SPANS + local // SPAN_ROOM) * span + place
        alive = (place < span) & (row < tokens)
        queries = load_rows(q_at, row.to(tl.int64), q_stride[2], alive, HEAD_DIM, BLOCK_D, True)
        log = tl.load(lse_at + row, mask=alive, other=0.0)
        # A row without mass has scores of -inf alone: any finite stand-in gives 0 for it.
        lse_log2 = tl.where(log == NEG_INF, 0.0, log) * LOG2_E_IN_KERNEL
        # Read one step ahead, so that keys do not wait for the table within a step.
        physical = physical_pages(table_at, begin, table_stride[1], pages, BLOCK_N, ROOM, SLOTS)
        for i in range(bulk):
            page = begin + i * SLOTS
            mass = tl.zeros([BLOCK_M, SLOTS], dtype=tl.float32)
            for sub in range(SUBS):
                found = full_scores(queries, k_at, physical, sub, k_stride, PAGE_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, ROOM)
                mass += row_masses(found, lse_log2, alive, scale_log2, BLOCK_M, SLOTS)
            add_to_scores(scores_at, mass, sizes, page, end, spans, pages, index, SPANS, SPAN_ROOM, SLOTS, MANY)
            physical = physical_pages(table_at, page + SLOTS, table_stride[1], pages, BLOCK_N, ROOM, SLOTS)
        for page in range(begin + bulk * SLOTS, end, SLOTS):
            mass = tl.zeros([BLOCK_M, SLOTS], dtype=tl.float32)
            for sub in range(SUBS):
                found = partial_scores(
                    queries,
                    k_at,
                    table_at,
                    lengths_at,
                    page,
                    sub,
                    table_stride[1],
                    lengths_stride[1],
                    k_stride,
                    end,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_N,
                    ROOM,
                )
                mass += row_masses(found, lse_log2, alive, scale_log2, BLOCK_M, SLOTS)
            add_to_scores(scores_at, mass, sizes, page, end, spans, pages, index, SPANS, SPAN_ROOM, SLOTS, MANY)


@triton.jit
def lse_kernel(
    q,
    k,
    logs,
    table,
    lengths,
    runs,
    q_stride,
    k_stride,
    table_stride,
    lengths_stride,
    tokens,
    pages,
    pages_a_program,
    shares,
    q_heads,
    kv_heads,
    scale_log2,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROOM: tl.constexpr,
    SLOTS: tl.constexpr,
    SUBS: tl.constexpr,
):
    """Find the LSE of one tile of rows over a share of the pages; see `context_lse`."""
    b, head = tl.program_id(1) // q_heads, tl.program_id(1) % q_heads
    k_at = k + (head // (q_heads // kv_heads)).to(tl.int64) * k_stride[1]
    q_at = q + b.to(tl.int64) * q_stride[0] + head.to(tl.int64) * q_stride[1]
    table_at, lengths_at = table + b * table_stride[0], lengths + b * lengths_stride[0]
    begin, full, end = pages_of_program(runs, b, pages_a_program)
    bulk = (full - begin) // SLOTS
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = row < tokens
    queries = load_rows(q_at, row.to(tl.int64), q_stride[2], alive, HEAD_DIM, BLOCK_D, True)
    running_max = tl.full([BLOCK_M], NEG_INF, dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    physical = physical_pages(table_at, begin, table_stride[1], pages, BLOCK_N, ROOM, SLOTS)
    for i in range(bulk):
        for sub in range(SUBS):
            found = full_scores(queries, k_at, physical, sub, k_stride, PAGE_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, ROOM)
            _, running_max, running_sum, _ = softmax_step(found, running_max, running_sum, scale_log2)
        physical = physical_pages(table_at, begin + (i + 1) * SLOTS, table_stride[1], pages, BLOCK_N, ROOM, SLOTS)
    for page in range(begin + bulk * SLOTS, end, SLOTS):
        for sub in range(SUBS):
            found = partial_scores(
                queries,
                k_at,
                table_at,
                lengths_at,
                page,
                sub,
                table_stride[1],
                lengths_stride[1],
                k_stride,
                end,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                ROOM,
            )
            _, running_max, running_sum, _ = softmax_step(found, running_max, running_sum, scale_log2)
    _, log = softmax_end(running_max, running_sum, scale_log2)
    at = (tl.program_id(1) * shares + tl.program_id(2)).to(tl.int64) * tokens
    tl.store(logs + at + row, log * LN2, mask=alive)


def _runs(lengths: Tensor, page_size: int) -> Tensor:
    """Return, int32 ``(batch, 3)``, where pages begin, where the first run of full pages ends, and the end.

    Computed on the device: what a kernel skips without a look by the host.
    """
    pages = lengths.shape[1]
    number = torch.arange(pages, device=lengths.device, dtype=torch.int32)
    exists = lengths > 0
    begin = torch.where(exists, number, pages).amin(1)
    end = torch.where(exists, number + 1, 0).amax(1)
    broken = (lengths != page_size) & (number >= begin[:, None])
    full = torch.minimum(torch.where(broken, number, pages).amin(1), end)
    return torch.stack([torch.minimum(begin, end), full, end], dim=1).to(torch.int32).contiguous()


def _sweep(
    q: Tensor, k_pages: Tensor, page_table: Tensor, page_lengths: Tensor, tile: Tile, row_tiles: int
) -> tuple[int, int, tuple[Any, ...], dict[str, Any]]:
    """Return programs that share the pages, pages of each, and what both kernels take: tensors and constants."""
    (batch, q_heads, _, head_dim), (pages, page_size) = q.shape, (page_table.shape[1], k_pages.shape[2])
    # A page takes a power of two of a step's keys; a step has several pages, or a page several steps.
    room = power_of_two(page_size, 1)
    slots, subs = max(tile.tokens // room, 1), max(room // tile.tokens, 1)
    wanted = triton.cdiv(PROGRAMS, max(row_tiles * batch * q_heads, 1))
    each = triton.cdiv(max(triton.cdiv(pages, wanted), LEAST_STEPS * slots), slots) * slots
    constants = {
        "PAGE_SIZE": page_size,
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.tokens,
        "ROOM": room,
        "SLOTS": slots,
        "SUBS": subs,
        **tile.launch_options(),
    }
    tensors = (
        page_table,
        page_lengths,
        _runs(page_lengths, page_size),
        q.stride()[:3],
        k_pages.stride()[:3],
        page_table.stride(),
        page_lengths.stride(),
    )
    return triton.cdiv(pages, each), each, tensors, constants


def context_lse(
    q: Tensor, k_pages: Tensor, page_table: Tensor, page_lengths: Tensor, scale: float, *, tile: Tile | None = None
) -> Tensor:
    """Return the LSE of every row over all valid keys, without values; -inf for an empty context.

    Arguments as for `pooled_scores`; float32 ``(batch, q_heads, tokens)``, a natural logarithm.
    """
    (batch, q_heads, tokens, head_dim), kv_heads, pages = q.shape, k_pages.shape[1], page_table.shape[1]
    if 0 in (*q.shape, pages, *k_pages.shape):
        return q.new_full(q.shape[:3], -float("inf"), dtype=torch.float32)
    tile = tile or pooled_tile(q.dtype, head_dim, tokens, tokens)
    row_tiles = triton.cdiv(tokens, tile.rows)
    shares, each, tensors, constants = _sweep(q, k_pages, page_table, page_lengths, tile, row_tiles)
    logs = torch.empty((batch, q_heads, shares, tokens), dtype=torch.float32, device=q.device)
    lse_kernel[(row_tiles, batch * q_heads, shares)](
        q, k_pages, logs, *tensors, tokens, pages, each, shares, q_heads, kv_heads, scale * LOG2_E, **constants
    )
    return logs[:, :, 0] if shares == 1 else logs.logsumexp(2)


def pooled_scores(
    q: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    span: int,
    scale: float,
    lse: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Return the mean softmax mass of each page over each span's rows (clauses POOLED-1 to POOLED-3).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``, any strides with a contiguous last axis; float16,
        bfloat16 or float32.
    k_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``, any strides with a contiguous last axis.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    span : int
        Rows to average over.
    scale : float
        Factor on q.k, positive.
    lse : torch.Tensor, optional
        float32 ``(batch, q_heads, tokens)``: what masses are shares of. Without it the context's own,
        found by a sweep before.
    tile : Tile, optional
        How programs work; chosen from the shape unless given.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, spans, pages)``.
    """
    (batch, q_heads, tokens, head_dim), kv_heads, pages = q.shape, k_pages.shape[1], page_table.shape[1]
    span = min(span, max(tokens, 1))
    spans = -(-tokens // span)
    scores = torch.zeros((batch, q_heads, spans, pages), dtype=torch.float32, device=q.device)
    if 0 in (*q.shape, pages, *k_pages.shape):
        return scores
    if lse is None:
        lse = context_lse(q, k_pages, page_table, page_lengths, scale)
    tile = tile or pooled_tile(q.dtype, head_dim, tokens, span)
    room = min(power_of_two(span, 1), tile.rows)
    together, parts = tile.rows // room, triton.cdiv(span, tile.rows)
    groups = triton.cdiv(spans, together)
    shares, each, tensors, constants = _sweep(q, k_pages, page_table, page_lengths, tile, groups)
    pooled_kernel[(groups, batch * q_heads, shares)](
        q,
        k_pages,
        lse.contiguous(),
        scores,
        *tensors,
        tokens,
        span,
        spans,
        pages,
        each,
        parts,
        q_heads,
        kv_heads,
        scale * LOG2_E,
        SPANS=together,
        SPAN_ROOM=room,
        MANY=parts > 1,
        **constants,
    )
    return scores
