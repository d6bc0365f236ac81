"""Tiles of the whole-sequence kernels, chosen from the shape alone, and the tensor descriptors that load them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_dlm_attn_triton.common import WIDE_TILE_BYTES, power_of_two

__all__ = ["Tile", "attend_tile", "can_describe", "descriptors", "pooled_tile"]

MOST_SPANS = 32
"""Most spans that share a tile: one bit each."""
Tensor = torch.Tensor


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


def _fit(tile: Tile, tokens: int, span: int) -> Tile:
    """Shrink a tile to the rows that there are, and to as many spans as fit its bits."""
    most = power_of_two(MOST_SPANS * span + 1) // 2  # the power of two below
    return replace(tile, rows=max(16, min(tile.rows, power_of_two(tokens), most)))


def attend_tile(dtype: torch.dtype, head_dim: int, tokens: int, span: int, shared_bytes: int) -> Tile:
    """Choose the tile of block-sparse attention, for a program that may use so many bytes of shared memory."""
    wide = head_dim > 128
    if dtype == torch.float32:  # tensor cores would round the inputs to tf32: products are plain sums
        return _fit(Tile(16 if wide else 32, 16, 4, 2), tokens, span)
    if wide:
        large = span >= 128 and shared_bytes >= WIDE_TILE_BYTES
        return _fit(Tile(128 if large else 64, 32, 8 if large else 4, 2), tokens, span)
    return _fit(Tile(64, 64, 4, 3 if span >= 128 else 2), tokens, span)


def pooled_tile(dtype: torch.dtype, head_dim: int, tokens: int, span: int) -> Tile:
    """Choose the tile of the selection sweep, which fits any GPU; parameters as those of `attend_tile`."""
    wide = head_dim > 128
    if dtype == torch.float32:
        return _fit(Tile(16 if wide else 32, 32, 4, 2), tokens, span)
    return _fit(Tile(64, 64, 4, 2) if wide else Tile(128, 128, 4, 2), tokens, span)


def _row_view(pages: Tensor) -> tuple[Tensor, int, int] | None:
    """View pages as a matrix with a token a row; return it with the rows from page to page and head to head.

    None if the memory is not laid out so, or if its rows do not lie on 16 bytes.
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


def can_describe(k_pages: Tensor, v_pages: Tensor, tile: Tile) -> bool:
    """Return whether tensor descriptors can load tiles of these pages on their GPU."""
    if k_pages.device.type != "cuda" or torch.cuda.get_device_capability(k_pages.device) < (9, 0):
        return False
    if k_pages.dtype == torch.float32 or k_pages.shape[2] % tile.tokens:
        return False
    return _row_view(k_pages) is not None and _row_view(v_pages) is not None


def descriptors(k_pages: Tensor, v_pages: Tensor, tile: Tile) -> tuple[Any, Any, tuple[int, int], tuple[int, int]]:
    """Return tensor descriptors of K and V, if the tile asks for them, and the row strides of page and head."""
    if not tile.tma:
        return k_pages, v_pages, (0, 0), (0, 0)
    k_view, v_view = _row_view(k_pages), _row_view(v_pages)
    if k_view is None or v_view is None or k_pages.shape[2] % tile.tokens:
        raise ValueError(
            "tile.tma: needs pages whose tokens lie side by side in memory, rows on 16 bytes, and "
            f"tile.tokens ({tile.tokens}) that divides page_size ({k_pages.shape[2]}); use tma=False."
        )
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [tile.tokens, power_of_two(k_pages.shape[3])]
    k_tiles, v_tiles = (TensorDescriptor.from_tensor(view[0], block) for view in (k_view, v_view))
    return k_tiles, v_tiles, k_view[1:], v_view[1:]
