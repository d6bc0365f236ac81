"""Triton kernels that carry messages between the GPUs of one host and merge states on arrival.

Every rank has a mailbox: memory that all ranks of the group can write into. A program writes its part of the
message into the mailboxes of the other ranks, raises its flag there, waits for theirs and goes on with what
arrived: one launch instead of a collective with kernels before and behind it.

Flags hold the number of the exchange, counted on the device, so that a captured graph can be replayed as it
is. Messages alternate between two places: a rank that writes its next message may find another rank still
reading the last one, but not the one before, since that rank's next flag has come since. A wait has an end:
``limit`` nanoseconds, or a word that the host writes. What has not arrived by then is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

__all__ = ["BOTH", "RECEIVE", "SEND", "gather_kernel", "merge_kernel"]

SEND, RECEIVE, BOTH = 1, 2, 3
"""Phases of a kernel. Under Triton's interpreter all ranks send, one after the other, then all receive."""
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _address(table, number, KIND: tl.constexpr):
    """Return the pointer that stands in a table of addresses."""
    # Mailboxes begin at multiples of 16 bytes, and vectors are stored whole only where that is known.
    return tl.multiple_of(tl.load(table + number).to(tl.pointer_type(KIND)), 16)


@triton.jit
def _raise_flags(table, program, programs, epoch, flags_at, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell the other ranks that this program's part of the message lies in their mailboxes."""
    tl.debug_barrier()  # all threads of this program have written
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            flag = _address(table, peer, tl.int32) + flags_at // 4 + RANK * programs + program
            tl.atomic_xchg(flag, epoch, sem="release", scope="sys")


@triton.jit
def _wait(
    table, stopped, program, programs, epoch, flags_at, limit, RANK: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """Wait for the flags of the other ranks; return 1 if all of them came, else 0."""
    came = tl.full((), 1, tl.int32)
    begun = globaltimer()
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            flag = _address(table, RANK, tl.int32) + flags_at // 4 + peer * programs + program
            # Differences, because epochs wrap around.
            behind = epoch - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            waiting = behind > 0
            while waiting:
                late = globaltimer() - begun > limit
                halted = tl.load(stopped, volatile=True) != 0
                behind = epoch - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                waiting = (behind > 0) & (late == 0) & (halted == 0)
            if behind > 0:
                came = tl.full((), 0, tl.int32)
                # Later exchanges do not wait again, and the host sees the rank that was missed.
                tl.store(stopped, peer + 1)
                tl.store(_address(table, RANKS, tl.int32), peer + 1)
    tl.debug_barrier()  # no thread reads before the flags were seen
    return came


@triton.jit
def gather_kernel(
    table, epochs, stopped, source, result, words, space, flags_at, limit,
    RANK: tl.constexpr, RANKS: tl.constexpr, PHASE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Give ``words`` int32 of every rank to every rank: ``result`` is ``(RANKS, words)``.

    A mailbox holds ``(2, RANKS, space)`` int32, then a flag for each rank and program.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs + program) + 1
    half = (epoch & 1) * RANKS
    if PHASE != 2:
        for first in range(program * BLOCK, words, programs * BLOCK):
            word = first + lane
            sent = tl.load(source + word, mask=word < words, other=0)
            tl.store(result + RANK * words + word, sent, mask=word < words)
            for peer in tl.static_range(RANKS):
                if peer != RANK:
                    into = _address(table, peer, tl.int32) + (half + RANK) * space + word
                    tl.store(into, sent, mask=word < words)
        _raise_flags(table, program, programs, epoch, flags_at, RANK, RANKS)
    if PHASE != 1:
        came = tl.full((), 1, tl.int32)
        if PHASE == 3:
            came = _wait(table, stopped, program, programs, epoch, flags_at, limit, RANK, RANKS)
        own = _address(table, RANK, tl.int32)
        for first in range(program * BLOCK, words, programs * BLOCK):
            word = first + lane
            for peer in tl.static_range(RANKS):
                if peer != RANK:
                    # Past the first cache, which other ranks do not write through.
                    got = tl.load(
                        own + (half + peer) * space + word, mask=word < words, other=0, cache_modifier=".cg"
                    )
                    got = tl.where(came != 0, got, -1)  # all bits set: NaN in any float
                    tl.store(result + peer * words + word, got, mask=word < words)
        tl.store(epochs + program, epoch)


@triton.jit
def _block_part(
    q, k, v, keys, stride_kt, stride_vt, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return attention of one row over the block's own keys: ``out`` without its sum, peak and sum."""
    channel = tl.arange(0, BLOCK_D)
    query = tl.load(q + channel, mask=channel < HEAD_DIM, other=0.0).to(tl.float32) * scale
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        there = (key < keys)[:, None] & (channel < HEAD_DIM)[None, :]
        at_k = k + key[:, None] * stride_kt + channel[None, :]
        at_v = v + key[:, None] * stride_vt + channel[None, :]
        row_keys = tl.load(at_k, mask=there, other=0.0).to(tl.float32)
        values = tl.load(at_v, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(key < keys, tl.sum(row_keys * query[None, :], axis=1), NOTHING)
        top = tl.maximum(peak, tl.max(scores, axis=0))
        safe = tl.where(top == NOTHING, 0.0, top)  # -inf - -inf would be NaN
        weights, kept = tl.exp(scores - safe), tl.exp(peak - safe)
        # An absent key is dropped, not multiplied by 0.
        parts = tl.where((weights != 0)[:, None], values * weights[:, None], 0.0)
        mixed = mixed * kept + tl.sum(parts, axis=0)
        total = total * kept + tl.sum(weights, axis=0)
        peak = top
    return mixed, peak, total


@triton.jit
def merge_kernel(
    table, epochs, stopped, part_out, part_lse, active, cached_out, cached_lse, q, k, v,
    out, state_out, state_lse, rows, q_heads, keys,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_cb, stride_ch, stride_ct, stride_lb, stride_lh,
    scale, space, out_at, flags_at, limit,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, PHASE: tl.constexpr, COUNTED: tl.constexpr, CACHED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program some rows: send this rank's state, attend to the block, merge what all ranks sent.

    Ranks are merged in their order on every rank, so all of them come to the same bits. The message of a
    rank is ``lse`` float32 of all rows, then, ``out_at`` bytes in, ``out`` in its dtype: `packing`. Messages
    lie ``space`` bytes apart. Without ``COUNTED`` they came another way and are only merged (phase 2): the
    one address in ``table`` is that of the first of them.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel, rank = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    wide = channel < HEAD_DIM
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs + program) + 1 if COUNTED else 0
    half = (epoch & 1) * RANKS if COUNTED else 0
    if PHASE != 2:
        for row in range(program, rows, programs):
            sent = tl.load(part_out + row * HEAD_DIM + channel, mask=wide, other=0.0)
            sent_lse = tl.load(part_lse + row)
            for peer in tl.static_range(RANKS):
                message = _address(table, peer, tl.int8) + (half + RANK) * space
                lse_into = message.to(tl.pointer_type(tl.float32)) + row
                out_into = (message + out_at).to(tl.pointer_type(part_out.dtype.element_ty))
                tl.store(lse_into, sent_lse)
                tl.store(out_into + row * HEAD_DIM + channel, sent, mask=wide)
        _raise_flags(table, program, programs, epoch, flags_at, RANK, RANKS)
    if PHASE != 1:
        messages = _address(table, RANK if COUNTED else 0, tl.int8) + half * space
        for row in range(program, rows, programs):
            token, head = row % TOKENS, (row // TOKENS) % q_heads
            sequence = (row // TOKENS // q_heads).to(tl.int64)
            if BLOCK:  # while messages are under way
                mixed, peak, total = _block_part(
                    q + sequence * stride_qb + head * stride_qh + token * stride_qt,
                    k + sequence * stride_kb + head // GROUP * stride_kh,
                    v + sequence * stride_vb + head // GROUP * stride_vh,
                    keys, stride_kt, stride_vt, scale, HEAD_DIM, BLOCK_D, BLOCK_K,
                )  # fmt: skip
            came = tl.full((), 1, tl.int32)
            if PHASE == 3:
                came = _wait(table, stopped, program, programs, epoch, flags_at, limit, RANK, RANKS)
            from_lse = (messages + rank * space).to(tl.pointer_type(tl.float32)) + row
            lses = tl.load(from_lse, mask=rank < RANKS, other=NOTHING, cache_modifier=".cg")
            lses = tl.where(came != 0, lses, float("nan"))
            from_out = (messages + rank * space + out_at).to(tl.pointer_type(part_out.dtype.element_ty))
            parts = tl.load(
                from_out[:, None] + row * HEAD_DIM + channel[None, :],
                mask=(rank < RANKS)[:, None] & wide[None, :], other=0.0, cache_modifier=".cg",
            ).to(tl.float32)
            top = tl.max(tl.where(lses != lses, float("inf"), lses), axis=0)
            safe = tl.where(top == NOTHING, 0.0, top)
            weights = tl.exp(lses - safe)
            sum_of = tl.sum(weights, axis=0)
            share = tl.where(sum_of == 0, 1.0, sum_of)
            # A rank without weight is dropped; NaN is no 0, and shows.
            parts = tl.where((weights != 0)[:, None], parts * (weights / share)[:, None], 0.0)
            context_out = tl.sum(parts, axis=0)
            context_lse = tl.where(sum_of == 0, NOTHING, safe + tl.log(share))
            if CACHED:
                is_active = tl.load(active + sequence * TOKENS + token) != 0
                # A length instead of a conjunction, which Triton's interpreter does not take with scalars.
                stored = tl.where(is_active, 0, HEAD_DIM)
                at_old = cached_out + sequence * stride_cb + head * stride_ch + token * stride_ct + channel
                old = tl.load(at_old, mask=channel < stored, other=0.0).to(tl.float32)
                at_lse = cached_lse + sequence * stride_lb + head * stride_lh + token
                old_lse = tl.load(at_lse, mask=is_active == 0, other=0.0)
                context_out = tl.where(is_active, context_out, old)
                context_lse = tl.where(is_active, context_lse, old_lse)
            kind = state_out.dtype.element_ty
            tl.store(state_out + row * HEAD_DIM + channel, context_out.to(kind), mask=wide)
            tl.store(state_lse + row, context_lse)
            if BLOCK:
                both = tl.maximum(context_lse, peak)
                both = tl.where(both == NOTHING, 0.0, both)
                weight, other = tl.exp(context_lse - both), tl.exp(peak - both)
                everything = weight + other * total
                everything = tl.where(everything == 0, 1.0, everything)
                mine = tl.where(weight == 0, 0.0, context_out * (weight / everything))
                theirs = tl.where(other == 0, 0.0, mixed * (other / everything))
                tl.store(out + row * HEAD_DIM + channel, (mine + theirs).to(kind), mask=wide)
        if COUNTED:
            tl.store(epochs + program, epoch)
