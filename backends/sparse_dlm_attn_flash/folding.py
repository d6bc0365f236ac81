"""Head folding: a paged cache with per-head page lists, as a cache of one head with more pages and requests.

A kernel for paged attention reads one list of pages for all heads of a request, and lets only the last page
of a list be partly filled. Seen with one KV head, page ``p`` of head ``h`` is a page of its own, and each
(sequence, head, span) a request of its own, with the rows of all query heads that share the list. Nothing
is copied for it: folded page ``p * a + h * b`` begins where that page of that head does.

Partly filled pages may stand anywhere in a list here. Their tokens are copied side by side into new pages,
so that every list comes in two parts: full pages where they lie, and the rest, of which only the last page
is partly filled. The copy is clean: kernels multiply what lies behind a page's length by 0, and 0 x NaN is
NaN. The states of both parts are merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparse_dlm_attn import Context, Selection, UnsupportedError

__all__ = ["Pool", "Requests", "folded", "full_pages", "partial_pages", "rows_of_lists"]


@dataclass(frozen=True, eq=False)
class Pool:
    """Pages of one head.

    Parameters
    ----------
    k, v : torch.Tensor
        ``(pages, page_size, head_dim)``; they may overlap, which no list of pages does.
    page_step, head_step : int
        Page ``p`` of head ``h`` is folded page ``p * page_step + h * head_step``.
    """

    k: torch.Tensor
    v: torch.Tensor
    page_step: int
    head_step: int


@dataclass(frozen=True, eq=False)
class Requests:
    """What a kernel is asked for, in the terms of a paged cache with one head.

    Parameters
    ----------
    rows : torch.Tensor
        int64 ``(rows,)``: which rows of the flat queries, request by request.
    row_starts : torch.Tensor
        int32 ``(requests + 1,)``: first row of each request, on the host.
    pages : torch.Tensor
        int32: folded pages, request by request.
    page_starts : torch.Tensor
        int32 ``(requests + 1,)``, on the host; no request is without a page.
    last_lengths : torch.Tensor
        int32 ``(requests,)``, on the host: tokens in the last page of each request; the others are full.
    """

    rows: torch.Tensor
    row_starts: torch.Tensor
    pages: torch.Tensor
    page_starts: torch.Tensor
    last_lengths: torch.Tensor

    def __len__(self) -> int:
        return int(self.last_lengths.numel())

    def lengths(self, page_size: int) -> torch.Tensor:
        """Return the tokens of each request, int32 on the host."""
        return (self.page_starts.diff() - 1) * page_size + self.last_lengths

    def block_table(self) -> torch.Tensor:
        """Return the pages of each request, int32 ``(requests, most pages)``, padded with its last page.

        A kernel may multiply what lies behind a request's last token by 0, and 0 x NaN is NaN: it has to be
        something that the request reads anyway.
        """
        counts = self.page_starts.diff().long()[:, None]
        place = torch.minimum(torch.arange(int(counts.max()), device=counts.device), counts - 1)
        return self.pages[(place + self.page_starts[:-1].long()[:, None]).to(self.pages.device)]


def folded(context: Context, backend: str) -> Pool:
    """View the pages of a context as those of one head.

    Raises
    ------
    UnsupportedError
        If K and V have different strides, which one list of pages cannot serve.
    """
    k, v = context.k_pages, context.v_pages
    count, heads, size, dim = k.shape
    if k.numel() == 0:
        return Pool(k.reshape(0, size, dim), v.reshape(0, size, dim), heads, 1)
    if k.stride() != v.stride():
        raise UnsupportedError(
            backend, [f"k_pages and v_pages have different strides ({k.stride()}, {v.stride()}); allocate both alike"]
        )
    page, head, token, _ = k.stride()
    page, head = (page if count > 1 else 0), (head if heads > 1 else 0)
    unit = math.gcd(page, head) or size * token
    steps = page // unit, head // unit
    last = (count - 1) * steps[0] + (heads - 1) * steps[1]
    shape, strides = (last + 1, size, dim), (unit, token, 1)
    return Pool(k.as_strided(shape, strides), v.as_strided(shape, strides), *steps)


def rows_of_lists(
    context: Context, selection: Selection, active: torch.Tensor, q_heads: int
) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Return the lists that are not empty: sequence, KV head, rows of the flat queries, logical pages.

    Reads selection, lengths and active rows on the host, as planning with such kernels does anyway.
    """
    kv_heads, tokens = context.kv_heads, active.shape[1]
    mask = (selection.mask & context.exists[:, None, None, :]).cpu()
    if mask.shape[1] == 1:
        mask = mask.expand(-1, kv_heads, -1, -1)
    on, heads = active.cpu(), mask.shape[1]
    share = q_heads // heads  # query heads of a list
    span = min(selection.span, max(tokens, 1))
    found = []
    for b, head, number in mask.any(-1).nonzero().tolist():
        chosen = on[b, number * span : (number + 1) * span].nonzero()[:, 0] + number * span
        if chosen.numel():
            of_heads = torch.arange(head * share, (head + 1) * share, device=on.device)[:, None]
            rows = ((b * q_heads + of_heads) * tokens + chosen).flatten()
            pages = mask[b, head, number].nonzero()[:, 0]
            found.append((b, head * kv_heads // heads, rows, pages))
    return found


Lists = list[tuple[int, int, torch.Tensor, torch.Tensor]]


def _requests(rows: list[torch.Tensor], pages: list[torch.Tensor], last: list[int], device: torch.device) -> Requests:
    def starts(parts: list[torch.Tensor]) -> torch.Tensor:
        sizes = torch.tensor([0, *(part.numel() for part in parts)], device="cpu")
        return sizes.cumsum(0).to(torch.int32)

    return Requests(
        torch.cat(rows).to(device),
        starts(rows),
        torch.cat(pages).to(device, torch.int32),
        starts(pages),
        torch.tensor(last, dtype=torch.int32, device="cpu"),
    )


def full_pages(context: Context, lists: Lists, pool: Pool) -> Requests | None:
    """Return the requests over full pages, None if there is none."""
    table, lengths = context.page_table.cpu().to(torch.int64), context.page_lengths.cpu()
    rows, pages = [], []
    for b, head, of_list, logical in lists:
        full = logical[lengths[b, logical] == context.page_size]
        if full.numel():
            rows.append(of_list)
            pages.append(table[b, full] * pool.page_step + head * pool.head_step)
    if not rows:
        return None
    return _requests(rows, pages, [context.page_size] * len(rows), context.k_pages.device)


def partial_pages(context: Context, lists: Lists) -> tuple[Requests, Pool] | None:
    """Return the requests over partly filled pages and clean copies of them, None if there is none."""
    size, device = context.page_size, context.k_pages.device
    table, lengths = context.page_table.cpu().to(torch.int64), context.page_lengths.cpu()
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    rows, pages, last, made = [], [], [], 0
    for b, head, of_list, logical in lists:
        some = logical[lengths[b, logical] < size]
        if not some.numel():
            continue
        held = torch.arange(size, device=lengths.device) < lengths[b, some, None]
        physical, held = table[b, some].to(device), held.to(device)
        parts = [pages_of[physical, head][held] for pages_of in (context.k_pages, context.v_pages)]
        tokens, missing = parts[0].shape[0], -parts[0].shape[0] % size
        for kept, part in zip((keys, values), parts, strict=True):
            kept.append(torch.nn.functional.pad(part, (0, 0, 0, missing)).view(-1, size, context.head_dim))
        count = (tokens + missing) // size
        rows.append(of_list)
        pages.append(torch.arange(made, made + count, device=some.device))
        last.append(size - missing)
        made += count
    if not rows:
        return None
    return _requests(rows, pages, last, device), Pool(torch.cat(keys), torch.cat(values), 1, 0)
