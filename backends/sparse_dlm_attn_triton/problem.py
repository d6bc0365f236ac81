"""What decides how the attention kernels of a pass are launched: shapes, strides, tiles and the grid.

Nothing here looks at a value that a tensor holds, so nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from sparse_dlm_attn_triton import settings
from sparse_dlm_attn_triton.common import (
    INTERPRETED,
    WIDE_TILE_BYTES,
    aligned,
    last_contiguous,
    layout,
    power_of_two,
    precision,
    shared_memory,
)
from sparse_dlm_attn_triton.settings import Settings

__all__ = ["Grid", "Part", "Sizes", "constants_of", "grid_of", "sizes_of", "strides_of"]

FEW_LISTS = 16
"""With at most this many page lists, use at least 16 programs a list: balance matters more than tile efficiency."""
TWO_CTA_BYTES = 220 << 10
"""Shared memory of a multiprocessor that holds two CTAs with a 3-stage pipeline of 64-token tiles (64 rows, 128
channels); CTAs that need all of it were faster with this depth too."""
Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """The context part of a pass: which pages, for which rows; shapes as in `ops`.

    ``span`` rows share a selection. ``most_active`` is an upper bound of the active rows of a sequence that the host
    knows; ``tokens`` if it knows none.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    page_lengths: Tensor
    mask: Tensor
    span: int
    active: Tensor
    most_active: int

    def contiguous(self) -> Part:
        """Return it as kernels read it: itself, unless a table or a selection has gaps."""
        table, lengths, active = (x.contiguous() for x in (self.page_table, self.page_lengths, self.active))
        mask = last_contiguous(self.mask)
        if table is self.page_table and lengths is self.page_lengths and active is self.active and mask is self.mask:
            return self
        return Part(self.k_pages, self.v_pages, table, lengths, mask, self.span, active, self.most_active)


class Sizes(NamedTuple):
    """Shapes, strides and options of a pass; the key under which its launches are kept."""

    device: torch.device
    dtype: torch.dtype
    q: Any
    k: Any
    v: Any
    k_pages: Any
    v_pages: Any
    mask: Any
    span: int
    most_active: int
    kv_heads: int
    scale: float
    cached: Any
    reference: Any
    keep: int
    later: bool
    ragged: bool
    aligned: bool

    @property
    def has_context(self) -> bool:
        """Whether the context part is asked for."""
        return self.mask is not None

    @property
    def has_pages(self) -> bool:
        """Whether there is a page to read."""
        return self.has_context and self.mask[0][3] > 0 and self.k_pages[0][0] > 0

    @property
    def page_size(self) -> int:
        """Tokens a page; 1 without a context part."""
        return int(self.k_pages[0][2]) if self.has_context else 1

    @property
    def keys(self) -> int:
        """Keys of the block; 0 without a block."""
        return 0 if self.k is None else int(self.k[0][2])


def sizes_of(
    q: Tensor,
    block: tuple[Tensor, Tensor] | None,
    part: Part | None,
    cached: tuple[Tensor, Tensor] | None,
    reference: Tensor | None,
    scale: float,
    keep: int,
    later: bool,
    ragged: bool,
    mask: Any = None,
) -> Sizes:
    """Return the sizes of a pass of these tensors; ``mask`` is the layout of a selection that is not made yet."""
    tensors = [q, *(block or ()), *(cached or ()), *(() if reference is None else (reference,))]
    kv_heads = block[0].shape[1] if block is not None else q.shape[1]
    k_pages = v_pages = None
    if part is not None:
        tensors += [part.k_pages, part.v_pages, part.page_table, part.page_lengths]
        kv_heads, k_pages, v_pages = part.k_pages.shape[1], layout(part.k_pages), layout(part.v_pages)
        if mask is None:
            mask = layout(part.mask)
            tensors += [part.mask, part.active]
    return Sizes(
        q.device,
        q.dtype,
        layout(q),
        None if block is None else layout(block[0]),
        None if block is None else layout(block[1]),
        k_pages,
        v_pages,
        mask,
        1 if part is None else part.span,
        q.shape[2] if part is None else part.most_active,
        kv_heads,
        scale,
        None if cached is None else (cached[0].stride(), cached[1].stride()),
        None if reference is None else reference.stride(),
        keep,
        later,
        ragged,
        aligned(*tensors),
    )


@dataclass(frozen=True)
class Grid:
    """How rows and pages of a problem are divided among programs."""

    settings: Settings
    block_m: int
    rows: int
    tiles: int
    group: int
    pairs: int
    mask_rows: int


def grid_of(sizes: Sizes) -> Grid:
    """Choose the tiles of a pass: tuned ones if they were asked for, else measured defaults."""
    batch, q_heads, tokens, head_dim = sizes.q[0]
    kv_heads, pages = sizes.kv_heads, sizes.mask[0][3] if sizes.has_pages else 0
    group, rows = q_heads // kv_heads, max(min(sizes.most_active, tokens), 1)
    most_m = 32 if sizes.dtype == torch.float32 else 64 if head_dim > 128 else 128
    block_m = min(power_of_two(group * rows), most_m)
    lists = batch * kv_heads * triton.cdiv(group * rows, block_m)
    found = default_settings(sizes.dtype, head_dim, block_m, sizes.page_size, lists, shared_memory(sizes.device))
    if INTERPRETED:  # a few programs of small tiles show the same
        found = Settings(block_n=32, programs=8)
    if sizes.has_pages:
        kind = head_dim, sizes.page_size, group, tokens, batch * kv_heads, pages * sizes.page_size
        found = settings.chosen(found, sizes.device, sizes.dtype, *kind)
    block_m = max(block_m, found.least_m)
    rows = tokens if group * tokens <= block_m else rows  # all rows fit: no need to look for the active ones
    heads = sizes.mask[0][1] if sizes.has_context else 1
    mask_rows = group if heads == q_heads and heads != kv_heads else 1
    return Grid(found, block_m, rows, triton.cdiv(group * rows, block_m), group, batch * kv_heads, mask_rows)


def default_settings(
    dtype: torch.dtype, head_dim: int, block_m: int, page_size: int, lists: int, shared_bytes: int
) -> Settings:
    """Return the measured default for a page size, a number of page lists and a CTA's shared memory.

    Tiles that lie in one page are loaded two ahead where two CTAs fit a multiprocessor, smaller ones three.
    Others are loaded one ahead: float32, tiles that span pages, wide heads on GPUs with less shared memory.
    """
    warps, roomy = 4 if block_m <= 64 else 8, shared_bytes >= TWO_CTA_BYTES
    if dtype == torch.float32:
        if head_dim > 128:
            return Settings(block_n=16, warps=8, stages=2)
        return Settings(block_n=64 if shared_bytes >= WIDE_TILE_BYTES else 32, warps=8, stages=2)
    if head_dim > 128:
        return Settings(block_n=32, warps=warps, stages=3 if roomy else 2)
    if page_size % 64 == 0 and lists > FEW_LISTS and roomy:
        return Settings(warps=warps, stages=3, least_m=64)
    if page_size % 32 == 0:
        return Settings(block_n=32, warps=warps, stages=4, least_m=64)
    return Settings(warps=warps, stages=2, least_m=64)


def strides_of(sizes: Sizes, grid: Grid) -> tuple[tuple[int, ...], ...]:
    """Return strides of q, K and V pages, mask, and the block's k and v, as the attention kernels take them."""
    q = sizes.q[1][:3]
    mask, heads = ((0, 0, 0, 0), 1) if not sizes.has_context else (sizes.mask[1], sizes.mask[0][1])
    # Of a sequence, a KV head, a query head of its group, and a span.
    of_mask = mask[0], mask[1] * (heads > 1) * grid.mask_rows, mask[1], mask[2]
    of_pages = ((0,) * 3,) * 2 if not sizes.has_context else (sizes.k_pages[1][:3], sizes.v_pages[1][:3])
    of_block = (q, q) if sizes.k is None else (sizes.k[1][:3], sizes.v[1][:3])
    return (q, *of_pages, of_mask, *of_block)


def constants_of(sizes: Sizes, grid: Grid) -> dict[str, Any]:
    """Return the compile-time constants that the attention kernels share."""
    tokens, head_dim = sizes.q[0][2:]
    return {
        "TOKENS": tokens,
        "GROUP": grid.group,
        "ROWS": grid.rows,
        "MASK_ROWS": grid.mask_rows,
        "PER_ROW": grid.mask_rows > 1 or (sizes.has_context and sizes.mask[0][2] > 1),
        "PAGE_SIZE": sizes.page_size,
        "HEAD_DIM": head_dim,
        "BLOCK_M": grid.block_m,
        "BLOCK_N": grid.settings.block_n,
        # Keys of the block are multiplied some at a time.
        "BLOCK_K": min(power_of_two(sizes.keys or tokens), 32 if head_dim <= 128 else 16),
        "BLOCK_D": power_of_two(head_dim),
        "PRECISION": precision(sizes.dtype),
        "STAGES": grid.settings.stages,
        "num_warps": grid.settings.warps,
    }
