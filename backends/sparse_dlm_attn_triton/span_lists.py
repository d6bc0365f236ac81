"""Page lists for tiles of spans, made from a selection on the device, without a look at it on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["SpanLists", "span_lists"]

BLOCK = 256  # pages that a program ranks at once


@dataclass(frozen=True, eq=False)
class SpanLists:
    """Which pages each tile of rows reads. A selection that stays needs them only once.

    Parameters
    ----------
    entries : torch.Tensor
        int32 ``(batch, heads, groups, pages)``. From the front *plain* pages, by physical number;
        from the back *careful* pages, by logical number. What lies between holds anything.
    bits : torch.Tensor
        int32, like ``entries``: which spans of the group chose the page, the first in the lowest bit.
        Without elements where a group is a single span.
    counts : torch.Tensor
        int32 ``(batch, heads, groups, 2)``: how many plain and how many careful pages.
    span : int
        Rows that share a selection.
    spans_together : int
        Spans of a group: those whose rows one program computes.

    Notes
    -----
    A plain page is whole, and may be added to all rows of the group with weight 0 for those that did
    not choose it. That holds for finite values alone, since 0 times NaN is NaN: pages that are partly
    filled, and pages with values that are not finite where spans share a program, are careful ones.
    """

    entries: torch.Tensor
    bits: torch.Tensor
    counts: torch.Tensor
    span: int
    spans_together: int


@triton.jit
def _find_unsafe(
    v, table, lengths, unsafe, v_page, v_head, v_token, table_row, table_page, lengths_row, lengths_page,
    pages, kv_heads, PAGE: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Flag pages that hold a value which is not finite."""
    page, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b * lengths_row + page * lengths_page)
    found = tl.zeros([TOKENS, CHANNELS], dtype=tl.int32)
    if length > 0:
        physical = tl.load(table + b * table_row + page * table_page).to(tl.int64)
        token, channel = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
        at = v + physical * v_page + head.to(tl.int64) * v_head
        inside = (token[:, None] < length) & (channel[None, :] < DIM)
        value = tl.load(at + token[:, None] * v_token + channel[None, :], mask=inside, other=0.0)
        found = (value.to(tl.float32) * 0.0 != 0.0).to(tl.int32)  # inf and NaN times 0 is NaN
    tl.store(unsafe + (b * kv_heads + head) * pages + page, tl.max(tl.max(found, 1), 0).to(tl.int8))


@triton.jit
def _list_pages(
    mask, used, table, lengths, unsafe, entries, bits, counts, mask_b, mask_h, mask_s, mask_p,
    table_row, table_page, lengths_row, lengths_page, heads, groups, pages,
    PAGE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rank the pages of one group of spans; see `SpanLists`."""
    group, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row = ((b * heads + h) * groups + group).to(tl.int64) * pages
    plain_count, careful_count = 0, 0
    for start in range(0, pages, BLOCK):
        page = start + tl.arange(0, BLOCK)
        inside = page < pages
        length = tl.load(lengths + b * lengths_row + page * lengths_page, mask=inside, other=0)
        chosen = tl.zeros([BLOCK], dtype=tl.int32)
        for i in tl.static_range(TOGETHER):
            span = group * TOGETHER + i
            alive = tl.load(used + b * (groups * TOGETHER) + span).to(tl.int32)  # 0 behind the last span
            at = mask + b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h + span.to(tl.int64) * mask_s
            took = tl.load(at + page * mask_p, mask=page < pages * alive, other=0) != 0
            chosen |= took.to(tl.int32) << i
        wanted = (chosen != 0) & (length > 0)
        careful = wanted & (length < PAGE)
        if TOGETHER > 1:
            flag = tl.load(unsafe + (b * heads + h) * pages + page, mask=inside, other=0)
            careful = careful | (wanted & (flag != 0))
        plain = wanted & ~careful
        physical = tl.load(table + b * table_row + page * table_page, mask=plain, other=0)
        place = plain_count + tl.cumsum(plain.to(tl.int32), 0) - 1
        tl.store(entries + row + place, physical, mask=plain)
        back = pages - careful_count - tl.cumsum(careful.to(tl.int32), 0)
        tl.store(entries + row + back, page, mask=careful)
        if TOGETHER > 1:
            tl.store(bits + row + place, chosen, mask=plain)
            tl.store(bits + row + back, chosen, mask=careful)
        plain_count += tl.sum(plain.to(tl.int32), 0)
        careful_count += tl.sum(careful.to(tl.int32), 0)
    at = counts + ((b * heads + h) * groups + group) * 2
    tl.store(at, plain_count)
    tl.store(at + 1, careful_count)


def span_lists(
    v_pages: torch.Tensor, page_table: torch.Tensor, page_lengths: torch.Tensor, mask: torch.Tensor,
    span: int, active: torch.Tensor, spans_together: int = 1,
) -> SpanLists:
    """List the pages that groups of spans read.

    Parameters
    ----------
    v_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``; read only where spans share a program.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``.
    span : int
        Rows that share a selection, at most the rows that there are.
    active : torch.Tensor
        bool ``(batch, tokens)``; a span without an active row reads nothing.
    spans_together : int
        Neighbouring spans of a group, at most 32.

    Returns
    -------
    SpanLists
        On the device of the mask.
    """
    batch, heads, spans, pages = mask.shape
    kv_heads, page_size, head_dim = v_pages.shape[1:]
    if spans_together > 1 and heads == 1:  # values differ between heads, and so does what is careful
        heads = kv_heads
        mask = mask.expand(batch, heads, spans, pages)
    groups = -(-spans // spans_together)
    together = groups * spans_together
    used = torch.nn.functional.pad(active, (0, together * span - active.shape[1]))
    used = used.reshape(batch, together, span).any(-1).to(torch.uint8)
    entries = torch.empty((batch, heads, groups, pages), dtype=torch.int32, device=mask.device)
    bits = torch.empty_like(entries) if spans_together > 1 else entries.new_empty(0)
    counts = entries.new_empty((batch, heads, groups, 2))
    unsafe = used
    if spans_together > 1:
        unsafe = torch.empty((batch, kv_heads, pages), dtype=torch.int8, device=mask.device)
        _find_unsafe[(pages, kv_heads, batch)](
            v_pages, page_table, page_lengths, unsafe, *v_pages.stride()[:3], *page_table.stride(),
            *page_lengths.stride(), pages, kv_heads, PAGE=page_size, DIM=head_dim,
            TOKENS=triton.next_power_of_2(page_size), CHANNELS=triton.next_power_of_2(head_dim),
        )
        if heads != kv_heads:
            unsafe = unsafe.repeat_interleave(heads // kv_heads, dim=1)
    view: Any = mask.view(torch.uint8)
    _list_pages[(groups, batch * heads)](
        view, used, page_table, page_lengths, unsafe, entries, bits, counts, *view.stride(),
        *page_table.stride(), *page_lengths.stride(), heads, groups, pages,
        PAGE=page_size, TOGETHER=spans_together, BLOCK=min(BLOCK, triton.next_power_of_2(max(pages, 16))),
    )
    return SpanLists(entries, bits, counts, span, spans_together)
