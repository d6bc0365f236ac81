"""Page lists for tiles of spans, made from a selection on the device, without a look at it on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_dlm_attn_triton.common import power_of_two
from sparse_dlm_attn_triton.tiles import load_rows

__all__ = ["SpanLists", "span_lists"]

MOST_LISTED = 256
"""Most pages that a program lists in one iteration."""
Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class SpanLists:
    """Which pages each tile of rows reads. A selection that stays needs them only once.

    Parameters
    ----------
    entries : torch.Tensor
        int32 ``(batch, heads, groups, pages)``. From the front *full* pages, by physical number;
        from the back *partial* pages, by logical number. What lies between is undefined.
    bits : torch.Tensor
        int32, like ``entries``: which spans of the group chose the page, the first in the lowest bit.
        Without elements where a group is a single span.
    counts : torch.Tensor
        int32 ``(batch, heads, groups, 2)``: how many full and how many partial pages.
    span : int
        Rows that share a selection.
    spans_together : int
        Spans of a group: those whose rows one program computes.

    Notes
    -----
    Full pages run without a mask: rows of the group that did not choose one take it with weight 0. That is
    right for finite values alone, since 0 times NaN is NaN. So where spans share a program, pages with values
    that are not finite count as partial, like those that are partly filled.
    """

    entries: torch.Tensor
    bits: torch.Tensor
    counts: torch.Tensor
    span: int
    spans_together: int


@triton.jit
def unsafe_kernel(
    v,
    table,
    lengths,
    unsafe,
    v_stride,
    table_stride,
    lengths_stride,
    pages,
    kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Flag pages that hold a value which is not finite."""
    page, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b * lengths_stride[0] + page * lengths_stride[1])
    found = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.int32)
    if length > 0:
        physical = tl.load(table + b * table_stride[0] + page * table_stride[1]).to(tl.int64)
        token = tl.arange(0, BLOCK_T)
        at = v + physical * v_stride[0] + head.to(tl.int64) * v_stride[1]
        value = load_rows(at, token, v_stride[2], token < length, HEAD_DIM, BLOCK_D, True)
        found = (value.to(tl.float32) * 0.0 != 0.0).to(tl.int32)  # inf and NaN times 0 is NaN
    tl.store(unsafe + (b * kv_heads + head) * pages + page, tl.max(tl.max(found, 1), 0).to(tl.int8))


@triton.jit
def span_lists_kernel(
    mask,
    used,
    table,
    lengths,
    unsafe,
    entries,
    bits,
    counts,
    mask_stride,
    table_stride,
    lengths_stride,
    heads,
    groups,
    pages,
    PAGE_SIZE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Rank the pages of one group of spans; see `SpanLists`."""
    group, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row = ((b * heads + h) * groups + group).to(tl.int64) * pages
    full_count, partial_count = 0, 0
    for start in range(0, pages, BLOCK_P):
        page = start + tl.arange(0, BLOCK_P)
        inside = page < pages
        length = tl.load(lengths + b * lengths_stride[0] + page * lengths_stride[1], mask=inside, other=0)
        chosen = tl.zeros([BLOCK_P], dtype=tl.int32)
        for i in tl.static_range(TOGETHER):
            span = group * TOGETHER + i
            alive = tl.load(used + b * (groups * TOGETHER) + span).to(tl.int32)  # 0 behind the last span
            at = mask + b.to(tl.int64) * mask_stride[0] + h.to(tl.int64) * mask_stride[1]
            at += span.to(tl.int64) * mask_stride[2]
            took = tl.load(at + page * mask_stride[3], mask=page < pages * alive, other=0) != 0
            chosen |= took.to(tl.int32) << i
        wanted = (chosen != 0) & (length > 0)
        partial = wanted & (length < PAGE_SIZE)
        if TOGETHER > 1:
            flag = tl.load(unsafe + (b * heads + h) * pages + page, mask=inside, other=0)
            partial = partial | (wanted & (flag != 0))
        full = wanted & ~partial
        physical = tl.load(table + b * table_stride[0] + page * table_stride[1], mask=full, other=0)
        place = full_count + tl.cumsum(full.to(tl.int32), 0) - 1
        tl.store(entries + row + place, physical, mask=full)
        back = pages - partial_count - tl.cumsum(partial.to(tl.int32), 0)
        tl.store(entries + row + back, page, mask=partial)
        if TOGETHER > 1:
            tl.store(bits + row + place, chosen, mask=full)
            tl.store(bits + row + back, chosen, mask=partial)
        full_count += tl.sum(full.to(tl.int32), 0)
        partial_count += tl.sum(partial.to(tl.int32), 0)
    at = counts + ((b * heads + h) * groups + group) * 2
    tl.store(at, full_count)
    tl.store(at + 1, partial_count)


def span_lists(
    v_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    mask: Tensor,
    span: int,
    active: Tensor,
    spans_together: int = 1,
) -> SpanLists:
    """List the pages that groups of ``spans_together`` neighbouring spans, at most 32, read.

    A span without an active row reads nothing. Values are looked at only where spans share a program.
    """
    batch, heads, spans, pages = mask.shape
    kv_heads, page_size, head_dim = v_pages.shape[1:]
    if spans_together > 1 and heads == 1:  # values differ between heads, and so does what is partial
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
        unsafe_kernel[(pages, kv_heads, batch)](
            v_pages,
            page_table,
            page_lengths,
            unsafe,
            v_pages.stride()[:3],
            page_table.stride(),
            page_lengths.stride(),
            pages,
            kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_T=power_of_two(page_size, 1),
            BLOCK_D=power_of_two(head_dim),
        )
        if heads != kv_heads:
            unsafe = unsafe.repeat_interleave(heads // kv_heads, dim=1)
    view: Any = mask.view(torch.uint8)
    span_lists_kernel[(groups, batch * heads)](
        view,
        used,
        page_table,
        page_lengths,
        unsafe,
        entries,
        bits,
        counts,
        view.stride(),
        page_table.stride(),
        page_lengths.stride(),
        heads,
        groups,
        pages,
        PAGE_SIZE=page_size,
        TOGETHER=spans_together,
        BLOCK_P=min(MOST_LISTED, power_of_two(pages)),
    )
    return SpanLists(entries, bits, counts, span, spans_together)
