"""Sizes of the tiles in which whole-sequence kernels work, chosen from the shape alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

__all__ = ["LOG2_E", "WIDE_ROOM", "Tile", "attend_tile", "padded_dim", "pooled_tile", "row_view"]

LOG2_E = 1.4426950408889634
LEAST = 16  # rows, tokens and channels of the smallest matrix product of a tensor core
MOST_SPANS = 32  # spans that share a tile: one bit each
WIDE_ROOM = 136 << 10  # bytes of shared memory for the widest tiles, which 99 KiB do not hold


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel works.

    Parameters
    ----------
    rows : int
        Query rows a program, a power of two from 16 on. Larger than a span, several spans share the
        program: it loads the union of their pages once and masks what a row did not select.
    tokens : int
        Keys a step, a power of two from 16 on.
    warps, stages : int
        Warps a program, and steps whose loads are in flight.
    tma : bool
        Load K and V through tensor descriptors (compute capability 9.0 or later). Needs pages whose
        tokens lie side by side, and ``tokens`` that divides the page size.
    warp_specialize : bool
        Ask the compiler for separate loading and computing warps.
    registers : int, optional
        Most registers a thread.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    tma: bool = False
    warp_specialize: bool = False
    registers: int | None = None

    def launch_options(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def padded_dim(head_dim: int) -> int:
    """Return the power of two, at least 16, to which channels are padded inside a kernel."""
    return max(LEAST, int(triton.next_power_of_2(head_dim)))


def _fit(tile: Tile, tokens: int, span: int) -> Tile:
    """Shrink a tile to the rows that there are, and to as many spans as fit its bits."""
    rows = min(tile.rows, max(LEAST, triton.next_power_of_2(tokens)))
    most = triton.next_power_of_2(MOST_SPANS * span)
    if most > MOST_SPANS * span:
        most //= 2
    return replace(tile, rows=max(LEAST, min(rows, most)))


def attend_tile(
    dtype: torch.dtype, head_dim: int, tokens: int, span: int, page_size: int, room: int
) -> Tile:
    """Choose the tile of block-sparse attention.

    Parameters
    ----------
    dtype : torch.dtype
        Of q, K and V.
    head_dim : int
        Channels a head.
    tokens, span : int
        Query rows of the block, and those that share a page list.
    page_size : int
        Tokens a page.
    room : int
        Bytes of shared memory that a program may use.
    """
    dim = padded_dim(head_dim)
    if dtype == torch.float32:  # no tensor core computes it exactly enough: products are plain sums
        return _fit(Tile(32 if dim <= 128 else 16, 16, 4, 2), tokens, span)
    if dim > 128:
        wide = span >= 128 and room >= WIDE_ROOM
        return _fit(Tile(128 if wide else 64, 32, 8 if wide else 4, 2), tokens, span)
    return _fit(Tile(64, 64, 4, 3 if span >= 128 else 2), tokens, span)


def pooled_tile(dtype: torch.dtype, head_dim: int, tokens: int, span: int, page_size: int) -> Tile:
    """Choose the tile of the selection sweep; parameters as those of `attend_tile`, any GPU has the room."""
    dim = padded_dim(head_dim)
    if dtype == torch.float32:
        return _fit(Tile(32 if dim <= 128 else 16, 32, 4, 2), tokens, span)
    if dim > 128:
        return _fit(Tile(64, 64, 4, 2), tokens, span)
    return _fit(Tile(128, 128, 4, 2), tokens, span)


def row_view(pages: torch.Tensor) -> tuple[torch.Tensor, int, int] | None:
    """View pages as a matrix with a token a row, for tensor descriptors.

    Parameters
    ----------
    pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``.

    Returns
    -------
    tuple or None
        ``(rows, head_dim)`` in the same memory, and the rows from one page and from one head to the
        next; None if the memory is not laid out so, or if its rows do not lie on 16 bytes.
    """
    count, heads, page_size, head_dim = pages.shape
    of_page, of_head, of_token, of_channel = pages.stride()
    if count == 0 or of_channel != 1 or (page_size > 1 and of_token != head_dim):
        return None
    if of_page % head_dim or of_head % head_dim:
        return None
    if head_dim * pages.element_size() % 16 or pages.data_ptr() % 16:
        return None
    of_page, of_head = of_page // head_dim, of_head // head_dim
    rows = (count - 1) * of_page + (heads - 1) * of_head + page_size
    if rows >= 2**31:  # coordinates are 32 bits wide
        return None
    return pages.as_strided((rows, head_dim), (head_dim, 1)), of_page, of_head
