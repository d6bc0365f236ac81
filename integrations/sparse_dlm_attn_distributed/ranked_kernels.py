"""Triton kernels of a ranked pass over many GPUs: changed rows, and the best pages of all ranks.

A candidate is one int64: the order of its score in the high half, of its page in the low one, so that the
larger number is the better page and among equal scores the lower page. `ranking` proves that the best pages
of all ranks are among the best that each rank holds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_distributed.kernels import _address, _raise_flags, _wait

__all__ = ["change_kernel", "choose_kernel"]

NONE = tl.constexpr(-(1 << 63) + 1)  # below any candidate


@triton.jit
def change_kernel(
    q, reference, changes, q_heads,
    stride_qb, stride_qh, stride_qt, stride_rb, stride_rh, stride_rt,
    HEAD_DIM: tl.constexpr, NUMBERS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: mean over heads and channels of the squared change of its query (CHANGE-1)."""
    token, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = tl.num_programs(0)
    channel = tl.arange(0, BLOCK_D)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, q_heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        there = (head < q_heads)[:, None] & (channel < HEAD_DIM)[None, :]
        at_q = q + sequence * stride_qb + token * stride_qt + head[:, None] * stride_qh + channel[None, :]
        at_r = reference + sequence * stride_rb + token * stride_rt + head[:, None] * stride_rh
        now = tl.load(at_q, mask=there, other=0.0).to(tl.float32)
        before = tl.load(at_r + channel[None, :], mask=there, other=0.0).to(tl.float32)
        sums += tl.sum((now - before) * (now - before), axis=1)
    numbers = tl.sum(tl.zeros((BLOCK_H,), tl.float32), axis=0) + NUMBERS
    tl.store(changes + sequence * tokens + token, tl.div_rn(tl.sum(sums, axis=0), numbers))


@triton.jit
def _active_rows(
    changes, sequence, count, mass,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BY_MASS: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """Return which rows are active, bool ``(BLOCK_T,)`` (clauses CHANGE-2 and CHANGE-3)."""
    token = tl.arange(0, BLOCK_T)
    inside = token < TOKENS
    if ALL_ROWS:
        return inside
    change = tl.load(changes + sequence * TOKENS + token, mask=inside, other=0.0)
    nan = change != change
    change = tl.where(nan, float("inf"), change)
    # The same changes as a column: rows that come before row t are counted beside it.
    column = tl.sum(tl.where(token[:, None] == token[None, :], change[None, :], 0.0), axis=1)
    tied = (change[None, :] == column[:, None]) & (token[None, :] < token[:, None])
    before = ((change[None, :] > column[:, None]) | tied) & inside[None, :]
    if BY_MASS:
        amounts = tl.where(inside, change, 0.0).to(tl.float64)
        reached = tl.sum(tl.where(before, amounts[None, :], 0.0), axis=1)
        limit = tl.load(mass) * tl.sum(amounts, axis=0)
        return inside & ((reached < limit) | (tl.max(nan.to(tl.int32), axis=0) > 0))
    return inside & (tl.sum(before.to(tl.int32), axis=1) < count)


@triton.jit
def _row_of_item(rows, number, BLOCK_T: tl.constexpr):
    """Return the ``number``-th active row, -1 if there is none."""
    mine = rows & (tl.cumsum(rows.to(tl.int32), axis=0) - 1 == number)
    return tl.max(tl.where(mine, tl.arange(0, BLOCK_T), -1), axis=0)


@triton.jit
def choose_kernel(
    table, epochs, stopped, scores, changes, page_lengths, held, active, union,
    q_heads, pages, unions, most, items, count, mass, budget, bought, space, flags_at, limit,
    TOKENS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PHASE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BY_MASS: tl.constexpr, ALL_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program some active rows of query heads: send the best pages held, take the best of all ranks.

    An item is a sequence, a query head and one of its ``most`` active rows. A page chosen is written as 1
    into the union, which is empty before: programs that write the same 1 need no order.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    page, lane = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs + program) + 1
    half = (epoch & 1) * RANKS
    if PHASE != 2:
        for item in range(program, items, programs):
            number, query_head = item % most, (item // most) % q_heads
            sequence = (item // most // q_heads).to(tl.int64)
            rows = _active_rows(changes, sequence, count, mass, TOKENS, BLOCK_T, BY_MASS, ALL_ROWS)
            row = _row_of_item(rows, number, BLOCK_T)
            if row >= 0:
                inside = page < pages
                length = tl.load(page_lengths + sequence * pages + page, mask=inside, other=0)
                here = tl.load(held + sequence * pages + page, mask=inside, other=0) != 0
                of_scores = scores + ((sequence * q_heads + query_head) * TOKENS + row) * pages
                score = tl.load(of_scores + page, mask=inside, other=0.0)
                # int32 in the order of float32: both zeros are one, NaN ranks as +inf.
                score = tl.where(score != score, float("inf"), tl.where(score == 0, 0.0, score))
                bits = score.to(tl.int32, bitcast=True)
                order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
                keys = (order.to(tl.int64) << 32) | (0x7FFFFFFF - page).to(tl.int64)
                keys = tl.where(here & (length > 0), keys, NONE)
                best = tl.full((BLOCK_C,), NONE, tl.int64)
                for place in range(bought):
                    top = tl.max(keys, axis=0)
                    best = tl.where(lane == place, top, best)
                    keys = tl.where(keys == top, NONE, keys)
                for peer in tl.static_range(RANKS):
                    message = _address(table, peer, tl.int8) + (half + RANK) * space
                    tl.store(message.to(tl.pointer_type(tl.int64)) + item * BLOCK_C + lane, best)
        _raise_flags(table, program, programs, epoch, flags_at, RANK, RANKS)
    if PHASE != 1:
        came = program * 0 + 1
        if PHASE == 3:
            came = _wait(table, stopped, program, programs, epoch, flags_at, limit, RANK, RANKS)
        messages = _address(table, RANK, tl.int8) + half * space
        each = tl.arange(0, BLOCK_R * BLOCK_C)
        rank, place_in = each // BLOCK_C, each % BLOCK_C
        for item in range(program, items, programs):
            number, query_head = item % most, (item // most) % q_heads
            sequence = (item // most // q_heads).to(tl.int64)
            rows = _active_rows(changes, sequence, count, mass, TOKENS, BLOCK_T, BY_MASS, ALL_ROWS)
            token = tl.arange(0, BLOCK_T)
            # One of the items of a sequence says which of its rows are active.
            said = tl.where(item % (most * q_heads) == 0, TOKENS, 0)
            tl.store(active + sequence * TOKENS + token, rows.to(tl.int8), mask=token < said)
            row = _row_of_item(rows, number, BLOCK_T)
            if (row >= 0) & (came != 0):
                length = tl.load(page_lengths + sequence * pages + page, mask=page < pages, other=0)
                exists = (length > 0).to(tl.int32)
                existing = tl.sum(exists, axis=0)
                of_row = (query_head * TOKENS + row) * unions // (q_heads * TOKENS)
                chosen = union + (sequence * unions + of_row) * pages
                if tl.sum(length, axis=0) <= budget:  # a context that fits into the budget is read whole
                    tl.store(chosen + page, exists.to(tl.int8), mask=(page < pages) & (exists != 0))
                else:
                    from_rank = (messages + rank * space).to(tl.pointer_type(tl.int64))
                    known = tl.load(
                        from_rank + item * BLOCK_C + place_in, mask=rank < RANKS, other=NONE,
                        cache_modifier=".cg",
                    )
                    left, cut = known, tl.max(known, axis=0)
                    for _ in range(1, tl.minimum(bought, existing)):
                        left = tl.where(left == cut, NONE, left)
                        cut = tl.max(left, axis=0)
                    taken = (known >= cut) & (known > NONE)  # an empty context has no candidate
                    best_page = (0x7FFFFFFF - (known & 0xFFFFFFFF)).to(tl.int32)
                    tl.store(chosen + best_page, (known * 0 + 1).to(tl.int8), mask=taken)
        tl.store(epochs + program, epoch)
