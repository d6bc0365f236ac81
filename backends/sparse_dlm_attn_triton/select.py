"""The best pages of each row: a search for the score that cuts off exactly so many of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_triton.common import Launch, bytes_of, power_of_two

__all__ = ["MOST_RANKED", "select_launch", "top_pages"]

MOST_RANKED = 16384
"""Most pages that one program ranks in registers."""
ABSENT = tl.constexpr(-0x80000000)  # below the key of every score, that of -inf too
ABOVE_ALL = tl.constexpr(0x7FFFFFFE)  # above the key of every score; 1 more still fits int32
Tensor = torch.Tensor


@triton.jit
def _order_keys(scores):
    """Return int32 keys in the order of float32 scores: both zeros are one, NaN ranks as +inf."""
    scores = tl.where(scores != scores, float("inf"), tl.where(scores == 0, 0.0, scores))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(keys, wanted, PARTS: tl.constexpr):
    """Return the mask ``[BLOCK_P]`` of the ``wanted`` largest keys but `ABSENT`, of equals the lowest index first.

    A search for the cut between ``low``, which at least ``wanted`` keys reach (``reach_low``), and ``high``,
    which fewer reach. Each iteration counts above two values between them, in one sum. It ends early where
    one key more than wanted reaches ``low``, or one less ``high``: the key next to that end is the cut then.

    It begins at the smallest of the largest keys of ``PARTS`` parts, each what one thread holds: so many keys
    reach it, mostly more than are wanted, and with far less between it and the largest than below.
    """
    # Neighbours that a thread loads together. A builtin min would be no constant to Triton 3.5.
    each: tl.constexpr = 4 if keys.shape[0] >= 4 * PARTS else keys.shape[0] // PARTS
    parted = tl.reshape(keys, (keys.shape[0] // (PARTS * each), PARTS, each))
    largest = tl.max(tl.max(parted, axis=2), axis=0)  # [PARTS]
    low = tl.min(tl.where(largest == ABSENT, ABOVE_ALL, largest), axis=0)
    if tl.sum((largest != ABSENT).to(tl.int32), axis=0) < wanted:
        low = tl.min(tl.where(keys == ABSENT, ABOVE_ALL, keys), axis=0)
    high = tl.max(largest, axis=0) + 1
    reach_low, reach_high = keys.shape[0] + wanted, wanted * 0
    while (low + 1 < high) & (reach_low != wanted + 1) & (reach_high != wanted - 1):
        width = high.to(tl.int64) - low
        third = tl.maximum((width * 0x5555) >> 16, 1)
        first = (low + third).to(tl.int32)
        second = tl.maximum(low + 2 * third, first).to(tl.int32)
        counts = tl.sum(tl.where(keys >= first, 1, 0) + tl.where(keys >= second, 0x10000, 0), axis=0)
        reach_first, reach_second = counts & 0xFFFF, counts >> 16
        # Keep the third that holds the cut: the upper one, or the middle one, or else the lowest. A value that
        # exactly `wanted` keys reach ends the search: a width of 1 is left below it.
        in_upper, at_second, below_second = reach_second > wanted, reach_second == wanted, second - 1
        in_middle, at_first = reach_first > wanted, reach_first == wanted
        new_low = tl.where(at_first, first - 1, low)
        new_low = tl.where(in_middle, first, new_low)
        new_low = tl.where(at_second, below_second, new_low)
        low = tl.where(in_upper, second, new_low)
        new_high = tl.where(in_middle, second, first)
        new_high = tl.where(at_second, second, new_high)
        high = tl.where(in_upper, high, new_high)
        reach_low = tl.where(in_upper, reach_second, tl.where(in_middle, reach_first, reach_low))
        reach_high = tl.where(in_upper, reach_high, tl.where(in_middle, reach_second, reach_first))
    if low + 1 < high:
        if reach_high == wanted - 1:
            low = tl.max(tl.where(keys < high, keys, ABSENT), axis=0)
        else:
            low = tl.min(tl.where(keys >= low, keys, ABOVE_ALL), axis=0)
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
def top_kernel(scores, counts, eligible, chosen, pages, BLOCK_P: tl.constexpr, PARTS: tl.constexpr):
    """One program a row of scores: its ``count`` best eligible pages (clauses TOP-1 to TOP-4)."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.arange(0, BLOCK_P)
    inside = page < pages
    allowed = inside & (tl.load(eligible + row * pages + page, mask=inside, other=0) != 0)
    keys = _order_keys(tl.load(scores + row * pages + page, mask=inside, other=0.0).to(tl.float32))
    count = tl.load(counts + row)
    wanted = tl.minimum(tl.maximum(count, 0), tl.sum(allowed.to(tl.int32), axis=0))
    best = _best(tl.where(allowed, keys, ABSENT), wanted, PARTS)
    tl.store(chosen + row * pages + page, best.to(tl.int8), mask=inside)


@triton.jit
def select_kernel(
    scores,
    order,
    page_lengths,
    union,
    q_heads,
    pages,
    unions,
    budget,
    top_k,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program an active row and query head: the ``top_k`` pages that it wants.

    A page wanted is written as 1 into the union, which `scores_kernel` has cleared: programs that write the
    same 1 need no order.
    """
    place, query_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    page = tl.arange(0, BLOCK_P)
    # Page tables were complete before the first kernel of this pass let the others start.
    length = tl.load(page_lengths + sequence * pages + page, mask=page < pages, other=0)
    there = length > 0
    existing = tl.sum(there.to(tl.int32), axis=0)
    # A context that fits into the budget is read whole.
    wanted = tl.where(tl.sum(length, axis=0) <= budget, existing, tl.minimum(top_k, existing))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(order + sequence * ROWS + place)
    of_scores = (sequence * q_heads + query_head) * ROWS + place
    keys = _order_keys(tl.load(scores + of_scores * pages + page, mask=page < pages, other=0.0))
    if row >= 0:  # fewer rows than places may be active
        best = _best(tl.where(there, keys, ABSENT), wanted, PARTS)
        # unions is kv_heads, q_heads or q_heads * tokens rows
        of_row = (query_head * TOKENS + row) * unions // (q_heads * TOKENS)
        tl.store(union + (sequence * unions + of_row) * pages + page, (best * 0 + 1).to(tl.int8), mask=best)


def _search_sizes(pages: int) -> dict[str, int]:
    """Return how a program ranks so many pages: about 8 keys a thread, and a part for each thread.

    Fewer keys make iterations of the search shorter and sums over warps relatively longer.
    """
    block = power_of_two(pages)
    warps = min(max(block // 256, 1), 16)
    return {"BLOCK_P": block, "PARTS": min(32 * warps, block), "num_warps": warps}


def select_launch(
    device: torch.device,
    grid: tuple[int, int, int],
    tokens: int,
    pages: int,
    unions: int,
    budget: int,
    top_k: int,
    aligned_all: bool,
) -> Launch:
    """Settle the launch of the choice of pages; the grid is active rows, query heads and sequences."""
    rows, q_heads, _ = grid
    return Launch(
        select_kernel,
        grid,
        q_heads,
        pages,
        unions,
        budget,
        top_k,
        device=device,
        aligned=aligned_all,
        TOKENS=tokens,
        ROWS=rows,
        **_search_sizes(pages),
    )


def top_pages(scores: Tensor, count: Tensor, eligible: Tensor) -> Tensor:
    """Return the mask of the ``count`` best eligible pages; at most `MOST_RANKED` pages."""
    pages, rows = scores.shape[-1], scores[..., 0].numel() if scores.shape[-1] else 0
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if chosen.numel() == 0:
        return chosen
    # Clamped in its own dtype first: a count may not fit int32.
    counts = count.clamp(0, min(pages, 127)) if count.dtype == torch.int8 else count.clamp(0, pages)
    counts = counts.to(torch.int32).expand(scores.shape[:-1]).contiguous()
    allowed = bytes_of(eligible.expand(scores.shape).contiguous())
    top_kernel[(rows,)](scores.contiguous(), counts, allowed, bytes_of(chosen), pages, **_search_sizes(pages))
    return chosen
