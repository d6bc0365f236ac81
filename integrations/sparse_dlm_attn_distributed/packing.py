"""An attention state as one tensor of bytes, so that one collective carries it."""

from __future__ import annotations

import torch

from sparse_dlm_attn import AttentionState

__all__ = ["packed", "packed_bytes", "unpacked"]

ALIGNMENT = 16  # bytes: every rank's part starts where any dtype may


def packed_bytes(rows: int, head_dim: int, element: int) -> int:
    """Return the bytes of a packed state.

    Parameters
    ----------
    rows : int
        ``batch * q_heads * tokens``.
    head_dim : int
        Channels.
    element : int
        Bytes of an element of ``out``.
    """
    used = rows * (4 + head_dim * element)
    return -(-used // ALIGNMENT) * ALIGNMENT


def packed(state: AttentionState) -> torch.Tensor:
    """Return ``lse``, then ``out``, then padding, as int32 of ``packed_bytes / 4``."""
    lse = state.lse.contiguous().reshape(-1).view(torch.uint8)
    out = state.out.contiguous().reshape(-1).view(torch.uint8)
    missing = -(lse.numel() + out.numel()) % ALIGNMENT
    if missing:
        return torch.cat([lse, out, lse.new_zeros(missing)]).view(torch.int32)
    if out.numel() % 4 == 0:  # wider elements are copied faster
        return torch.cat([lse.view(torch.int32), out.view(torch.int32)])
    return torch.cat([lse, out]).view(torch.int32)


def unpacked(gathered: torch.Tensor, like: AttentionState) -> list[AttentionState]:
    """Return the states of all ranks, as views of ``(ranks, packed_bytes / 4)``."""
    rows, states = like.lse.numel(), []
    for part in gathered:
        lse = part[:rows].view(torch.float32).view(like.lse.shape)
        out = part[rows:].view(like.out.dtype)[: like.out.numel()].view(like.out.shape)
        states.append(AttentionState(out, lse))
    return states
