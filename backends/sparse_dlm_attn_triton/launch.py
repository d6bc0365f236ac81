"""Sizes of tiles and grids, and the launches. Nothing here looks at a value, so nothing waits."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton

from sparse_dlm_attn_triton.attention import finish_kernel, splits_kernel
from sparse_dlm_attn_triton.decisions import bounds_kernel, scores_kernel, select_kernel, top_kernel
from sparse_dlm_attn_triton.settings import Settings, chosen
from sparse_dlm_attn_triton.span_tiles import LOG2_E, padded_dim

__all__ = [
    "INTERPRETED",
    "MOST_RANKED",
    "MOST_ROWS",
    "Part",
    "attend",
    "page_bounds",
    "page_scores",
    "rank",
    "top_pages",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton interprets kernels on CPU tensors, as it decided when it was imported."""
MOST_RANKED = 16384
"""Most pages that one program ranks in registers."""
MOST_ROWS = 128
"""Longest block that the kernels of a pass take; longer ones are whole sequences (`full_sequence`)."""
MOST_LISTED = 2048
"""Most pages that one turn of a page list takes."""
Tensor = torch.Tensor


def power_of_two(number: int, least: int = 16) -> int:
    """Return the least power of two that holds ``number``, and ``least`` at the least."""
    return max(least, 1 << max(number - 1, 0).bit_length())


@functools.cache
def chained(device: torch.device) -> bool:
    """Return whether kernels may start while the previous one ends (programmatic dependent launch)."""
    if INTERPRETED or os.environ.get("SDA_TRITON_PDL", "1") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launched(device: torch.device) -> dict[str, Any]:
    """Return what every chained launch passes."""
    return {"PDL": True, "launch_pdl": True} if chained(device) else {"PDL": False}


def precision(tensor: Tensor) -> str:
    """Return how products are multiplied: float32 must not be cut to tf32, or exact sums are none."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def bytes_of(mask: Tensor) -> Tensor:
    """View a bool tensor as int8, which kernels load."""
    return mask.view(torch.int8)


def lined(tensor: Tensor) -> Tensor:
    """Return a tensor whose last axis is contiguous, as kernels read it: itself wherever it is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


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
    return _scores(q, lower, upper, None, None, None, 0)


def _scores(
    q: Tensor, lower: Tensor, upper: Tensor, reference: Tensor | None, changes: Tensor | None,
    union: Tensor | None, unions: int,
) -> Tensor:
    (batch, q_heads, tokens, head_dim), (_, kv_heads, pages, _) = q.shape, lower.shape
    q, lower, upper = lined(q), lined(lower), lined(upper)
    scores = torch.empty((batch, q_heads, tokens, pages), dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    group, wide = q_heads // kv_heads, q.dtype == torch.float32
    block_m = min(power_of_two(group * tokens), 32 if wide else 64)
    block_p = min(power_of_two(pages), 32 if wide or head_dim > 128 else 64)
    # One more tile of programs sums the changes of queries.
    tiles = triton.cdiv(pages, block_p)
    grid = (tiles + (changes is not None), triton.cdiv(group * tokens, block_m), batch * kv_heads)
    none = q if reference is None else lined(reference)
    scores_kernel[grid](
        q, lower, upper, none, scores, scores if changes is None else changes,
        scores if union is None else bytes_of(union),
        *q.stride()[:3], *lower.stride()[:3], *upper.stride()[:3], *none.stride()[:3],
        kv_heads, pages, unions,
        TOKENS=tokens, GROUP=group, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_P=block_p,
        BLOCK_D=padded_dim(head_dim), PRECISION=precision(q), TILES=tiles, CHANGES=union is not None,
        num_warps=4, **launched(q.device),
    )  # fmt: skip
    return scores


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
        BLOCK_P=power_of_two(pages), num_warps=4 if pages <= 4096 else 8,
    )  # fmt: skip
    return chosen


@dataclass(frozen=True, eq=False)
class Part:
    """The context part of a pass: which pages, for which rows.

    Parameters
    ----------
    k_pages, v_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``.
    span : int
        Rows that share a selection.
    active : torch.Tensor
        bool ``(batch, tokens)``.
    most_active : int
        Bound of the active rows of a sequence that is known on the host; ``tokens`` if none is.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    page_lengths: Tensor
    mask: Tensor
    span: int
    active: Tensor
    most_active: int


def settings_for(dtype: torch.dtype, head_dim: int, block_m: int) -> Settings:
    """Return the tile for a problem."""
    if INTERPRETED:
        return Settings(block_n=32, programs=8)
    if dtype == torch.float32:
        return Settings(block_n=32, stages=2)
    if head_dim > 128:
        return Settings(block_n=32, warps=4 if block_m <= 64 else 8, stages=2)
    return Settings(warps=4 if block_m <= 64 else 8, stages=2, least_m=64)


def _rows_of_tile(dtype: torch.dtype, head_dim: int, rows: int) -> int:
    most = 32 if dtype == torch.float32 else 64 if head_dim > 128 else 128
    return min(power_of_two(rows), most)


@dataclass(frozen=True, eq=False)
class Parts:
    """States of splits, the block's behind them: ``out`` and ``lse`` (log2 units), and how many splits."""

    out: Tensor
    lse: Tensor
    splits: int


def _splits(q: Tensor, block: tuple[Tensor, Tensor] | None, part: Part | None, scale: float) -> Parts:
    """Launch attention over the listed pages and over the block."""
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads = block[0].shape[1] if part is None else part.k_pages.shape[1]  # type: ignore[index]
    k, v = map(lined, block) if block is not None else (q, q)
    if part is None or part.page_table.shape[1] == 0 or part.k_pages.shape[0] == 0:
        part, has_pages = _no_pages(q, kv_heads), False
    else:
        has_pages = True
    page_size, (_, heads, spans, pages) = part.k_pages.shape[2], part.mask.shape
    group, rows = q_heads // kv_heads, max(min(part.most_active, tokens), 1)
    block_m = _rows_of_tile(q.dtype, head_dim, group * rows)
    settings = settings_for(q.dtype, head_dim, block_m)
    if has_pages:
        sizes = head_dim, page_size, group, tokens, batch * kv_heads, pages * page_size
        settings = chosen(settings, q.device, q.dtype, *sizes)
    block_m = max(block_m, settings.least_m)
    rows = tokens if group * tokens <= block_m else rows  # all rows fit: no need to look for the active ones
    tiles, splits = triton.cdiv(group * rows, block_m), 0
    if has_pages:
        most = max(min(triton.cdiv(pages * page_size, settings.block_n), pages, 128), 1)
        splits = min(max(settings.programs // (batch * kv_heads * tiles), 1), most)
        splits = 1 << (splits.bit_length() - 1)
    slots = splits + (block is not None)
    states = (batch, q_heads, tokens, slots)
    parts = Parts(
        torch.empty((*states, head_dim), dtype=torch.float32, device=q.device),
        torch.empty(states, dtype=torch.float32, device=q.device), splits,
    )
    capacity = triton.cdiv(pages, max(splits, 1))
    scratch = torch.empty(
        batch * kv_heads * tiles * splits * 2 * capacity, dtype=torch.int64, device=q.device
    )
    mask = lined(part.mask)
    mask_rows = group if heads == q_heads and heads != kv_heads else 1
    splits_kernel[(slots, tiles, batch * kv_heads)](
        q, part.k_pages, part.v_pages, part.page_table.contiguous(), part.page_lengths.contiguous(),
        bytes_of(mask), bytes_of(part.active.contiguous()), k, v, parts.out, parts.lse, scratch,
        *q.stride()[:3], *part.k_pages.stride()[:3], *part.v_pages.stride()[:3],
        mask.stride(0), mask.stride(1) * (heads > 1) * mask_rows, mask.stride(1), mask.stride(2),
        *k.stride()[:3], *v.stride()[:3], scale * LOG2_E,
        kv_heads, pages, spans, min(part.span, tokens), capacity, k.shape[2] if block is not None else 0,
        TOKENS=tokens, GROUP=group, ROWS=rows, SPLITS=splits, SLOTS=slots, MASK_ROWS=mask_rows,
        OWN=mask_rows > 1 or spans > 1, PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK_M=block_m,
        BLOCK_N=settings.block_n, BLOCK_K=min(power_of_two(k.shape[2]), 32),
        BLOCK_P=min(power_of_two(pages), MOST_LISTED), BLOCK_T=power_of_two(tokens) if splits else 16,
        BLOCK_D=padded_dim(head_dim), LONG=pages > MOST_LISTED, PRECISION=precision(q),
        STAGES=settings.stages, num_warps=settings.warps, **launched(q.device),
    )  # fmt: skip
    return parts


def _no_pages(q: Tensor, kv_heads: int) -> Part:
    """Return a context of no pages, for kernels that are asked about the block alone."""
    batch, _, tokens, head_dim = q.shape
    pages = q.new_empty((1, kv_heads, 1, head_dim))
    table = torch.empty((batch, 0), dtype=torch.int32, device=q.device)
    mask = torch.empty((batch, 1, 1, 0), dtype=torch.bool, device=q.device)
    active = torch.empty((batch, tokens), dtype=torch.bool, device=q.device)
    return Part(pages, pages, table, table, mask, tokens, active, tokens)


def attend(
    q: Tensor,
    block: tuple[Tensor, Tensor] | None,
    part: Part | None,
    cached: tuple[Tensor, Tensor] | None,
    scale: float,
    keep: int = 0,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch a pass, or the half of it that is asked for.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    block : tuple of torch.Tensor or None
        ``k`` and ``v`` of the block, ``(batch, kv_heads, keys, head_dim)``.
    part : Part or None
        The context part.
    cached : tuple of torch.Tensor or None
        ``out`` and ``lse`` of inactive rows; None counts as the empty set.
    scale : float
        Factor on q.k.
    keep : int
        What to store for the next pass to measure change against: nothing (0), all queries (1), those of
        active rows and ``reference`` elsewhere (2).
    reference : torch.Tensor or None
        Like ``q``.

    Returns
    -------
    tuple of torch.Tensor
        Output of the pass, ``out`` and ``lse`` of the context part (of the block if there is no context
        part), and the kept queries. Empty tensors stand for what was not asked for.
    """
    batch, q_heads, tokens, head_dim = q.shape
    q = lined(q)
    state_out = torch.empty((batch, q_heads, tokens, head_dim), dtype=q.dtype, device=q.device)
    state_lse = torch.empty((batch, q_heads, tokens), dtype=torch.float32, device=q.device)
    nothing = q.new_empty(0)
    out = torch.empty_like(state_out) if part is not None and block is not None else nothing
    kept = torch.empty_like(state_out) if keep else nothing
    if state_out.numel() == 0:
        return out, state_out, state_lse, kept
    parts = _splits(q, block, part, scale)
    old = tuple(map(lined, cached)) if cached is not None else (q, state_lse)
    before = q if reference is None else lined(reference)
    active = q if part is None else bytes_of(part.active.contiguous())
    finish_kernel[(tokens, q_heads, batch)](
        q, active, parts.out, parts.lse, *old, before, out, state_out, state_lse, kept,
        *q.stride()[:3], *old[0].stride()[:3], *old[1].stride()[:2], *before.stride()[:3], q_heads,
        TOKENS=tokens, SPLITS=parts.splits, SLOTS=parts.lse.shape[3], HEAD_DIM=head_dim,
        BLOCK_S=power_of_two(parts.splits, 1), BLOCK_D=padded_dim(head_dim), CONTEXT=part is not None,
        CACHED=cached is not None, BLOCK=block is not None, KEEP=keep, num_warps=1,
        **launched(q.device),
    )  # fmt: skip
    return out, state_out, state_lse, kept


def rank(
    q: Tensor, bounds: tuple[Tensor, Tensor], page_lengths: Tensor, reference: Tensor | None,
    count: int | None, mass: float | None, budget: int, bought: int, union: str,
) -> tuple[Tensor, Tensor]:
    """Launch the decisions of a ranked pass: scores and changes, then active rows and pages.

    Parameters
    ----------
    q, bounds, page_lengths
        Queries ``(batch, q_heads, tokens, head_dim)``, bounds ``(batch, kv_heads, pages, head_dim)``,
        int32 ``(batch, pages)``.
    reference : torch.Tensor or None
        Queries to measure change against; None makes every row active.
    count, mass : int or float or None
        Which rows are active: exactly one of them where there is a reference.
    budget, bought : int
        Tokens that make a context small enough to be read whole, and pages of a row and head otherwise.
    union : {"kv_head", "query_head", "row"}
        Over what pages are united.

    Returns
    -------
    active : torch.Tensor
        bool ``(batch, tokens)``.
    mask : torch.Tensor
        bool ``(batch, kv_heads or q_heads, 1 or tokens, pages)``.
    """
    (batch, q_heads, tokens, _), (_, kv_heads, pages, _) = q.shape, bounds[0].shape
    spans = tokens if union == "row" else 1
    heads = kv_heads if union == "kv_head" else q_heads
    mask = torch.empty((batch, heads, spans, pages), dtype=torch.bool, device=q.device)
    active = torch.empty((batch, tokens), dtype=torch.bool, device=q.device)
    changes = torch.empty((batch, q_heads, tokens), dtype=torch.float32, device=q.device)
    scores = _scores(q, *bounds, reference, changes, mask, heads * spans)
    limit = _constant(float(mass or 0.0), q.device)
    most = tokens if reference is None or count is None else min(max(count, 1), tokens)
    select_kernel[(most, q_heads, batch)](
        scores, changes, page_lengths.contiguous(), bytes_of(active), bytes_of(mask),
        q_heads, pages, heads * spans, q_heads * q.shape[3], count or 0, limit, budget, bought,
        TOKENS=tokens, BLOCK_H=power_of_two(q_heads, 1), BLOCK_T=power_of_two(tokens, 1),
        BLOCK_P=power_of_two(pages), BY_MASS=mass is not None, ALL_ROWS=reference is None,
        num_warps=4 if pages <= 4096 else 8, **launched(q.device),
    )  # fmt: skip
    return active, mask


@functools.lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    """Return a float64 number on the device: kernels take floats as float32, which would round it."""
    return torch.tensor([value], dtype=torch.float64, device=device)
