"""FlexAttention over lists of blocks, as a contender of benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention

from sparse_dlm_attn_torch import flex
from sparse_dlm_attn_torch.layout import Lists

__all__ = ["flex_listed", "flex_masked", "listed_mask"]

Pair = tuple[torch.Tensor, torch.Tensor]


def flex_listed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, block: tuple[int, int], scale: float,
    *, kernel: str = "TRITON", partial: Lists | None = None, options: dict[str, Any] | None = None,
    mask_mod: Callable[..., Any] = flex.every_slot,
) -> Pair:
    """Run compiled FlexAttention over listed blocks.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    k, v : torch.Tensor
        ``(batch, kv_heads, keys, head_dim)``.
    lists : Lists
        ``(batch, q_heads, row blocks, width)``: blocks that need no mask.
    block : tuple of int
        Rows and keys a block.
    scale : float
        Factor on q.k.
    kernel : str
        "TRITON" or "FLASH".
    partial : Lists, optional
        Blocks to which ``mask_mod`` is applied; None for none.
    options : dict, optional
        Further kernel options.
    mask_mod : callable
        For ``partial``; default: every key.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and ``lse`` ``(batch, q_heads, tokens)``, natural log.
    """
    mask = listed_mask((q.shape[2], k.shape[2]), lists, block, partial=partial, mask_mod=mask_mod)
    return flex_masked(q, k, v, mask, scale, kernel=kernel, options=options)


def listed_mask(
    lengths: tuple[int, int], lists: Lists, block: tuple[int, int], *, partial: Lists | None = None,
    mask_mod: Callable[..., Any] = flex.every_slot,
) -> Any:
    """Return FlexAttention's `BlockMask` of listed blocks.

    Parameters
    ----------
    lengths : tuple of int
        Rows and keys.
    lists, block, partial, mask_mod
        As for `flex_listed`.
    """
    full = lists.pages.to(torch.int32), lists.counts.to(torch.int32)
    other = (
        (torch.zeros_like(full[0]), torch.zeros_like(full[1])) if partial is None
        else (partial.pages.to(torch.int32), partial.counts.to(torch.int32))
    )
    return flex_attention.BlockMask.from_kv_blocks(
        other[1], other[0], full[1], full[0], BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=lengths,
        **flex.INDEX_OPTIONS,
    )


def flex_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float, *, kernel: str = "TRITON",
    options: dict[str, Any] | None = None,
) -> Pair:
    """Run compiled FlexAttention over a mask that is there already; see `flex_listed`.

    Parameters
    ----------
    q, k, v
        As there.
    mask : BlockMask
        As `listed_mask` makes it.
    scale, kernel, options
        As there.
    """
    chosen = dict(options or {})
    if kernel != "TRITON":
        chosen["BACKEND"] = kernel
    # Compiled or an error: uncompiled it ignores lists, and something else would be timed.
    form = (q.shape, k.shape, q.dtype, mask.BLOCK_SIZE, mask.mask_mod, scale, *sorted(chosen.items()))
    return flex.kernel(flex.with_lse, form)(  # type: ignore[no-any-return]
        q, k, v, mask, scale, chosen or None
    )
