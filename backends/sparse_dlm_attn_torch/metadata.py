"""Page bounds and scores."""

from __future__ import annotations

import math

import torch

from sparse_dlm_attn import Context, PageBounds
from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn.checks import check_context, check_library, check_page_scores
from sparse_dlm_attn.operators import valid_tokens

__all__ = ["page_bounds", "page_scores"]


def page_bounds(context: Context) -> PageBounds:
    """Return minimum and maximum of each page's valid keys (clause BOUNDS-1)."""
    check_context(context)
    check_library("context", context.k_pages, torch.Tensor, "torch")
    shape = (context.batch, context.kv_heads, context.pages, context.head_dim)
    if 0 in (context.batch, context.k_pages.shape[0]):  # no page exists
        return PageBounds(context.k_pages.new_zeros(shape), context.k_pages.new_zeros(shape))
    table = torch.where(context.exists, context.page_table, 0).long()
    lower, upper = [], []
    for pages, valid, exists in zip(table, valid_tokens(context), context.exists, strict=True):
        keys = context.k_pages[pages]  # (pages, kv_heads, page_size, head_dim): one sequence at a time
        absent = ~valid[:, None, :, None]
        smallest = keys.masked_fill(absent, math.inf).amin(dim=2)
        largest = keys.masked_fill(absent, -math.inf).amax(dim=2)
        missing = ~exists[:, None, None]
        lower.append(smallest.masked_fill(missing, 0).transpose(0, 1))
        upper.append(largest.masked_fill(missing, 0).transpose(0, 1))
    return PageBounds(torch.stack(lower), torch.stack(upper))


def page_scores(
    q: torch.Tensor, bounds: PageBounds, active: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``relu(q) . upper + min(q, 0) . lower``, one pair of products a KV head (SCORES-1)."""
    check_page_scores(q, bounds, active)
    check_library("q", q, torch.Tensor, "torch")
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads = bounds.lower.shape[1]
    dtype = compute_dtype(q)
    rows = q.to(dtype).reshape(batch, kv_heads, q_heads // kv_heads * tokens, head_dim)
    upper, lower = (b.to(dtype).transpose(-1, -2) for b in (bounds.upper, bounds.lower))
    scores: torch.Tensor = rows.clamp(min=0) @ upper + rows.clamp(max=0) @ lower
    return scores.reshape(batch, q_heads, tokens, bounds.lower.shape[2]).to(torch.float32)
