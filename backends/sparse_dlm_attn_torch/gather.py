"""Attention over gathered pages: copy the selected pages of a KV head once, then two products.

The rows of all query heads of a group share one copy of the union of their pages; a page that some
of them did not select is masked for those rows. Extra memory is the selected pages of one head.
"""

from __future__ import annotations

import math

import torch

from sparse_dlm_attn import AttentionState, Context, Selection
from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn.checks import check_attend_block, check_attend_pages, check_library
from sparse_dlm_attn.values import softmax_scale

__all__ = ["attend_block", "attend_pages"]

ROWS_AT_ONCE = 1024  # bounds the score matrix of a whole-sequence block


def attend_pages(
    q: torch.Tensor,
    context: Context,
    selection: Selection,
    active: torch.Tensor,
    *,
    scale: float | None = None,
) -> AttentionState:
    """Attend to selected pages (clause ATTEND-1)."""
    check_attend_pages(q, context, selection, active, scale)
    check_library("q", q, torch.Tensor, "torch")
    batch, q_heads, _, head_dim = q.shape
    dtype = compute_dtype(q)
    factor = softmax_scale(head_dim, scale)
    group = q_heads // context.kv_heads
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32)
    masks = selection.for_query_heads(q_heads) & context.exists[:, None, None, :]
    for b in range(batch):
        rows = active[b].nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        of_rows = masks[b][:, rows // selection.span]  # (q_heads, rows, pages)
        for head in range(context.kv_heads):
            heads = slice(head * group, (head + 1) * group)
            wanted = of_rows[heads].reshape(group * rows.numel(), -1)
            listed = wanted.any(dim=0).nonzero()[:, 0]
            if listed.numel() == 0:
                continue
            queries = q[b, heads][:, rows].reshape(-1, head_dim).to(dtype)
            keys, values, reads = _gather(context, b, head, listed, wanted[:, listed], dtype)
            part, part_lse = _attend(queries * factor, keys, values, reads)
            out[b, heads, rows] = part.reshape(group, -1, head_dim).to(q.dtype)
            lse[b, heads, rows] = part_lse.reshape(group, -1).to(torch.float32)
    return AttentionState(out, lse)


def _gather(
    context: Context, sequence: int, head: int, listed: torch.Tensor, wanted: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Copy the valid tokens of the listed pages; say which rows read which, None if all read all."""
    physical = context.page_table[sequence, listed].long()
    lengths = context.page_lengths[sequence, listed]
    keys = context.k_pages[physical, head].flatten(0, 1)
    values = context.v_pages[physical, head].flatten(0, 1)
    shared = bool(wanted.all())
    reads = None if shared else wanted.repeat_interleave(context.page_size, dim=1)
    if bool((lengths < context.page_size).any()):
        slots = torch.arange(context.page_size)
        valid = (slots < lengths[:, None]).flatten()
        keys, values = keys[valid], values[valid]
        reads = None if reads is None else reads[:, valid]
    return keys.to(dtype), values.to(dtype), reads


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reads: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(out, lse)`` of scaled ``queries``; each row has at least one key or reads none."""
    logits = queries @ keys.T
    if reads is None:
        return _softmax(logits, values)
    logits = logits.masked_fill(~reads, -math.inf)
    lse = logits.logsumexp(dim=-1)
    nothing = lse.isneginf()[:, None]
    weights = torch.softmax(logits.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    out = weights @ values
    # A value that is not finite must reach only the rows that read it: 0 x NaN is NaN.
    unsafe = ~values.isfinite().all(dim=-1)
    if bool(unsafe.any()):
        clean = weights @ values.masked_fill(unsafe[:, None], 0.0)
        touched = (reads & unsafe).any(dim=-1, keepdim=True)
        out = torch.where(touched, _row_by_row(weights, values, reads), clean)
    return out.masked_fill(nothing, 0.0), lse


def _softmax(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(out, lse)``; keys whose scores are all -inf weigh nothing, as an empty set (STATE-2)."""
    lse = logits.logsumexp(dim=-1)
    out = torch.softmax(logits, dim=-1) @ values
    return out.masked_fill(lse.isneginf()[..., None], 0.0), lse


def _row_by_row(weights: torch.Tensor, values: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    return torch.stack([w[r] @ values[r] for w, r in zip(weights, reads, strict=True)])


def attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> AttentionState:
    """Attend densely within the block (clause BLOCK-1)."""
    check_attend_block(q, k, v, scale)
    check_library("q", q, torch.Tensor, "torch")
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    dtype = compute_dtype(q)
    rows = q.to(dtype).reshape(batch, kv_heads, q_heads // kv_heads * tokens, head_dim)
    rows = rows * softmax_scale(head_dim, scale)
    keys, values = k.to(dtype).transpose(-1, -2), v.to(dtype)
    outs, lses = [], []
    for part in torch.split(rows, ROWS_AT_ONCE, dim=2):
        part_out, part_lse = _softmax(part @ keys, values)
        outs.append(part_out)
        lses.append(part_lse)
    out = torch.cat(outs, dim=2).reshape(q.shape).to(q.dtype)
    return AttentionState(out, torch.cat(lses, dim=2).reshape(batch, q_heads, tokens).to(torch.float32))
