"""What path "gather" loads: a selection as lists of physical pages, looked at once for all heads together.

Everything that the host has to know about a list is read here, in a few operations over all of them, so that
what is left to do for each list is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

__all__ = ["Load", "loads_of"]


@dataclass(frozen=True, eq=False)
class Load:
    """Pages that some query heads of one group load together, for the active rows of a sequence.

    Parameters
    ----------
    sequence : int
        The sequence.
    heads : slice
        The query heads.
    physical, lengths : torch.Tensor
        ``(count,)``: physical pages in reading order, and how many tokens each holds.
    first : int or None
        First physical page, if the others follow it in memory.
    partial : int
        Pages that are not full.
    last_length : int
        Tokens of the last page.
    reads : torch.Tensor or None
        bool ``(lists, spans, count)``: who reads which page, if not everybody reads all; ``lists`` is 1 or
        the number of heads.
    """

    sequence: int
    heads: slice
    physical: torch.Tensor
    lengths: torch.Tensor
    first: int | None
    partial: int
    last_length: int
    reads: torch.Tensor | None

    @property
    def count(self) -> int:
        """Pages."""
        return self.physical.shape[0]

    def full_but_last(self, page_size: int) -> bool:
        """Return whether every page but the last one is full."""
        return self.partial == (self.last_length < page_size)


def loads_of(
    mask: torch.Tensor,
    used: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    page_size: int,
    q_heads: int,
    kv_heads: int,
) -> list[Load]:
    """Return what a selection loads; lists without a page are left out.

    Rows that all read one list need no mask, so each list is loaded for itself, even if query heads of a
    group have their own. Where spans differ, a group loads the union.

    Parameters
    ----------
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``.
    used : torch.Tensor
        bool ``(batch, spans)``: spans with an active row.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    page_size, q_heads, kv_heads : int
        Tokens a page, and numbers of heads.
    """
    if 0 in mask.shape:
        return []
    batch, lists, spans, pages = mask.shape
    chosen = mask & (page_lengths > 0)[:, None, None, :] & used[:, None, :, None]
    units = q_heads if spans == 1 and lists == q_heads else kv_heads
    each = max(lists // units, 1)  # lists that a unit unites
    of_list = chosen[:, :, 0] if spans == 1 else chosen.any(dim=2)
    united = of_list.view(batch, units, -1, pages).any(dim=2) if lists > units else of_list.expand(batch, units, pages)
    sequences, _, logical = united.nonzero().unbind(1)
    if logical.shape[0] == 0:
        return []
    counts = united.sum(dim=-1)
    ends = list(accumulate(counts.flatten().tolist()))
    physical, lengths = page_table[sequences, logical], page_lengths[sequences, logical]
    facts = _facts(physical, lengths, [0, *ends], page_size)
    alike = None
    if each * spans > 1:
        same = (chosen.sum(dim=-1) == _of_lists(counts, lists)[..., None]) | ~used[:, None]
        alike = same.view(batch, -1, each * spans).all(dim=-1).expand(-1, units)
    loads = []
    for unit, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == end:
            continue
        b, head = divmod(unit, units)
        part, reads, width = slice(start, end), None, q_heads // units
        if alike is not None and not bool(alike[b, head]):
            of_unit = chosen[b, head * lists // units :][:each]
            reads = of_unit.index_select(2, logical[part])
        first, last, breaks, partial, last_length = facts[unit]
        side_by_side = breaks == 0 and last - first + 1 == end - start
        loads.append(
            Load(
                b,
                slice(head * width, (head + 1) * width),
                physical[part],
                lengths[part],
                first if side_by_side else None,
                partial,
                last_length,
                reads,
            )
        )
    return loads


def _of_lists(counts: torch.Tensor, lists: int) -> torch.Tensor:
    """Return the pages of the union that each list belongs to, ``(batch, lists)``."""
    units = counts.shape[1]
    return counts.repeat_interleave(lists // units, dim=1) if lists > units else counts[:, :lists]


def _facts(
    physical: torch.Tensor, lengths: torch.Tensor, bounds: list[int], page_size: int
) -> list[tuple[int, int, int, int, int]]:
    """Return first and last physical page, breaks, partial pages and last length of each list."""
    places = torch.tensor(bounds, device=lengths.device)
    first, last = places[:-1].clamp(max=physical.shape[0] - 1), (places[1:] - 1).clamp(min=0)
    # Sums of everything before a place: what lies within a list is a difference.
    breaks = physical.new_zeros(physical.shape[0], dtype=torch.int64)
    torch.cumsum(physical.diff() != 1, 0, out=breaks[1:])
    partial = physical.new_zeros(physical.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(lengths < page_size, 0, out=partial[1:])
    columns = (
        physical[first],
        physical[last],
        breaks[last] - breaks[first],
        partial[places[1:]] - partial[places[:-1]],
        lengths[last],
    )
    return [tuple(row) for row in torch.stack([each.long() for each in columns], dim=1).tolist()]
