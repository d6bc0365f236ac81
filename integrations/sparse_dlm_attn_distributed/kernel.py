"""The Triton kernel that merges what ranks have sent, with cached states and the block: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparse_dlm_attn import AttentionState

__all__ = ["merge"]

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def merge_kernel(
    sent,
    sent_lse,
    active,
    cached_out,
    cached_lse,
    block_out,
    block_lse,
    out,
    state_out,
    state_lse,
    rows,
    heads_tokens,
    tokens,
    RANKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LSE_WIDTH: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program a row of a query head. All ranks merge in one order, so they come to the same bits."""
    row = tl.program_id(0).to(tl.int64)
    channel, rank = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    wide, known = channel < HEAD_DIM, rank < RANKS
    of_rank = rank * rows + row
    lse = tl.load(sent_lse + of_rank * LSE_WIDTH + LSE_WIDTH - 1, mask=known, other=NOTHING)  # [BLOCK_R]
    parts = tl.load(
        sent + of_rank[:, None] * WIDTH + channel[None, :], mask=known[:, None] & wide[None, :], other=0.0
    ).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    top = tl.max(tl.where(lse != lse, float("inf"), lse), axis=0)
    safe = tl.where(top == NOTHING, 0.0, top)  # -inf - -inf would be NaN
    weights = tl.exp(lse - safe)
    total = tl.sum(weights, axis=0)
    share = tl.where(total == 0, 1.0, total)
    # A state of weight 0 is dropped, whatever it holds; NaN is no 0, and shows.
    mixed = tl.sum(tl.where((weights != 0)[:, None], parts * (weights / share)[:, None], 0.0), axis=0)
    mixed_lse = tl.where(total == 0, NOTHING, safe + tl.log(share))
    if CACHED:
        is_active = tl.load(active + row // heads_tokens * tokens + row % tokens) != 0
        old = tl.load(cached_out + row * HEAD_DIM + channel, mask=wide, other=0.0).to(tl.float32)
        mixed = tl.where(is_active, mixed, old)
        mixed_lse = tl.where(is_active, mixed_lse, tl.load(cached_lse + row))
    tl.store(state_out + row * HEAD_DIM + channel, mixed.to(state_out.dtype.element_ty), mask=wide)
    tl.store(state_lse + row, mixed_lse)
    if BLOCK:
        own = tl.load(block_out + row * HEAD_DIM + channel, mask=wide, other=0.0).to(tl.float32)
        own_lse = tl.load(block_lse + row)
        both = tl.maximum(mixed_lse, own_lse)
        both = tl.where(both == NOTHING, 0.0, both)
        weight, own_weight = tl.exp(mixed_lse - both), tl.exp(own_lse - both)
        share = tl.where(weight + own_weight == 0, 1.0, weight + own_weight)
        mixed = tl.where(weight == 0, 0.0, mixed * (weight / share))
        mixed += tl.where(own_weight == 0, 0.0, own * (own_weight / share))
        tl.store(out + row * HEAD_DIM + channel, mixed.to(out.dtype.element_ty), mask=wide)


def merge(
    gathered: torch.Tensor,
    head_dim: int,
    active: torch.Tensor | None = None,
    cached: AttentionState | None = None,
    block: AttentionState | None = None,
) -> tuple[torch.Tensor | None, AttentionState]:
    """Merge packed states; see `merging.finish`."""
    ranks, batch, q_heads, tokens, width = gathered.shape
    state_out = gathered.new_empty((batch, q_heads, tokens, head_dim))
    state_lse = gathered.new_empty(state_out.shape[:3], dtype=torch.float32)
    state, out = AttentionState(state_out, state_lse), None if block is None else torch.empty_like(state_out)
    given = [state if other is None else other for other in (cached, block)]
    rows_on = state_lse if active is None else active.contiguous().view(torch.int8)
    kept = [side.contiguous() for other in given for side in (other.out, other.lse)]
    with torch.cuda.device_of(gathered):
        merge_kernel[(state_lse.numel(),)](
            gathered,
            gathered.view(torch.float32),
            rows_on,
            *kept,
            state_out if out is None else out,
            state_out,
            state_lse,
            state_lse.numel(),
            q_heads * tokens,
            tokens,
            RANKS=ranks,
            HEAD_DIM=head_dim,
            WIDTH=width,
            LSE_WIDTH=width * gathered.element_size() // 4,
            CACHED=cached is not None,
            BLOCK=block is not None,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_R=triton.next_power_of_2(ranks),
            num_warps=1 if ranks <= 8 else 4,
        )
    return out, state
