"""Building blocks of the attention kernels: rows and pages of a program, and the online softmax over tiles.

Inside kernels an LSE is in log2 units, since the hardware has `exp2`: the scale carries a factor of log2(e).
An LSE that leaves a kernel for good is a natural logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

__all__ = [
    "LN2",
    "NEG_INF",
    "active_rows",
    "attend_tiles",
    "block_part",
    "list_pages",
    "load_rows",
    "product",
    "softmax_end",
    "softmax_step",
    "store_part",
    "wanted_pages",
]

LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def softmax_step(scores, running_max, running_sum, scale_log2):
    """Take raw scores ``[BLOCK_M, BLOCK_N]`` into an online softmax.

    Returns the tile's weights, the new maximum and sum, and the factor ``[BLOCK_M]`` that rescales what was
    accumulated before. The maximum is one of raw scores: to scale and shift is one multiply-add an element.
    """
    new_max = tl.maximum(running_max, tl.max(scores, axis=1))  # [BLOCK_M]
    shift = tl.where(new_max == NEG_INF, 0.0, new_max) * scale_log2  # -inf - -inf would be NaN
    weights = tl.exp2(scores * scale_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
    rescale = tl.exp2(running_max * scale_log2 - shift)  # [BLOCK_M]
    return weights, new_max, running_sum * rescale + tl.sum(weights, axis=1), rescale


@triton.jit
def softmax_end(running_max, running_sum, scale_log2):
    """Return what to divide ``acc`` by, and the LSE in log2 units: 1 and -inf for rows without a key, ``[BLOCK_M]``."""
    total = tl.where(running_sum == 0, 1.0, running_sum)
    return total, tl.where(running_sum == 0, NEG_INF, running_max * scale_log2 + tl.log2(total))


@triton.jit
def product(queries, keys):
    """Return queries times keys transposed, ``[BLOCK_M, BLOCK_N]`` in float32; "ieee" keeps float32 exact."""
    return tl.dot(queries, tl.trans(keys), input_precision="ieee")


@triton.jit
def load_rows(base, rows, stride, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows ``[rows, BLOCK_D]``; channels past HEAD_DIM are 0, as are rows outside ``keep`` if MASKED."""
    channel = tl.arange(0, BLOCK_D)
    at = base + rows[:, None] * stride + channel[None, :]
    if MASKED:
        tile = tl.load(at, mask=keep[:, None] & (channel[None, :] < HEAD_DIM), other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(at, mask=channel[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def active_rows(is_active, token, row, ROWS: tl.constexpr):
    """Return for each row of a tile its token ``[BLOCK_M]``, and whether there is one.

    A tile holds ``ROWS`` rows of each query head of a group: the active ones, in order. The ``r``-th active
    token is found by comparing ranks, since registers cannot be indexed.
    """
    rank = tl.cumsum(is_active.to(tl.int32), axis=0) - 1  # [BLOCK_T]
    same = is_active[None, :] & (rank[None, :] == (row % ROWS)[:, None])  # [BLOCK_M, BLOCK_T]
    return tl.sum(tl.where(same, token[None, :], 0), axis=1), tl.sum(same.to(tl.int32), axis=1) > 0


@triton.jit
def wanted_pages(
    mask, is_active, token, page, mask_strides, pages, spans, span, MASK_ROWS: tl.constexpr, PER_ROW: tl.constexpr
):
    """Return int32 ``[BLOCK_P]``: which of some pages any active row of the group selected."""
    if not PER_ROW:
        return (tl.load(mask + page, mask=page < pages, other=0) != 0).to(tl.int32)
    wanted = page * 0
    for i in range(MASK_ROWS):
        for s in range(spans):
            used = tl.max((is_active & (token // span == s)).to(tl.int32), axis=0)
            row = mask + i * mask_strides[2] + s * mask_strides[3]
            chosen = tl.load(row + page, mask=page < pages, other=0)
            wanted |= (chosen != 0).to(tl.int32) * used
    return wanted


@triton.jit
def list_pages(
    wanted, page, physical, length, taken, which, entries, logicals, LISTS: tl.constexpr, PER_ROW: tl.constexpr
):
    """Write the wanted pages that belong to list ``which`` of LISTS; return how many all lists have.

    Of the wanted pages that exist, in reading order, a list takes every ``LISTS``-th: no program waits for a
    count, and no list is longer than another by more than one.
    """
    wanted = tl.where(length > 0, wanted, 0)  # [BLOCK_P]
    rank = taken + tl.cumsum(wanted, axis=0) - 1
    mine = (wanted > 0) & (rank % LISTS == which)
    place = rank // LISTS
    # One number for page and length: what is scattered has to be reordered among threads first.
    entry = (physical.to(tl.int64) << 16) | length
    tl.store(entries + place, entry, mask=mine)
    if PER_ROW:
        tl.store(logicals + place, page.to(tl.int64), mask=mine)
    return taken + tl.sum(wanted, axis=0)


@triton.jit
def _listed_page(entries, first, listed, PART: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return physical page and length for the tokens of a tile: scalars where it lies in one page.

    Call it in the iteration that uses the result. Carried across iterations, the masked load becomes an
    asynchronous copy that stalls those of K and V.
    """
    if PART % BLOCK_N == 0:  # noqa: SIM108 (known at compile time: the types differ)
        place = first // PART
    else:
        place = (first + tl.arange(0, BLOCK_N)) // PART
    entry = tl.load(entries + place, mask=place < listed, other=0)
    return entry >> 16, (entry & 0xFFFF).to(tl.int32)


@triton.jit
def attend_tiles(
    queries,
    k_pages,
    v_pages,
    entries,
    logicals,
    mask_row,
    exists,
    channel,
    begin,
    end,
    listed,
    piece,
    k_stride,
    v_stride,
    scale_log2,
    PAGE_SIZE: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to tokens ``begin`` to ``end`` of a list of pages; return maximum, sum and ``acc`` of a softmax.

    A page counts ``PART`` tokens, its ``piece``-th part of so many. ``PER_ROW`` masks pages for rows that did
    not select them, where rows or query heads have selections of their own.
    """
    wide = (channel < HEAD_DIM)[None, :]
    running_max = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        physical, length = _listed_page(entries, first, listed, PART, BLOCK_N)
        if PART % BLOCK_N == 0:
            slot = piece * PART + first % PART + tl.arange(0, BLOCK_N)
            from_k = k_pages + physical * k_stride[0] + slot[:, None] * k_stride[2] + channel[None, :]
            from_v = v_pages + physical * v_stride[0] + slot[:, None] * v_stride[2] + channel[None, :]
        else:
            slot = piece * PART + (first + tl.arange(0, BLOCK_N)) % PART
            from_k = k_pages + (physical * k_stride[0] + slot * k_stride[2])[:, None] + channel[None, :]
            from_v = v_pages + (physical * v_stride[0] + slot * v_stride[2])[:, None] + channel[None, :]
        valid = slot < length
        keys = tl.load(from_k, mask=valid[:, None] & wide, other=0.0)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        seen = valid[None, :]
        if PER_ROW:
            place = (first + tl.arange(0, BLOCK_N)) // PART
            logical = tl.load(logicals + place, mask=place < listed, other=0)
            chosen = tl.load(mask_row[:, None] + logical[None, :], mask=exists[:, None] & seen, other=0)
            seen = seen & (chosen != 0)
        scores = tl.where(seen, scores, NEG_INF)
        weights, running_max, running_sum, rescale = softmax_step(scores, running_max, running_sum, scale_log2)
        acc = acc * rescale[:, None]
        values = tl.load(from_v, mask=valid[:, None] & wide, other=0.0)  # [BLOCK_N, BLOCK_D]
        if PER_ROW:
            # A weight of 0 does not stop a NaN in a page that another row selected.
            bad = values.to(tl.float32) - values.to(tl.float32) != 0
            hit = tl.dot(seen.to(values.dtype), bad.to(values.dtype), input_precision=PRECISION)
            acc = tl.where(hit > 0, float("nan"), acc)
            values = tl.where(bad, 0.0, values).to(values.dtype)
        acc = tl.dot(weights.to(values.dtype), values, acc=acc, input_precision=PRECISION)
    return running_max, running_sum, acc


@triton.jit
def block_part(
    q,
    k,
    v,
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
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Attend from all rows of a group to the block's own keys, dense.

    With ``WAIT`` the kernel before may still run and read memory that is reused for the parts: they are
    stored when it is done.
    """
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    for first_row in range(tile * BLOCK_M, GROUP * TOKENS, tiles * BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        group_head, token = row // TOKENS, row % TOKENS
        exists = row < GROUP * TOKENS
        from_q = q + group_head[:, None] * q_stride[1] + token[:, None] * q_stride[2] + channel[None, :]
        queries = tl.load(from_q, mask=exists[:, None] & wide, other=0.0)  # [BLOCK_M, BLOCK_D]
        running_max = tl.full((BLOCK_M,), NEG_INF, tl.float32)
        running_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, keys, BLOCK_K):
            key = first + tl.arange(0, BLOCK_K)
            there = (key < keys)[:, None] & wide
            block_keys = tl.load(k + key[:, None] * k_stride[2] + channel[None, :], mask=there, other=0.0)
            scores = tl.dot(queries, tl.trans(block_keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_K]
            scores = tl.where((key < keys)[None, :], scores, NEG_INF)
            weights, running_max, running_sum, rescale = softmax_step(scores, running_max, running_sum, scale_log2)
            acc = acc * rescale[:, None]
            values = tl.load(v + key[:, None] * v_stride[2] + channel[None, :], mask=there, other=0.0)
            acc = tl.dot(weights.to(values.dtype), values, acc=acc, input_precision=PRECISION)
        if WAIT:
            gdc_wait()
        slot = slots + (group_head * TOKENS + token) * SLOTS + SLOTS - 1
        store_part(part_out, part_lse, slot, exists, running_max, running_sum, acc, scale_log2, channel, HEAD_DIM)


@triton.jit
def store_part(
    part_out, part_lse, slot, exists, running_max, running_sum, acc, scale_log2, channel, HEAD_DIM: tl.constexpr
):
    """Store a partial state: normalised ``out``, and ``lse`` in log2 units."""
    total, lse = softmax_end(running_max, running_sum, scale_log2)
    tl.store(part_lse + slot, lse, mask=exists)
    into = part_out + slot.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    # One division a row: one an element would be a third of what a short program executes.
    tl.store(into, acc * (1.0 / total)[:, None], mask=exists[:, None] & (channel < HEAD_DIM)[None, :])
