"""Sizes of tiles and grids, and the launches. Nothing here looks at a value, so nothing waits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from sparse_dlm_attn_triton.attention import finish_kernel, splits_kernel
from sparse_dlm_attn_triton.common import (
    INTERPRETED,
    bytes_of,
    launched,
    lined,
    power_of_two,
    precision,
    shared_memory,
)
from sparse_dlm_attn_triton.launch_decisions import (
    MOST_RANKED,
    page_bounds,
    page_scores,
    rank,
    top_pages,
)
from sparse_dlm_attn_triton.settings import Settings, chosen
from sparse_dlm_attn_triton.shares import lists_kernel, shares_kernel
from sparse_dlm_attn_triton.span_tiles import LOG2_E, WIDE_ROOM, padded_dim

__all__ = [
    "INTERPRETED",
    "MOST_RANKED",
    "MOST_ROWS",
    "Part",
    "attend",
    "lined",
    "page_bounds",
    "page_scores",
    "rank",
    "top_pages",
]

MOST_ROWS = 128
"""Longest block that the kernels of a pass take; longer ones are whole sequences (`full_sequence`)."""
MANY_ROWS = 2048
"""From so many rows on, programs that finish a pass take `FINISHED` of them: to start programs takes longer
than they run. Fewer rows, and rows of many parts, have a program each: what counts then is one row's time."""
FINISHED = 4
MOST_PAIRS = 2048
"""Most pairs of sequence and KV head whose page lists are shared out evenly."""
FEW_LISTS = 16
"""Up to so many lists of pages, of a KV head or a tile of its rows, each has 16 programs or more by default:
short shares, which gain more from being even with small tiles than those lose."""
ROOMY = 220 << 10
"""Bytes of shared memory from which on two programs fit a multiprocessor that fetch tiles of 64 tokens two
ahead, for 64 rows of 128 channels; larger ones have it to themselves, and were faster with this depth too."""
MOST_LISTED = 2048
"""Most pages that one turn of a page list takes."""
Tensor = torch.Tensor


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


def settings_for(
    dtype: torch.dtype, head_dim: int, block_m: int, page_size: int, lists: int, room: int
) -> Settings:
    """Return the tile for pages of a size, so many lists of them, and bytes of shared memory for a program.

    Where two programs of a multiprocessor have the room, tiles that lie in one page are fetched two ahead,
    smaller ones three. Others are fetched one ahead: float32, tiles that span pages, heads of many channels
    on GPUs with less shared memory.
    """
    warps, roomy = 4 if block_m <= 64 else 8, room >= ROOMY
    if dtype == torch.float32:
        return Settings(
            block_n=16 if head_dim > 128 else 64 if room >= WIDE_ROOM else 32, warps=8, stages=2
        )
    if head_dim > 128:
        return Settings(block_n=32, warps=warps, stages=3 if roomy else 2)
    if page_size % 64 == 0 and lists > FEW_LISTS and roomy:
        return Settings(warps=warps, stages=3, least_m=64)
    if page_size % 32 == 0:
        return Settings(block_n=32, warps=warps, stages=4, least_m=64)
    return Settings(warps=warps, stages=2, least_m=64)


def _rows_of_tile(dtype: torch.dtype, head_dim: int, rows: int) -> int:
    most = 32 if dtype == torch.float32 else 64 if head_dim > 128 else 128
    return min(power_of_two(rows), most)


@dataclass(frozen=True, eq=False)
class Parts:
    """States of parts of rows, ``out`` and ``lse`` (log2 units), and how `finish_kernel` finds them.

    Those of splits lie row by row, ``slots`` each. Those of shares have numbers of the first and the last
    share of each pair of sequence and KV head, and the length of its list; parts of blocks begin at
    ``block_slots``.
    """

    out: Tensor
    lse: Tensor
    splits: int
    slots: int = 0
    firsts: Tensor | None = None
    lasts: Tensor | None = None
    counts: Tensor | None = None
    block_slots: int = 0


@dataclass(frozen=True)
class _Grid:
    """How rows and pages of a problem are divided among programs."""

    settings: Settings
    block_m: int
    rows: int
    tiles: int
    group: int
    pairs: int
    mask_rows: int


def _grid(q: Tensor, part: Part, kv_heads: int, has_pages: bool) -> _Grid:
    batch, q_heads, tokens, head_dim = q.shape
    group, rows = q_heads // kv_heads, max(min(part.most_active, tokens), 1)
    block_m = _rows_of_tile(q.dtype, head_dim, group * rows)
    pages, page_size = part.page_table.shape[1], part.k_pages.shape[2]
    lists = batch * kv_heads * triton.cdiv(group * rows, block_m)
    settings = settings_for(q.dtype, head_dim, block_m, page_size, lists, shared_memory(q.device))
    if INTERPRETED:  # a few programs of small tiles show the same
        settings = Settings(block_n=32, programs=8)
    if has_pages:
        sizes = head_dim, page_size, group, tokens, batch * kv_heads, pages * page_size
        settings = chosen(settings, q.device, q.dtype, *sizes)
    block_m = max(block_m, settings.least_m)
    rows = tokens if group * tokens <= block_m else rows  # all rows fit: no need to look for the active ones
    heads = part.mask.shape[1]
    mask_rows = group if heads == q_heads and heads != kv_heads else 1
    tiles = triton.cdiv(group * rows, block_m)
    return _Grid(settings, block_m, rows, tiles, group, batch * kv_heads, mask_rows)


def _parts(
    q: Tensor, block: tuple[Tensor, Tensor] | None, part: Part | None, scale: float, kv_heads: int, *,
    later: bool, ragged: bool,
) -> Parts:
    """Launch attention over the listed pages and over the block."""
    if part is None or part.page_table.shape[1] == 0 or part.k_pages.shape[0] == 0:
        part, has_pages = _no_pages(q, kv_heads), False
    else:
        has_pages = True
    grid = _grid(q, part, kv_heads, has_pages)
    if has_pages and ragged and q.shape[0] > 1 and grid.tiles == 1 and grid.pairs <= MOST_PAIRS:
        return _shares(q, block, part, scale, grid)
    return _splits(q, block, part, scale, later, grid, has_pages)


def _splits(
    q: Tensor, block: tuple[Tensor, Tensor] | None, part: Part, scale: float, later: bool, grid: _Grid,
    has_pages: bool,
) -> Parts:
    batch, q_heads, tokens, head_dim = q.shape
    k, v = block if block is not None else (q, q)
    page_size, (spans, pages) = part.k_pages.shape[2], part.mask.shape[2:]
    settings, tiles, splits = grid.settings, grid.tiles, 0
    if has_pages:
        pieces = max(page_size // settings.block_n, 1)
        most = max(min(triton.cdiv(pages * page_size, settings.block_n), pages * pieces, 128), 1)
        splits = min(max(settings.programs // (grid.pairs * tiles), 1), most)
        splits = 1 << (splits.bit_length() - 1)
    pieces = _pieces(page_size, settings.block_n, splits)
    slots = splits + (block is not None)
    states = (batch, q_heads, tokens, slots)
    parts = Parts(
        torch.empty((*states, head_dim), dtype=torch.float32, device=q.device),
        torch.empty(states, dtype=torch.float32, device=q.device), splits, slots,
    )
    capacity = triton.cdiv(pages, max(splits // pieces, 1))
    scratch = torch.empty(grid.pairs * tiles * splits * 2 * capacity, dtype=torch.int64, device=q.device)
    mask = part.mask
    splits_kernel[(slots * tiles * grid.pairs,)](
        q, part.k_pages, part.v_pages, part.page_table, part.page_lengths,
        bytes_of(mask), bytes_of(part.active), k, v, parts.out, parts.lse, scratch,
        *q.stride()[:3], *part.k_pages.stride()[:3], *part.v_pages.stride()[:3],
        *_mask_strides(mask, grid), *k.stride()[:3], *v.stride()[:3], scale * LOG2_E,
        grid.pairs // batch, grid.pairs, tiles, pages, spans, min(part.span, tokens), capacity,
        k.shape[2] if block is not None else 0,
        TOKENS=tokens, GROUP=grid.group, ROWS=grid.rows, SPLITS=splits, SLOTS=slots,
        MASK_ROWS=grid.mask_rows, OWN=grid.mask_rows > 1 or spans > 1, PAGE_SIZE=page_size,
        HEAD_DIM=head_dim, BLOCK_M=grid.block_m, BLOCK_N=settings.block_n,
        BLOCK_K=_keys_of_tile(k.shape[2], head_dim), BLOCK_P=min(power_of_two(pages), MOST_LISTED),
        BLOCK_T=power_of_two(tokens) if splits else 16, BLOCK_D=padded_dim(head_dim),
        LONG=pages > MOST_LISTED, PIECES=pieces, LATER=later, PRECISION=precision(q),
        STAGES=settings.stages, num_warps=settings.warps, **launched(q.device),
    )  # fmt: skip
    return parts


def _mask_strides(mask: Tensor, grid: _Grid) -> tuple[int, int, int, int]:
    """Return strides of a selection along sequences, KV heads, query heads of a group, spans."""
    batch, head, span, _ = mask.stride()
    return batch, head * (mask.shape[1] > 1) * grid.mask_rows, head, span


def _shares(
    q: Tensor, block: tuple[Tensor, Tensor] | None, part: Part, scale: float, grid: _Grid
) -> Parts:
    batch, _, tokens, head_dim = q.shape
    k, v = block if block is not None else (q, q)
    page_size, spans, pages = part.k_pages.shape[2], part.mask.shape[2], part.mask.shape[3]
    pairs, settings, own = grid.pairs, grid.settings, grid.mask_rows > 1 or spans > 1
    mask, active = bytes_of(part.mask), bytes_of(part.active)
    entries, logicals = torch.empty((2, pairs, pages), dtype=torch.int64, device=q.device)
    counts, firsts, lasts = torch.empty((3, pairs), dtype=torch.int32, device=q.device)
    lists_kernel[(pairs,)](
        mask, active, part.page_table, part.page_lengths, entries, logicals,
        counts, *_mask_strides(mask, grid), pairs // batch, pages, spans, min(part.span, tokens),
        TOKENS=tokens, MASK_ROWS=grid.mask_rows, OWN=own, PAGE_SIZE=page_size,
        BLOCK_P=min(power_of_two(pages), MOST_LISTED), BLOCK_T=power_of_two(tokens),
        num_warps=4, **launched(q.device),
    )  # fmt: skip
    programs = settings.programs
    blocks = pairs if block is not None else 0
    slots = programs + pairs + blocks
    parts = Parts(
        torch.empty((slots, grid.group * tokens, head_dim), dtype=torch.float32, device=q.device),
        torch.empty((slots, grid.group * tokens), dtype=torch.float32, device=q.device), 0, 0,
        firsts, lasts, counts, programs + pairs,
    )
    shares_kernel[(programs + blocks,)](
        q, part.k_pages, part.v_pages, mask, active, k, v, parts.out, parts.lse, entries, logicals, counts,
        firsts, lasts, *q.stride()[:3], *part.k_pages.stride()[:3], *part.v_pages.stride()[:3],
        *_mask_strides(mask, grid), *k.stride()[:3], *v.stride()[:3], scale * LOG2_E,
        pairs // batch, pages, min(part.span, tokens), pairs, programs, blocks, k.shape[2] if blocks else 0,
        TOKENS=tokens, GROUP=grid.group, ROWS=grid.rows, MASK_ROWS=grid.mask_rows, OWN=own,
        PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK_M=grid.block_m, BLOCK_N=settings.block_n,
        BLOCK_K=_keys_of_tile(k.shape[2], head_dim),
        BLOCK_L=power_of_two(pairs), BLOCK_T=power_of_two(tokens),
        BLOCK_D=padded_dim(head_dim), PRECISION=precision(q), STAGES=settings.stages,
        num_warps=settings.warps, **launched(q.device),
    )  # fmt: skip
    return parts


def _keys_of_tile(keys: int, head_dim: int) -> int:
    """Return how many keys of the block to multiply at a time."""
    return min(power_of_two(keys), 32 if head_dim <= 128 else 16)


def _pieces(page_size: int, block_n: int, splits: int) -> int:
    """Return among how many splits to divide each page, so that all have about the same to read."""
    pieces = 1
    while pieces < splits and page_size % (2 * pieces * block_n) == 0:
        pieces *= 2
    return pieces


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
    *,
    later: bool = False,
    ragged: bool = False,
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
    later : bool
        Whether kernels of the same pass were launched before.
    ragged : bool
        Whether programs take equal shares of all lists together, for one more launch.

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
    kv_heads = block[0].shape[1] if part is None else part.k_pages.shape[1]  # type: ignore[index]
    # Copies, if there have to be any, before the first launch: see `attend_ranked`.
    old = tuple(map(lined, cached)) if cached is not None else (q, state_lse)
    before = q if reference is None else lined(reference)
    block = None if block is None else (lined(block[0]), lined(block[1]))
    if part is not None:
        part = replace(
            part, page_table=part.page_table.contiguous(), page_lengths=part.page_lengths.contiguous(),
            mask=lined(part.mask), active=part.active.contiguous(),
        )
    parts = _parts(q, block, part, scale, kv_heads, later=later, ragged=ragged)
    shared = parts.counts is not None
    active = q if part is None else bytes_of(part.active)
    several = not shared and parts.splits <= 8 and batch * q_heads * tokens >= MANY_ROWS
    rows = min(power_of_two(tokens, 1), FINISHED) if several else 1
    finish_kernel[(triton.cdiv(tokens, rows), q_heads, batch)](
        q, active, parts.out, parts.lse, *(parts.firsts, parts.lasts, parts.counts) if shared else (q, q, q),
        *old, before, out, state_out, state_lse, kept,
        *q.stride()[:3], *old[0].stride()[:3], *old[1].stride()[:2], *before.stride()[:3], q_heads,
        parts.block_slots,
        TOKENS=tokens, GROUP=q_heads // kv_heads, SPLITS=parts.splits, SLOTS=parts.slots, HEAD_DIM=head_dim,
        BLOCK_R=rows, BLOCK_S=8 if shared else power_of_two(parts.splits, 1),
        BLOCK_D=padded_dim(head_dim),
        CONTEXT=part is not None, CACHED=cached is not None, BLOCK=block is not None, SHARED=shared,
        KEEP=keep, num_warps=rows, **launched(q.device),
    )  # fmt: skip
    return out, state_out, state_lse, kept
