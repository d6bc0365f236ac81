"""Attention states: merging and keeping."""

from __future__ import annotations

import math

import torch

__all__ = ["keep_active", "merged", "united"]


def merged(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge states of disjoint key sets (clause MERGE-1), in the precision that they come in.

    Parameters
    ----------
    outs, lses : list of torch.Tensor
        ``(..., head_dim)`` and ``(...)``. A state of weight 0 may hold anything (MERGE-4).

    Returns
    -------
    tuple of torch.Tensor
        ``out`` and ``lse`` of the union.
    """
    lse = torch.stack(lses)
    peak = lse.amax(0)
    safe = torch.where(peak.isneginf(), 0.0, peak)  # -inf - -inf would be NaN
    weights = (lse - safe).exp()
    total = weights.sum(0)
    empty = total == 0
    shares = weights / torch.where(empty, 1.0, total)
    out = torch.zeros_like(outs[0])
    for part, share in zip(outs, shares.unsqueeze(-1), strict=True):
        out = out + torch.where(share == 0, 0.0, part) * share
    return out, torch.where(empty, -math.inf, safe + torch.where(empty, 1.0, total).log())


def united(out: torch.Tensor, lse: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge states that lie in one tensor, in few steps.

    Parameters
    ----------
    out, lse : torch.Tensor
        As for `merged`, with the states along ``axis``, which the result lacks.
    axis : int
        Not negative.
    """
    peak = lse.amax(axis, keepdim=True)
    safe = torch.where(peak.isneginf(), 0.0, peak)
    weights = (lse - safe).exp()
    total = weights.sum(axis, keepdim=True)
    shares = (weights / torch.where(total == 0, 1.0, total))[..., None]
    # A state of weight 0 may hold anything (MERGE-4).
    mixed = (torch.where(shares == 0, 0.0, out) * shares).sum(axis)
    return mixed, (safe + total.log()).squeeze(axis)


def keep_active(out: torch.Tensor, lse: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make inactive rows empty (clause ATTEND-2).

    Parameters
    ----------
    out, lse : torch.Tensor
        State of all rows.
    active : torch.Tensor
        bool ``(batch, tokens)``.

    Returns
    -------
    tuple of torch.Tensor
        New, contiguous tensors; ``lse`` is float32.
    """
    rows = active[:, None, :]
    lse = torch.where(rows, lse.to(torch.float32), -math.inf)
    return torch.where(rows[..., None], out, 0.0).contiguous(), lse.contiguous()
