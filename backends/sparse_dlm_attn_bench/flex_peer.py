"""FlexAttention over lists of blocks, as a contender of benchmarks."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from sparse_dlm_attn_torch.layout import Lists

__all__ = ["flex_listed", "flex_masked", "listed_mask"]

Pair = tuple[torch.Tensor, torch.Tensor]


@functools.cache
def _compiled() -> Callable[..., Any]:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    # One graph or an error: uncompiled it ignores lists, and would be timed at something else.
    return torch.compile(module.flex_attention, dynamic=False, fullgraph=True)


def _every_key(b: Any, h: Any, query: Any, key: Any) -> Any:
    # A mask_mod that is trivial would let the FLASH back end ignore the lists and compute densely.
    return key >= 0


def flex_listed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, block: tuple[int, int], scale: float,
    *, kernel: str = "TRITON", partial: Lists | None = None, options: dict[str, Any] | None = None,
    mask_mod: Callable[..., Any] = _every_key,
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
    mask_mod: Callable[..., Any] = _every_key,
) -> Any:
    """Return FlexAttention's `BlockMask` of listed blocks.

    Parameters
    ----------
    lengths : tuple of int
        Rows and keys.
    lists, block, partial, mask_mod
        As for `flex_listed`.
    """
    module = importlib.import_module("torch.nn.attention.flex_attention")
    full = lists.pages.to(torch.int32), lists.counts.to(torch.int32)
    other = (
        (torch.zeros_like(full[0]), torch.zeros_like(full[1])) if partial is None
        else (partial.pages.to(torch.int32), partial.counts.to(torch.int32))
    )
    more: dict[str, Any] = {}
    if "compute_q_blocks" in inspect.signature(module.BlockMask.from_kv_blocks).parameters:
        more["compute_q_blocks"] = False
    return module.BlockMask.from_kv_blocks(
        other[1], other[0], full[1], full[0], BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=lengths,
        **more,
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
    module = importlib.import_module("torch.nn.attention.flex_attention")
    chosen = dict(options or {})
    if kernel != "TRITON":
        chosen["BACKEND"] = kernel
    request = getattr(module, "AuxRequest", None)
    wish = {"return_lse": True} if request is None else {"return_aux": request(lse=True)}
    out, aux = _compiled()(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=chosen or None, **wish,
    )
    return out, getattr(aux, "lse", aux)
