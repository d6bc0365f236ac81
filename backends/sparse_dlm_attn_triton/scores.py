"""Page bounds, change of queries, page scores: kernels and launches of what pages are chosen by.

Data flow of a ranked pass, each arrow one launch (docs/backends/triton.md)::

    q, q_reference -> [changes] -> [scores] -> [select] -> active rows, pages -> attention.py
    q, bounds ------------------------^

`scores_kernel` multiplies all rows of a block, active or not, while `changes_kernel` still runs: they fit
into the same tile of the tensor cores. Which of them are active decides only what is stored.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_triton.common import (
    WIDE_TILE_BYTES,
    Launch,
    aligned,
    last_contiguous,
    layout,
    power_of_two,
    precision,
    shared_memory,
)

__all__ = ["changes_launch", "page_bounds", "page_scores", "scores_launch"]

Tensor = torch.Tensor


@triton.jit
def bounds_kernel(
    k_pages,
    page_table,
    page_lengths,
    lower,
    upper,
    k_stride,
    kv_heads,
    pages,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a page and KV head: minimum and maximum of its valid keys, NaN if one of them is."""
    page, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(page_lengths + sequence * pages + page)
    physical = tl.load(page_table + sequence * pages + page, mask=length > 0, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    start = k_pages + physical * k_stride[0] + head.to(tl.int64) * k_stride[1]
    smallest = tl.full((BLOCK_D,), float("inf"), tl.float32)
    largest = tl.full((BLOCK_D,), float("-inf"), tl.float32)
    nan = tl.zeros((BLOCK_D,), tl.int32)
    for first in range(0, PAGE_SIZE, BLOCK_T):
        slot = first + tl.arange(0, BLOCK_T)
        valid = (slot < length)[:, None] & (channel < HEAD_DIM)[None, :]
        where = start + slot[:, None].to(tl.int64) * k_stride[2] + channel[None, :]
        keys = tl.load(where, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        nan |= tl.max((keys != keys).to(tl.int32), axis=0)
        smallest = tl.minimum(smallest, tl.min(tl.where(valid, keys, float("inf")), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(valid, keys, float("-inf")), axis=0))
    smallest = tl.where(length > 0, tl.where(nan > 0, float("nan"), smallest), 0.0)
    largest = tl.where(length > 0, tl.where(nan > 0, float("nan"), largest), 0.0)
    at = ((sequence * kv_heads + head).to(tl.int64) * pages + page) * HEAD_DIM + channel
    tl.store(lower + at, smallest.to(lower.dtype.element_ty), mask=channel < HEAD_DIM)
    tl.store(upper + at, largest.to(upper.dtype.element_ty), mask=channel < HEAD_DIM)


def page_bounds(k_pages: Tensor, page_table: Tensor, page_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of each page's valid keys, ``(batch, kv_heads, pages, head_dim)``."""
    (batch, pages), (_, kv_heads, page_size, head_dim) = page_table.shape, k_pages.shape
    lower = k_pages.new_empty((batch, kv_heads, pages, head_dim))
    upper = torch.empty_like(lower)
    if lower.numel():
        bounds_kernel[(pages, kv_heads, batch)](
            k_pages,
            page_table.contiguous(),
            page_lengths.contiguous(),
            lower,
            upper,
            k_pages.stride()[:3],
            kv_heads,
            pages,
            PAGE_SIZE=page_size,
            HEAD_DIM=head_dim,
            BLOCK_T=min(power_of_two(page_size, 1), 64),
            BLOCK_D=power_of_two(head_dim),
        )
    return lower, upper


@triton.jit
def changes_kernel(
    q,
    reference,
    changes,
    q_stride,
    reference_stride,
    q_heads,
    numbers,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row of a block: mean squared change of its queries (clause CHANGE-1)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    q += sequence * q_stride[0] + token * q_stride[2] + channel[None, :]
    reference += sequence * reference_stride[0] + token * reference_stride[2] + channel[None, :]
    squares = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for first in range(0, q_heads, BLOCK_H):
        head = (first + tl.arange(0, BLOCK_H))[:, None]
        there = (head < q_heads) & (channel < HEAD_DIM)[None, :]
        now = tl.load(q + head * q_stride[1], mask=there, other=0.0).to(tl.float32)
        moved = now - tl.load(reference + head * reference_stride[1], mask=there, other=0.0).to(tl.float32)
        squares += moved * moved
    total = tl.sum(tl.sum(squares, axis=1), axis=0)
    # the mean, rounded once
    tl.store(changes + sequence * tl.num_programs(0) + token, tl.div_rn(total, numbers.to(tl.float32)))


def changes_launch(device: torch.device, q: Any, reference: Any, aligned_all: bool) -> Launch:
    """Settle the launch of the mean squared change of each row; layouts of queries now and before."""
    batch, q_heads, tokens, head_dim = q[0]
    block_d = power_of_two(head_dim)
    return Launch(
        changes_kernel,
        (tokens, batch),
        q[1][:3],
        reference[1][:3],
        q_heads,
        q_heads * head_dim,
        device=device,
        aligned=aligned_all,
        HEAD_DIM=head_dim,
        BLOCK_H=min(power_of_two(q_heads, 1), 8192 // block_d),
        BLOCK_D=block_d,
        num_warps=8,
    )


@triton.jit
def _rank_by_change(changes, token, tokens, count, mass, BLOCK_T: tl.constexpr, BY_MASS: tl.constexpr):
    """Return ``[BLOCK_M]``: how many rows of the block changed more than each ``token``, and whether it is active.

    Clauses CHANGE-2 and CHANGE-3: among equals the first row comes first, and NaN changed most.
    """
    other = tl.arange(0, BLOCK_T)
    inside = other < tokens
    change = tl.load(changes + other, mask=inside, other=0.0)  # [BLOCK_T]
    mine = tl.load(changes + token)  # [BLOCK_M]
    nan = change != change
    change = tl.where(nan, float("inf"), change)
    mine = tl.where(mine != mine, float("inf"), mine)
    before = (change[None, :] > mine[:, None]) | (
        (change[None, :] == mine[:, None]) & (other[None, :] < token[:, None])
    )
    before = before & inside[None, :]
    rank = tl.sum(before.to(tl.int32), axis=1)
    if not BY_MASS:
        return rank, rank < count
    amounts = tl.where(inside, change, 0.0).to(tl.float64)
    reached = tl.sum(tl.where(before, amounts[None, :], 0.0), axis=1)
    # A change that is NaN makes every row active.
    unknown = tl.max(nan.to(tl.int32), axis=0) > 0
    limit = tl.where(unknown, 1.0, tl.load(mass) * tl.sum(amounts, axis=0))
    return rank, tl.where(unknown, 0.0, reached) < limit


@triton.jit
def scores_kernel(
    q,
    lower,
    upper,
    changes,
    mass,
    scores,
    active,
    order,
    union,
    q_stride,
    lower_stride,
    upper_stride,
    kv_heads,
    pages,
    unions,
    count,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    RULE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a tile of pages, a tile of rows and a KV head: ``relu(q) . upper + min(q, 0) . lower``.

    ``RULE`` says which rows are active: those of largest change, so many of them ("count") or a share of all
    change ("mass"), or all ("all"). Active rows are stored one behind the other, ``ROWS`` a head, and
    ``order`` holds their tokens. For `select_kernel`, programs clear their part of the union. No rule:
    scores of all rows and nothing else.
    """
    CHANGED: tl.constexpr = (RULE == "count") | (RULE == "mass")
    if PDL and not CHANGED:  # the first kernel of a pass
        gdc_wait()
        gdc_launch_dependents()
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)  # all query heads of the group, one after the other
    group_head, token = row // TOKENS, row % TOKENS
    exists = row < GROUP * TOKENS
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    page = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    stored = (page < pages)[:, None] & wide
    from_lower = lower + sequence * lower_stride[0] + head * lower_stride[1] + page[:, None] * lower_stride[2]
    low = tl.load(from_lower + channel[None, :], mask=stored, other=0.0)  # [BLOCK_P, BLOCK_D]
    from_upper = upper + sequence * upper_stride[0] + head * upper_stride[1] + page[:, None] * upper_stride[2]
    high = tl.load(from_upper + channel[None, :], mask=stored, other=0.0)
    from_q = q + sequence * q_stride[0] + head * GROUP * q_stride[1]
    from_q += group_head[:, None] * q_stride[1] + token[:, None] * q_stride[2]
    queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)  # [BLOCK_M, BLOCK_D]
    # Written so that a NaN query is in both parts: a maximum with 0 might hide it.
    zero = tl.zeros_like(queries)
    positive = tl.where(queries < zero, zero, queries)
    negative = tl.where(queries > zero, zero, queries)
    best = tl.dot(positive, tl.trans(high), input_precision=PRECISION)  # [BLOCK_M, BLOCK_P]
    best = tl.dot(negative, tl.trans(low), acc=best, input_precision=PRECISION)
    place, is_active = token, exists
    if CHANGED:
        if PDL:  # inputs of the pass were complete before `changes_kernel` let this one start
            gdc_wait()
            gdc_launch_dependents()
        place, changed = _rank_by_change(
            changes + sequence * TOKENS, token, TOKENS, count, mass, BLOCK_T, RULE == "mass"
        )
        is_active = exists & changed
    into = scores + ((pair * GROUP + group_head) * ROWS + place).to(tl.int64)[:, None] * pages + page[None, :]
    tl.store(into, best, mask=is_active[:, None] & (page < pages)[None, :])
    if RULE != "":
        if part == 0:  # the union has one row for a KV head, a query head or a query row
            rows_each = unions // kv_heads
            for i in range(rows_each):
                at_union = union + (sequence * unions + head * rows_each + i) * pages + page
                tl.store(at_union, tl.zeros((BLOCK_P,), tl.int8), mask=page < pages)
        if (tile == 0) & (head == 0):
            first = exists & (group_head == 0)
            tl.store(active + sequence * TOKENS + token, is_active.to(tl.int8), mask=first)
            listed = tl.where(is_active, token, -1)
            tl.store(order + sequence * ROWS + place, listed, mask=first & (place < ROWS))


@functools.lru_cache(maxsize=1024)
def scores_launch(
    device: torch.device,
    dtype: torch.dtype,
    q: Any,
    lower: Any,
    upper: Any,
    rows: int,
    rule: str,
    unions: int,
    count: int,
    aligned_all: bool,
) -> Launch:
    """Settle the launch of scores, by themselves or with the decisions of a ranked pass."""
    (batch, q_heads, tokens, head_dim), (_, kv_heads, pages, _) = q[0], lower[0]
    group, single = q_heads // kv_heads, dtype == torch.float32
    side = 32 if single or head_dim > 128 else 64
    if single and head_dim > 128 and shared_memory(device) < WIDE_TILE_BYTES:
        side = 16
    block_m, block_p = min(power_of_two(group * tokens), side if single else 64), min(power_of_two(pages), side)
    tiles, parts = max(triton.cdiv(pages, block_p), 1), triton.cdiv(group * tokens, block_m)
    return Launch(
        scores_kernel,
        (tiles, parts, batch * kv_heads),
        q[1][:3],
        lower[1][:3],
        upper[1][:3],
        kv_heads,
        pages,
        unions,
        count,
        device=device,
        aligned=aligned_all,
        TOKENS=tokens,
        GROUP=group,
        ROWS=rows,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_P=block_p,
        BLOCK_T=power_of_two(tokens, 1),
        BLOCK_D=power_of_two(head_dim),
        PRECISION=precision(dtype),
        RULE=rule,
        num_warps=4,
    )


def page_scores(q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return the QUEST bound of every row and page, float32 ``(batch, q_heads, tokens, pages)``."""
    q, lower, upper = last_contiguous(q), last_contiguous(lower), last_contiguous(upper)
    (batch, q_heads, tokens, _), pages = q.shape, lower.shape[2]
    scores = torch.empty((batch, q_heads, tokens, pages), dtype=torch.float32, device=q.device)
    if scores.numel():
        aligned_all = aligned(q, lower, upper)
        launch = scores_launch(
            q.device, q.dtype, layout(q), layout(lower), layout(upper), tokens, "", 0, 0, aligned_all
        )
        launch(q, lower, upper, scores, scores, scores, scores, scores, scores)
    return scores
