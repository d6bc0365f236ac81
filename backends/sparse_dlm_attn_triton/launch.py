"""Sizes of tiles and grids, and the launches. Nothing here looks at a value, so nothing waits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from sparse_dlm_attn_triton import settings
from sparse_dlm_attn_triton.attention import finish_kernel, splits_kernel
from sparse_dlm_attn_triton.common import (
    INTERPRETED,
    Launch,
    aligned,
    layout,
    lined,
    power_of_two,
    precision,
    shared_memory,
)
from sparse_dlm_attn_triton.launch_decisions import (
    MOST_RANKED,
    page_bounds,
    page_scores,
    top_pages,
)
from sparse_dlm_attn_triton.settings import Settings
from sparse_dlm_attn_triton.shares import lists_kernel, shares_kernel
from sparse_dlm_attn_triton.span_tiles import LOG2_E, WIDE_ROOM, padded_dim

__all__ = [
    "INTERPRETED",
    "MOST_RANKED",
    "MOST_ROWS",
    "Part",
    "Plan",
    "Sizes",
    "attend",
    "lined",
    "page_bounds",
    "page_scores",
    "planned",
    "sizes_of",
    "top_pages",
]

MOST_ROWS = 128
"""Longest block that the kernels of a pass take; longer ones are whole sequences (`full_sequence`)."""
MANY_ROWS = 2048
"""From so many rows on, programs that finish a pass take `FINISHED` of them: to start programs takes longer
than they run. Fewer rows, and rows of many parts, have a program each: what counts then is one row's time."""
FINISHED = 4
MOST_PAIRS = 2048
"""Most pairs of sequence and KV head whose page lists are shared out evenly."""
FEW_LISTS = 16
"""Up to so many lists of pages, of a KV head or a tile of its rows, each has 16 programs or more by default:
short shares, which gain more from being even with small tiles than those lose."""
ROOMY = 220 << 10
"""Bytes of shared memory from which on two programs fit a multiprocessor that fetch tiles of 64 tokens two
ahead, for 64 rows of 128 channels; larger ones have it to themselves, and were faster with this depth too."""
MOST_LISTED = 2048
"""Most pages that one turn of a page list takes."""
Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """The context part of a pass: which pages, for which rows.

    Parameters
    ----------
    k_pages, v_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``.
    span : int
        Rows that share a selection.
    active : torch.Tensor
        bool ``(batch, tokens)``.
    most_active : int
        Bound of the active rows of a sequence that is known on the host; ``tokens`` if none is.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    page_lengths: Tensor
    mask: Tensor
    span: int
    active: Tensor
    most_active: int

    def lined(self) -> Part:
        """Return it as kernels read it: itself, unless a table or a selection has gaps."""
        table, lengths, active = (x.contiguous() for x in (self.page_table, self.page_lengths, self.active))
        mask = lined(self.mask)
        if table is self.page_table and lengths is self.page_lengths and active is self.active and mask is self.mask:
            return self
        return Part(self.k_pages, self.v_pages, table, lengths, mask, self.span, active, self.most_active)


def settings_for(
    dtype: torch.dtype, head_dim: int, block_m: int, page_size: int, lists: int, room: int
) -> Settings:
    """Return the tile for pages of a size, so many lists of them, and bytes of shared memory for a program.

    Where two programs of a multiprocessor have the room, tiles that lie in one page are fetched two ahead,
    smaller ones three. Others are fetched one ahead: float32, tiles that span pages, heads of many channels
    on GPUs with less shared memory.
    """
    warps, roomy = 4 if block_m <= 64 else 8, room >= ROOMY
    if dtype == torch.float32:
        return Settings(
            block_n=16 if head_dim > 128 else 64 if room >= WIDE_ROOM else 32, warps=8, stages=2
        )
    if head_dim > 128:
        return Settings(block_n=32, warps=warps, stages=3 if roomy else 2)
    if page_size % 64 == 0 and lists > FEW_LISTS and roomy:
        return Settings(warps=warps, stages=3, least_m=64)
    if page_size % 32 == 0:
        return Settings(block_n=32, warps=warps, stages=4, least_m=64)
    return Settings(warps=warps, stages=2, least_m=64)


def _rows_of_tile(dtype: torch.dtype, head_dim: int, rows: int) -> int:
    most = 32 if dtype == torch.float32 else 64 if head_dim > 128 else 128
    return min(power_of_two(rows), most)


class Sizes(NamedTuple):
    """What decides how a pass is launched: sizes and strides, and nothing that a tensor holds."""

    device: torch.device
    dtype: torch.dtype
    q: Any
    k: Any
    v: Any
    k_pages: Any
    v_pages: Any
    mask: Any
    span: int
    most_active: int
    kv_heads: int
    scale: float
    cached: Any
    reference: Any
    keep: int
    later: bool
    ragged: bool
    straight: bool

    @property
    def has_context(self) -> bool:
        """Whether the context part is asked for."""
        return self.mask is not None

    @property
    def has_pages(self) -> bool:
        """Whether there is a page to read."""
        return self.has_context and self.mask[0][3] > 0 and self.k_pages[0][0] > 0


@dataclass(frozen=True)
class _Grid:
    """How rows and pages of a problem are divided among programs."""

    settings: Settings
    block_m: int
    rows: int
    tiles: int
    group: int
    pairs: int
    mask_rows: int


def _grid(sizes: Sizes) -> _Grid:
    batch, q_heads, tokens, head_dim = sizes.q[0]
    kv_heads, pages = sizes.kv_heads, sizes.mask[0][3] if sizes.has_pages else 0
    page_size = sizes.k_pages[0][2] if sizes.has_context else 1
    group, rows = q_heads // kv_heads, max(min(sizes.most_active, tokens), 1)
    block_m = _rows_of_tile(sizes.dtype, head_dim, group * rows)
    lists = batch * kv_heads * triton.cdiv(group * rows, block_m)
    room = shared_memory(sizes.device)
    found = settings_for(sizes.dtype, head_dim, block_m, page_size, lists, room)
    if INTERPRETED:  # a few programs of small tiles show the same
        found = Settings(block_n=32, programs=8)
    if sizes.has_pages:
        kind = head_dim, page_size, group, tokens, batch * kv_heads, pages * page_size
        found = settings.chosen(found, sizes.device, sizes.dtype, *kind)
    block_m = max(block_m, found.least_m)
    rows = tokens if group * tokens <= block_m else rows  # all rows fit: no need to look for the active ones
    heads = sizes.mask[0][1] if sizes.has_context else 1
    mask_rows = group if heads == q_heads and heads != kv_heads else 1
    tiles = triton.cdiv(group * rows, block_m)
    return _Grid(found, block_m, rows, tiles, group, batch * kv_heads, mask_rows)


@dataclass(frozen=True)
class Plan:
    """The launches of a pass, and the sizes of what they hand to each other.

    ``whole`` says whether context and block are merged into an output, ``keeps`` whether queries are stored.

    Parts of rows are states, ``lse`` in log2 units. Those of splits lie row by row. Those of shares have numbers of
    the first and the last share of each pair of sequence and KV head, and the length of its list (``pairs``).
    """

    whole: bool
    keeps: bool
    parts: tuple[int, ...]
    scratch: int
    pairs: int
    pages: int
    launches: tuple[Launch, ...]
    finish: Launch

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, part: Part, cached: tuple[Tensor, Tensor] | None,
        reference: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Launch a pass; return its output, ``out`` and ``lse`` of the part that is kept, and the kept queries."""
        state_out, state_lse = torch.empty_like(q, memory_format=torch.contiguous_format), self._lse(q)
        out = torch.empty_like(state_out) if self.whole else q.new_empty(0)
        kept = torch.empty_like(state_out) if self.keeps else q.new_empty(0)
        part_out, part_lse, firsts, lasts, counts = self._parts(q, part, k, v)
        old, old_lse = (q, state_lse) if cached is None else cached
        self.finish(
            q, part.active, part_out, part_lse, firsts, lasts, counts, old, old_lse,
            q if reference is None else reference, out, state_out, state_lse, kept,
        )
        return out, state_out, state_lse, kept

    @staticmethod
    def _lse(q: Tensor) -> Tensor:
        return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)

    def _parts(self, q: Tensor, part: Part, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Launch all but the last kernel; return the parts, and what finds them."""
        device = q.device
        part_out = torch.empty(self.parts, dtype=torch.float32, device=device)
        part_lse = torch.empty(self.parts[:-1], dtype=torch.float32, device=device)
        scratch = torch.empty(self.scratch, dtype=torch.int64, device=device)
        mask, active, table, lengths = part.mask, part.active, part.page_table, part.page_lengths
        if not self.pairs:
            (splits,) = self.launches
            splits(q, part.k_pages, part.v_pages, table, lengths, mask, active, k, v, part_out, part_lse, scratch)
            return part_out, part_lse, q, q, q
        entries, logicals = scratch.view(2, self.pairs, self.pages)
        counts, firsts, lasts = torch.empty((3, self.pairs), dtype=torch.int32, device=q.device)
        lists, shares = self.launches
        lists(mask, active, table, lengths, entries, logicals, counts)
        shares(
            q, part.k_pages, part.v_pages, mask, active, k, v, part_out, part_lse, entries, logicals, counts,
            firsts, lasts,
        )
        return part_out, part_lse, firsts, lasts, counts


@functools.lru_cache(maxsize=1024)
def planned(sizes: Sizes, epoch: int) -> Plan:
    """Settle the launches of a pass; ``epoch`` counts changes of the settings."""
    grid = _grid(sizes)
    ragged = sizes.has_pages and sizes.ragged and sizes.q[0][0] > 1
    if ragged and grid.tiles == 1 and grid.pairs <= MOST_PAIRS:
        return _shares(sizes, grid)
    return _splits(sizes, grid)


def _strides(sizes: Sizes, grid: _Grid) -> tuple[int, ...]:
    """Return the strides that both kernels of attention take, in their order."""
    mask = (0, 0, 0, 0) if not sizes.has_context else sizes.mask[1]
    heads = sizes.mask[0][1] if sizes.has_context else 1
    of_mask = mask[0], mask[1] * (heads > 1) * grid.mask_rows, mask[1], mask[2]
    of_pages = ((0,) * 3,) * 2 if not sizes.has_context else (sizes.k_pages[1][:3], sizes.v_pages[1][:3])
    of_block = (sizes.q[1][:3],) * 2 if sizes.k is None else (sizes.k[1][:3], sizes.v[1][:3])
    return (*sizes.q[1][:3], *of_pages[0], *of_pages[1], *of_mask, *of_block[0], *of_block[1])


def _constants(sizes: Sizes, grid: _Grid) -> dict[str, Any]:
    """Return the compile-time constants that both kernels of attention take."""
    tokens, head_dim = sizes.q[0][2:]
    keys = tokens if sizes.k is None else sizes.k[0][2]
    return {
        "TOKENS": tokens, "GROUP": grid.group, "ROWS": grid.rows, "MASK_ROWS": grid.mask_rows,
        "OWN": grid.mask_rows > 1 or (sizes.has_context and sizes.mask[0][2] > 1),
        "PAGE_SIZE": sizes.k_pages[0][2] if sizes.has_context else 1, "HEAD_DIM": head_dim,
        "BLOCK_M": grid.block_m, "BLOCK_N": grid.settings.block_n,
        # Keys of the block are multiplied some at a time.
        "BLOCK_K": min(power_of_two(keys), 32 if head_dim <= 128 else 16), "BLOCK_D": padded_dim(head_dim),
        "PRECISION": precision(sizes.dtype), "STAGES": grid.settings.stages,
        "num_warps": grid.settings.warps,
    }  # fmt: skip


def _splits(sizes: Sizes, grid: _Grid) -> Plan:
    batch, q_heads, tokens, head_dim = sizes.q[0]
    spans, pages = sizes.mask[0][2:] if sizes.has_pages else (1, 0)
    page_size = sizes.k_pages[0][2] if sizes.has_context else 1
    chosen, tiles, splits = grid.settings, grid.tiles, 0
    if sizes.has_pages:
        pieces = max(page_size // chosen.block_n, 1)
        most = max(min(triton.cdiv(pages * page_size, chosen.block_n), pages * pieces, 128), 1)
        splits = min(max(chosen.programs // (grid.pairs * tiles), 1), most)
        splits = 1 << (splits.bit_length() - 1)
    pieces = _pieces(page_size, chosen.block_n, splits)
    slots = splits + (sizes.k is not None)
    capacity = triton.cdiv(pages, max(splits // pieces, 1))
    launch = Launch(
        splits_kernel, (slots * tiles * grid.pairs,), *_strides(sizes, grid), sizes.scale * LOG2_E,
        sizes.kv_heads, grid.pairs, tiles, pages, spans, min(sizes.span, tokens), capacity,
        0 if sizes.k is None else sizes.k[0][2], device=sizes.device,
        aligned=sizes.straight, SPLITS=splits, SLOTS=slots,
        BLOCK_P=min(power_of_two(pages), MOST_LISTED), BLOCK_T=power_of_two(tokens) if splits else 16,
        LONG=pages > MOST_LISTED, PIECES=pieces, LATER=sizes.later, **_constants(sizes, grid),
    )  # fmt: skip
    scratch = grid.pairs * tiles * splits * 2 * capacity
    finish = _finish(sizes, SPLITS=splits, SLOTS=slots)
    whole = sizes.has_context and sizes.k is not None
    parts = batch, q_heads, tokens, slots, head_dim
    return Plan(whole, sizes.keep > 0, parts, scratch, 0, 0, (launch,), finish)


def _shares(sizes: Sizes, grid: _Grid) -> Plan:
    _, _, tokens, head_dim = sizes.q[0]
    (spans, pages), pairs, span = sizes.mask[0][2:], grid.pairs, min(sizes.span, tokens)
    constants, strides = _constants(sizes, grid), _strides(sizes, grid)
    names = "TOKENS", "MASK_ROWS", "OWN", "PAGE_SIZE"
    lists = Launch(
        lists_kernel, (pairs,), *strides[9:13], sizes.kv_heads, pages, spans, span, device=sizes.device,
        aligned=sizes.straight,
        **{name: constants[name] for name in names}, BLOCK_P=min(power_of_two(pages), MOST_LISTED),
        BLOCK_T=power_of_two(tokens), num_warps=4,
    )  # fmt: skip
    programs = grid.settings.programs
    blocks = 0 if sizes.k is None else pairs
    shares = Launch(
        shares_kernel, (programs + blocks,), *strides, sizes.scale * LOG2_E, sizes.kv_heads, pages, span, pairs,
        programs, blocks, sizes.k[0][2] if blocks else 0, device=sizes.device,
        aligned=sizes.straight, BLOCK_L=power_of_two(pairs),
        BLOCK_T=power_of_two(tokens), **constants,
    )  # fmt: skip
    parts = programs + pairs + blocks, grid.group * tokens, head_dim
    finish = _finish(sizes, SPLITS=0, SLOTS=0, block_slots=programs + pairs)
    whole = sizes.has_context and sizes.k is not None
    return Plan(whole, sizes.keep > 0, parts, 2 * pairs * pages, pairs, pages, (lists, shares), finish)


def _finish(sizes: Sizes, *, SPLITS: int, SLOTS: int, block_slots: int = 0) -> Launch:
    batch, q_heads, tokens, head_dim = sizes.q[0]
    shared = block_slots > 0
    several = not shared and SPLITS <= 8 and batch * q_heads * tokens >= MANY_ROWS
    rows = min(power_of_two(tokens, 1), FINISHED) if several else 1
    old, old_lse = sizes.cached or (sizes.q[1], (0, 0, 0))
    before = sizes.q[1] if sizes.reference is None else sizes.reference
    return Launch(
        finish_kernel, (triton.cdiv(tokens, rows), q_heads, batch),
        *sizes.q[1][:3], *old[:3], *old_lse[:2], *before[:3], q_heads, block_slots, device=sizes.device,
        aligned=sizes.straight,
        TOKENS=tokens, GROUP=q_heads // sizes.kv_heads, SPLITS=SPLITS, SLOTS=SLOTS, HEAD_DIM=head_dim,
        BLOCK_R=rows, BLOCK_S=8 if shared else power_of_two(SPLITS, 1), BLOCK_D=padded_dim(head_dim),
        CONTEXT=sizes.has_context, CACHED=sizes.cached is not None, BLOCK=sizes.k is not None, SHARED=shared,
        KEEP=sizes.keep, num_warps=rows,
    )  # fmt: skip


def _pieces(page_size: int, block_n: int, splits: int) -> int:
    """Return among how many splits to divide each page, so that all have about the same to read."""
    pieces = 1
    while pieces < splits and page_size % (2 * pieces * block_n) == 0:
        pieces *= 2
    return pieces


def attend(
    q: Tensor,
    block: tuple[Tensor, Tensor] | None,
    part: Part | None,
    cached: tuple[Tensor, Tensor] | None,
    scale: float,
    keep: int = 0,
    reference: Tensor | None = None,
    *,
    later: bool = False,
    ragged: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch a pass, or the half of it that is asked for.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    block : tuple of torch.Tensor or None
        ``k`` and ``v`` of the block, ``(batch, kv_heads, keys, head_dim)``.
    part : Part or None
        The context part.
    cached : tuple of torch.Tensor or None
        ``out`` and ``lse`` of inactive rows; None counts as the empty set.
    scale : float
        Factor on q.k.
    keep : int
        What to store for the next pass to measure change against: nothing (0), all queries (1), those of
        active rows and ``reference`` elsewhere (2).
    reference : torch.Tensor or None
        Like ``q``.
    later : bool
        Whether kernels of the same pass were launched before.
    ragged : bool
        Whether programs take equal shares of all lists together, for one more launch.

    Returns
    -------
    tuple of torch.Tensor
        Output of the pass, ``out`` and ``lse`` of the context part (of the block if there is no context
        part), and the kept queries. Empty tensors stand for what was not asked for.
    """
    # Copies, if there have to be any, before the first launch: see `attend_ranked`.
    q = lined(q)
    if q.numel() == 0:
        nothing = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        return torch.empty_like(q), torch.empty_like(q), nothing, torch.empty_like(q)
    cached = None if cached is None else (lined(cached[0]), lined(cached[1]))
    reference = None if reference is None else lined(reference)
    k, v = (q, q) if block is None else (lined(block[0]), lined(block[1]))
    has_context, part = part is not None, _no_part(q) if part is None else part.lined()
    sizes = sizes_of(
        q, None if block is None else (k, v), part if has_context else None, cached, reference, scale, keep, later,
        ragged,
    )
    return planned(sizes, settings.epoch()).run(q, k, v, part, cached, reference)


def sizes_of(
    q: Tensor, block: tuple[Tensor, Tensor] | None, part: Part | None, cached: tuple[Tensor, Tensor] | None,
    reference: Tensor | None, scale: float, keep: int, later: bool, ragged: bool, mask: Any = None,
) -> Sizes:  # fmt: skip
    """Return what decides how a pass of these tensors is launched; ``mask`` is the layout of one not made yet."""
    given = [q, *(block or ()), *(cached or ()), *(() if reference is None else (reference,))]
    kv_heads = block[0].shape[1] if block is not None else q.shape[1]
    k_pages = v_pages = None
    if part is not None:
        given += [part.k_pages, part.v_pages, part.page_table, part.page_lengths]
        kv_heads, k_pages, v_pages = part.k_pages.shape[1], layout(part.k_pages), layout(part.v_pages)
        if mask is None:
            mask = layout(part.mask)
            given += [part.mask, part.active]
    return Sizes(
        q.device, q.dtype, layout(q), None if block is None else layout(block[0]),
        None if block is None else layout(block[1]), k_pages, v_pages, mask, 1 if part is None else part.span,
        q.shape[2] if part is None else part.most_active, kv_heads, scale,
        None if cached is None else (cached[0].stride(), cached[1].stride()),
        None if reference is None else reference.stride(), keep, later, ragged, aligned(*given),
    )  # fmt: skip


@functools.cache
def _nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(1, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.bool, device=device)


def _no_part(q: Tensor) -> Part:
    """Return tensors to launch with where no context part is asked for; none of them is read."""
    table, mask = _nothing(q.device)
    return Part(q, q, table, table, mask, 1, mask, q.shape[2])
