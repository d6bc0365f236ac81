"""Kernels of attention: over listed pages in splits, then one that finishes a pass.

Data flow of a pass, each arrow one launch (docs/backends/triton.md has the sizes)::

    q, pages, selection -> [splits] -> parts -> [finish] -> out, context state
    q, k, v of the block, cached states ----------^

Scores live in log2 units inside: ``exp2`` is what the hardware has, so ``log2(e)`` is folded into the
scale once. What leaves a kernel as an LSE is a natural logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["finish_kernel", "splits_kernel"]

LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _active_rows(active, tokens, row, ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return for each row of a tile its token, and whether there is one.

    A tile holds ``ROWS`` rows of each query head of a group: the active ones, in order. The ``r``-th active
    token is found by comparing ranks, since registers cannot be indexed.
    """
    token = tl.arange(0, BLOCK_T)
    is_active = tl.load(active + token, mask=token < tokens, other=0) != 0
    rank = tl.cumsum(is_active.to(tl.int32), axis=0) - 1
    same = is_active[None, :] & (rank[None, :] == (row % ROWS)[:, None])
    return tl.sum(tl.where(same, token[None, :], 0), axis=1), tl.sum(same.to(tl.int32), axis=1) > 0


@triton.jit
def _list_pages(
    mask, active, page_table, page_lengths, physicals, lengths, logicals, stride_mask_row, stride_mask_span,
    tokens, pages, spans, span, split,
    SPLITS: tl.constexpr, MASK_ROWS: tl.constexpr, OWN: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write the pages of one split, and return how many they are.

    Wanted is what any active row of the group selected and what exists. Of those in reading order the
    split takes every ``SPLITS``-th, so that no split waits for a count and none is longer by more than one.
    """
    taken = tl.full((), 0, tl.int32)
    token = tl.arange(0, BLOCK_T)
    is_active = tl.load(active + token, mask=token < tokens, other=0) != 0
    for first in range(0, pages, BLOCK_P):
        page = first + tl.arange(0, BLOCK_P)
        length = tl.load(page_lengths + page, mask=page < pages, other=0)
        wanted = tl.zeros((BLOCK_P,), tl.int32)
        for i in range(MASK_ROWS):
            for s in range(spans):
                used = tl.max((is_active & (token // span == s)).to(tl.int32), axis=0)
                at = mask + i * stride_mask_row + s * stride_mask_span + page
                chosen = tl.load(at, mask=page < pages, other=0)
                wanted |= (chosen != 0).to(tl.int32) * used
        wanted = tl.where(length > 0, wanted, 0)
        rank = taken + tl.cumsum(wanted, axis=0) - 1
        mine = (wanted > 0) & (rank % SPLITS == split)
        place = rank // SPLITS
        physical = tl.load(page_table + page, mask=mine, other=0)
        tl.store(physicals + place, physical, mask=mine)
        tl.store(lengths + place, length, mask=mine)
        if OWN:
            tl.store(logicals + place, page, mask=mine)
        taken += tl.sum(wanted, axis=0)
    return (taken - split + SPLITS - 1) // SPLITS


@triton.jit
def splits_kernel(
    q, k_pages, v_pages, page_table, page_lengths, mask, active, part_out, part_lse, scratch,
    stride_qb, stride_qh, stride_qt, stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt,
    stride_mb, stride_mh, stride_mr, stride_ms, scale_log2, kv_heads, tokens, pages, spans, span, capacity,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, MASK_ROWS: tl.constexpr,
    OWN: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a split, a tile of rows and a KV head: softmax attention over its share of the pages.

    ``OWN`` masks pages for rows that did not select them, where rows or query heads have their own lists.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    split, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    q_heads = kv_heads * GROUP
    active += sequence * tokens
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, exists = _active_rows(active, tokens, row, ROWS, BLOCK_T)
    of_group = row // ROWS
    exists = exists & (of_group < GROUP)
    if tl.max(exists.to(tl.int32), axis=0) == 0:
        return
    query_head = head * GROUP + of_group
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < HEAD_DIM)[None, :]
    at = q + sequence * stride_qb + query_head[:, None] * stride_qh + token[:, None] * stride_qt
    queries = tl.load(at + channel[None, :], mask=exists[:, None] & wide, other=0.0)

    mask += sequence * stride_mb + head * stride_mh
    physicals = scratch + ((pair * tl.num_programs(1) + tile) * SPLITS + split).to(tl.int64) * 3 * capacity
    lengths, logicals = physicals + capacity, physicals + 2 * capacity
    listed = _list_pages(
        mask, active, page_table + sequence * pages, page_lengths + sequence * pages,
        physicals, lengths, logicals, stride_mr, stride_ms, tokens, pages, spans, span, split,
        SPLITS, MASK_ROWS, OWN, BLOCK_P, BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()  # the list was written by other threads of this program
    peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k_pages += head.to(tl.int64) * stride_kh
    v_pages += head.to(tl.int64) * stride_vh
    mask_row = mask + (of_group % MASK_ROWS) * stride_mr + (token // span) * stride_ms
    for first in tl.range(0, listed * PAGE_SIZE, BLOCK_N, num_stages=STAGES):
        key = first + tl.arange(0, BLOCK_N)
        place, slot = key // PAGE_SIZE, key % PAGE_SIZE
        inside = place < listed
        physical = tl.load(physicals + place, mask=inside, other=0).to(tl.int64)
        length = tl.load(lengths + place, mask=inside, other=0)
        valid = slot < length
        at = k_pages + (physical * stride_kp + slot * stride_kt)[:, None] + channel[None, :]
        keys = tl.load(at, mask=valid[:, None] & wide, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        seen = valid[None, :]
        if OWN:
            logical = tl.load(logicals + place, mask=inside, other=0)
            chosen = tl.load(mask_row[:, None] + logical[None, :], mask=exists[:, None] & seen, other=0)
            seen = seen & (chosen != 0)
        scores = tl.where(seen, scores, NOTHING)
        top = tl.maximum(peak, tl.max(scores, axis=1))
        safe = tl.where(top == NOTHING, 0.0, top)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - safe[:, None])
        kept = tl.exp2(peak - safe)
        at = v_pages + (physical * stride_vp + slot * stride_vt)[:, None] + channel[None, :]
        values = tl.load(at, mask=valid[:, None] & wide, other=0.0)
        total = total * kept + tl.sum(weights, axis=1)
        mixed = mixed * kept[:, None]
        if OWN:
            # A weight of 0 does not stop a NaN in a page that another row selected.
            bad = values.to(tl.float32) - values.to(tl.float32) != 0
            hit = tl.dot(seen.to(values.dtype), bad.to(values.dtype), input_precision=PRECISION)
            mixed = tl.where(hit > 0, float("nan"), mixed)
            values = tl.where(bad, 0.0, values).to(values.dtype)
        mixed = tl.dot(weights.to(values.dtype), values, acc=mixed, input_precision=PRECISION)
        peak = top
    empty = total == 0
    share = tl.where(empty, 1.0, total)
    lse = tl.where(empty, NOTHING, peak + tl.log2(share))
    state = ((sequence * q_heads + query_head) * tokens + token) * SPLITS + split
    tl.store(part_lse + state, lse, mask=exists)
    into = part_out + state[:, None] * HEAD_DIM + channel[None, :]
    tl.store(into, mixed / share[:, None], mask=exists[:, None] & wide)


@triton.jit
def _merged(out, lse, other_out, other_lse):
    """Merge two states in log2 units; one of weight 0 is dropped, whatever its ``out`` holds."""
    top = tl.maximum(lse, other_lse)
    safe = tl.where(top == NOTHING, 0.0, top)
    weight, other_weight = tl.exp2(lse - safe), tl.exp2(other_lse - safe)
    total = weight + other_weight
    share = tl.where(total == 0, 1.0, total)
    out = tl.where(weight == 0, 0.0, out * (weight / share))
    other_out = tl.where(other_weight == 0, 0.0, other_out * (other_weight / share))
    return out + other_out, tl.where(total == 0, NOTHING, safe + tl.log2(share))


@triton.jit
def _block_part(
    queries, k, v, stride_kt, stride_vt, scale_log2, keys, channel, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the state of one query row over the block's own keys, float32 throughout."""
    peak = tl.full((), NOTHING, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        valid = key < keys
        there = valid[:, None] & (channel < HEAD_DIM)[None, :]
        at = k + key[:, None].to(tl.int64) * stride_kt + channel[None, :]
        scores = tl.sum(tl.load(at, mask=there, other=0.0).to(tl.float32) * queries[None, :], axis=1)
        scores = tl.where(valid, scores * scale_log2, NOTHING)
        top = tl.maximum(peak, tl.max(scores, axis=0))
        safe = tl.where(top == NOTHING, 0.0, top)
        weights, kept = tl.exp2(scores - safe), tl.exp2(peak - safe)
        at = v + key[:, None].to(tl.int64) * stride_vt + channel[None, :]
        values = tl.load(at, mask=there, other=0.0).to(tl.float32)
        total = total * kept + tl.sum(weights, axis=0)
        mixed = mixed * kept + tl.sum(weights[:, None] * values, axis=0)
        peak = top
    empty = total == 0
    share = tl.where(empty, 1.0, total)
    return mixed / share, tl.where(empty, NOTHING, peak + tl.log2(share))


@triton.jit
def finish_kernel(
    q, k, v, active, part_out, part_lse, cached_out, cached_lse, reference,
    out, state_out, state_lse, kept,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_cb, stride_ch, stride_ct, stride_lb, stride_lh, stride_rb, stride_rh, stride_rt,
    scale_log2, q_heads, tokens, keys,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CONTEXT: tl.constexpr, CACHED: tl.constexpr,
    BLOCK: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a query row: merge its splits, or take its cached state, and merge the block's part.

    The block's part needs nothing of the splits, so it is computed while they are still under way.
    ``KEEP`` stores what the next pass measures change against: the query of every row (1), or that of
    active rows and the old one of the others (2).
    """
    token, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    wide = channel < HEAD_DIM
    row = (sequence * q_heads + head) * tokens + token
    if BLOCK or KEEP:
        raw = tl.load(q + sequence * stride_qb + head * stride_qh + token * stride_qt + channel,
                      mask=wide, other=0.0)  # fmt: skip
    if BLOCK:
        of_group = (head // GROUP).to(tl.int64)
        block_out, block_lse = _block_part(
            raw.to(tl.float32), k + sequence * stride_kb + of_group * stride_kh,
            v + sequence * stride_vb + of_group * stride_vh, stride_kt, stride_vt, scale_log2, keys,
            channel, HEAD_DIM, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if CONTEXT:
        is_active = tl.load(active + sequence * tokens + token) != 0
        split = tl.arange(0, BLOCK_S)
        # Lengths instead of conjunctions with a scalar, which Triton's interpreter does not take as masks.
        ready, stored = tl.where(is_active, SPLITS, 0), tl.where(is_active, 0, HEAD_DIM)
        lses = tl.load(part_lse + row * SPLITS + split, mask=split < ready, other=NOTHING)
        top = tl.max(lses, axis=0)
        safe = tl.where(top == NOTHING, 0.0, top)
        weights = tl.exp2(lses - safe)
        total = tl.sum(weights, axis=0)
        share = tl.where(total == 0, 1.0, total)
        used = (split < ready) & (weights != 0)  # NaN is used, and shows
        at = part_out + (row * SPLITS + split)[:, None] * HEAD_DIM + channel[None, :]
        parts = tl.load(at, mask=used[:, None] & wide[None, :], other=0.0)
        context_out = tl.sum(parts * (weights / share)[:, None], axis=0)
        context_lse = tl.where(total == 0, NOTHING, safe + tl.log2(share))
        natural = context_lse * LN2
        if CACHED:
            at = cached_out + sequence * stride_cb + head * stride_ch + token * stride_ct + channel
            old = tl.load(at, mask=channel < stored, other=0.0).to(tl.float32)
            at = cached_lse + sequence * stride_lb + head * stride_lh + token
            old_lse = tl.load(at, mask=is_active == 0, other=0.0)
            context_out = tl.where(is_active, context_out, old)
            natural = tl.where(is_active, natural, old_lse)
            context_lse = tl.where(is_active, context_lse, old_lse / LN2)
        tl.store(state_out + row * HEAD_DIM + channel, context_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, natural)
        if BLOCK:
            block_out, _ = _merged(context_out, context_lse, block_out, block_lse)
            tl.store(out + row * HEAD_DIM + channel, block_out.to(out.dtype.element_ty), mask=wide)
        if KEEP == 1:
            tl.store(kept + row * HEAD_DIM + channel, raw, mask=wide)
        if KEEP == 2:
            at = reference + sequence * stride_rb + head * stride_rh + token * stride_rt + channel
            before = tl.load(at, mask=channel < stored, other=0.0)
            tl.store(kept + row * HEAD_DIM + channel, tl.where(is_active, raw, before), mask=wide)
    else:
        tl.store(state_out + row * HEAD_DIM + channel, block_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, block_lse * LN2)
