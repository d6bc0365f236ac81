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
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn_torch.layout import Lists, PageRows, lists_of, wanted_pages
from sparse_dlm_attn_torch.masked import attend_lists
from sparse_dlm_attn_torch.states import keep_active, merged

__all__ = ["attend_pages", "why_not"]

PARTIAL_PAGES = 16
"""Partial pages a sequence that are computed exactly. More of them are rare: a page is partial at the end
of a prompt, of a generation and of a suffix. The problem's width counts where it is smaller."""
TILE = 16
"""Smallest tile of the kernel, in tokens and in channels."""
PROGRAMS = 264  # to keep a large GPU busy: two for each of its multiprocessors
SMALLEST_WIDTH = 64


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
    if dtype == "float64":
        reasons.append("dtype float64 is not one of float32, float16, bfloat16 of attention='flex'")
    if page_size % TILE:
        reasons.append(f"page_size {page_size} is not a multiple of {TILE}, as attention='flex' needs")
    if not TILE <= head_dim <= 256 or head_dim & (head_dim - 1):
        reasons.append(f"head_dim {head_dim} is not a power of two in 16..256, as attention='flex' needs")
    return reasons


def attend_pages(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor,
    page_lengths: torch.Tensor, mask: torch.Tensor, span: int, active: torch.Tensor, scale: float,
    *, compiled: bool = True,
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
    partial = lists_of(wanted & ~whole, span, PARTIAL_PAGES)
    rows = partial.rows_of(q)
    in_precision = rows.to(compute_dtype(q)) * scale
    states = [attend_lists(in_precision, partial, k_pages, v_pages, page_table, page_lengths)]
    states += _whole_pages(
        rows, lists_of(wanted & whole, span), k_pages, v_pages, page_table, scale, compiled
    )
    out, lse = merged([state[0] for state in states], [state[1] for state in states])
    shape = q.shape
    return keep_active(partial.to_tokens(out, shape).to(q.dtype), partial.to_tokens(lse, shape), active)


def _whole_pages(
    rows: torch.Tensor, lists: Lists, k_pages: torch.Tensor, v_pages: torch.Tensor,
    page_table: torch.Tensor, scale: float, compiled: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a state for each share of the lists, ``(batch, spans, heads, rows, ...)``."""
    batch, spans, heads, length, head_dim = rows.shape
    keys, values = _as_one_head(k_pages), _as_one_head(v_pages)
    if 0 in rows.shape or page_table.shape[1] == 0 or keys.rows.shape[0] == 0:
        return []
    blocks = _blocks(lists, keys, page_table, k_pages.shape[1])
    if (keys.page_stride, keys.head_stride) != (values.page_stride, values.head_stride):
        values = PageRows(_reordered(v_pages, keys), keys.page_stride, keys.head_stride)
    entries = spans * heads
    width = _bucket(blocks.shape[-1])
    ways = _ways(batch * entries * -(-length // 128), width)
    blocks = torch.nn.functional.pad(blocks, (0, width - blocks.shape[-1]))
    # Entry i of a list goes to share i % ways, so that no share is longer than another by more than one.
    blocks = blocks.reshape(batch, entries, width // ways, ways).transpose(2, 3)
    dealt = torch.arange(ways, device=blocks.device)
    counts = (lists.counts.reshape(batch, entries, 1) - dealt + ways - 1).div(ways, rounding_mode="floor")
    queries = rows.reshape(batch, entries, 1, length, head_dim)
    queries = queries.expand(batch, entries, ways, length, head_dim).flatten(1, 2)
    page_size = k_pages.shape[2]
    out, lse = _flex(
        queries.contiguous(), _tokens(keys, head_dim), _tokens(values, head_dim),
        blocks.flatten(1, 2).to(torch.int32), counts.flatten(1).to(torch.int32), page_size, scale, compiled,
    )
    shape = (batch, spans, heads, ways, length)
    out, lse = out.reshape(*shape, head_dim), lse.reshape(shape).to(compute_dtype(rows))
    return [(out[:, :, :, way].to(compute_dtype(rows)), lse[:, :, :, way]) for way in range(ways)]


def _as_one_head(pages: torch.Tensor) -> PageRows:
    """View pages as rows; a layout whose pages are not contiguous is copied."""
    rows = PageRows.view(pages)
    if rows is None:
        rows = PageRows.view(pages.contiguous())
    if rows is None:  # no physical page
        return PageRows(pages.reshape(0, pages.shape[2] * pages.shape[3]), 0, 0)
    return rows


def _reordered(pages: torch.Tensor, like: PageRows) -> torch.Tensor:
    """Copy V so that its rows stand as those of K, if an engine stores the two differently."""
    count, heads, page_size, head_dim = pages.shape
    rows = pages.new_zeros((like.rows.shape[0], page_size * head_dim))
    pages_at = torch.arange(count, device=pages.device)[:, None]
    heads_at = torch.arange(heads, device=pages.device)
    rows[like.index(pages_at, heads_at).flatten()] = pages.reshape(count * heads, -1)
    return rows


def _blocks(lists: Lists, rows: PageRows, page_table: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Translate logical pages to rows, int64 ``(batch, spans, heads, width)``; any row behind the end."""
    shape = lists.pages.shape
    physical = page_table[:, None, None, :].expand(*shape[:3], -1).gather(-1, lists.pages)
    heads = torch.arange(lists.heads, device=physical.device)[:, None] // (lists.heads // kv_heads)
    places = torch.arange(shape[3], device=physical.device)
    return torch.where(places < lists.counts[..., None], rows.index(physical.long(), heads), 0)


def _bucket(width: int) -> int:
    """Return the power of two that a list is padded to, so that a longer context compiles nothing new."""
    return max(SMALLEST_WIDTH, 1 << (width - 1).bit_length())


def _ways(programs: int, width: int) -> int:
    """Return over how many programs each list is dealt out: a power of two, 4 pages or more for each."""
    wanted = max(PROGRAMS // max(programs, 1), 1)
    return min(1 << (wanted.bit_length() - 1), width // 4)


def _tokens(rows: PageRows, head_dim: int) -> torch.Tensor:
    """View rows as the tokens of one KV head, ``(1, 1, tokens, head_dim)``."""
    return rows.rows.view(1, 1, -1, head_dim)


def _every_slot(
    b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Mask of whole pages; defined once, because a new function would be compiled anew."""
    return key >= 0


@functools.cache
def kernel(backend: Any = "inductor") -> Callable[..., Any]:
    """Return the compiled kernel, one for this process; it compiles at its first call.

    Parameters
    ----------
    backend : str or callable
        Compiler, for tests that count how often it is asked.
    """
    # Only the cache's length is symbolic: with symbolic heads the kernel is a slower one.
    return torch.compile(_listed_attention, dynamic=False, fullgraph=True, backend=backend)


def _listed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: torch.Tensor, counts: torch.Tensor,
    mask_mod: Callable[..., torch.Tensor], block: tuple[int, int], scale: float, options: dict[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the listed blocks; the mask is made in here, so that its length may be symbolic too."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    none = torch.zeros_like(counts)
    mask = module.BlockMask.from_kv_blocks(
        none, torch.zeros_like(lists), counts, lists, BLOCK_SIZE=block, mask_mod=mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]), **_index_options(),
    )
    out, aux = module.flex_attention(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options, **_lse_options()
    )
    return out, getattr(aux, "lse", aux)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, counts: torch.Tensor,
    page_size: int, scale: float, compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run FlexAttention.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, entries, rows, head_dim)``.
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
    batch, entries, length, _ = q.shape
    tile = min(max(TILE, 1 << (length - 1).bit_length()), 128)
    tiles = -(-length // tile)
    lists = blocks[:, :, None].expand(batch, entries, tiles, blocks.shape[-1]).contiguous()
    full = counts[:, :, None].expand(batch, entries, tiles).contiguous()
    size = (tile, page_size)
    if not compiled:
        mask_mod = _mask_of(blocks, counts, k.shape[2] // page_size, page_size)
        return _listed_attention(q, k, v, lists, full, mask_mod, size, scale, {})
    for side in (k, v):  # the cache grows
        torch._dynamo.maybe_mark_dynamic(side, 2)
    tokens = min(64, page_size & -page_size)
    return kernel()(  # type: ignore[no-any-return]
        q, k, v, lists, full, _every_slot, size, scale, {"BLOCK_M": min(tile, 64), "BLOCK_N": tokens}
    )


def _mask_of(
    blocks: torch.Tensor, counts: torch.Tensor, rows: int, page_size: int
) -> Callable[..., torch.Tensor]:
    """Return the same selection as a `mask_mod`: the uncompiled function ignores block lists."""
    chosen = torch.zeros((*blocks.shape[:2], rows), dtype=torch.bool, device=blocks.device)
    real = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    chosen = chosen.scatter_reduce(-1, blocks.long(), real, reduce="amax")

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return chosen[b, h, key // page_size]

    return mask_mod


@functools.cache
def _index_options() -> dict[str, Any]:
    """Return the argument that leaves the backward pass's lists out, where this version has it."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    parameters = inspect.signature(module.BlockMask.from_kv_blocks).parameters
    return {"compute_q_blocks": False} if "compute_q_blocks" in parameters else {}


@functools.cache
def _lse_options() -> dict[str, Any]:
    """Ask for the log-sum-exp as this version of PyTorch wants to be asked."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    request = getattr(module, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}
