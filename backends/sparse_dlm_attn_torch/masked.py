"""Path "masked": page lists in chunks of a fixed size, with an online softmax; never synchronises.

It computes any shape and dtype on any device. A chunk that lies behind the end of all lists is computed
for nothing: how many there are is known from shapes alone. Extra memory is one chunk.
"""

from __future__ import annotations

import math

import torch

from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn_torch.layout import Lists, PageRows, lists_of, wanted_pages
from sparse_dlm_attn_torch.states import keep_active

__all__ = ["attend_lists", "attend_pages"]

CHUNK_BYTES = 32 << 20  # of keys in computing precision


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to selected pages (clause ATTEND-1); arguments and results as those of path "gather".

    Parameters
    ----------
    q, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale
        See `sparse_dlm_attn_torch.gather.attend_pages`.
    """
    wanted = wanted_pages(mask, span, active, page_lengths > 0, k_pages.shape[1])
    lists = lists_of(wanted, min(span, max(q.shape[2], 1)))
    rows = lists.rows_of(q).to(compute_dtype(q)) * scale
    out, lse = attend_lists(rows, lists, k_pages, v_pages, page_table, page_lengths)
    return keep_active(lists.to_tokens(out, q.shape).to(q.dtype), lists.to_tokens(lse, q.shape), active)


def attend_lists(
    rows: torch.Tensor,
    lists: Lists,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to page lists, chunk by chunk.

    Parameters
    ----------
    rows : torch.Tensor
        Scaled queries ``(batch, spans, heads, rows, head_dim)`` in the precision to compute in.
    lists : Lists
        The pages that they read.
    k_pages, v_pages, page_table, page_lengths : torch.Tensor
        The context.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``rows`` and ``lse`` ``(batch, spans, heads, rows)``; no key gives 0 and -inf.
    """
    peak = rows.new_full(rows.shape[:-1], -math.inf)
    total, mixed = torch.zeros_like(peak), torch.zeros_like(rows)
    width = lists.pages.shape[-1]
    if 0 in rows.shape or width == 0 or k_pages.shape[0] == 0:
        return mixed, peak
    size = max(rows.shape[3], rows.shape[4]) * k_pages.shape[2] * rows.element_size()
    at_once = max(CHUNK_BYTES // (math.prod(lists.pages.shape[:3]) * size), 1)
    source = _Pages(k_pages, v_pages, page_table, page_lengths, lists)
    for start in range(0, width, at_once):
        keys, values, valid = source.chunk(slice(start, min(start + at_once, width)), rows.dtype)
        logits = (rows @ keys.transpose(-1, -2)).masked_fill(~valid[..., None, :], -math.inf)
        top = torch.maximum(peak, logits.amax(-1))
        # A row without a key so far has the peak -inf; a stand-in keeps -inf - -inf away.
        safe = torch.where(top.isneginf(), 0.0, top)
        weights = (logits - safe[..., None]).exp()
        kept = (peak - safe).exp()
        total = kept * total + weights.sum(-1)
        mixed = kept[..., None] * mixed + weights @ values
        peak = top
    empty = total == 0
    lse = torch.where(empty, -math.inf, peak + torch.where(empty, 1.0, total).log())
    return torch.where(empty[..., None], 0.0, mixed / total[..., None]), lse


class _Pages:
    """Copies chunks of page lists, with everything zeroed that is no token."""

    def __init__(
        self,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        page_table: torch.Tensor,
        page_lengths: torch.Tensor,
        lists: Lists,
    ) -> None:
        self.sides = ((k_pages, PageRows.view(k_pages)), (v_pages, PageRows.view(v_pages)))
        self.table, self.lengths, self.lists = page_table, page_lengths, lists
        self.page_size = k_pages.shape[2]
        group = lists.heads // k_pages.shape[1]
        self.heads = torch.arange(lists.heads, device=k_pages.device)[:, None] // group

    def chunk(self, part: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, values ``(batch, spans, heads, tokens, head_dim)`` and which tokens are real."""
        listed = self.lists.pages[..., part]
        places = torch.arange(part.start, part.stop, device=listed.device)
        real = places < self.lists.counts[..., None]
        physical, lengths = (
            values[:, None, None, :].expand(*listed.shape[:3], -1).gather(-1, listed)
            for values in (self.table, self.lengths)
        )
        # Behind the end of a list: a page that is there in any case, of which no token counts.
        physical, lengths = torch.where(real, physical, 0), torch.where(real, lengths, 0)
        slots = torch.arange(self.page_size, device=listed.device)
        valid = (slots < lengths[..., None]).flatten(-2)
        keys, values = (self._copy(side, physical.long(), valid).to(dtype) for side in self.sides)
        return keys, values, valid

    def _copy(
        self, side: tuple[torch.Tensor, PageRows | None], physical: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        pages, rows = side
        if rows is None:
            taken = pages[physical, self.heads.expand_as(physical)]
        else:
            taken = rows.rows.index_select(0, rows.index(physical, self.heads).flatten())
        taken = taken.reshape(*valid.shape, pages.shape[3])
        # A weight of 0 does not stop a NaN that lies where no token is.
        return torch.where(valid[..., None], taken, 0.0)
