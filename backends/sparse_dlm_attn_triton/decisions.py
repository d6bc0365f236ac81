"""Kernels of decisions: page bounds, changed rows, page scores, best pages.

Data flow of a ranked pass, each arrow one launch (docs/backends/triton.md has the sizes)::

    q, q_reference -> [changes] -> [scores] -> [select] -> active rows, pages -> attention.py
    q, bounds ------------------------^

`scores` multiplies all rows of a block, active or not, while `changes` still runs: they fit into the same
tile of the tensor cores. Which of them are active decides only what is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["bounds_kernel", "changes_kernel", "scores_kernel", "select_kernel", "top_kernel"]

ABSENT = tl.constexpr(-0x80000000)  # below the key of every score, that of -inf too


@triton.jit
def bounds_kernel(
    k_pages, page_table, page_lengths, lower, upper,
    stride_page, stride_head, stride_token, kv_heads, pages,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a page and KV head: minimum and maximum of its valid keys, NaN if one of them is."""
    page, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(page_lengths + sequence * pages + page)
    physical = tl.load(page_table + sequence * pages + page, mask=length > 0, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    start = k_pages + physical * stride_page + head.to(tl.int64) * stride_head
    smallest = tl.full((BLOCK_D,), float("inf"), tl.float32)
    largest = tl.full((BLOCK_D,), float("-inf"), tl.float32)
    nan = tl.zeros((BLOCK_D,), tl.int32)
    for first in range(0, PAGE_SIZE, BLOCK_T):
        slot = first + tl.arange(0, BLOCK_T)
        valid = (slot < length)[:, None] & (channel < HEAD_DIM)[None, :]
        where = start + slot[:, None].to(tl.int64) * stride_token + channel[None, :]
        keys = tl.load(where, mask=valid, other=0.0).to(tl.float32)
        nan |= tl.max((keys != keys).to(tl.int32), axis=0)
        smallest = tl.minimum(smallest, tl.min(tl.where(valid, keys, float("inf")), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(valid, keys, float("-inf")), axis=0))
    smallest = tl.where(length > 0, tl.where(nan > 0, float("nan"), smallest), 0.0)
    largest = tl.where(length > 0, tl.where(nan > 0, float("nan"), largest), 0.0)
    at = ((sequence * kv_heads + head).to(tl.int64) * pages + page) * HEAD_DIM + channel
    tl.store(lower + at, smallest.to(lower.dtype.element_ty), mask=channel < HEAD_DIM)
    tl.store(upper + at, largest.to(upper.dtype.element_ty), mask=channel < HEAD_DIM)


@triton.jit
def changes_kernel(
    q, reference, changes,
    stride_qb, stride_qh, stride_qt, stride_rb, stride_rh, stride_rt, q_heads, numbers,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row of a block: mean squared change of its queries (clause CHANGE-1)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    q += sequence * stride_qb + token * stride_qt + channel[None, :]
    reference += sequence * stride_rb + token * stride_rt + channel[None, :]
    squares = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for first in range(0, q_heads, BLOCK_H):
        head = (first + tl.arange(0, BLOCK_H))[:, None]
        there = (head < q_heads) & (channel < HEAD_DIM)[None, :]
        now = tl.load(q + head * stride_qh, mask=there, other=0.0).to(tl.float32)
        moved = now - tl.load(reference + head * stride_rh, mask=there, other=0.0).to(tl.float32)
        squares += moved * moved
    total = tl.sum(tl.sum(squares, axis=1), axis=0)
    # the mean, rounded once
    tl.store(changes + sequence * tl.num_programs(0) + token, tl.div_rn(total, numbers.to(tl.float32)))


@triton.jit
def _places(changes, token, tokens, count, mass, BLOCK_T: tl.constexpr, BY_MASS: tl.constexpr):
    """Return how many rows of the block changed more than each ``token``, and whether it is active.

    Clauses CHANGE-2 and CHANGE-3: among equals the first row comes first, and NaN changed most.
    """
    other = tl.arange(0, BLOCK_T)
    inside = other < tokens
    change = tl.load(changes + other, mask=inside, other=0.0)
    mine = tl.load(changes + token)
    nan = change != change
    change = tl.where(nan, float("inf"), change)
    mine = tl.where(mine != mine, float("inf"), mine)
    before = (change[None, :] > mine[:, None]) | (
        (change[None, :] == mine[:, None]) & (other[None, :] < token[:, None])
    )
    before = before & inside[None, :]
    place = tl.sum(before.to(tl.int32), axis=1)
    if not BY_MASS:
        return place, place < count
    amounts = tl.where(inside, change, 0.0).to(tl.float64)
    reached = tl.sum(tl.where(before, amounts[None, :], 0.0), axis=1)
    # A change that is NaN makes every row active.
    unknown = tl.max(nan.to(tl.int32), axis=0) > 0
    limit = tl.where(unknown, 1.0, tl.load(mass) * tl.sum(amounts, axis=0))
    return place, tl.where(unknown, 0.0, reached) < limit


@triton.jit
def scores_kernel(
    q, lower, upper, changes, mass, scores, active, order, union,
    stride_qb, stride_qh, stride_qt, stride_lb, stride_lh, stride_lp, stride_ub, stride_uh, stride_up,
    kv_heads, pages, unions, count,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, RULE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile of pages, a tile of rows and a KV head: ``relu(q) . upper + min(q, 0) . lower``.

    ``RULE`` says which rows are active: those of largest change, so many of them ("count") or a share of all
    change ("mass"), or all ("all"). Active rows are stored one behind the other, ``ROWS`` a head, with
    ``order`` telling their tokens. For `select_kernel`, programs empty their part of the union. No rule:
    scores of all rows and nothing else.
    """
    CHANGED: tl.constexpr = (RULE == "count") | (RULE == "mass")
    if PDL and not CHANGED:  # the first kernel of a pass
        gdc_wait()
        gdc_launch_dependents()
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)  # all query heads of the group, one after the other
    of_group, token = row // TOKENS, row % TOKENS
    exists = row < GROUP * TOKENS
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    page = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    stored = (page < pages)[:, None] & wide
    from_lower = lower + sequence * stride_lb + head * stride_lh + page[:, None] * stride_lp
    low = tl.load(from_lower + channel[None, :], mask=stored, other=0.0)
    from_upper = upper + sequence * stride_ub + head * stride_uh + page[:, None] * stride_up
    high = tl.load(from_upper + channel[None, :], mask=stored, other=0.0)
    from_q = q + sequence * stride_qb + head * GROUP * stride_qh
    from_q += of_group[:, None] * stride_qh + token[:, None] * stride_qt
    queries = tl.load(from_q + channel[None, :], mask=exists[:, None] & wide, other=0.0)
    # Written so that a NaN query is in both parts: a maximum with 0 might hide it.
    nothing = tl.zeros_like(queries)
    positive = tl.where(queries < nothing, nothing, queries)
    negative = tl.where(queries > nothing, nothing, queries)
    best = tl.dot(positive, tl.trans(high), input_precision=PRECISION)
    best = tl.dot(negative, tl.trans(low), acc=best, input_precision=PRECISION)
    place, is_active = token, exists
    if CHANGED:
        if PDL:  # inputs of the pass were complete before `changes_kernel` let this one start
            gdc_wait()
            gdc_launch_dependents()
        place, changed = _places(
            changes + sequence * TOKENS, token, TOKENS, count, mass, BLOCK_T, RULE == "mass"
        )
        is_active = exists & changed
    into = scores + ((pair * GROUP + of_group) * ROWS + place).to(tl.int64)[:, None] * pages + page[None, :]
    tl.store(into, best, mask=is_active[:, None] & (page < pages)[None, :])
    if RULE != "":
        if part == 0:  # the union has one row for a KV head, a query head or a query row
            rows_each = unions // kv_heads
            for i in range(rows_each):
                at_union = union + (sequence * unions + head * rows_each + i) * pages + page
                tl.store(at_union, tl.zeros((BLOCK_P,), tl.int8), mask=page < pages)
        if (tile == 0) & (head == 0):
            first = exists & (of_group == 0)
            tl.store(active + sequence * TOKENS + token, is_active.to(tl.int8), mask=first)
            listed = tl.where(is_active, token, -1)
            tl.store(order + sequence * ROWS + place, listed, mask=first & (place < ROWS))


@triton.jit
def _ordered(scores):
    """Return int32 keys in the order of float32 scores: both zeros are one, NaN ranks as +inf."""
    scores = tl.where(scores != scores, float("inf"), tl.where(scores == 0, 0.0, scores))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(keys, wanted, PARTS: tl.constexpr):
    """Return the mask of the ``wanted`` largest keys that are not `ABSENT`, the lowest index first of equals.

    A search for the cut: ``reach_low`` keys reach ``low``, at least as many as wanted, and ``reach_high``,
    fewer, reach ``high``. Each turn counts above two values between them, in one sum. It ends early where
    exactly ``wanted`` keys reach one of them, and where all but one of those wanted reach ``high`` or one
    too many reach ``low``: the key next to that end is the cut then. Three keys in between are few enough
    for that, which spares the turns that part close neighbours.

    It begins at the smallest of the largest keys of ``PARTS`` parts, each what one thread holds: so many keys
    reach it, mostly more than are wanted, and with far less between it and the largest than below.
    """
    # Neighbours that a thread loads together. A builtin min would be no constant to Triton 3.5.
    each: tl.constexpr = 4 if keys.shape[0] >= 4 * PARTS else keys.shape[0] // PARTS
    parted = tl.reshape(keys, (keys.shape[0] // (PARTS * each), PARTS, each))
    largest = tl.max(tl.max(parted, axis=2), axis=0)
    low = tl.min(tl.where(largest == ABSENT, 0x7FFFFFFE, largest), axis=0)
    if tl.sum((largest != ABSENT).to(tl.int32), axis=0) < wanted:
        low = tl.min(tl.where(keys == ABSENT, 0x7FFFFFFE, keys), axis=0)
    high = tl.max(largest, axis=0) + 1
    reach_low, reach_high = keys.shape[0] + wanted, wanted * 0
    while (low + 1 < high) & (reach_low != wanted + 1) & (reach_high != wanted - 1):
        width = high.to(tl.int64) - low
        third = tl.maximum((width * 0x5555) >> 16, 1)
        first = (low + third).to(tl.int32)
        second = tl.maximum(low + 2 * third, first).to(tl.int32)
        counts = tl.sum(tl.where(keys >= first, 1, 0) + tl.where(keys >= second, 0x10000, 0), axis=0)
        one, two = counts & 0xFFFF, counts >> 16
        # Which of the three parts holds the cut; a part of width 1 if a value is the cut itself.
        low, high, reach_low, reach_high = (
            tl.where(two > wanted, second, tl.where(two == wanted, second - 1, tl.where(
                     one > wanted, first, tl.where(one == wanted, first - 1, low)))),
            tl.where(two > wanted, high, tl.where(two == wanted, second,
                     tl.where(one > wanted, second, first))),
            tl.where(two > wanted, two, tl.where(one > wanted, one, reach_low)),
            tl.where(two > wanted, reach_high, tl.where(one > wanted, two, one)),
        )  # fmt: skip
    if low + 1 < high:
        if reach_high == wanted - 1:
            low = tl.max(tl.where(keys < high, keys, ABSENT), axis=0)
        else:
            low = tl.min(tl.where(keys >= low, keys, 0x7FFFFFFE), axis=0)
        high = low + 1
    above, equal = keys >= high, keys == low
    counts = tl.sum(tl.where(above, 1, 0) + tl.where(equal, 0x10000, 0), axis=0)
    room = wanted - (counts & 0xFFFF)
    if room == counts >> 16:
        above = above | equal
    elif room > 0:  # some that tie with the last one taken are left out
        above = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
    return above


@triton.jit
def top_kernel(
    scores, counts, eligible, chosen, pages,
    BLOCK_P: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a row of scores: its ``count`` best eligible pages (clauses TOP-1 to TOP-4)."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.arange(0, BLOCK_P)
    inside = page < pages
    allowed = inside & (tl.load(eligible + row * pages + page, mask=inside, other=0) != 0)
    keys = _ordered(tl.load(scores + row * pages + page, mask=inside, other=0.0).to(tl.float32))
    count = tl.load(counts + row)
    wanted = tl.minimum(tl.maximum(count, 0), tl.sum(allowed.to(tl.int32), axis=0))
    best = _best(tl.where(allowed, keys, ABSENT), wanted, PARTS)
    tl.store(chosen + row * pages + page, best.to(tl.int8), mask=inside)


@triton.jit
def select_kernel(
    scores, order, page_lengths, union, q_heads, pages, unions, budget, bought,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program an active row and query head: which pages does it want.

    A page wanted is written as 1 into the union, which `scores_kernel` has emptied: programs that write the
    same 1 need no order.
    """
    number, query_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    page = tl.arange(0, BLOCK_P)
    # Page tables were complete before the first kernel of this pass let the others start.
    length = tl.load(page_lengths + sequence * pages + page, mask=page < pages, other=0)
    there = length > 0
    existing = tl.sum(there.to(tl.int32), axis=0)
    # A context that fits into the budget is read whole.
    wanted = tl.where(tl.sum(length, axis=0) <= budget, existing, tl.minimum(bought, existing))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(order + sequence * ROWS + number)
    of_scores = (sequence * q_heads + query_head) * ROWS + number
    keys = _ordered(tl.load(scores + of_scores * pages + page, mask=page < pages, other=0.0))
    if row >= 0:  # fewer rows than places may be active
        best = _best(tl.where(there, keys, ABSENT), wanted, PARTS)
        # unions is kv_heads, q_heads or q_heads * tokens rows
        of_row = (query_head * TOKENS + row) * unions // (q_heads * TOKENS)
        tl.store(union + (sequence * unions + of_row) * pages + page, (best * 0 + 1).to(tl.int8), mask=best)
