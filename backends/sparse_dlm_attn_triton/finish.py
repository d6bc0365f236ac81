"""The last kernel of a pass: merge the partial states, or take cached ones, and add the block's part."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_dlm_attn_triton.common import Launch, power_of_two
from sparse_dlm_attn_triton.problem import Sizes
from sparse_dlm_attn_triton.tiles import LN2, NEG_INF, softmax_end

__all__ = ["finish_launch"]

MANY_ROWS = 2048
"""At or above this many rows each program finishes `FINISHED` rows; otherwise launch overhead dominates. Below,
and where rows have many parts, a program has one row: what counts then is the latency of one row."""
FINISHED = 4
FEW_PARTS = 8


@triton.jit
def _merge_two(out, lse, other_out, other_lse):
    """Merge two states of rows, LSE in log2 units; one of weight 0 is dropped, whatever its ``out`` holds."""
    top = tl.maximum(lse, other_lse)
    shift = tl.where(top == NEG_INF, 0.0, top)
    weight, other_weight = tl.exp2(lse - shift), tl.exp2(other_lse - shift)
    both = weight + other_weight
    total = tl.where(both == 0, 1.0, both)
    return tl.where((weight == 0)[:, None], 0.0, out * (weight / total)[:, None]) + tl.where(
        (other_weight == 0)[:, None], 0.0, other_out * (other_weight / total)[:, None]
    )


@triton.jit
def _merge_parts(
    part_out,
    part_lse,
    base,
    step,
    ready,
    most,
    channel,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the first ``ready`` parts of each row, ``step`` apart from ``base``; LSE in log2 units.

    ``BLOCK_S`` parts at a time: their loads wait for nothing, so all of them are under way together.
    """
    running_max = tl.full((BLOCK_R,), NEG_INF, tl.float32)
    running_sum = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for begin in range(0, most, BLOCK_S):
        if BLOCK_R == 1:  # parts of one row are a tile
            part = begin + tl.arange(0, BLOCK_S)
            lses = tl.load(part_lse + base + part * step, mask=part < ready, other=NEG_INF)  # [BLOCK_S]
            there = (part < ready)[:, None] & (channel < HEAD_DIM)[None, :]
            from_parts = part_out + (base + part * step)[:, None] * HEAD_DIM + channel[None, :]
            parts = tl.load(from_parts, mask=there, other=0.0)  # [BLOCK_S, BLOCK_D]
            new_max = tl.maximum(running_max, tl.max(lses, axis=0))
            shift = tl.where(new_max == NEG_INF, 0.0, new_max)
            weights = tl.exp2(lses - shift)
            # A part without a weight is dropped; NaN is no 0, and shows.
            parts = tl.where((weights != 0)[:, None], parts * weights[:, None], 0.0)
            added, weight = tl.sum(parts, axis=0)[None, :], tl.sum(weights, axis=0)
        else:
            new_max = running_max
            for i in tl.static_range(BLOCK_S):
                from_lse = part_lse + base + (begin + i) * step
                new_max = tl.maximum(new_max, tl.load(from_lse, mask=begin + i < ready, other=NEG_INF))
            shift = tl.where(new_max == NEG_INF, 0.0, new_max)
            added, weight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
            for i in tl.static_range(BLOCK_S):
                at, there = base + (begin + i) * step, begin + i < ready
                one = tl.exp2(tl.load(part_lse + at, mask=there, other=NEG_INF) - shift)
                there = there[:, None] & (channel < HEAD_DIM)[None, :]
                rows = tl.load(part_out + at[:, None] * HEAD_DIM + channel[None, :], mask=there, other=0.0)
                added += tl.where((one != 0)[:, None], rows * one[:, None], 0.0)
                weight += one
        rescale = tl.exp2(running_max - shift)
        acc = tl.where((rescale != 0)[:, None], acc * rescale[:, None], 0.0) + added
        running_sum = running_sum * rescale + weight
        running_max = new_max
    total, lse = softmax_end(running_max, running_sum, 1.0)
    return acc * (1.0 / total)[:, None], lse


@triton.jit
def finish_kernel(
    q,
    active,
    part_out,
    part_lse,
    firsts,
    lasts,
    counts,
    cached_out,
    cached_lse,
    reference,
    out,
    state_out,
    state_lse,
    kept,
    q_stride,
    cached_stride,
    cached_lse_stride,
    reference_stride,
    q_heads,
    block_slots,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CONTEXT: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAM_K: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program ``BLOCK_R`` rows of a query head, a warp each: merge parts or cached states with the block.

    Parts are those of `attention.splits_kernel`, or with ``STREAM_K`` of `stream_k.stream_k_kernel`.

    ``KEEP`` stores what the next pass measures change against: the query of every row (1), or that of
    active rows and the old one of the others (2).
    """
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = token < TOKENS
    channel = tl.arange(0, BLOCK_D)
    wide = exists[:, None] & (channel < HEAD_DIM)[None, :]  # [BLOCK_R, BLOCK_D]
    row = (sequence * q_heads + head) * TOKENS + token
    into = row[:, None] * HEAD_DIM + channel[None, :]
    if KEEP:  # written before this pass began, so there is no need to wait
        from_q = q + sequence * q_stride[0] + head * q_stride[1] + token[:, None] * q_stride[2] + channel[None, :]
        query = tl.load(from_q, mask=wide, other=0.0)
        if KEEP == 1:
            tl.store(kept + into, query, mask=wide)
    if CACHED:  # of every row: which rows are active may not be known yet
        from_old = cached_out + sequence * cached_stride[0] + head * cached_stride[1]
        old = tl.load(from_old + token[:, None] * cached_stride[2] + channel[None, :], mask=wide, other=0.0)
        old = old.to(tl.float32)
        from_lse = cached_lse + sequence * cached_lse_stride[0] + head * cached_lse_stride[1] + token
        old_lse = tl.load(from_lse, mask=exists, other=NEG_INF)
    if KEEP == 2:
        from_before = reference + sequence * reference_stride[0] + head * reference_stride[1]
        from_before += token[:, None] * reference_stride[2]
        before = tl.load(from_before + channel[None, :], mask=wide, other=0.0)
    if CONTEXT:  # complete since the kernel before the last; without pages there is none, and no use for it
        is_active = tl.load(active + sequence * TOKENS + token, mask=exists, other=0) != 0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if STREAM_K:
        pair = sequence * (q_heads // GROUP) + head // GROUP
        of_pair = (head % GROUP) * TOKENS + token
        at_block = (block_slots + pair) * (GROUP * TOKENS) + of_pair
    else:
        at_block = row * SLOTS + SLOTS - 1
    if BLOCK:
        block_out = tl.load(part_out + at_block[:, None] * HEAD_DIM + channel[None, :], mask=wide, other=0.0)
        block_lse = tl.load(part_lse + at_block, mask=exists, other=NEG_INF)
    if CONTEXT:
        if STREAM_K:
            first = tl.load(firsts + pair)
            ready = tl.where(tl.load(counts + pair) > 0, tl.load(lasts + pair) - first + 1, 0)
            context_out, context_lse = _merge_parts(
                part_out,
                part_lse,
                (first + pair) * (GROUP * TOKENS) + of_pair,
                GROUP * TOKENS,
                tl.where(is_active, ready, 0),
                ready,
                channel,
                HEAD_DIM,
                BLOCK_R,
                BLOCK_S,
                BLOCK_D,
            )
        else:
            context_out, context_lse = _merge_parts(
                part_out,
                part_lse,
                row * SLOTS,
                1,
                tl.where(is_active, SPLITS, 0),
                SPLITS,
                channel,
                HEAD_DIM,
                BLOCK_R,
                BLOCK_S,
                BLOCK_D,
            )
        natural = context_lse * LN2
        if CACHED:
            context_out = tl.where(is_active[:, None], context_out, old)
            natural = tl.where(is_active, natural, old_lse)
            context_lse = tl.where(is_active, context_lse, old_lse / LN2)
        tl.store(state_out + into, context_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, natural, mask=exists)
        if BLOCK:
            both = _merge_two(context_out, context_lse, block_out, block_lse)
            tl.store(out + into, both.to(out.dtype.element_ty), mask=wide)
        if KEEP == 2:
            tl.store(kept + into, tl.where(is_active[:, None], query, before), mask=wide)
    else:
        tl.store(state_out + into, block_out.to(state_out.dtype.element_ty), mask=wide)
        tl.store(state_lse + row, block_lse * LN2, mask=exists)


def finish_launch(sizes: Sizes, splits: int, slots: int, block_slots: int = 0) -> Launch:
    """Settle the launch after split-KV, or after stream-K, whose parts of blocks begin at ``block_slots``."""
    batch, q_heads, tokens, head_dim = sizes.q[0]
    streamed = block_slots > 0
    several = not streamed and splits <= FEW_PARTS and batch * q_heads * tokens >= MANY_ROWS
    rows = min(power_of_two(tokens, 1), FINISHED) if several else 1
    cached, cached_lse = sizes.cached or (sizes.q[1], (0, 0, 0))
    reference = sizes.q[1] if sizes.reference is None else sizes.reference
    return Launch(
        finish_kernel,
        (triton.cdiv(tokens, rows), q_heads, batch),
        sizes.q[1][:3],
        cached[:3],
        cached_lse[:2],
        reference[:3],
        q_heads,
        block_slots,
        device=sizes.device,
        aligned=sizes.aligned,
        TOKENS=tokens,
        GROUP=q_heads // sizes.kv_heads,
        SPLITS=splits,
        SLOTS=slots,
        HEAD_DIM=head_dim,
        BLOCK_R=rows,
        BLOCK_S=FEW_PARTS if streamed else power_of_two(splits, 1),
        BLOCK_D=power_of_two(head_dim),
        CONTEXT=sizes.has_context,
        CACHED=sizes.cached is not None,
        BLOCK=sizes.k is not None,
        STREAM_K=streamed,
        KEEP=sizes.keep,
        num_warps=rows,
    )
