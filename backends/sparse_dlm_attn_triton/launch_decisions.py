"""Launches of decisions: bounds and scores of pages, the best of them, ranked passes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from sparse_dlm_attn_triton.common import (
    Launch,
    aligned,
    bytes_of,
    layout,
    lined,
    power_of_two,
    precision,
    shared_memory,
)
from sparse_dlm_attn_triton.decisions import (
    bounds_kernel,
    changes_kernel,
    scores_kernel,
    select_kernel,
    top_kernel,
)
from sparse_dlm_attn_triton.span_tiles import WIDE_ROOM, padded_dim

__all__ = ["MOST_RANKED", "Ranking", "page_bounds", "page_scores", "ranking_of", "top_pages"]

MOST_RANKED = 16384
"""Most pages that one program ranks in registers."""
Tensor = torch.Tensor


def page_bounds(k_pages: Tensor, page_table: Tensor, page_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of each page's valid keys, ``(batch, kv_heads, pages, head_dim)``."""
    (batch, pages), (_, kv_heads, page_size, head_dim) = page_table.shape, k_pages.shape
    lower = k_pages.new_empty((batch, kv_heads, pages, head_dim))
    upper = torch.empty_like(lower)
    if lower.numel():
        bounds_kernel[(pages, kv_heads, batch)](
            k_pages, page_table.contiguous(), page_lengths.contiguous(), lower, upper, *k_pages.stride()[:3],
            kv_heads, pages, PAGE_SIZE=page_size, HEAD_DIM=head_dim,
            BLOCK_T=min(power_of_two(page_size, 1), 64), BLOCK_D=padded_dim(head_dim),
        )  # fmt: skip
    return lower, upper


def page_scores(q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return the QUEST bound of every row and page, float32 ``(batch, q_heads, tokens, pages)``."""
    q, lower, upper = lined(q), lined(lower), lined(upper)
    (batch, q_heads, tokens, _), pages = q.shape, lower.shape[2]
    scores = torch.empty((batch, q_heads, tokens, pages), dtype=torch.float32, device=q.device)
    if scores.numel():
        launch = _scores(
            q.device, q.dtype, layout(q), layout(lower), layout(upper), tokens, "", 0, 0, aligned(q, lower, upper)
        )
        launch(q, lower, upper, scores, scores, scores, scores, scores, scores)
    return scores


@functools.lru_cache(maxsize=1024)
def _scores(
    device: torch.device, dtype: torch.dtype, q: Any, lower: Any, upper: Any, rows: int, rule: str, unions: int,
    count: int, straight: bool,
) -> Launch:  # fmt: skip
    """Settle the launch of scores, by themselves or with the decisions of a ranked pass."""
    (batch, q_heads, tokens, head_dim), (_, kv_heads, pages, _) = q[0], lower[0]
    group, wide = q_heads // kv_heads, dtype == torch.float32
    side = 32 if wide or head_dim > 128 else 64
    if wide and head_dim > 128 and shared_memory(device) < WIDE_ROOM:
        side = 16
    block_m, block_p = min(power_of_two(group * tokens), side if wide else 64), min(power_of_two(pages), side)
    tiles, parts = max(triton.cdiv(pages, block_p), 1), triton.cdiv(group * tokens, block_m)
    return Launch(
        scores_kernel, (tiles, parts, batch * kv_heads), *q[1][:3], *lower[1][:3], *upper[1][:3], kv_heads, pages,
        unions, count, device=device, aligned=straight,
        TOKENS=tokens, GROUP=group, ROWS=rows, HEAD_DIM=head_dim, BLOCK_M=block_m,
        BLOCK_P=block_p, BLOCK_T=power_of_two(tokens, 1), BLOCK_D=padded_dim(head_dim),
        PRECISION=precision(dtype), RULE=rule, num_warps=4,
    )  # fmt: skip


def _changes(device: torch.device, q: Any, reference: Any, straight: bool) -> Launch:
    """Settle the launch of the mean squared change of each row."""
    batch, q_heads, tokens, head_dim = q[0]
    block_d = padded_dim(head_dim)
    return Launch(
        changes_kernel, (tokens, batch), *q[1][:3], *reference[1][:3], q_heads, q_heads * head_dim, device=device,
        aligned=straight,
        HEAD_DIM=head_dim, BLOCK_H=min(power_of_two(q_heads, 1), 8192 // block_d), BLOCK_D=block_d, num_warps=8,
    )  # fmt: skip


def _select(
    device: torch.device, grid: tuple[int, int, int], tokens: int, pages: int, unions: int, budget: int, bought: int,
    straight: bool,
) -> Launch:  # fmt: skip
    """Settle the launch of the choice of pages."""
    rows, q_heads, _ = grid
    return Launch(
        select_kernel, grid, q_heads, pages, unions, budget, bought, device=device, aligned=straight, TOKENS=tokens,
        ROWS=rows,
        **search_sizes(pages),
    )  # fmt: skip


def top_pages(scores: Tensor, count: Tensor, eligible: Tensor) -> Tensor:
    """Return the mask of the ``count`` best eligible pages; at most `MOST_RANKED` pages."""
    pages, rows = scores.shape[-1], scores[..., 0].numel() if scores.shape[-1] else 0
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if chosen.numel() == 0:
        return chosen
    # Clamped in its own dtype first: a count may not fit int32.
    counts = count.clamp(0, min(pages, 127)) if count.dtype == torch.int8 else count.clamp(0, pages)
    counts = counts.to(torch.int32).expand(scores.shape[:-1]).contiguous()
    allowed = eligible.expand(scores.shape).contiguous()
    top_kernel[(rows,)](
        scores.contiguous(), counts, bytes_of(allowed), bytes_of(chosen), pages,
        **search_sizes(pages),
    )  # fmt: skip
    return chosen


class Ranking(NamedTuple):
    """The launches of a ranked pass's decisions, and the shapes of what they write.

    ``mask`` is ``(batch, kv_heads or q_heads, 1 or tokens, pages)``, ``active`` ``(batch, tokens)``.
    """

    mask: tuple[int, ...]
    active: tuple[int, ...]
    order: tuple[int, ...]
    scores: tuple[int, ...]
    limit: Tensor
    changed: Launch | None
    scored: Launch
    select: Launch

    def run(
        self, q: Tensor, bounds: tuple[Tensor, Tensor], page_lengths: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Launch scores and changes, then active rows and pages; return rows and pages, bool."""
        device = q.device
        mask = torch.empty(self.mask, dtype=torch.bool, device=device)
        active = torch.empty(self.active, dtype=torch.bool, device=device)
        order = torch.empty(self.order, dtype=torch.int32, device=device)
        scores = torch.empty(self.scores, dtype=torch.float32, device=device)
        changes = order
        if self.changed is not None and reference is not None:
            changes = torch.empty(self.active, dtype=torch.float32, device=device)
            self.changed(q, reference, changes)
        self.scored(q, *bounds, changes, self.limit, scores, active, order, mask)
        self.select(scores, order, page_lengths, mask)
        return active, mask


def ranking_of(
    device: torch.device, dtype: torch.dtype, q: Any, bounds: tuple[Any, Any], reference: Any, count: int | None,
    mass: float | None, budget: int, bought: int, union: str, straight: bool,
) -> Ranking:  # fmt: skip
    """Settle the launches of a ranked pass's decisions.

    Parameters
    ----------
    device, dtype
        Of the queries.
    q, bounds, reference : layout
        Of the queries ``(batch, q_heads, tokens, head_dim)``, of lower and upper bounds ``(batch, kv_heads, pages,
        head_dim)``, and of the queries to measure change against; without those every row is active.
    count, mass : int or float or None
        Which rows are active: exactly one of them where there is a reference.
    budget, bought : int
        Tokens that make a context small enough to be read whole, and pages of a row and head otherwise.
    union : {"kv_head", "query_head", "row"}
        Over what pages are united.
    straight : bool
        Whether all tensors are `aligned`.
    """
    (batch, q_heads, tokens, _), (_, kv_heads, pages, _) = q[0], bounds[0][0]
    spans, heads = tokens if union == "row" else 1, kv_heads if union == "kv_head" else q_heads
    rule = "all" if reference is None else "mass" if count is None else "count"
    rows = min(max(count, 1), tokens) if rule == "count" and count is not None else tokens
    unions = heads * spans
    return Ranking(
        (batch, heads, spans, pages), (batch, tokens), (batch, rows), (batch, q_heads, rows, pages),
        _constant(float(mass or 0.0), device), None if reference is None else _changes(device, q, reference, straight),
        _scores(device, dtype, q, *bounds, rows, rule, unions, count or 0, straight),
        _select(device, (rows, q_heads, batch), tokens, pages, unions, budget, bought, straight),
    )  # fmt: skip


def search_sizes(pages: int) -> dict[str, int]:
    """Return how a program ranks so many pages: about 8 keys a thread, and a part for each thread.

    Fewer keys make turns of the search shorter and sums over warps relatively longer.
    """
    block = power_of_two(pages)
    warps = min(max(block // 256, 1), 16)
    return {"BLOCK_P": block, "PARTS": min(32 * warps, block), "num_warps": warps}


@functools.lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    """Return a float64 number on the device: kernels take floats as float32, which would round it."""
    return torch.tensor([value], dtype=torch.float64, device=device)
