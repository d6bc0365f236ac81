"""Path "block-sparse": long blocks through a library's block-sparse kernel, FlashAttention 4's.

Pages become blocks of one dense sequence, copied in reading order; slots behind a page's length hold 0
there. Whole pages are flash-attn 4's, called itself: driven by FlexAttention
(``kernel_options={"BACKEND": "FLASH"}``) its results were wrong over the same lists. Pages that are not full,
or that only some rows of a tile selected, or whose numbers may overflow, are FlexAttention's own, with a
mask; states merge by their LSE. Pages must be the kernel's tile, 128 tokens; spans may be any, and are best
of that size.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn.attention import flex_attention

from sparse_dlm_attn import UnavailableError, UnsupportedError
from sparse_dlm_attn_torch import flex
from sparse_dlm_attn_torch.layout import Lists, lists_of, wanted_pages
from sparse_dlm_attn_torch.states import keep_active, merged

__all__ = ["attend_pages", "check_installed", "flash_attn_listed", "of_tiles", "why_not"]

TILE = 128
LARGEST = 1e37
"""Scores below it are finite float32 numbers, whatever base their exponentials have."""
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 96, 128)
Pair = tuple[torch.Tensor, torch.Tensor]


def check_installed() -> None:
    """Raise `UnavailableError` unless flash-attn 4 is there."""
    try:
        importlib.import_module("flash_attn.cute")
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UnavailableError(
            "backend 'torch' with attention='block-sparse'",
            [f"flash_attn.cute: {error}"],
            "Install flash-attn 4 (pip install flash-attn-4), or use attention='flex'.",
        ) from error


def why_not(dtype: str, head_dim: int, page_size: int) -> list[str]:
    """Return what keeps the kernel from a problem.

    Parameters
    ----------
    dtype : str
        Dtype of q, K and V.
    head_dim, page_size : int
        Channels a head, tokens a page.
    """
    reasons, way = [], "of attention='block-sparse'"
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {', '.join(DTYPES)} {way}")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))} {way}")
    if page_size != TILE:
        reasons.append(f"page_size {page_size} is not {TILE}, the tile {way}")
    return reasons


def attend_pages(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    mask: torch.Tensor,
    span: int,
    active: torch.Tensor,
    scale: float,
) -> Pair:
    """Attend to selected pages (clause ATTEND-1); arguments and results as those of path "gather".

    Parameters
    ----------
    q, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale
        See `sparse_dlm_attn_torch.gather.attend_pages`.

    Raises
    ------
    UnsupportedError
        If the kernel does not take the dtype, the head size or the page size.
    """
    pages = page_table.shape[1]
    reasons = why_not(str(q.dtype).removeprefix("torch."), q.shape[3], k_pages.shape[2])
    if reasons:
        raise UnsupportedError("torch", reasons)
    if 0 in (*q.shape, pages, k_pages.shape[0]):
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    span, group = min(span, q.shape[2]), q.shape[1] // k_pages.shape[1]
    chosen = wanted_pages(mask, span, active, page_lengths > 0, k_pages.shape[1]).transpose(1, 2)
    chosen = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], dim=1)
    some, every = of_tiles(chosen, span, active)
    (k, of_k), (v, of_v) = (_dense(side, page_table, page_lengths) for side in (k_pages, v_pages))
    missing = some.shape[2] * TILE - q.shape[2]
    rows = (torch.nn.functional.pad(q, (0, 0, 0, missing)) if missing else q).contiguous()
    every &= (page_lengths == TILE)[:, None, None, :] & _harmless(rows, of_k, of_v, scale)
    rest = some & ~every
    read, dead, mixed = v, None, mask.shape[2] > 1 and span % TILE != 0
    if mixed:  # rows of one tile may have selected other pages: a weight of 0 does not stop a NaN
        read = torch.where(v.isfinite(), v, 0.0)
        dead = _not_finite(v, chosen, span, group)[:, :, : q.shape[2]].contiguous()
    whole = flash_attn_listed(rows, k, v, lists_of(every, TILE), scale)
    masked = _masked_pages(rows, k, read, rest, chosen, span, page_lengths, scale)
    form = (*q.shape, q.dtype, q.device, every.shape[-1], mixed)
    joined: Pair = _compiled(_joined, form, *whole, every, *masked, rest, dead, active)
    return joined


def _compiled(function: Any, form: tuple[Any, ...], *arguments: Any) -> Any:
    """Call a function, compiled for one form, whose work is reading and writing whole sequences."""
    with torch.no_grad():  # whether gradients are recorded is part of what is compiled
        return flex.kernel(function, form, flex.compiler)(*arguments)


def _joined(
    out: torch.Tensor,
    lse: torch.Tensor,
    listed: torch.Tensor,
    masked_out: torch.Tensor,
    masked_lse: torch.Tensor,
    masked: torch.Tensor,
    dead: torch.Tensor | None,
    active: torch.Tensor,
) -> Pair:
    """Merge the states of whole and of masked pages, of active rows alone.

    Parameters
    ----------
    out, lse : torch.Tensor
        ``(batch, q_heads, rows, head_dim)``, whole tiles of rows, and ``(batch, q_heads, rows)``.
    listed : torch.Tensor
        bool ``(batch, q_heads, tiles, pages)``: what they read.
    masked_out, masked_lse, masked : torch.Tensor
        The same of masked pages.
    dead : torch.Tensor or None
        bool ``(batch, q_heads, tokens, head_dim)``: what becomes NaN.
    active : torch.Tensor
        bool ``(batch, tokens)``.
    """
    tokens = active.shape[1]
    outs, lses = [], []
    for of_part, lse_of_part, read in ((out, lse, listed), (masked_out, masked_lse, masked)):
        empty = (~read.any(dim=-1)).repeat_interleave(TILE, dim=2)[:, :, :tokens]
        outs.append(of_part[:, :, :tokens].to(torch.float32))
        lses.append(lse_of_part[:, :, :tokens].to(torch.float32).masked_fill(empty, -torch.inf))
    joint, joint_lse = merged(outs, lses)
    if dead is not None:
        joint = joint.masked_fill(dead, torch.nan)
    return keep_active(joint.to(out.dtype), joint_lse, active)


def _harmless(q: torch.Tensor, of_k: torch.Tensor, of_v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return for which tiles and pages no score and no value can be infinite or NaN.

    flash-attn takes a sum of weights that is NaN for one of no keys and returns such rows as empty. A bound
    is enough, bool ``(batch, q_heads, tiles, pages)``: FlexAttention computes the others.
    """
    group = q.shape[1] // of_k.shape[1]
    of_q = _compiled(_largest, (*q.shape, q.dtype, q.device), q)
    of_k, of_v = (side.repeat_interleave(group, 1)[:, :, None] for side in (of_k, of_v))
    bound = LARGEST / (q.shape[3] * max(scale, 1.0))
    harmless: torch.Tensor = (of_q[..., None] * of_k < bound) & of_v.isfinite()
    return harmless


def _largest(side: torch.Tensor) -> torch.Tensor:
    """Return the largest amount in each tile of 128 tokens, float32 ``(batch, heads, tiles)``."""
    return _tiles(side).abs().amax(dim=(3, 4)).to(torch.float32)


def _tiles(side: torch.Tensor) -> torch.Tensor:
    """View ``(batch, heads, tokens, head_dim)`` as ``(batch, heads, tiles, 128, head_dim)``."""
    batch, heads, _, head_dim = side.shape
    return side.view(batch, heads, -1, TILE, head_dim)


def _not_finite(v: torch.Tensor, chosen: torch.Tensor, span: int, group: int) -> torch.Tensor:
    """Return which channels of which rows read a value that is not finite.

    A weight of 0 would carry it to rows of the same tile that did not select its page.
    """
    bad = ~_tiles(v).isfinite().all(dim=3)
    hits = chosen.to(torch.float32) @ bad.repeat_interleave(group, dim=1).to(torch.float32)
    rows: torch.Tensor = hits > 0
    return rows.repeat_interleave(span, dim=2)


def of_tiles(chosen: torch.Tensor, span: int, active: torch.Tensor) -> Pair:
    """Return the pages that any, and those that all, active rows of a tile of rows selected.

    Parameters
    ----------
    chosen : torch.Tensor
        bool ``(batch, heads, spans, pages)``: false where a span has no active row.
    span : int
        Rows that share a selection.
    active : torch.Tensor
        bool ``(batch, tokens)``.

    Returns
    -------
    tuple of torch.Tensor
        bool ``(batch, heads, tiles, pages)``.
    """
    (batch, _, spans, _), tokens = chosen.shape, active.shape[1]
    rows = torch.nn.functional.pad(active, (0, spans * span - tokens))
    used = rows.view(batch, 1, spans, span).any(-1)
    first = torch.arange(0, tokens, TILE, device=active.device)
    last = (first + (TILE - 1)).clamp(max=tokens - 1)
    before, after = first // span, last // span + 1

    def count(side: torch.Tensor) -> torch.Tensor:
        running = torch.nn.functional.pad(side.cumsum(2), (0, 0, 1, 0))
        return running[:, :, after] - running[:, :, before]

    got, wanted = count(chosen), count(used[..., None])
    return got > 0, (got > 0) & (got == wanted)


def _dense(pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> Pair:
    """Return pages copied in reading order, ``(batch, kv_heads, tokens, head_dim)``, and their `_largest`."""
    form = (*pages.shape, *pages.stride(), *table.shape, pages.dtype, pages.device)
    dense = _compiled(_in_order, form, pages, table.contiguous(), lengths.contiguous())
    return dense, _compiled(_largest, (*dense.shape, dense.dtype, dense.device), dense)


def _in_order(pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Copy pages; 0 where no token is."""
    exists = torch.arange(pages.shape[2], device=table.device) < lengths[..., None]
    dense = pages[torch.where(lengths > 0, table, 0).long()].masked_fill(~exists[:, :, None, :, None], 0.0)
    return dense.permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous()


def _partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    counts: torch.Tensor,
    inside: torch.Tensor,
    chosen: torch.Tensor,
    span: int,
    lengths: torch.Tensor,
    scale: float,
) -> Pair:
    """Run FlexAttention over tiles that need a mask; see `_masked_pages`."""
    last = chosen.shape[2] - 1

    def mask_mod(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # It says all that the lists say: where the function is not compiled they are ignored.
        page = key // TILE
        of_row = chosen[b, h, torch.clamp(query // span, max=last), page] & inside[b, h, query // TILE, page]
        return of_row & (key % TILE < lengths[b, page])

    mask = flex_attention.BlockMask.from_kv_blocks(
        counts,
        lists,
        torch.zeros_like(counts),
        torch.zeros_like(lists),
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]),
        **flex.INDEX_OPTIONS,
    )
    return flex.with_lse(q, k, v, mask, scale, None)


def _masked_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inside: torch.Tensor,
    chosen: torch.Tensor,
    span: int,
    lengths: torch.Tensor,
    scale: float,
) -> Pair:
    """Attend to pages that are not full, or that some rows of a tile selected and others did not.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, rows, head_dim)``: whole tiles of rows.
    k, v : torch.Tensor
        ``(batch, kv_heads, keys, head_dim)``.
    inside : torch.Tensor
        bool ``(batch, q_heads, tiles, pages)``: these pages.
    chosen : torch.Tensor
        bool ``(batch, q_heads, spans, pages)``: what each span selected.
    span : int
        Rows of a span.
    lengths : torch.Tensor
        int32 ``(batch, pages)``.
    scale : float
        Factor on q.k.
    """
    listed = lists_of(inside, TILE)  # heads take the place of spans there
    form = (*q.shape, *k.shape, *chosen.shape, span, q.dtype, q.device, scale)
    pages, counts = listed.pages.to(torch.int32), listed.counts.to(torch.int32)
    arguments = (q, k, v, pages, counts, inside, chosen, span, lengths, scale)
    return _compiled(_partial_attention, form, *arguments)  # type: ignore[no-any-return]


def flash_attn_listed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, scale: float) -> Pair:
    """Run flash-attn 4 itself over whole listed blocks of 128.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``; like K and V a view of ``(batch, tokens, heads, head_dim)`` if
        need be.
    k, v : torch.Tensor
        ``(batch, kv_heads, keys, head_dim)``.
    lists : Lists
        ``(batch, q_heads, tiles, width)``: heads take the place of its spans.
    scale : float
        Factor on q.k.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and ``lse`` ``(batch, q_heads, tokens)``, natural log.
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
    pages, counts = lists.pages.to(torch.int32), lists.counts.to(torch.int32)
    tensors = sparsity.BlockSparseTensorsTorch
    # Said outright: what it infers from the lengths may be another tile, and our numbers other keys.
    size = {"block_size": (TILE, TILE)} if "block_size" in getattr(tensors, "_fields", ()) else {}
    blocks = tensors(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(pages),
        full_block_cnt=counts,
        full_block_idx=pages,
        **size,
    )
    out, lse = interface._flash_attn_fwd(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=scale,
        block_sparse_tensors=blocks,
        return_lse=True,
    )[:2]
    return out.transpose(1, 2), lse
