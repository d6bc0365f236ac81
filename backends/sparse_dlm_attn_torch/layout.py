"""Where pages lie in memory, and which of them a selection loads, as index arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Lists", "PageRows", "lists_of", "wanted_pages"]


@dataclass(frozen=True, eq=False)
class PageRows:
    """K or V pages as the rows of a matrix: one row for each physical page and KV head.

    Parameters
    ----------
    rows : torch.Tensor
        ``(rows, page_size * head_dim)``; a view of the pages wherever their memory allows.
    page_stride, head_stride : int
        Rows from one physical page, or one head, to the next.
    """

    rows: torch.Tensor
    page_stride: int
    head_stride: int

    @classmethod
    def view(cls, pages: torch.Tensor) -> PageRows | None:
        """View pages ``(num_pages, kv_heads, page_size, head_dim)``; None if only a copy could do it.

        It works wherever the tokens of a page and head lie side by side, as in a contiguous pool and in
        what `Context.from_dense` makes.
        """
        count, heads, page_size, head_dim = pages.shape
        of_page, of_head, of_token, of_channel = pages.stride()
        size = page_size * head_dim
        if (head_dim > 1 and of_channel != 1) or (page_size > 1 and of_token != head_dim) or count == 0:
            return None
        of_page, of_head = of_page if count > 1 else 0, of_head if heads > 1 else 0
        if of_page % size or of_head % size:
            return None
        of_page, of_head = of_page // size, of_head // size
        rows = (count - 1) * of_page + (heads - 1) * of_head + 1
        return cls(pages.as_strided((rows, size), (size, 1)), of_page, of_head)

    @property
    def strides(self) -> tuple[int, int]:
        """Rows to the next page and head: equal for caches that one index serves."""
        return self.page_stride, self.head_stride

    def index(self, physical: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Return the rows of physical pages in KV heads; the two broadcast against each other."""
        return physical * self.page_stride + heads * self.head_stride


@dataclass(frozen=True, eq=False)
class Lists:
    """A selection as page lists, one for each (sequence, span, head), whose rows all read that list.

    Parameters
    ----------
    pages : torch.Tensor
        int64 ``(batch, spans, heads, width)``: logical pages in reading order; only the first ``counts``
        entries count. ``heads`` is kv_heads where the query heads of a group share a selection, else
        q_heads.
    counts : torch.Tensor
        int64 ``(batch, spans, heads)``.
    span : int
        Rows of a span.
    """

    pages: torch.Tensor
    counts: torch.Tensor
    span: int

    @property
    def heads(self) -> int:
        """Lists a sequence and span."""
        return self.pages.shape[2]

    def rows_of(self, q: torch.Tensor) -> torch.Tensor:
        """Reorder queries to the lists, ``(batch, spans, heads, rows, head_dim)``; padding rows are 0."""
        batch, q_heads, tokens, head_dim = q.shape
        spans, group, span = self.pages.shape[1], q_heads // self.heads, self.span
        if spans * span != tokens:
            q = torch.nn.functional.pad(q, (0, 0, 0, spans * span - tokens))
        split = q.reshape(batch, self.heads, group, spans, span, head_dim)
        return split.permute(0, 3, 1, 2, 4, 5).reshape(batch, spans, self.heads, group * span, head_dim)

    def to_tokens(self, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Undo `rows_of` for results ``(batch, spans, heads, rows, ...)`` of queries of ``shape``."""
        batch, q_heads, tokens, _ = shape
        spans, group = self.pages.shape[1], q_heads // self.heads
        rest = rows.shape[4:]
        split = rows.reshape(batch, spans, self.heads, group, -1, *rest)
        axes = (0, 2, 3, 1, 4, *range(5, split.dim()))
        return split.permute(axes).reshape(batch, q_heads, -1, *rest)[:, :, :tokens]


def lists_of(wanted: torch.Tensor, span: int, width: int | None = None) -> Lists:
    """Turn a mask of wanted pages, bool ``(batch, spans, heads, pages)``, into `Lists`.

    Without a look at the values, hence without data-dependent shapes: each wanted page is written to its
    rank, all others to a place behind the last one. A ``width`` below ``pages`` cuts longer lists off.
    """
    pages = wanted.shape[-1]
    ranks = wanted.cumsum(-1)
    counts = ranks[..., -1] if pages else wanted.sum(-1)
    places = torch.where(wanted, ranks - 1, pages)
    numbers = torch.arange(pages, device=wanted.device).expand(wanted.shape)
    listed = wanted.new_zeros((*wanted.shape[:-1], pages + 1), dtype=torch.int64)
    listed = listed.scatter(-1, places, numbers)
    kept = pages if width is None else min(width, pages)
    return Lists(listed[..., :kept], counts.clamp(max=kept), span)


def wanted_pages(
    mask: torch.Tensor, span: int, active: torch.Tensor, exists: torch.Tensor, kv_heads: int
) -> torch.Tensor:
    """Return the pages that each (sequence, span, head) loads, bool ``(batch, spans, heads, pages)``.

    Parameters
    ----------
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``; 1 becomes kv_heads.
    span : int
        Rows that share a selection.
    active : torch.Tensor
        bool ``(batch, tokens)``; a span without an active row loads nothing.
    exists : torch.Tensor
        bool ``(batch, pages)``.
    kv_heads : int
        KV heads.
    """
    batch, heads, spans, pages = mask.shape
    tokens = active.shape[1]
    span = min(span, max(tokens, 1))
    padded = torch.nn.functional.pad(active, (0, spans * span - tokens))
    used = padded.reshape(batch, spans, span).any(-1)
    if heads == 1:
        mask = mask.expand(batch, kv_heads, spans, pages)
    return mask.transpose(1, 2) & used[:, :, None, None] & exists[:, None, None, :]
