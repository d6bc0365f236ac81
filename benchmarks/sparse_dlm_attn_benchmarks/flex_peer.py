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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: Lists,
    block: tuple[int, int],
    scale: float,
    *,
    kernel: str = "TRITON",
    partial: Lists | None = None,
    options: dict[str, Any] | None = None,
    mask_mod: Callable[..., Any] = flex.every_slot,
) -> Pair:
    """Run compiled FlexAttention over listed blocks; return ``out`` and its LSE, natural log.

    ``q`` is ``(batch, q_heads, tokens, head_dim)``, ``k`` and ``v`` are ``(batch, kv_heads, keys, head_dim)``.
    Blocks of ``lists``, ``(batch, q_heads, row blocks, width)``, need no mask; those of ``partial`` get ``mask_mod``.
    """
    mask = listed_mask((q.shape[2], k.shape[2]), lists, block, partial=partial, mask_mod=mask_mod)
    return flex_masked(q, k, v, mask, scale, kernel=kernel, options=options)


def listed_mask(
    lengths: tuple[int, int],
    lists: Lists,
    block: tuple[int, int],
    *,
    partial: Lists | None = None,
    mask_mod: Callable[..., Any] = flex.every_slot,
) -> Any:
    """Return FlexAttention's `BlockMask` of listed blocks."""
    full = lists.pages.to(torch.int32), lists.counts.to(torch.int32)
    other = (
        (torch.zeros_like(full[0]), torch.zeros_like(full[1]))
        if partial is None
        else (partial.pages.to(torch.int32), partial.counts.to(torch.int32))
    )
    return flex_attention.BlockMask.from_kv_blocks(
        other[1],
        other[0],
        full[1],
        full[0],
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        **flex.INDEX_OPTIONS,
    )


def flex_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    scale: float,
    *,
    kernel: str = "TRITON",
    options: dict[str, Any] | None = None,
) -> Pair:
    """Run compiled FlexAttention over a mask that is there already; see `flex_listed`."""
    chosen = dict(options or {})
    if kernel != "TRITON":
        chosen["BACKEND"] = kernel
    # Compiled or an error: uncompiled it ignores lists, and something else would be timed.
    form = (q.shape, k.shape, q.dtype, mask.BLOCK_SIZE, mask.mask_mod, scale, *sorted(chosen.items()))
    return flex.kernel(flex.with_lse, form)(  # type: ignore[no-any-return]
        q, k, v, mask, scale, chosen or None
    )
