"""Path "block-sparse": long blocks through a library's block-sparse kernel, FlashAttention 4's.

Pages become blocks of one dense sequence, copied in reading order; slots behind a page's length hold 0
there. Whole pages are flash-attn 4's, called itself: driven by FlexAttention
(``kernel_options={"BACKEND": "FLASH"}``) its results were wrong over the same lists. The few pages that are
not full are FlexAttention's own, whose `mask_mod` keeps their empty slots out; states merge by their LSE.
Spans and pages must be the kernel's tile, 128 tokens.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from sparse_dlm_attn import UnavailableError, UnsupportedError
from sparse_dlm_attn_torch.layout import Lists, lists_of, wanted_pages
from sparse_dlm_attn_torch.states import keep_active, merged

__all__ = [
    "attend_pages", "check_installed", "flash_attn_listed", "flex_listed", "flex_masked", "listed_mask",
    "why_not",
]

TILE = 128
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 96, 128)
Pair = tuple[torch.Tensor, torch.Tensor]


def check_installed() -> None:
    """Raise `UnavailableError` unless flash-attn 4 is there."""
    try:
        importlib.import_module("flash_attn.cute")
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UnavailableError(
            "backend 'torch' with attention='block-sparse'", [f"flash_attn.cute: {error}"],
            "Install flash-attn 4 (pip install flash-attn-4), or use attention='flex'.",
        ) from error


def why_not(dtype: str, head_dim: int, page_size: int, span: int | None = None) -> list[str]:
    """Return what keeps the kernel from a problem.

    Parameters
    ----------
    dtype : str
        Dtype of q, K and V.
    head_dim, page_size : int
        Channels a head, tokens a page.
    span : int, optional
        Rows that share a selection, where it is known.
    """
    reasons, way = [], "of attention='block-sparse'"
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {', '.join(DTYPES)} {way}")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))} {way}")
    if page_size != TILE:
        reasons.append(f"page_size {page_size} is not {TILE}, the tile {way}")
    if span not in (None, TILE):
        reasons.append(f"span {span} is not {TILE}, the tile {way}")
    return reasons


def attend_pages(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor,
    page_lengths: torch.Tensor, mask: torch.Tensor, span: int, active: torch.Tensor, scale: float,
) -> Pair:
    """Attend to selected pages (clause ATTEND-1); arguments and results as those of path "gather".

    Parameters
    ----------
    q, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale
        See `sparse_dlm_attn_torch.gather.attend_pages`.

    Raises
    ------
    UnsupportedError
        If the kernel's tile does not fit the problem.
    """
    tokens, pages = q.shape[2], page_table.shape[1]
    of_span = span if mask.shape[2] > 1 else TILE  # a single span is a short block: one tile, or several
    reasons = why_not(str(q.dtype).removeprefix("torch."), q.shape[3], k_pages.shape[2], of_span)
    if mask.shape[2] == 1 and tokens > TILE:
        reasons.append(f"span {span} of a block of {tokens} is not {TILE}, the tile of 'block-sparse'")
    if reasons:
        raise UnsupportedError("torch", reasons)
    if 0 in (*q.shape, pages, k_pages.shape[0]):
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    wanted = wanted_pages(mask, span, active, page_lengths > 0, k_pages.shape[1]).transpose(1, 2)
    if wanted.shape[1] != q.shape[1]:
        wanted = wanted.repeat_interleave(q.shape[1] // wanted.shape[1], dim=1)
    whole = (page_lengths == k_pages.shape[2])[:, None, None, :]
    q = q.contiguous()
    k, v = (_in_order(side, page_table, page_lengths) for side in (k_pages, v_pages))
    # Lists are (batch, heads, spans, width) here: heads take the place of spans in `lists_of`.
    full, partial, none = (lists_of(part, span) for part in (wanted & whole, wanted & ~whole, wanted & False))
    states = [
        flash_attn_listed(q, k, v, full, scale),
        flex_listed(q, k, v, none, (TILE, TILE), scale, partial=partial, lengths=page_lengths),
    ]
    outs, lses = [], []
    for (out, lse), listed in zip(states, (full, partial), strict=True):
        empty = (listed.counts == 0).repeat_interleave(span, dim=2)[:, :, :tokens]
        outs.append(out.to(torch.float32))
        lses.append(lse.to(torch.float32).masked_fill(empty, -torch.inf))
    out, lse = merged(outs, lses)
    return keep_active(out.to(q.dtype), lse, active)


def _in_order(pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Copy pages in reading order, ``(batch, kv_heads, tokens, head_dim)``; 0 where no token is."""
    exists = torch.arange(pages.shape[2], device=table.device) < lengths[..., None]
    dense = pages[torch.where(lengths > 0, table, 0).long()].masked_fill(~exists[:, :, None, :, None], 0.0)
    return dense.permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous()


@functools.cache
def _compiled() -> Callable[..., Any]:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    return torch.compile(module.flex_attention, dynamic=False)


def _every_key(b: Any, h: Any, query: Any, key: Any) -> Any:
    # A mask_mod that is trivial would let the FLASH back end ignore the lists and compute densely.
    return key >= 0


def flex_listed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, block: tuple[int, int], scale: float,
    *, kernel: str = "TRITON", partial: Lists | None = None, lengths: torch.Tensor | None = None,
    options: dict[str, Any] | None = None, mask_mod: Callable[..., Any] | None = None,
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
    lengths : torch.Tensor, optional
        int32 ``(batch, key blocks)``: valid tokens of each block, for the default ``mask_mod``.
    options : dict, optional
        Further kernel options.
    mask_mod : callable, optional
        For ``partial``; default: keys within ``lengths``, or every key.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and ``lse`` ``(batch, q_heads, tokens)``, natural log.
    """
    if mask_mod is None:
        mask_mod = _every_key if lengths is None else _within(lengths, block[1])
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


def _within(lengths: torch.Tensor, block: int) -> Callable[..., Any]:
    def mask_mod(b: Any, h: Any, query: Any, key: Any) -> Any:
        return key % block < lengths[b, key // block]

    return mask_mod


def flash_attn_listed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, scale: float
) -> Pair:
    """Run flash-attn 4 itself over whole listed blocks of 128; arguments as those of `flex_listed`.

    Parameters
    ----------
    q, k, v, lists, scale
        See there; q, K and V may be views of ``(batch, tokens, heads, head_dim)``.
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
    pages, counts = lists.pages.to(torch.int32), lists.counts.to(torch.int32)
    tensors = sparsity.BlockSparseTensorsTorch
    # Said outright: what it infers from the lengths may be another tile, and our numbers other keys.
    size = {"block_size": (TILE, TILE)} if "block_size" in getattr(tensors, "_fields", ()) else {}
    blocks = tensors(
        mask_block_cnt=torch.zeros_like(counts), mask_block_idx=torch.zeros_like(pages),
        full_block_cnt=counts, full_block_idx=pages, **size,
    )
    out, lse = interface._flash_attn_fwd(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale,
        block_sparse_tensors=blocks, return_lse=True,
    )[:2]
    return out.transpose(1, 2), lse
