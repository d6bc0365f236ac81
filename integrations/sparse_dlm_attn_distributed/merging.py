"""States of all ranks as one tensor, and the merge that ends a pass."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from sparse_dlm_attn import AttentionState, Backend

__all__ = ["finish", "packed"]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed(state: AttentionState) -> torch.Tensor:
    """Return ``(batch, q_heads, tokens, head_dim + n)``: each row's ``out``, then its ``lse``.

    The LSE stays float32: two elements of a half dtype hold its bits.
    """
    dtype = state.out.dtype
    lse = state.lse[..., None].contiguous()
    return torch.cat([state.out, lse.to(dtype) if dtype == torch.float64 else lse.view(dtype)], dim=-1)


def finish(
    backend: Backend,
    gathered: torch.Tensor,
    head_dim: int,
    active: torch.Tensor | None = None,
    cached: AttentionState | None = None,
    block: AttentionState | None = None,
) -> tuple[torch.Tensor | None, AttentionState]:
    """Merge the packed states of all ranks, in their order, with what the pass has besides.

    Parameters
    ----------
    backend : Backend
        Merges where the kernel does not.
    gathered : torch.Tensor
        ``(ranks, batch, q_heads, tokens, head_dim + n)``.
    head_dim : int
        Channels.
    active : torch.Tensor or None
        bool ``(batch, tokens)``: rows that take the new state; needed with ``cached``.
    cached : AttentionState or None
        The state of all other rows.
    block : AttentionState or None
        The block's own state; None for the context part alone.

    Returns
    -------
    tuple
        Output of the pass, None without a block, and its context part.
    """
    if gathered.is_cuda and _kernel_takes(gathered, head_dim):
        from sparse_dlm_attn_distributed.kernel import merge

        return merge(gathered, head_dim, active, cached, block)
    tail = gathered[..., head_dim:].contiguous()
    lse = (tail.to(torch.float32) if tail.dtype == torch.float64 else tail.view(torch.float32))[..., 0]
    state = backend.merge(*map(AttentionState, gathered[..., :head_dim], lse))
    if cached is not None and active is not None:
        state = backend.reuse(active, state, cached)
    return None if block is None else backend.merge(state, block).out, state


def _kernel_takes(gathered: torch.Tensor, head_dim: int) -> bool:
    """Return whether the kernel merges such states: each LSE must lie at a multiple of 4 bytes."""
    aligned = head_dim * gathered.element_size() % 4 == 0
    return aligned and head_dim <= 256 and gathered.dtype in KERNEL_DTYPES and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
