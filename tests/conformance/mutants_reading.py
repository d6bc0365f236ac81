"""Backends gone wrong in what they read: pages, tokens and values that a selection leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from mutants_attention import lengths, numbers, pages, per_head, whole
from mutation import Call, R, chosen, kept, mutant, state, table

from sparse_dlm_attn import AttentionState, Context
from sparse_dlm_attn.values import softmax_scale


@mutant(R, "attend_pages", "ATTEND-1 CONTEXT-5")
def zero_keys_in_partial_pages(x: Call) -> Any:
    c = x.context
    k, v = c.k_pages.copy(), c.v_pages.copy()
    held = np.zeros(k.shape[:1] + k.shape[2:3], bool)
    for b, page in np.argwhere(c.page_lengths > 0):
        held[c.page_table[b, page], : c.page_lengths[b, page]] = True
    k.swapaxes(1, 2)[~held], v.swapaxes(1, 2)[~held] = 0, 0
    return x.right(context=Context(k, v, c.page_table, whole(x).astype(np.int32)))


@mutant(R, "attend_pages", "GQA-1")
def kv_head_is_head_modulo_kv_heads(x: Call) -> Any:
    order = np.argsort(np.arange(x.q.shape[1]) % x.context.kv_heads, kind="stable")
    moved = x.right(q=x.q[:, order], selection=chosen(x.selection, per_head(x)[:, order]))
    back = np.argsort(order)
    return AttentionState(moved.out[:, back], moved.lse[:, back])


@mutant(R, "attend_pages", "CONTEXT-5 CONTEXT-1")
def last_page_taken_for_full(x: Call) -> Any:
    """Assumes that only the last existing page may be partial."""
    assumed = whole(x)
    for b, row in enumerate(x.context.page_lengths):
        last = np.flatnonzero(row)[-1:]
        assumed[b, last] = row[last]
    return lengths(x, assumed)


@mutant(R, "attend_pages", "ATTEND-1")
def second_tile_not_rescaled(x: Call) -> Any:
    """An online softmax over tiles of 16 pages that adds sums without moving them to the common peak."""
    tiles = range(0, max(x.context.pages, 1), 16)
    states = [pages(x, x.selection.mask & (numbers(x) // 16 == start // 16)) for start in tiles]
    if len(states) == 1:
        return states[0]
    logs = np.stack([part.lse for part in states]).astype(np.float64)
    peak = np.where(np.isneginf(logs.max(axis=0)), 0, logs[-1])  # the last tile's instead of the largest
    peak = np.where(np.isneginf(peak), 0, peak)
    with np.errstate(all="ignore"):
        weights = np.exp(np.minimum(logs - peak, 0))
        total = weights.sum(axis=0)
        out = sum(w[..., None] * part.out for w, part in zip(weights, states, strict=True))
        lse = np.where(total == 0, -np.inf, peak + np.log(total))
        return state(out / np.where(total == 0, 1, total)[..., None], lse, states[0])


@mutant(R, "attend_pages", "ATTEND-1 ACCURACY-1")
def products_with_ten_bits(x: Call) -> Any:
    """Matrix units that round float32 to ten bits without being asked."""

    def rounded(values: Any) -> Any:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).reshape(values.shape)

    return x.right(q=rounded(x.q), context=replace(x.context, k_pages=rounded(x.context.k_pages)))


@mutant(R, "attend_pages", "STATE-1 STATE-2")
def minus_infinity_minus_minus_infinity(x: Call) -> Any:
    right = x.right()
    read = x.selection.for_rows(x.q.shape[1], x.q.shape[2]) & x.active[:, None, :, None]
    bad = (read & (x.context.page_lengths > 0)[:, None, None]).any(axis=-1) & np.isneginf(right.lse)
    return state(np.where(bad[..., None], np.nan, right.out), np.where(bad, np.nan, right.lse), right)


@mutant(R, "attend_pages", "CONTEXT-1 CONTEXT-5")
def strides_of_the_cache_assumed(x: Call) -> Any:
    """Reads the memory behind the pages as if it were contiguous."""
    k = x.context.k_pages
    if k.flags.c_contiguous or not k.size or k.base is None or k.base.size < k.size:
        return x.right()
    raw = np.ravel(k.base if k.base.ndim else k)[: k.size].reshape(k.shape)
    return x.right(context=replace(x.context, k_pages=np.ascontiguousarray(raw)))


@mutant(R, "attend_pages", "PURE-1")
def queries_scaled_in_place(x: Call) -> Any:
    x.q.flags.writeable = True
    np.multiply(x.q, 0.5, out=x.q)
    return x.right(scale=2 * softmax_scale(x.q.shape[3], x.scale))


@mutant(R, "attend_pages", "PURE-1")
def poison_cleaned_in_place(x: Call) -> Any:
    k = x.context.k_pages
    (k if k.base is None else k.base).flags.writeable = True
    k.flags.writeable = True
    k[...] = np.nan_to_num(k)
    return x.right()


@mutant(R, "attend_pages", "PURE-3")
def results_share_one_buffer(x: Call) -> Any:
    right = x.right()
    buffers = vars(x.this).setdefault("buffers", {})
    buffer = buffers.setdefault((x.q.shape, x.q.dtype), np.empty_like(right.out))
    buffer[...] = right.out
    return AttentionState(buffer, right.lse)


@mutant(R, "attend_pages", "PURE-3")
def stale_state_after_the_prefix_grew(x: Call) -> Any:
    stored = vars(x.this).setdefault("kept", {})
    key = (x.q.shape, x.context.k_pages.shape, x.context.page_table.tobytes(), x.q.dtype.name)
    old = stored.setdefault(key, x.right())
    return AttentionState(old.out.copy(), old.lse.copy())


def by_row(x: Call) -> AttentionState:
    """Return attention in which a row sees the keys up to its own."""
    states = [x.right(q=x.q[:, :, r : r + 1], k=x.k[:, :, : r + 1], v=x.v[:, :, : r + 1]) for r in range(x.q.shape[2])]
    return AttentionState(
        np.concatenate([s.out for s in states], axis=2), np.concatenate([s.lse for s in states], axis=2)
    )


def padded(x: Call, part: Any) -> Any:
    more = -part.shape[2] % 16 if part.shape[2] > 16 else 0
    return np.concatenate([part, np.zeros((*part.shape[:2], more, part.shape[3]), part.dtype)], axis=2)


table(
    R,
    "attend_block",
    {
        "block_is_causal": ("BLOCK-1", by_row),
        "last_key_of_the_block_dropped": ("BLOCK-1", lambda x: x.right(k=x.k[:, :, :-1], v=x.v[:, :, :-1])),
        "block_keys_cut_to_the_rows": (
            "BLOCK-1",
            lambda x: x.right(k=x.k[:, :, : x.q.shape[2]], v=x.v[:, :, : x.q.shape[2]]),
        ),
        "block_scale_missing": ("STATE-3", lambda x: x.right(scale=1.0)),
        "block_head_modulo_kv_heads": (
            "GQA-1",
            lambda x: x.right(
                k=x.k[:, np.arange(x.q.shape[1]) % x.k.shape[1]], v=x.v[:, np.arange(x.q.shape[1]) % x.k.shape[1]]
            ),
        ),
        "block_padded_with_zero_keys": ("BLOCK-1", lambda x: x.right(k=padded(x, x.k), v=padded(x, x.v))),
        "nan_in_the_block_taken_for_zero": (
            "BLOCK-1 MERGE-4",
            lambda x: x.right(k=np.nan_to_num(x.k), v=np.nan_to_num(x.v)),
        ),
        "block_of_the_first_eight_sequences": (
            "BLOCK-1",
            lambda x: kept(x.right(), (np.arange(len(x.q)) < 8)[:, None, None]),
        ),
    },
)
