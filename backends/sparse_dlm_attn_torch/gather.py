"""Path "gather": copy the selected pages of a KV head, then two products; reads indices on the host.

The rows of all query heads of a group share one copy of the union of their pages; a page that some
of them did not select is masked for those rows. Extra memory is the selected pages of one head, and
nothing where they lie side by side in reading order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn_torch.layout import PageRows

__all__ = ["attend_pages"]

ALIGNED = 64  # bytes: where PyTorch's allocator puts a tensor on a processor


def attend_pages(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor,
    page_lengths: torch.Tensor, mask: torch.Tensor, span: int, active: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to selected pages (clause ATTEND-1).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
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
    scale : float
        Factor on q.k.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and float32 ``lse`` ``(batch, q_heads, tokens)``.
    """
    batch, q_heads, _, head_dim = q.shape
    kv_heads, dtype = k_pages.shape[1], compute_dtype(q)
    group = q_heads // kv_heads
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32)
    mask = mask & (page_lengths > 0)[:, None, None, :]
    store = _Store(k_pages, v_pages)
    for b in range(batch):
        rows = active[b].nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        every = rows.numel() == active.shape[1]  # then a slice does, which is much quicker than an index
        for load in _loads(mask[b], rows // span, group, kv_heads):
            heads, count = load.heads, load.heads.stop - load.heads.start
            queries = q[b, heads] if every else q[b, heads].index_select(1, rows)
            queries = queries.reshape(-1, head_dim).to(dtype) * scale
            physical, lengths = page_table[b, load.pages], page_lengths[b, load.pages]
            tokens = store.tokens(heads.start // group, physical, lengths)
            part, part_lse = _attend(queries, tokens, dtype, load.reads)
            where = (b, heads) if every else (b, heads, rows)
            out[where] = part.view(count, -1, head_dim).to(q.dtype)
            lse[where] = part_lse.view(count, -1).to(torch.float32)
    return out, lse


@dataclass(frozen=True, eq=False)
class _Load:
    """Pages to load once, for the active rows of some query heads of one group.

    ``reads`` says which of them each row reads, bool ``(heads * rows, pages)``; None if all read all.
    """

    heads: slice
    pages: torch.Tensor
    reads: torch.Tensor | None


def _loads(mask: torch.Tensor, spans: torch.Tensor, group: int, kv_heads: int) -> Iterator[_Load]:
    """Cut a selection ``(heads, spans, pages)`` of one sequence into loads, those without a page left out.

    Rows that all read one list need no mask, so each list is loaded for itself, even if query heads of a
    group have their own. Where spans differ, a group loads the union.
    """
    of_rows, heads = spans, mask.shape[0]  # one span: all rows are its own
    if mask.shape[1] > 1:
        used = torch.unique(spans)  # sorted
        mask, of_rows = mask[:, used], torch.searchsorted(used, spans)
    step = 1 if mask.shape[1] == 1 and heads == kv_heads * group else group
    for first in range(0, kv_heads * group, step):
        lists = first * heads // (kv_heads * group)
        mine = mask[lists : lists + max(step * heads // (kv_heads * group), 1)]
        pages = mine.flatten(0, 1).any(dim=0).nonzero()[:, 0]
        if pages.numel() == 0:
            continue
        reads = None
        if mine.shape[0] * mine.shape[1] > 1:
            per_span = mine[:, :, pages]
            if not bool(per_span.all()):
                reads = per_span[:, of_rows].expand(step, -1, -1).flatten(0, 1)
        yield _Load(slice(first, first + step), pages, reads)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Keys and values of listed pages, ``(tokens, head_dim)``; slots past a page's length are 0.

    ``valid`` says which slots hold a token, None if all do. ``page_size`` slots make a page.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    page_size: int


class _Store:
    """The pages of all heads, read with as little copying as their memory allows."""

    def __init__(self, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
        self.pages = (k_pages, v_pages)
        self.rows = (PageRows.view(k_pages), PageRows.view(v_pages))
        self.page_size = k_pages.shape[2]

    def tokens(self, head: int, physical: torch.Tensor, lengths: torch.Tensor) -> _Tokens:
        """Return the tokens of physical pages, in that order."""
        partial = (lengths < self.page_size).nonzero()[:, 0]
        count = lengths.numel() * self.page_size
        last_only = partial.numel() == 0 or int(partial[0]) == lengths.numel() - 1
        if partial.numel() and last_only:
            count += int(lengths[-1]) - self.page_size
        first, last = int(physical[0]), int(physical[-1])
        run = last - first + 1 == physical.numel() and bool((physical.diff() == 1).all())
        keys, values = (
            self._run(side, head, first, last + 1) if run and last_only else self._copy(side, head, physical)
            for side in (0, 1)
        )
        if last_only:
            return _Tokens(keys[:count], values[:count], None, self.page_size)
        valid = torch.arange(self.page_size) < lengths[:, None]
        for side in (keys, values):  # copies of our own
            paged = side.view(-1, self.page_size, side.shape[1])
            paged[partial] = paged[partial].masked_fill(~valid[partial, :, None], 0.0)
        return _Tokens(keys, values, valid.flatten(), self.page_size)

    def _run(self, side: int, head: int, first: int, end: int) -> torch.Tensor:
        """Return physical pages ``first..end-1``, a view if they lie side by side.

        A product may sum in another order where rows are not aligned as those of a copy are, and then the
        order of pages in memory would show in the last bit (CONTEXT-3).
        """
        rows = self.pages[side][first:end, head].flatten(0, 1)
        step = rows.stride(0) * rows.element_size()
        aligned = rows.data_ptr() % ALIGNED == 0 and (step % ALIGNED == 0 or rows.is_contiguous())
        return rows if aligned else rows.contiguous().clone()

    def _copy(self, side: int, head: int, physical: torch.Tensor) -> torch.Tensor:
        rows = self.rows[side]
        if rows is None:
            return self.pages[side][physical.long(), head].flatten(0, 1)
        index = physical * rows.page_stride + head * rows.head_stride
        return rows.rows.index_select(0, index).view(-1, self.pages[side].shape[3])


def _attend(
    queries: torch.Tensor, tokens: _Tokens, dtype: torch.dtype, reads: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(out, lse)`` of scaled ``queries``; ``reads`` says which pages each row reads."""
    values = tokens.values.to(dtype)
    logits = queries @ tokens.keys.to(dtype).T
    if tokens.valid is not None:
        logits = logits.masked_fill(~tokens.valid, -math.inf)
    if reads is None:
        return _softmax(logits, values)
    allowed = reads.repeat_interleave(tokens.page_size, dim=1)[:, : logits.shape[1]]
    logits = logits.masked_fill(~allowed, -math.inf)
    out, lse = _softmax(logits, values)
    if not bool(out.isfinite().all()):
        # A value that is not finite must reach only the rows that read it: 0 x NaN is NaN.
        unsafe = ~values.isfinite().all(dim=-1)
        clean, _ = _softmax(logits, values.masked_fill(unsafe[:, None], 0.0))
        touched = (allowed & unsafe).any(dim=-1)
        out = torch.where(touched[:, None], _row_by_row(logits, values, allowed), clean)
    return out, lse


def _softmax(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(out, lse)``; keys whose scores are all -inf weigh nothing, as an empty set (STATE-2)."""
    peak = logits.amax(dim=-1, keepdim=True)
    weights = (logits - torch.where(peak.isneginf(), 0.0, peak)).exp_()  # one exp serves both results
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.where(total == 0, 0.0, (weights @ values) / total)
    return out, (peak + total.log())[..., 0]


def _row_by_row(logits: torch.Tensor, values: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    nothing = values.new_zeros(values.shape[1])
    pairs = zip(logits, reads, strict=True)
    outs = [_softmax(row[read], values[read])[0] if read.any() else nothing for row, read in pairs]
    return torch.stack(outs)
