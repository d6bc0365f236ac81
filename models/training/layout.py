"""Who sees whom in a packed row of tokens, as tensors of one fixed shape.

A row always has the same number of tokens, whatever the lengths of the sequences in it, so that
the model compiles once. Three kinds of row:

* block training: a noisy copy of every sequence in the first half of the row, a clean copy in the
  second. A noisy block sees itself and the clean copies of earlier blocks; a clean token sees clean
  tokens of its own and earlier blocks. All blocks of a sequence are thus trained at once.
* full-sequence: every token sees its whole sequence.
* decoding: one copy of every sequence, block-causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

TILE = 128
"""Tile of FlexAttention; every sequence's length in a row is a multiple of it."""


@dataclass(frozen=True)
class Rows:
    """One int32 value per token of a row: the layout in NumPy."""

    position: np.ndarray  # position in the sequence
    block: np.ndarray  # number of the token's block, counted over the whole row
    first: np.ndarray  # number of the first block of the token's sequence
    noisy: np.ndarray  # 1 in a noisy copy


def _one_copy(lengths: Sequence[int], block_length: int | None) -> np.ndarray:
    """Return position, block and first block of sequences side by side, ``(3, tokens)``."""
    columns, blocks = [], 0
    for length in lengths:
        if length % TILE:
            raise ValueError(f"lengths: must be multiples of {TILE}; got {length}")
        position = np.arange(length)
        block = position // (block_length or length)
        columns.append(np.stack([position, blocks + block, np.full(length, blocks)]))
        blocks += int(block[-1]) + 1
    return np.concatenate(columns, axis=1)


def block_training_rows(lengths: Sequence[int], block_length: int) -> Rows:
    """Return noisy copies followed by clean copies."""
    once = _one_copy(lengths, block_length)
    noisy = np.repeat([1, 0], once.shape[1])
    return Rows(*np.concatenate([once, once], axis=1), noisy)


def full_rows(lengths: Sequence[int], used: int | None = None) -> Rows:
    """Return sequences that each see themselves both ways; no token before `used` sees the padding from there on."""
    position, block, first = _one_copy(lengths, None)
    if used is not None:
        block, first = 2 * block + (position >= used), 2 * first
    return Rows(position, block, first, np.zeros_like(position))


def decoding_rows(lengths: Sequence[int], block_length: int) -> Rows:
    """Return block-causal sequences."""
    once = _one_copy(lengths, block_length)
    return Rows(*once, np.zeros(once.shape[1], dtype=np.int64))


def _tiles(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs of tiles see each other in part, and which in full."""
    tiled = rows.block.reshape(-1, TILE)
    low, high = tiled.min(axis=1), tiled.max(axis=1)
    first, noisy = rows.first[::TILE], rows.noisy[::TILE].astype(bool)
    same = first[:, None] == first[None, :]
    q_noisy, kv_noisy = noisy[:, None], noisy[None, :]
    shift = q_noisy.astype(np.int64)  # a noisy block sees clean blocks strictly before it
    any_clean = ~kv_noisy & (low[None, :] <= high[:, None] - shift)
    all_clean = ~kv_noisy & (high[None, :] <= low[:, None] - shift)
    overlap = (high[None, :] >= low[:, None]) & (low[None, :] <= high[:, None])
    one_block = (low == high)[:, None] & (low == high)[None, :]
    any_noisy = q_noisy & kv_noisy & overlap
    all_noisy = any_noisy & one_block
    full = same & (all_clean | all_noisy)
    return same & (any_clean | any_noisy) & ~full, full


def _lists(visible: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return counts and column indices, visible tiles first, as FlexAttention wants them."""
    counts = visible.sum(axis=1).astype(np.int32)
    columns = np.argsort(~visible, axis=1, kind="stable").astype(np.int32)
    return (torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(columns)[None, None].to(device))


class Layout:
    """A row's layout on a device."""

    def __init__(self, rows: Rows, cos: torch.Tensor, sin: torch.Tensor, *, flex: bool) -> None:
        device = cos.device
        self.cos, self.sin = cos, sin
        self.position, self.block, self.first, self.noisy = (
            torch.from_numpy(column.astype(np.int32)).to(device)
            for column in (rows.position, rows.block, rows.first, rows.noisy)
        )
        self.blocks = int(rows.block.max()) + 1
        self.block_mask = self._block_mask(rows, device) if flex else None

    def visible(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Return whether token `q` sees token `kv` (indices that broadcast together)."""
        return _visible(self.block, self.first, self.noisy, q, kv)

    def dense_mask(self) -> torch.Tensor:
        """Return the whole mask ``(tokens, tokens)``; for short rows only."""
        index = torch.arange(len(self.block), device=self.block.device)
        return self.visible(index[:, None], index[None, :])

    def _block_mask(self, rows: Rows, device: torch.device) -> BlockMask:
        block, first, noisy = self.block, self.first, self.noisy

        def mask_mod(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return _visible(block, first, noisy, q, kv)

        partial, full = _tiles(rows)
        return BlockMask.from_kv_blocks(
            *_lists(partial, device),
            *_lists(full, device),
            BLOCK_SIZE=TILE,
            mask_mod=mask_mod,
            seq_lengths=(len(rows.block), len(rows.block)),
        )


def _visible(
    block: torch.Tensor, first: torch.Tensor, noisy: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
) -> torch.Tensor:
    q_noisy, kv_noisy = noisy[q], noisy[kv]
    # first[q] <= block[kv] <= block[q] keeps a token inside its own sequence.
    clean = (kv_noisy == 0) & (first[q] <= block[kv]) & (block[kv] <= block[q] - q_noisy)
    same_noisy_block = (q_noisy == 1) & (kv_noisy == 1) & (block[kv] == block[q])
    return clean | same_noisy_block
