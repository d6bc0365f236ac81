"""Path "flex": FlexAttention over the pages where they lie, driven by page lists on the device.

Nothing is gathered. All heads' pages are seen as the tokens of one long KV head, of which a page is a
block; a row's page list, translated to those blocks, becomes the `BlockMask`. Whole pages need no
`mask_mod` then. Partial pages, a few a sequence, go through path "masked", which alone can keep a NaN
behind a page's length away from the result, and are merged.

A list is dealt out to several programs, like cards, and their states are merged: one program a head
would leave most of a GPU idle.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention
from torch.nn.functional import pad

from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn_torch.layout import Lists, PageRows, lists_of, wanted_pages
from sparse_dlm_attn_torch.masked import attend_lists
from sparse_dlm_attn_torch.states import keep_active, merged, united

__all__ = ["attend_pages", "every_slot", "kernel", "why_not", "why_not_pages", "with_lse"]

PARTIAL_PAGES = 16
"""Most partial pages in a list: a page is partial at the end of a prompt, of a generation and of a suffix.
Rows with more of them become NaN."""
TILE = 16
"""Smallest tile of the kernel, in tokens and in channels."""
LARGEST_TILE = 128
TILE_BYTES = 16 << 10  # of queries, keys or values that a program holds: fits every dtype and head
PROGRAMS = 264  # to keep a large GPU busy: two for each of its multiprocessors
SMALLEST_WIDTH = 64
HEADS_AT_MOST = 1024  # in one axis of the kernel's grid, which ends at 65,535
LARGEST_OFFSET = 2**31
"""Elements of K, or of V, that the kernel can address."""

# Asked for here, because what is compiled cannot look them up.
INDEX_OPTIONS: dict[str, Any] = {
    name: False
    for name in ("compute_q_blocks",)  # lists that only a backward pass needs
    if name in inspect.signature(flex_attention.BlockMask.from_kv_blocks).parameters
}
RETURNS_AUX = hasattr(flex_attention, "AuxRequest")

compiler: Any = "inductor"
"""What compiles the kernel; tests put a counter here."""


def why_not(dtype: str, head_dim: int, page_size: int) -> list[str]:
    """Return what keeps the compiled kernel from a problem.

    Parameters
    ----------
    dtype : str
        Dtype of q, K and V.
    head_dim, page_size : int
        Channels a head, tokens a page.
    """
    reasons = []
    if not INDEX_OPTIONS:
        reasons.append(
            f"PyTorch {torch.__version__} cannot build a BlockMask from page lists alone, as "
            "attention='flex' needs (2.9 can)"
        )
    if dtype == "float64":
        reasons.append("dtype float64 is not one of float32, float16, bfloat16 of attention='flex'")
    if page_size % TILE:
        reasons.append(f"page_size {page_size} is not a multiple of {TILE}, as attention='flex' needs")
    if not TILE <= head_dim <= 256 or head_dim & (head_dim - 1):
        reasons.append(f"head_dim {head_dim} is not a power of two in 16..256, as attention='flex' needs")
    return reasons


def why_not_pages(k_pages: torch.Tensor, v_pages: torch.Tensor) -> tuple[str, ...]:
    """Return what keeps the kernel from caches laid out like these.

    Parameters
    ----------
    k_pages, v_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``.
    """
    if 0 in k_pages.shape:
        return ()
    reasons = []
    views = PageRows.view(k_pages), PageRows.view(v_pages)
    if views[0] is None or views[1] is None or views[0].strides != views[1].strides:
        reasons.append(
            "k_pages and v_pages must keep the tokens of a page and head side by side, in one layout, as "
            f"attention='flex' needs; their strides are {k_pages.stride()} and {v_pages.stride()}"
        )
    elif views[0].rows.numel() >= LARGEST_OFFSET:
        reasons.append(f"k_pages spans {views[0].rows.numel()} elements, attention='flex' addresses {LARGEST_OFFSET}")
    return tuple(reasons)


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
    *,
    compiled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to selected pages (clause ATTEND-1); arguments and results as those of path "gather".

    Parameters
    ----------
    q, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale
        See `sparse_dlm_attn_torch.gather.attend_pages`.
    compiled : bool
        Whether to run the compiled kernel. The uncompiled function reads the whole cache and serves
        tests on a host, where the compiled one returns no log-sum-exp.
    """
    span = min(span, max(q.shape[2], 1))
    wanted = wanted_pages(mask, span, active, page_lengths > 0, k_pages.shape[1])
    whole = (page_lengths == k_pages.shape[2])[:, None, None, :]
    cut = wanted & ~whole
    partial = lists_of(cut, span, PARTIAL_PAGES)
    rows = partial.rows_of(q)
    in_precision = rows.to(compute_dtype(q)) * scale
    out, lse = attend_lists(in_precision, partial, k_pages, v_pages, page_table, page_lengths)
    # Lists are cut without a look at them; what was lost must show, since it cannot be told to the host.
    lse = lse.masked_fill((cut.sum(-1) > PARTIAL_PAGES)[..., None], math.nan)
    if not (0 in rows.shape or page_table.shape[1] == 0 or k_pages.shape[0] == 0):
        lists = lists_of(wanted & whole, span)
        outs, lses = _whole_pages(rows, lists, k_pages, v_pages, page_table, scale, compiled)
        out, lse = merged([out, outs], [lse, lses])
    shape = q.shape
    return keep_active(partial.to_tokens(out, shape).to(q.dtype), partial.to_tokens(lse, shape), active)


def _whole_pages(
    rows: torch.Tensor,
    lists: Lists,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    scale: float,
    compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state of lists of whole pages, ``(batch, spans, heads, rows, ...)``."""
    batch, spans, heads, length, head_dim = rows.shape
    keys, values = PageRows.view(k_pages), PageRows.view(v_pages)
    assert keys is not None and values is not None  # `why_not_pages` is asked first
    blocks = _blocks(lists, keys, page_table, k_pages.shape[1]).flatten(0, 2)
    # Sizes are rounded up, so that few forms of the kernel are ever compiled.
    entries, tall, width = _power(batch * spans * heads), _padded_rows(length), blocks.shape[1]
    wide = max(_power(width), SMALLEST_WIDTH)
    ways = _ways(entries * -(-tall // LARGEST_TILE), wide)
    more = entries - blocks.shape[0]
    # Entry i of a list goes to share i % ways, so that no share is longer than another by more than one.
    blocks = pad(blocks, (0, wide - width, 0, more)).view(entries, wide // ways, ways).transpose(1, 2)
    shares = torch.arange(ways, device=blocks.device)
    counts = pad(lists.counts.flatten(), (0, more))[:, None] - shares + (ways - 1)
    counts = counts.div(ways, rounding_mode="floor")
    queries = pad(rows.flatten(0, 2), (0, 0, 0, tall - length, 0, more))
    queries = queries[:, None].expand(entries, ways, tall, head_dim)
    grid = (-1, min(entries * ways, HEADS_AT_MOST))  # powers of two, so that the second divides the product
    out, lse = _flex(
        queries.reshape(*grid, tall, head_dim),
        _tokens(keys, head_dim),
        _tokens(values, head_dim),
        blocks.reshape(*grid, wide // ways).to(torch.int32),
        counts.reshape(grid).to(torch.int32),
        k_pages.shape[2],
        scale,
        compiled,
    )
    real = (slice(batch * spans * heads), slice(None), slice(length))
    out = out.reshape(entries, ways, tall, head_dim)[real].to(compute_dtype(rows))
    out, lse = united(out, lse.reshape(entries, ways, tall)[real].to(out.dtype), 1)
    return out.view(rows.shape), lse.view(rows.shape[:-1])


def _blocks(lists: Lists, rows: PageRows, page_table: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Translate logical pages to rows, int64 ``(batch, spans, heads, width)``; any row behind the end."""
    shape = lists.pages.shape
    physical = page_table[:, None, None, :].expand(*shape[:3], -1).gather(-1, lists.pages)
    heads = torch.arange(lists.heads, device=physical.device)[:, None] // (lists.heads // kv_heads)
    places = torch.arange(shape[3], device=physical.device)
    return torch.where(places < lists.counts[..., None], rows.index(physical.long(), heads), 0)


def _power(size: int) -> int:
    """Return the next power of two."""
    return 1 << (size - 1).bit_length()


def _padded_rows(length: int) -> int:
    """Return how many rows a list gets: whole tiles."""
    return -(-length // LARGEST_TILE) * LARGEST_TILE if length > LARGEST_TILE else max(_power(length), TILE)


def _ways(programs: int, width: int) -> int:
    """Return over how many programs each list is dealt out: a power of two, 4 pages or more for each."""
    wanted = max(PROGRAMS // max(programs, 1), 1)
    return min(1 << (wanted.bit_length() - 1), width // 4)


def _tokens(rows: PageRows, head_dim: int) -> torch.Tensor:
    """View rows as the tokens of one KV head, ``(1, 1, tokens, head_dim)``."""
    return rows.rows.view(1, 1, -1, head_dim)


def every_slot(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Mask of whole pages; defined once, because a new function would be compiled anew.

    Not trivial either: FlexAttention's FLASH back end would then ignore lists and compute densely.

    Parameters
    ----------
    b, h, query, key : torch.Tensor
        As for every `mask_mod`.
    """
    return key >= 0


@functools.cache
def kernel(function: types.FunctionType, form: tuple[Any, ...], backend: Any = "inductor") -> Callable[..., Any]:
    """Return a function compiled for one form, for this process; it compiles at its first call.

    Parameters
    ----------
    function : function
        What to compile.
    form : tuple
        Every size that the kernel is built for, and its dtype.
    backend : str or callable
        Compiler.
    """
    # Code of its own for each form: after a few variants of a function PyTorch runs it uncompiled.
    code = function.__code__.replace(co_name=f"{function.__name__}_{abs(hash(form))}")
    own = types.FunctionType(code, function.__globals__)
    # Only the cache's length is symbolic: with symbolic heads the kernel is a slower one.
    return torch.compile(own, dynamic=False, fullgraph=True, backend=backend)


def _listed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    counts: torch.Tensor,
    mask_mod: Callable[..., torch.Tensor],
    block: tuple[int, int],
    scale: float,
    options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the listed blocks; the mask is made in here, so that its length may be symbolic too."""
    none = torch.zeros_like(counts)
    mask = flex_attention.BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(lists),
        counts,
        lists,
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]),
        **INDEX_OPTIONS,
    )
    return with_lse(q, k, v, mask, scale, options)


def with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float, options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call FlexAttention and ask for the LSE as this PyTorch wants to be asked, in what `kernel` compiles.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, rows, head_dim)``.
    k, v : torch.Tensor
        ``(batch, kv_heads, keys, head_dim)``.
    mask : BlockMask
        Which blocks are read.
    scale : float
        Factor on q.k.
    options : dict or None
        Of the kernel.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and ``lse`` ``(batch, q_heads, rows)``, natural log.
    """
    if RETURNS_AUX:
        out, aux = flex_attention.flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=True,
            kernel_options=options,
            return_aux=flex_attention.AuxRequest(lse=True),
        )
        return out, aux.lse  # type: ignore[return-value]  # it was asked for
    return flex_attention.flex_attention(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options, return_lse=True
    )


@torch.no_grad()  # whether gradients are recorded is part of what is compiled
def _flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    page_size: int,
    scale: float,
    compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run FlexAttention.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, entries, rows, head_dim)``; ``rows`` makes whole tiles.
    k, v : torch.Tensor
        ``(1, 1, tokens, head_dim)``.
    blocks : torch.Tensor
        int32 ``(batch, entries, width)``: blocks of ``page_size`` tokens.
    counts : torch.Tensor
        int32 ``(batch, entries)``: how many of them count.
    page_size : int
        Tokens a block.
    scale : float
        Factor on q.k.
    compiled : bool
        Whether to run the compiled kernel.
    """
    length, head_dim = q.shape[2:]
    tile = min(length, LARGEST_TILE)
    lists = blocks[:, :, None].expand(-1, -1, length // tile, -1).contiguous()
    full = counts[:, :, None].expand(-1, -1, length // tile).contiguous()
    size = (tile, page_size)
    if not compiled:
        mask_mod = _mask_of(blocks, counts, k.shape[2] // page_size, page_size)
        return _listed_attention(q, k, v, lists, full, mask_mod, size, scale, {})
    k, v = k.detach(), v.detach()
    for side in (k, v):  # the cache grows
        torch._dynamo.maybe_mark_dynamic(side, 2)
    most = max(TILE_BYTES // (head_dim * q.element_size()), TILE)
    options = {"BLOCK_M": min(tile, 64, most), "BLOCK_N": min(64, page_size & -page_size, most)}
    form = (*q.shape, blocks.shape[-1], page_size, q.dtype, q.device, scale)
    return kernel(_listed_attention, form, compiler)(  # type: ignore[no-any-return]
        q, k, v, lists, full, every_slot, size, scale, options
    )


def _mask_of(blocks: torch.Tensor, counts: torch.Tensor, rows: int, page_size: int) -> Callable[..., torch.Tensor]:
    """Return the same selection as a `mask_mod`: the uncompiled function ignores block lists."""
    chosen = torch.zeros((*blocks.shape[:2], rows), dtype=torch.bool, device=blocks.device)
    real = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    chosen = chosen.scatter_reduce(-1, blocks.long(), real, reduce="amax")

    def mask_mod(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return chosen[b, h, key // page_size]

    return mask_mod
